"""What `dtrak.generate` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..runs.choices import check_counts, check_model_folder, check_weights, parse_numbers
from ..runs.console import check_device
from ..runs.stated import Stated, option
from ..runs.usual import CLASSES, DEVICE, GUIDANCE, LORA, OF_CHECKPOINT, PROMPTS


@dataclass(frozen=True)
class Options(Stated):
    """What `dtrak.generate` was asked for."""

    model: str = option(
        help="Folder that Diffusers wrote, or a hub name: a bare UNet2DModel, or a pipeline of a "
        "kind in docs/models.md.",
        is_path=True,
    )
    output: str = option(help="Folder of the pictures.", is_path=True)
    weights: str | None = option(**OF_CHECKPOINT)
    num_images: int = option(16, help="How many to draw.")
    first_seed: int = option(0, help="Picture i is drawn from this seed + i.")
    num_inference_steps: int | None = option(
        None,
        help="Steps of DDIM (η = 0), or of Euler's method for a flow. Default: what suits the "
        "model, 50 for most.",
    )
    lora: str | None = option(**LORA)
    prompts: str | None = option(**PROMPTS)
    classes: str | None = option(**CLASSES)
    guidance_scale: float | None = option(**GUIDANCE)
    batch_size: int | None = option(
        None, help="Pictures drawn at a time. Default: what suits the model."
    )
    trajectories: bool = option(
        False,
        help="Also keep the clean image predicted at every step (Journey-TRAK), in trajectories/.",
    )
    device: str = option(**DEVICE)

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
    check_weights(options.weights, options.model)
    _ = options.class_numbers
    # with a LoRA it may be a hub name
    if options.lora is None:
        check_model_folder(options.model)
