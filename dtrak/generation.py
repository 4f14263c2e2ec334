"""Generating the images to explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .diffusion import DiffusionModel


@torch.no_grad()
def generate(
    model: DiffusionModel,
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image per seed with DDIM (η = 0).

    Every image starts from noise of a CPU generator of its own, so it does not depend on which
    others are drawn with it (up to rounding: a batch of another size may be multiplied otherwise),
    nor on the device or the dtype of the model.

    Args:
        model: the model, on its device, in evaluation mode.
        seeds: M seeds in ``[0, 2**32)``.
        num_inference_steps: DDIM steps, in ``[1, T]``.
        batch_size: images drawn at a time.
        progress: called with (DDIM steps done, DDIM steps), summed over batches, after every step.

    Returns:
        ``[M, C, H, W]`` float32 in [-1, 1], on the CPU.

    Raises:
        ValueError: the number of steps, the batch size or a seed is out of range, the model does
            not say the size of its images, or it drew a non-finite image (from which seed).

    Source:
        Song et al. 2021 (arXiv:2010.02502); one generator per image as in D-TRAK's
        gen_unconditional.py at e2a0c2e.
    """
    if not 1 <= num_inference_steps <= model.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps must be in [1, {model.num_train_timesteps}], got "
            f"{num_inference_steps}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for seed in seeds:
        # torch's CPU generator ignores higher bits: two seeds would draw one image
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must be in [0, 2**32), got {seed}")
    if model.size is None:
        raise ValueError("the model must have a sample_size to draw from it, got None")
    height, width = (model.size, model.size) if isinstance(model.size, int) else model.size
    shape = (model.channels, height, width)
    parameter = next(model.unet.parameters())
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    images = torch.empty(len(seeds), *shape)
    firsts = range(0, len(seeds), batch_size)
    done, total = 0, len(firsts) * num_inference_steps
    for first in firsts:
        chosen = seeds[first : first + batch_size]
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        sample = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(parameter)
        for timestep in scheduler.timesteps:
            prediction = model.unet(sample, timestep).sample
            sample = scheduler.step(prediction, timestep, sample, eta=0.0).prev_sample
            done += 1
            if progress is not None:
                progress(done, total)
        for seed, image in zip(chosen, sample, strict=True):
            if not torch.isfinite(image).all():
                raise ValueError(f"the model drew a non-finite image from seed {seed}")
        images[first : first + batch_size] = sample.float().clamp(-1, 1).cpu()
    return images
