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
        str,
        typer.Option(
            help="Folder that Diffusers wrote, or a hub name: a bare UNet2DModel, or a pipeline of "
            "a kind in docs/models.md."
        ),
    ],
    output: Annotated[str, typer.Option(help="Folder of the pictures.")],
    num_images: Annotated[int, typer.Option(help="How many to draw.")] = 16,
    first_seed: Annotated[int, typer.Option(help="Picture i is drawn from this seed + i.")] = 0,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of DDIM (η = 0), or of Euler's method for a flow. Default: what suits the "
            "model, 50 for most."
        ),
    ] = None,
    lora: Annotated[
        str | None, typer.Option(help="LoRA folder or file of a text-to-image model.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="What a text-to-image model draws: a text, or a file with one per line, of which "
            "picture i takes line i, from the first again after the last."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="What a model of classes draws, such as 0,3: picture i takes class i of them, "
            "from the first again after the last. Default: all of its classes."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance. Default: the model's.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Pictures drawn at a time. Default: what suits the model.")
    ] = None,
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
        lora=lora,
        prompts=prompts,
        classes=classes,
        guidance_scale=guidance_scale,
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
