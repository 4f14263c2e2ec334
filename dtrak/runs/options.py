"""What `dtrak.attribute` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dtrak_kernels.projection import KINDS, Projection

from ..features.output_names import check_output_function
from ..features.timesteps import Timesteps
from ..training.presets import PRESETS
from .choices import (
    DEFAULT_PROJ_DIM,
    DTYPES,
    check_choice,
    check_counts,
    check_model_folder,
    parse_numbers,
)
from .console import check_device, parse_damping


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `dtrak.attribute.attribute`."""

    model: str | None
    data: str
    queries: str
    num_queries: int
    output_function: str
    timesteps: int | str
    timestep_strategy: str | None
    noise_seed: int
    projection: str
    proj_dim: int | None
    seed: int
    damping: str
    top_k: int
    batch_size: int | None
    device: str
    dtype: str
    output: str | None
    fused: bool
    skip_corrupt: bool
    resize: bool
    preset: str | None = None
    lora: str | None = None
    caption: str | None = None
    prompts: str | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    classes: str | None = None

    @cached_property
    def when(self) -> Timesteps:
        """The timesteps asked for; raises as `Timesteps.parse`."""
        return Timesteps.parse(self.timesteps, self.timestep_strategy)

    @cached_property
    def class_numbers(self) -> list[int] | None:
        """The classes asked for, None for all; raises as `choices.parse_numbers`."""
        return None if self.classes is None else parse_numbers("--classes", self.classes)

    @property
    def num_features(self) -> int:
        """K of the projection; 0 where that is the number of parameters."""
        default = DEFAULT_PROJ_DIM[self.projection]
        return default if self.proj_dim is None else self.proj_dim


def check_options(options: Options) -> None:
    """Validate every option that needs neither model nor data.

    Raises:
        FileNotFoundError: there is no folder of the model.
        ValueError: an option is out of range or unknown; one clear line.
    """
    check_output_function(options.output_function)
    _ = options.when, options.class_numbers
    check_choice("--projection", options.projection, KINDS)
    check_choice("--dtype", options.dtype, DTYPES)
    if options.preset is not None:
        check_choice("--preset", options.preset, PRESETS)
    check_counts(
        num_queries=options.num_queries,
        top_k=options.top_k,
        batch_size=options.batch_size,
        resolution=options.resolution,
    )
    if not 0 <= options.noise_seed < 2**63:
        raise ValueError(f"--noise-seed must be in [0, 2**63), got {options.noise_seed}")
    Projection(options.projection, options.num_features, options.seed)
    check_device(options.device)
    parse_damping(options.damping)
    # without a LoRA it cannot be a hub name
    if options.lora is None and options.model is not None:
        check_model_folder(options.model)
