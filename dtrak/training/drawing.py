"""Drawing the pictures that are missing in a folder, one per seed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from ..data.images import encode_png, to_uint8
from ..models.generation import draw_batches, save_trajectory
from ..models.unet import hash_model, load_model
from ..runs.console import choose_device, progress_bar
from ..runs.files import write_atomically
from ..runs.folders import claim_folder
from .generate_options import Options, check_options

SETTINGS_FILE = "generation.json"


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
    model = load_model(options.model)
    if model.channels not in (1, 3):
        raise ValueError(f"the model must draw grey or RGB images, got {model.channels} channels")
    claim_folder(
        output,
        SETTINGS_FILE,
        {
            "model": hash_model(model.unet),
            "schedule": model.schedule,
            "num_inference_steps": options.num_inference_steps,
        },
        # what is finished is only read, and commands with other seeds draw other pictures
        held if _missing(options) else None,
        range(options.first_seed, options.first_seed + options.num_images),
    )
    missing = _missing(options)
    if not missing:
        console.print(f"already drawn: {output}", highlight=False, soft_wrap=True)
        return output
    model.unet.to(device)
    with progress_bar(console, f"draw {len(missing):,} images") as progress:
        batches = draw_batches(
            model,
            missing,
            num_inference_steps=options.num_inference_steps,
            batch_size=options.batch_size,
            trajectories=options.trajectories,
            progress=progress,
        )
        for batch in batches:
            for row, seed in enumerate(batch.seeds):
                if batch.trajectories is not None:
                    save_trajectory(_trajectory(output, seed), batch.trajectories[row])
                write_atomically(_picture(output, seed), encode_png(to_uint8(batch.images[row])))
    console.print(f"images: {output}", highlight=False, soft_wrap=True)
    return output


def _missing(options: Options) -> list[int]:
    """Seeds that are still to be drawn."""
    output = Path(options.output)
    return [
        seed
        for seed in range(options.first_seed, options.first_seed + options.num_images)
        if not _picture(output, seed).is_file()
        or (options.trajectories and not _trajectory(output, seed).is_file())
    ]


def _picture(output: Path, seed: int) -> Path:
    return output / f"{seed:05d}.png"


def _trajectory(output: Path, seed: int) -> Path:
    return output / "trajectories" / f"{seed:05d}.safetensors"
