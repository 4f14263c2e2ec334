"""A LoRA experiment small enough that a test can run all of it."""

from dataclasses import dataclass
from functools import cache

import torch
from tiny_lds import CPU

from dtrak.data.samples import Samples
from dtrak.training import presets
from dtrak.training.presets import Draw, LoraRecipe, Preset
from dtrak.training.trainer import Recipe

NAME = "tiny-lora"
CLASSES = ("fog", "hill", "sea")


@cache
def pictures(split: str) -> Samples:
    """Smooth pictures of 16 x 16 pixels of two classes, 8 bits a channel."""
    size = {"train": 8, "validation": 3}[split]
    generator = torch.Generator().manual_seed(size)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    images = (smooth * 255).round() / 127.5 - 1
    ids = [f"{split}/{number}" for number in range(size)]
    return Samples(images, ids, [2 * (number % 2) for number in range(size)], "pictures")


@dataclass(frozen=True)
class TinyLoraPreset(Preset):
    def load_data(self, split="train", source=None, *, limit=None, skip_corrupt=False) -> Samples:
        data = pictures(split)
        return data if limit is None else data.select(range(min(limit, len(data))))


PRESET = TinyLoraPreset(
    NAME,
    "tiny",
    # the published one but for its length
    Recipe(
        steps=8,
        batch_size=3,
        learning_rate=3e-2,
        betas=(0.9, 0.999),
        seed=42,
        flip=True,
        dropout=0.1,
        warm_up_from_zero=True,
        caption_dropout=0.1,
    ),
    Draw(8, 8),
    Draw(3, 3),
    size=16,
    num_inference_steps=2,
    num_generated=4,
    num_subsets=4,
    num_model_seeds=1,
    classes=CLASSES,
    lora=LoraRecipe(rank=2),
    prompt_classes=("sea", "fog"),
)


def register(preset: Preset = PRESET) -> None:
    """Make the preset known in this process."""
    presets.PRESETS[preset.name] = preset


__all__ = ["CPU", "NAME", "PRESET", "pictures", "register"]
