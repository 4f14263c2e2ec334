"""What `dtrak.generate` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass

from .console import check_device
from .options import check_counts, check_model_folder


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `dtrak.generate.generate_images`."""

    model: str
    output: str
    num_images: int = 16
    first_seed: int = 0
    num_inference_steps: int = 50
    batch_size: int = 64
    trajectories: bool = False
    device: str = "auto"


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
    check_model_folder(options.model)
