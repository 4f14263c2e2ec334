"""What `dtrak.train_lora` was asked for, and whether that can be."""

from __future__ import annotations

from dataclasses import dataclass

from ..runs.choices import CAPTION_DROPOUT, PRECISIONS, check_choice, check_counts
from .presets import PRESETS, SUBSET_FAMILIES, Preset, get_preset

RANK = 128


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `dtrak.train_lora.fine_tune`."""

    output: str
    model: str | None = None
    data: str | None = None
    preset: str | None = None
    caption: str | None = None
    subset: int | None = None
    family: str = "lds-val"
    without: str | None = None
    rank: int | None = None
    seed: int | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    caption_dropout: float = CAPTION_DROPOUT
    mixed_precision: str = "no"
    checkpoint_every: int = 100
    keep_checkpoints: int = 0
    latents: str | None = None
    resolution: int | None = None
    resize: bool = False
    skip_corrupt: bool = False
    device: str = "auto"


def check_options(options: Options) -> Preset | None:
    """Validate every option that needs no data.

    Returns:
        The preset; None where there is none.

    Raises:
        ValueError: one is out of range or unknown; one clear line.
    """
    check_choice("--family", options.family, SUBSET_FAMILIES)
    check_choice("--mixed-precision", options.mixed_precision, PRECISIONS)
    check_choice("--device", options.device, ("auto", "cpu"))
    check_counts(
        rank=options.rank,
        epochs=options.epochs,
        steps=options.steps,
        batch_size=options.batch_size,
        checkpoint_every=options.checkpoint_every,
        resolution=options.resolution,
    )
    if options.keep_checkpoints < 0:
        raise ValueError(f"--keep-checkpoints must be at least 0, got {options.keep_checkpoints}")
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be positive, got {options.learning_rate}")
    if not 0 <= options.caption_dropout <= 1:
        raise ValueError(f"--caption-dropout must be in [0, 1], got {options.caption_dropout}")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {options.seed}")
    if options.subset is not None and options.subset < 0:
        raise ValueError(f"--subset must be at least 0, got {options.subset}")
    for one, other in (("subset", "without"), ("epochs", "steps")):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            raise ValueError(f"--{one} and --{other} exclude each other, got both")
    tuned = [name for name, preset in PRESETS.items() if preset.lora is not None]
    preset = None if options.preset is None else get_preset(options.preset)
    if preset is not None and preset.lora is None:
        raise ValueError(
            f"--preset must be one that fine-tunes ({', '.join(tuned)}), got {preset.name!r}: "
            "use dtrak.train"
        )
    if preset is None and (options.model is None or options.data is None):
        raise ValueError("--model and --data must be given where there is no --preset")
    if preset is None and options.subset is not None:
        raise ValueError("--subset needs --preset, whose published subset it is")
    if preset is not None and (options.resolution is not None or options.caption is not None):
        raise ValueError("--resolution and --caption are the preset's own, got another")
    return preset
