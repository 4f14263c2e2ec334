"""Linear datamodelling score: do scores predict what models trained on subsets of the data do?

``python -m dtrak.lds prepare | train | evaluate | report`` draws subsets of a data set, trains a
model on each, takes the loss of every query under every model, and correlates what each attribution
method predicted with what happened.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from dtrak_kernels.projection import KINDS

from ..evaluation.lds.options import (
    DEFAULT_PRESET,
    FAMILIES,
    LDS,
    NUM_RESAMPLES,
    LossSettings,
    check_numbers,
    locate,
    parse_features,
    parse_sizes,
    read_manifest,
)
from ..runs.choices import check_choice, check_counts
from ..runs.console import check_device, reporting_errors, run_app
from ..training.presets import PRESETS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

_PRESET = Annotated[
    str | None,
    typer.Option(
        help=f"Experiment: {', '.join(PRESETS)}. Default: that of the run in --output, or "
        f"{DEFAULT_PRESET}."
    ),
]
_OUTPUT = Annotated[str | None, typer.Option(help="Run folder. Default: runs/lds-<preset>.")]
_DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_FIRST = Annotated[int, typer.Option(help="First subset to work on.")]
_LAST = Annotated[int | None, typer.Option(help="Last subset to work on, excluded.")]
_PROCESSES = Annotated[int, typer.Option(help="Models worked on at once.")]
_TRACEBACK = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


@app.command("prepare")
def prepare_command(
    preset: _PRESET = None,
    output: _OUTPUT = None,
    data: Annotated[
        str | None,
        typer.Option(help="Where the data set lies. Default: the run's, or the preset's."),
    ] = None,
    num_subsets: Annotated[
        int | None, typer.Option(help="M, subsets to draw. Default: the run's, or the preset's.")
    ] = None,
    num_model_seeds: Annotated[
        int | None,
        typer.Option(help="Trainings of each subset. Default: the run's, or the preset's."),
    ] = None,
    num_validation: Annotated[
        int | None,
        typer.Option(help="Validation images to take as queries. Default: the run's, or all."),
    ] = None,
    num_generated: Annotated[
        int | None,
        typer.Option(
            help="Images the full model draws as queries. Default: the run's, or the preset's."
        ),
    ] = None,
    num_retrain: Annotated[
        int | None,
        typer.Option(
            help="Subsets of the retrain family, to whose models datamodels and empirical "
            "influence are fitted. Default: the run's, or the preset's."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base of artbench2 and artbench5: a Stable Diffusion folder that Diffusers wrote, "
            "or a hub name. Default: the run's, or the preset's."
        ),
    ] = None,
    mixed_precision: Annotated[
        str | None,
        typer.Option(
            help="Of artbench2 and artbench5: no, fp16 or bf16. Default: fp16, as published, or no "
            "where there is no GPU."
        ),
    ] = None,
    device: _DEVICE = "auto",
    traceback: _TRACEBACK = False,
) -> None:
    """Draw the subsets and take the queries; run again with larger numbers to add models."""
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        check_device(device)
        folder, name = locate(preset, output)
        numbers = {
            "num_subsets": num_subsets,
            "num_model_seeds": num_model_seeds,
            "num_validation": num_validation,
            "num_generated": num_generated,
            "num_retrain": num_retrain,
        }
        check_numbers(numbers)
        # as in dtrak.train
        from .lds_stages import prepare_run

        prepare_run(
            folder,
            name,
            data,
            device,
            console,
            **numbers,
            model=model,
            mixed_precision=mixed_precision,
        )


@app.command("train")
def train_command(
    preset: _PRESET = None,
    output: _OUTPUT = None,
    family: Annotated[
        str, typer.Option(help=f"Whose models: {', '.join(FAMILIES)}; both have the full one.")
    ] = LDS,
    first: _FIRST = 0,
    last: _LAST = None,
    processes: _PROCESSES = 1,
    device: _DEVICE = "auto",
    traceback: _TRACEBACK = False,
) -> None:
    """Train the full model and one model per subset and seed; several commands may share a run."""
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        check_counts(processes=processes)
        check_device(device)
        check_choice("--family", family, FAMILIES)
        folder, _ = locate(preset, output)
        read_manifest(folder)
        # as in dtrak.train
        from .lds_stages import train_models

        train_models(folder, family, (first, last), processes, device, console)


@app.command("evaluate")
def evaluate_command(
    preset: _PRESET = None,
    output: _OUTPUT = None,
    family: Annotated[
        str | None,
        typer.Option(
            help=f"Whose losses are measured: {', '.join(FAMILIES)}. Default: of both, or with "
            f"--first or --last those of {LDS}."
        ),
    ] = None,
    first: _FIRST = 0,
    last: _LAST = None,
    processes: _PROCESSES = 1,
    device: _DEVICE = "auto",
    loss_timesteps: Annotated[
        int, typer.Option(help="Timesteps the loss of a query is averaged over (published: 1000).")
    ] = 100,
    noise_seeds: Annotated[
        int, typer.Option(help="Noises the loss of a query is averaged over.")
    ] = 3,
    batch_size: Annotated[
        int, typer.Option(help="Noisy images per forward pass when losses are measured.")
    ] = 256,
    timesteps: Annotated[
        str, typer.Option(help="S of the features; several separated by commas.")
    ] = "10,100",
    projection: Annotated[
        str,
        typer.Option(
            help=f"Random matrix: {', '.join(KINDS)}; of several separated by commas the "
            "first is for all methods, the others for D-TRAK and TRAK."
        ),
    ] = "sjlt",
    ensemble: Annotated[
        str | None,
        typer.Option(
            help="Add D-TRAK and TRAK averaged over the first N models of the retrain family, and "
            "with the first alone; several N separated by commas (published: 2,4,8)."
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="Folder of a CLIP model: adds CLIP similarity, dot and cosine."),
    ] = None,
    losses_only: Annotated[
        bool, typer.Option("--losses-only", help="Measure losses, leave the methods for later.")
    ] = False,
    traceback: _TRACEBACK = False,
) -> None:
    """Measure the losses under the models trained so far, and predict them with every method."""
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        check_counts(processes=processes, batch_size=batch_size)
        check_device(device)
        losses = LossSettings(loss_timesteps, noise_seeds)
        folder, _ = locate(preset, output)
        features = parse_features(timesteps, projection)
        sizes = [] if ensemble is None else parse_sizes(ensemble)
        if family is not None:
            check_choice("--family", family, FAMILIES)
        read_manifest(folder)
        # as in dtrak.train
        from .lds_stages import evaluate

        evaluate(
            folder,
            losses,
            features,
            sizes,
            family=family,
            bounds=(first, last),
            processes=processes,
            batch_size=batch_size,
            device=device,
            clip=clip,
            losses_only=losses_only,
            console=console,
        )


@app.command("report")
def report_command(
    preset: _PRESET = None,
    output: _OUTPUT = None,
    resamples: Annotated[
        int, typer.Option(help="Resamples of the models for intervals, at least 1,000.")
    ] = NUM_RESAMPLES,
    markdown: Annotated[
        str | None, typer.Option(help="Write the table as Markdown to this file too.")
    ] = None,
    traceback: _TRACEBACK = False,
) -> None:
    """Show the table of a run, or of the preset as it comes with the package, and plot it."""
    console = Console(stderr=True)
    with reporting_errors(console, traceback):
        if resamples < 1000:
            raise ValueError(f"--resamples must be at least 1000, got {resamples}")
        folder, _ = locate(preset, output)
        # as in dtrak.train
        from .lds_stages import show_table

        show_table(folder, preset, output, resamples, markdown, console)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.lds``."""
    run_app(app, "dtrak.lds", arguments)


if __name__ == "__main__":
    main()
