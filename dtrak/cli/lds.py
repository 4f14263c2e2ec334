"""Linear datamodelling score: do scores predict what models trained on subsets of the data do?

``python -m dtrak.lds prepare | train | evaluate | report`` draws subsets of a data set, trains a
model on each, takes the loss of every query under every model, and correlates what each attribution
method predicted with what happened. ``prepare --run FOLDER`` asks it of a model of your own.
"""

from __future__ import annotations

from collections.abc import Sequence

import typer
from rich.console import Console

from ..evaluation.lds.commands import (
    EvaluateOptions,
    PrepareOptions,
    ReportOptions,
    TrainOptions,
)
from ..evaluation.lds.options import locate, read_manifest
from ..runs.console import run_app
from .options import add_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


def prepare(options: PrepareOptions, console: Console) -> None:
    """Draw the subsets and take the queries; run again with larger numbers to add models."""
    options.check()
    folder, name = locate(options.preset, options.output, options.run)
    # as in dtrak.train
    from .lds_stages import prepare_experiment

    prepare_experiment(folder, name, options, console)


def train(options: TrainOptions, console: Console) -> None:
    """Train the full model and one model per subset and seed; several commands may share a run."""
    options.check()
    folder, _ = locate(options.preset, options.output, options.run)
    read_manifest(folder)
    # as in dtrak.train
    from .lds_stages import train_models

    train_models(folder, options, console)


def evaluate(options: EvaluateOptions, console: Console) -> None:
    """Measure the losses under the models trained so far, and predict them with every method."""
    options.check()
    folder, _ = locate(options.preset, options.output, options.run)
    read_manifest(folder)
    # as in dtrak.train
    from .lds_stages import evaluate_models

    evaluate_models(folder, options, console)


def report(options: ReportOptions, console: Console) -> None:
    """Show the table of a run, or of the preset as it comes with the package, and plot it."""
    options.check()
    folder, name = locate(options.preset, options.output, options.run)
    # as in dtrak.train
    from .lds_stages import show_table

    show_table(folder, name, options, console)


add_command(app, PrepareOptions, prepare, name="prepare")
add_command(app, TrainOptions, train, name="train", shares=True)
add_command(app, EvaluateOptions, evaluate, name="evaluate", shares=True)
add_command(app, ReportOptions, report, name="report")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.lds``."""
    run_app(app, "dtrak.lds", arguments)


if __name__ == "__main__":
    main()
