"""What options accept; importing it imports nothing heavy, so that mistakes are said at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from .files import expand_path

# of the weights and the forward pass, as torch calls them; 16-bit ones run under autocast
DTYPES = ("float32", "float64", "bfloat16", "float16")
# what rows of features are kept as
FLOAT32, BFLOAT16, INT8 = STORE_DTYPES = ("float32", "bfloat16", "int8")
# of the forward pass while training, as accelerate calls them
PRECISIONS = ("no", "fp16", "bf16")
# K by kind of the projection
DEFAULT_PROJ_DIM = {"sjlt": 8192, "kronecker": 8192, "rademacher": 2048, "normal": 2048, "none": 0}
# kinds of `dtrak_kernels.Whitening`
WHITENINGS = ("none", "scale", "diagonal", "channels", "lowrank", "kfac")
# of u in [0, 1], the place of a timestep between the least and the most noisy one, in training
DENSITIES = ("uniform", "logit_normal", "mode")
# of a flow's noise levels: as its scheduler is made, or as pictures of a resolution are drawn
SHIFTS = ("scheduler", "resolution")
# what groups training images, beside a file
GROUPS = ("label", "folder", "caption")
# guidance that a network embeds, of Diffusers' train_dreambooth_lora_flux.py
TRAINED_GUIDANCE = 3.5
# of a training checkpoint: as they were trained, or their exponential moving average
TRAINED, EMA = "trained", "ema"
WEIGHTS = (TRAINED, EMA)
# says of which kind a pipeline is
MODEL_INDEX = "model_index.json"
# what a trainer writes beside a model or an adapter
TRAINING_FILE = "training.json"
# pictures drawn from prompts, and kept, at a time
DRAWN_TOGETHER = 8
# layers that a LoRA is put into: query, key, value and output projections of every attention
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# DDIM steps of a picture
NUM_INFERENCE_STEPS = 50


def check_choice(option: str, value: str, valid: Iterable[str]) -> str:
    """``value`` if it is one of ``valid``.

    Raises:
        ValueError: it is not; the message names the closest valid value.
    """
    valid = list(valid)
    if value in valid:
        return value
    close = difflib.get_close_matches(value.lower().replace("-", "_"), valid, n=1, cutoff=0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{option} must be one of {', '.join(valid)}, got {value!r}{hint}")


def check_counts(**counts: int | None) -> None:
    """Refuse options that count something and are below 1; None is an option that is not given.

    Raises:
        ValueError: names the first.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {count}")


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that keys no random numbers.

    Raises:
        ValueError: it is out of range; ``name`` says which.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name} must be in [0, 2**63), got {seed}")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """So many of something, for a reader: ``1 image``, ``2,000 images``."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def check_weights(weights: str | None, model: str | Path | None) -> None:
    """Refuse what is no kind of weights, or of no model; None leaves it open.

    Raises:
        ValueError: it is not one of `WEIGHTS`, or no model is named.
    """
    if weights is not None:
        check_choice("--weights", weights, WEIGHTS)
        if model is None:
            raise ValueError(f"--weights must go with --model, got {weights} alone")


def check_model_folder(folder: str | Path) -> None:
    """Refuse a folder or file of a model that is not there; ``owner/name`` may be one of a hub.

    Raises:
        FileNotFoundError: there is none.
    """
    owner, _, name = str(folder).partition("/")
    may_be_hub = owner and name and not owner.startswith((".", "~")) and "/" not in name
    path = expand_path(folder)
    if not path.is_dir() and not path.is_file() and not (may_be_hub and not Path(owner).is_dir()):
        raise FileNotFoundError(
            "model must be an existing folder that Diffusers wrote, or a file of its weights, got "
            f"{folder}"
        )


def parse_numbers(option: str, text: str) -> list[int]:
    """Whole numbers of at least 0, separated by commas.

    Raises:
        ValueError: the text is something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} must be numbers such as 0,3,5, got {text!r}")
    return [int(part) for part in parts]
