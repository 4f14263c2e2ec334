"""Drawing images: ``python -m dtrak.generate --model runs/digits --output runs/generated``.

One picture per seed, ``00000.png`` from seed 0 and so on; what is there already is not drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from ..runs.console import reporting_errors, run_app
from ..training.generate_options import Options, check_options

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
        check_options(options)
        # as in dtrak.train
        from ..training.drawing import run_generation

        run_generation(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.generate``."""
    run_app(app, "dtrak.generate", arguments)


if __name__ == "__main__":
    main()
