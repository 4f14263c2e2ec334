"""Generating the images to explain."""

from __future__ import annotations

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from .diffusion import DiffusionModel


def generate(
    model: DiffusionModel, seeds: list[int], *, num_inference_steps: int = 50, batch_size: int = 64
) -> Tensor:
    """Draw one image per seed with DDIM (η = 0).

    Every image has a generator of its own, so it does not depend on which others are drawn with it.

    Args:
        model: the model, on its device.
        seeds: M seeds.
        num_inference_steps: DDIM steps.
        batch_size: images drawn at a time.

    Returns:
        ``[M, C, H, W]`` float32 in [-1, 1], on the CPU.

    Raises:
        ValueError: the model drew a non-finite image (which seed).

    Source:
        Song et al. 2021 (arXiv:2010.02502); one generator per image as in D-TRAK's gen_unconditional.py.
    """
    pipeline = DDIMPipeline(
        unet=model.unet, scheduler=DDIMScheduler.from_config(model.scheduler.config)
    )
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for first in range(0, len(seeds), batch_size):
        chosen = seeds[first : first + batch_size]
        drawn = pipeline(
            batch_size=len(chosen),
            generator=[torch.Generator().manual_seed(seed) for seed in chosen],
            num_inference_steps=num_inference_steps,
            output_type="np",
        ).images
        batch = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
        for seed, image in zip(chosen, batch, strict=True):
            if not torch.isfinite(image).all():
                raise ValueError(f"the model drew a non-finite image from seed {seed}")
        images.append(batch)
    return torch.cat(images) if images else torch.empty(0, model.channels, 0, 0)
