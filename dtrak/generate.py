"""Drawing images: ``python -m dtrak.generate --model runs/digits --output runs/generated``.

One picture per seed, ``00000.png`` from seed 0 and so on; what is there already is not drawn again.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # the imports below take seconds, in which Ctrl-C would end in a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import choose_device, progress_bar, reporting_errors, run_app
from .data import encode_png, to_uint8
from .diffusion import hash_model, load_model
from .files import write_atomically
from .folders import claim_folder
from .generation import draw_batches, save_trajectory

SETTINGS_FILE = "generation.json"


@dataclass(frozen=True)
class Options:
    """What the command line asked for; see `generate_images`."""

    model: str
    output: str
    num_images: int = 16
    first_seed: int = 0
    num_inference_steps: int = 50
    batch_size: int = 64
    trajectories: bool = False
    device: str = "auto"


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
    for name in ("num_images", "num_inference_steps", "batch_size"):
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= options.first_seed <= 2**32 - options.num_images:
        raise ValueError(
            f"--first-seed must be in [0, 2**32 - --num-images], got {options.first_seed}"
        )
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


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def generate_images(
    model: Annotated[
        str, typer.Option(help="Diffusers folder with a UNet2DModel, or a DDPM pipeline.")
    ],
    output: Annotated[str, typer.Option(help="Folder of the pictures.")],
    num_images: Annotated[int, typer.Option(help="How many to draw.")] = 16,
    first_seed: Annotated[int, typer.Option(help="Picture i is drawn from this seed + i.")] = 0,
    num_inference_steps: Annotated[int, typer.Option(help="DDIM steps (η = 0).")] = 50,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at a time.")] = 64,
    trajectories: Annotated[
        bool,
        typer.Option(
            "--trajectories",
            help="Also keep the clean image predicted at every step (Journey-TRAK), in "
            "trajectories/.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Draw pictures from a trained model, one per seed."""
    options = Options(
        model=model,
        output=output,
        num_images=num_images,
        first_seed=first_seed,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        trajectories=trajectories,
        device=device,
    )
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        run_generation(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.generate``."""
    run_app(app, "dtrak.generate", arguments)


if __name__ == "__main__":
    main()
