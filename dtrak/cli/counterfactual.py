"""Does a picture change when the training images that a method ranks highest were never there?

``python -m dtrak.counterfactual --run runs/digits`` removes, for each query and method, the top
training images, retrains from scratch, draws the picture again from its seed and measures how far
it is from the original. Every model is kept as the picture it drew, so a run that was interrupted
goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..evaluation.counterfactual.options import (
    DEFAULT_QUERIES,
    DEFAULT_SEED,
    METHODS,
    PUBLISHED_QUERIES,
    PUBLISHED_SEEDS,
    check_options,
)
from ..runs.console import choose_device, reporting_errors, run_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def counterfactual(
    run: Annotated[
        str,
        typer.Option(
            help="Finished run of dtrak.attribute whose queries were generated, or a run folder of "
            "dtrak.lds with its full model."
        ),
    ] = "runs/digits",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Who chooses what is removed, with commas: {', '.join(METHODS)}, or name=file "
            "with scores.safetensors of another run on the same images. 'none' removes nothing and "
            "trains with another seed."
        ),
    ] = "d-trak,trak,random",
    top_k: Annotated[
        int | None,
        typer.Option(help="Training images removed per query. Default: a fifth of them."),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(
            help=f"Queries of the run to draw again. Default: the published {PUBLISHED_QUERIES}, "
            f"else {DEFAULT_QUERIES}, or all."
        ),
    ] = None,
    retrainings: Annotated[
        int, typer.Option(help="Models trained for each removal, with other seeds.")
    ] = 1,
    draw: Annotated[
        str | None,
        typer.Option(
            help="Of the queries and of random removals: published (there is one for "
            f"{', '.join(PUBLISHED_SEEDS)} with 1,000 generated queries), or seed, from --seed. "
            "Default: published where there is one."
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help=f"Seed of a draw that is not the published. Default: {DEFAULT_SEED}."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Preset that trained the run's model. Default: what trained it wrote."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Where the training images lie now. Default: as in the run.")
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(help="S of gradient features. Default: the run's; 10 for one of dtrak.lds."),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Folder of a CLIP model, for CLIP similarity and the clip methods."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="Folder of a VAE, for the distance of latents and the latent methods. Default: "
            "that of a text-to-image model, for the distance."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(help="Models trained at once.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[
        str | None, typer.Option(help="Output folder. Default: counterfactual in the run's.")
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Retrain without the images a method ranks highest, and see how the pictures change."""
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        folder = Path(run) / "counterfactual" if output is None else Path(output)
        names = [method.strip() for method in methods.split(",") if method.strip()]
        check_options(
            Path(run),
            names,
            retrainings=retrainings,
            processes=processes,
            draw=draw,
            preset=preset,
            clip=clip,
            vae=vae,
            device=device,
            output=folder,
        )
        # as in dtrak.train
        from ..methods.baselines import load_clip, load_vae
        from .counterfactual_experiment import print_results, run_counterfactual

        chosen = choose_device(device)
        results = run_counterfactual(
            Path(run),
            names,
            top_k=top_k,
            num_queries=queries,
            retrainings=retrainings,
            draw=draw,
            seed=seed,
            preset=preset,
            source=data,
            timesteps=timesteps,
            clip=None if clip is None else load_clip(clip, chosen),
            vae=None if vae is None else load_vae(vae, chosen),
            processes=processes,
            device=chosen,
            output=folder,
            console=console,
        )
        if results is not None:
            print_results(results, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.counterfactual``."""
    run_app(app, "dtrak.counterfactual", arguments)


if __name__ == "__main__":
    main()
