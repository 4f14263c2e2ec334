"""The paths on which a text-to-image model draws: what Journey-TRAK averages gradients over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runs.choices import GUIDANCE_SCALE
from .stable_diffusion import (
    TextToImageModel,
    check_drawing,
    count_steps,
    make_pipeline,
    run_pipeline,
)


@torch.no_grad()
def follow_prompts(
    model: TextToImageModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    guidance_scale: float = GUIDANCE_SCALE,
    num_inference_steps: int = 50,
    size: int | tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The clean latents predicted at every step of the paths that `generate_from_prompts` takes.

    Args:
        model: as there; so are the others. All images are drawn at a time.
        prompts: M texts.
        seeds: M seeds.
        guidance_scale: the predictions are the guided ones.
        num_inference_steps: S.
        size: of the images, in pixels.
        progress: called with (DDIM steps done, DDIM steps) after every step.

    Returns:
        ``[M, S, C, h, w]`` float32 on the CPU, in the U-Net's units, the noisiest step first, never
        clipped.

    Raises:
        ValueError: as `generate_from_prompts`.

    Source:
        Journey-TRAK (arXiv:2312.06205) as D-TRAK computes it
        (TRAK_gen_sampling_trajectory.ipynb at e2a0c2e).
    """
    height, width = check_drawing(
        model, prompts, seeds, guidance_scale, num_inference_steps, size, max(1, len(seeds))
    )
    pipeline = make_pipeline(model)
    predicted: list[Tensor] = []
    step = pipeline.scheduler.step

    # the pipeline reads from the signature which options the scheduler takes
    @functools.wraps(step)
    def record(*arguments: Any, **options: Any) -> tuple[Tensor]:
        result = step(*arguments, **{**options, "return_dict": True})
        predicted.append(result.pred_original_sample.float().cpu())
        return (result.prev_sample,)

    pipeline.scheduler.step = record
    run_pipeline(
        pipeline,
        prompts,
        seeds,
        height=height,
        width=width,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
        callback_on_step_end=count_steps(progress, num_inference_steps),
    )
    paths = torch.stack(predicted, 1)
    for seed, path in zip(seeds, paths, strict=True):
        if not torch.isfinite(path).all():
            raise ValueError(f"the model predicted non-finite latents from seed {seed}")
    return paths
