"""Generating the images to explain, and the paths by which they came about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..runs.files import write_atomically
from .unet import DiffusionModel

Progress = Callable[[int, int], None]
_TRAJECTORY = "predicted_clean"


class Drawn(NamedTuple):
    """A batch of generated images.

    Attributes:
        seeds: B seeds.
        images: ``[B, C, H, W]`` float32 in [-1, 1], on the CPU.
        trajectories: ``[B, S, C, H, W]`` float32 on the CPU: the clean image the model predicted at
            each of the S steps, the noisiest first; or None.
    """

    seeds: list[int]
    images: Tensor
    trajectories: Tensor | None


def generate(
    model: DiffusionModel,
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    batch_size: int = 64,
    progress: Progress | None = None,
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
    batches = draw_batches(
        model,
        seeds,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        progress=progress,
    )
    drawn = [batch.images for batch in batches]
    return torch.cat(drawn) if drawn else torch.empty(0, *image_shape(model))


def image_shape(model: DiffusionModel) -> tuple[int, int, int]:
    """(C, H, W) of an image the model draws.

    Raises:
        ValueError: the model does not say the size of its images.
    """
    if model.size is None:
        raise ValueError("the model must have a sample_size to draw from it, got None")
    height, width = (model.size, model.size) if isinstance(model.size, int) else model.size
    return model.channels, height, width


def draw_batches(
    model: DiffusionModel,
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 50,
    batch_size: int = 64,
    trajectories: bool = False,
    progress: Progress | None = None,
) -> Iterator[Drawn]:
    """Draw images batch by batch, as `generate` does.

    Args:
        model: as in `generate`.
        seeds: as in `generate`.
        num_inference_steps: as in `generate`.
        batch_size: as in `generate`.
        trajectories: keep the predicted clean image of every step too, clipped to [-1, 1] where the
            model's schedule has ``clip_sample``, as the published ones have.
        progress: as in `generate`.

    Returns:
        The batches, in the order of their seeds; each is drawn when it is asked for.

    Raises:
        ValueError: as in `generate`, before the first batch where that can be known.

    Source:
        Trajectories: Journey-TRAK (arXiv:2312.06205) as D-TRAK computes it
        (01_gen_sampling_troj_5000_0.5.ipynb at e2a0c2e).
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
    return _draw_batches(
        model, seeds, num_inference_steps, batch_size, trajectories, image_shape(model), progress
    )


@torch.no_grad()
def _draw_batches(
    model: DiffusionModel,
    seeds: Sequence[int],
    num_inference_steps: int,
    batch_size: int,
    trajectories: bool,
    shape: tuple[int, int, int],
    progress: Progress | None,
) -> Iterator[Drawn]:
    parameter = next(model.unet.parameters())
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    firsts = range(0, len(seeds), batch_size)
    done, total = 0, len(firsts) * num_inference_steps
    for first in firsts:
        chosen = list(seeds[first : first + batch_size])
        generators = [torch.Generator().manual_seed(seed) for seed in chosen]
        sample = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(parameter)
        steps = []
        for timestep in scheduler.timesteps:
            prediction = model.unet(sample, timestep).sample
            step = scheduler.step(prediction, timestep, sample, eta=0.0)
            sample = step.prev_sample
            if trajectories:
                steps.append(step.pred_original_sample.float().cpu())
            done += 1
            if progress is not None:
                progress(done, total)
        for seed, image in zip(chosen, sample, strict=True):
            if not torch.isfinite(image).all():
                raise ValueError(f"the model drew a non-finite image from seed {seed}")
        yield Drawn(
            chosen,
            sample.float().clamp(-1, 1).cpu(),
            torch.stack(steps, 1) if trajectories else None,
        )


def save_trajectory(file: Path, trajectory: Tensor) -> None:
    """Write the path ``[S, C, H, W]`` of one image as a safetensors file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save({_TRAJECTORY: trajectory.contiguous()}))


def load_trajectories(folder: str | Path, seeds: Sequence[int] | None = None) -> Tensor:
    """Read the paths of images that ``python -m dtrak.generate --trajectories`` drew.

    Args:
        folder: its output folder.
        seeds: of the N images; None reads all, in the order of their seeds.

    Returns:
        ``[N, S, C, H, W]`` float32.

    Raises:
        FileNotFoundError: there are none, or not of this seed.
        ValueError: a file is damaged, or has another shape than the first.
    """
    folder = Path(folder) / "trajectories"
    if seeds is None:
        seeds = sorted(int(file.stem) for file in folder.glob("*.safetensors"))
    files = [folder / f"{seed:05d}.safetensors" for seed in seeds]
    if not files:
        raise FileNotFoundError(f"no trajectories in {folder} (dtrak.generate --trajectories)")
    paths: list[Tensor] = []
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no trajectory {file} (dtrak.generate --trajectories)")
        try:
            with safe_open(file, "pt") as opened:
                path = opened.get_tensor(_TRAJECTORY)
        except SafetensorError as error:
            raise ValueError(f"trajectory {file} is damaged: {error}") from error
        if paths and path.shape != paths[0].shape:
            raise ValueError(
                f"trajectory {file} must be {list(paths[0].shape)} as the first, "
                f"got {list(path.shape)}"
            )
        paths.append(path)
    return torch.stack(paths)
