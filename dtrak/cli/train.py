"""Training the model of a preset: in full, on a subset, or without some of its images.

``python -m dtrak.train --preset digits --output runs/digits`` writes a Diffusers pipeline. With
several GPUs, ``accelerate launch -m dtrak.train …`` shares every batch among them. A run that was
interrupted, called again, goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from ..runs.choices import PRECISIONS
from ..runs.console import reporting_errors, run_app
from ..training.presets import PRESETS, SUBSET_FAMILIES
from ..training.train_options import Options, check_options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train_preset(
    preset: Annotated[str, typer.Option(help=f"Experiment: {', '.join(PRESETS)}.")],
    output: Annotated[str, typer.Option(help="Folder of the trained pipeline.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Where the data set lies: its authors' files, <split>/<class>/<image> folders, "
            "parquet files, a datasets folder or a hub name. Default: the preset's hub name."
        ),
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="Train on this published subset (from 0) of the images.")
    ] = None,
    family: Annotated[
        str, typer.Option(help=f"Of the subset: {', '.join(SUBSET_FAMILIES)}.")
    ] = "lds-val",
    without: Annotated[
        str | None,
        typer.Option(help="Text file of ids, one a line: train without these images."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of the initial weights and the training. Default: the preset's; 0 for a subset."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps. Default: the preset's.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images per step, over all processes. Default: the preset's."),
    ] = None,
    mixed_precision: Annotated[
        str, typer.Option(help=f"Precision of the forward pass: {', '.join(PRECISIONS)}.")
    ] = "no",
    ema: Annotated[
        float | None,
        typer.Option(
            help="Largest decay of an exponential moving average of the weights, which is then the "
            "model. Default: none."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between the states an interrupted run resumes from.")
    ] = 500,
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            help="Keep this many models along the way, at equal distances, as checkpoint-<step> "
            "(TracInCP: 4)."
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help="auto (what accelerate finds) or cpu.")] = "auto",
    skip_corrupt: Annotated[
        bool, typer.Option("--skip-corrupt", help="Leave out images that do not decode.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    """Train the diffusion model of an experiment, in full or on part of its images."""
    options = Options(
        preset=preset,
        output=output,
        data=data,
        subset=subset,
        family=family,
        without=without,
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        mixed_precision=mixed_precision,
        ema=ema,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        device=device,
        skip_corrupt=skip_corrupt,
    )
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        check_options(options)
        # brings torch and Diffusers: seconds that a mistake in the options should not cost
        from ..training.from_preset import run_training

        run_training(options, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.train``."""
    run_app(app, "dtrak.train", arguments)


if __name__ == "__main__":
    main()
