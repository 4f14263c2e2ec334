"""Drawing the pictures that are missing in a folder, one per seed, by a model of any kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from ..data.captions import choose_prompts, read_prompts
from ..data.images import encode_png, to_uint8
from ..models import load
from ..models.denoiser import Denoiser, Drawn
from ..runs.choices import counted
from ..runs.console import choose_device, progress_bar
from ..runs.files import LOCK_FILE, claim, picture_name, write_atomically
from ..runs.folders import Record
from ..runs.ranks import ranks
from .generate_options import Options, check_options

SETTINGS_FILE = "generation.json"
_TRAJECTORY = "predicted_clean"
# beyond all seeds: whoever has it begins the folder
_BEGIN = range(2**40, 2**40 + 1)


def trajectory_file(folder: Path, seed: int) -> Path:
    """Where the path on which a picture came about is kept."""
    return folder / "trajectories" / f"{seed:05d}.safetensors"


def missing_seeds(folder: Path, seeds: Sequence[int], trajectories: bool = False) -> list[int]:
    """Seeds whose pictures (and paths, if those are wanted) are not in ``folder``."""
    return [
        seed
        for seed in seeds
        if not (folder / picture_name(seed)).is_file()
        or (trajectories and not trajectory_file(folder, seed).is_file())
    ]


def choose_items(
    model: Denoiser,
    seeds: Sequence[int],
    *,
    prompts: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
) -> list[Any] | None:
    """What the pictures of ``seeds`` are drawn from: seed i takes item i, again after the last.

    Args:
        model: draws them.
        seeds: of the pictures.
        prompts: for a model that reads captions.
        classes: for a model that reads labels; all of its own by default.

    Raises:
        ValueError: there are none, or they are of a kind that the model does not read.
    """
    if prompts is not None and model.reads != "captions":
        raise ValueError("--prompts is for models that read captions, which this one does not")
    if classes is not None and model.reads != "labels":
        raise ValueError("--classes is for models that read classes, which this one does not")
    if model.reads == "captions":
        if not prompts:
            raise ValueError(
                "--prompts must say what to draw: a text, or a file with one prompt per line"
            )
        return choose_prompts(prompts, seeds)
    if model.reads == "labels":
        every = list(range(model.num_classes or 0)) if classes is None else list(classes)
        for label in every:
            if not 0 <= label < (model.num_classes or 0):
                raise ValueError(f"--classes must be in [0, {model.num_classes}), got {label}")
        return [every[seed % len(every)] for seed in seeds]
    return None


def draw_all(model: Denoiser, seeds: Sequence[int], **how: Any) -> Tensor:
    """Pictures ``[M, C, H, W]`` of M seeds, in their order; ``how`` as `Denoiser.draw`."""
    drawn = [batch.images for batch in model.draw(seeds, **how)]
    if drawn:
        return torch.cat(drawn)
    height, width = model.size if isinstance(model.size, tuple) else [model.size or 0] * 2
    return torch.empty(0, model.channels or 0, height, width)


def fitting_steps(model: Denoiser) -> int:
    """Steps of a picture, where nothing else is said: the model's, at most its timesteps."""
    return min(model.num_inference_steps, model.process.num_timesteps)


def draw_missing(
    model: Denoiser,
    seeds: Sequence[int],
    folder: Path,
    items: Sequence[Any] | None = None,
    **how: Any,
) -> None:
    """Draw pictures into ``folder``, batch by batch, so that a killed run keeps what it drew.

    Args:
        model: on its device.
        seeds: of the pictures to draw.
        folder: made if missing.
        items: what each is drawn from, for a model that reads anything.
        how: as in `Denoiser.draw`.

    Raises:
        ValueError, ModelError: as `Denoiser.draw`, or as `keep`.
    """
    batches = model.draw(seeds, items, **how)
    folder.mkdir(parents=True, exist_ok=True)
    for batch in batches:
        keep(folder, batch)


def keep(folder: Path, batch: Drawn) -> None:
    """Write a batch of pictures, their paths first: a picture that is there is complete.

    Raises:
        ValueError: what was drawn are no grey or RGB pictures.
    """
    shape = list(batch.images.shape)
    if len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"the model must draw pictures [B, 1 or 3, H, W] to be kept, got {shape}")
    for row, seed in enumerate(batch.seeds):
        if batch.trajectories is not None:
            save_trajectory(trajectory_file(folder, seed), batch.trajectories[row])
        picture = encode_png(to_uint8(batch.images[row]))
        write_atomically(folder / picture_name(seed), picture)


def run_generation(options: Options, console: Console) -> Path:
    """Draw the images that are missing in the output folder.

    Args:
        options: what to do.
        console: where progress goes.

    Returns:
        The output folder.

    Raises:
        ValueError: an option, the model or the output folder is refused; one clear line.
        FileNotFoundError: there is no such model.
    """
    with ExitStack() as held:
        return _draw(options, console, held)


def _draw(options: Options, console: Console, held: ExitStack) -> Path:
    check_options(options)
    device, output = choose_device(options.device), Path(options.output)
    model = load(options.model, options.lora, weights=options.weights)
    if model.channels not in (1, 3):
        raise ValueError(f"the model must draw grey or RGB images, got {model.channels} channels")
    seeds = range(options.first_seed, options.first_seed + options.num_images)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    items = choose_items(model, seeds, prompts=prompts, classes=options.class_numbers)
    drawn_from: dict[str, Any] = {}
    if items is not None:
        # what is drawn, not what was typed: a default that is spelled out asks for the same
        every = prompts or options.class_numbers or list(range(model.num_classes or 0))
        drawn_from = {str(model.reads): every}
    if model.guidance_scale is not None:
        guidance = options.guidance_scale
        drawn_from["guidance_scale"] = model.guidance_scale if guidance is None else guidance
    steps = options.num_inference_steps or fitting_steps(model)
    how: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": options.guidance_scale,
        "batch_size": options.batch_size,
        "trajectories": options.trajectories,
    }
    # nothing is drawn yet: what is refused must not claim the folder
    model.draw(seeds, items, **how)
    missing = missing_seeds(output, seeds, options.trajectories)
    here = ranks()
    with claim(output / LOCK_FILE, part=_BEGIN, wait=True) if here.is_shared else nullcontext():
        Record(SETTINGS_FILE).claim(
            output,
            {
                **model.identity(),
                "schedule": model.process.describe(),
                "num_inference_steps": steps,
                **drawn_from,
            },
            # what is finished is only read, and commands with other seeds draw other pictures
            held if missing and not here.is_shared else None,
            seeds,
        )
    missing = missing_seeds(output, seeds, options.trajectories)
    if not missing:
        console.print(f"already drawn: {output}", highlight=False, soft_wrap=True)
        return output
    model.to(device)

    def draw(seeds: Sequence[int], progress: Callable[[int, int], None] | None) -> None:
        chosen = None if items is None else [items[seed - options.first_seed] for seed in seeds]
        draw_missing(model, seeds, output, chosen, progress=progress, **how)

    with progress_bar(console, f"draw {counted(len(missing), 'image')}") as progress:
        if here.is_shared:
            size = options.batch_size or model.drawn_together
            _draw_together(output, seeds, size, options.trajectories, draw, progress)
        else:
            draw(missing, progress)
    console.print(f"images: {output}", highlight=False, soft_wrap=True)
    return output


def _draw_together(
    output: Path,
    seeds: range,
    size: int,
    trajectories: bool,
    draw: Callable[[Sequence[int], None], None],
    progress: Callable[[int, int], None],
) -> None:
    """Batch by batch, with other processes that do the same."""

    def left(part: Sequence[int]) -> list[int]:
        return missing_seeds(output, part, trajectories)

    batches = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    for batch in ranks().divide(
        batches,
        lambda batch, wait: claim(output / LOCK_FILE, part=batch, wait=wait),
        lambda batch: not left(batch),
    ):
        draw(left(batch), None)
        progress(len(seeds) - len(left(seeds)), len(seeds))


def save_trajectory(file: Path, trajectory: Tensor) -> None:
    """Write the path ``[S, C, H, W]`` of one image as a safetensors file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, save({_TRAJECTORY: trajectory.contiguous()}))
