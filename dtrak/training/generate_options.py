"""What `dtrak.generate` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..runs.choices import check_counts, check_model_folder, parse_numbers
from ..runs.console import check_device


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `dtrak.generate.generate_images`."""

    model: str
    output: str
    num_images: int = 16
    first_seed: int = 0
    num_inference_steps: int | None = None
    batch_size: int | None = None
    trajectories: bool = False
    device: str = "auto"
    lora: str | None = None
    prompts: str | None = None
    classes: str | None = None
    guidance_scale: float | None = None

    @cached_property
    def class_numbers(self) -> list[int] | None:
        """The classes asked for, None for all; raises as `choices.parse_numbers`."""
        return None if self.classes is None else parse_numbers("--classes", self.classes)


def check_options(options: Options) -> None:
    """Validate every option, and that there is a folder of the model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: an option is out of range or unknown; one clear line.
    """
    check_counts(
        num_images=options.num_images,
        num_inference_steps=options.num_inference_steps,
        batch_size=options.batch_size,
    )
    if not 0 <= options.first_seed <= 2**32 - options.num_images:
        raise ValueError(
            f"--first-seed must be in [0, 2**32 - --num-images], got {options.first_seed}"
        )
    check_device(options.device)
    _ = options.class_numbers
    # with a LoRA it may be a hub name
    if options.lora is None:
        check_model_folder(options.model)
