"""What `dtrak.train` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.choices import PRECISIONS, check_choice, check_counts
from .presets import PRESETS, SUBSET_FAMILIES, Preset, get_preset


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `dtrak.train.train_preset`."""

    preset: str
    output: str
    data: str | None = None
    subset: int | None = None
    family: str = "lds-val"
    without: str | None = None
    seed: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    mixed_precision: str = "no"
    ema: float | None = None
    checkpoint_every: int = 500
    keep_checkpoints: int = 0
    device: str = "auto"
    skip_corrupt: bool = False


def check_options(options: Options) -> Preset:
    """Validate every option that needs no data.

    Returns:
        The preset.

    Raises:
        ValueError: one is out of range or unknown; one clear line.
    """
    preset = get_preset(check_choice("--preset", options.preset, PRESETS))
    check_choice("--family", options.family, SUBSET_FAMILIES)
    check_choice("--mixed-precision", options.mixed_precision, PRECISIONS)
    check_choice("--device", options.device, ("auto", "cpu"))
    check_counts(
        steps=options.steps,
        batch_size=options.batch_size,
        checkpoint_every=options.checkpoint_every,
    )
    if options.keep_checkpoints < 0:
        raise ValueError(f"--keep-checkpoints must be at least 0, got {options.keep_checkpoints}")
    if options.ema is not None and not 0 <= options.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {options.ema}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {options.seed}")
    if options.subset is not None and options.subset < 0:
        raise ValueError(f"--subset must be at least 0, got {options.subset}")
    if options.subset is not None and options.without is not None:
        raise ValueError("--subset and --without exclude each other, got both")
    if preset.lora is not None:
        raise ValueError(
            f"--preset {preset.name} fine-tunes a text-to-image model, which dtrak.train does not: "
            "see python -m dtrak.train_lora"
        )
    return preset
