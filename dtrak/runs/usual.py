"""Options that several commands take, each stated once: what `stated.option` is called with."""

from __future__ import annotations

from typing import Any

from .choices import WEIGHTS

DEVICE: dict[str, Any] = {"default": "auto", "help": "auto, cpu, cuda or cuda:N."}
OF_CHECKPOINT: dict[str, Any] = {
    "default": None,
    "help": f"Of a training checkpoint: {', '.join(WEIGHTS)}, their moving average. Default: what "
    "--model names, else trained.",
}
LORA: dict[str, Any] = {
    "default": None,
    "help": "LoRA folder or file of a text-to-image model.",
    "is_path": True,
}
PROMPTS: dict[str, Any] = {
    "default": None,
    "help": "What a text-to-image model draws: a text, or a file with one per line, of which "
    "picture i takes line i, from the first again after the last.",
    "is_path": True,
}
CLASSES: dict[str, Any] = {
    "default": None,
    "help": "What a model of classes draws, such as 0,3: picture i takes class i of them, from the "
    "first again after the last. Default: all of its classes.",
}
GUIDANCE: dict[str, Any] = {
    "default": None,
    "help": "Classifier-free guidance of the pictures drawn (gradients have none). Default: the "
    "model's.",
}
SKIP_CORRUPT: dict[str, Any] = {"default": False, "help": "Leave out images that do not decode."}
RESIZE: dict[str, Any] = {
    "default": False,
    "help": "Resize and centre-crop images to the model's size, or --resolution.",
}
RESOLUTION: dict[str, Any] = {
    "default": None,
    "help": "Image side in pixels, of a model that takes several. Default: the model's.",
}
WHERE_NOW: dict[str, Any] = {
    "default": None,
    "help": "Where the training images lie now. Default: as in the run.",
    "is_path": True,
}
FLIPS: dict[str, Any] = {
    "default": False,
    "help": "Average the features of training images over the image and its mirror image, for a "
    "model that was trained with flips.",
}
