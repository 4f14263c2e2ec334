"""Linear datamodelling score: do scores predict what models trained on subsets of the data do?

``python -m dtrak.lds prepare | train | evaluate | report`` draws subsets of a data set, trains a
model on each, takes the loss of every query under every model, and correlates what each attribution
method predicted with what happened.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # the imports below take seconds, in which Ctrl-C would end in a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from . import __version__
from .console import choose_device, model_bar, progress_bar, reporting_errors, run_app
from .features import Samples
from .files import write_atomically
from .lds_clip import ClipEncoder
from .lds_ensembles import ensemble_predictions, find_members, parse_sizes
from .lds_experiment import (
    FAMILIES,
    FULL,
    LDS,
    RETRAIN,
    Experiment,
    encode,
    load_experiment,
    missing_queries,
    prepare,
    query_sets,
    recorded_preset,
    train_one,
    trained_names,
)
from .lds_losses import (
    LossSettings,
    claim_settings,
    evaluate_one,
    is_outdated,
    load_losses,
    measured_names,
)
from .lds_methods import (
    PROJECTIONS,
    Prediction,
    Predictor,
    Setting,
    feature_bytes,
    list_settings,
    name_raw,
)
from .lds_report import print_table, read_table, render_markdown, write_plots
from .lds_statistics import DampingChoice, choose_damping, lds, lds_per_query
from .lds_table import (
    FEWEST_FITTED,
    NUM_RESAMPLES,
    Entry,
    Family,
    Results,
    dense_ranks,
    fitted_entries,
    load_results,
    make_table,
    packaged_results,
    save_results,
)
from .lds_workers import Job, work
from .measure import format_bytes
from .options import check_choice
from .presets import PRESETS, get_preset

__all__ = ["DampingChoice", "app", "choose_damping", "lds", "lds_per_query", "main"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)

_DEFAULT_PRESET = "digits"
_PRESET = Annotated[
    str | None,
    typer.Option(
        help=f"Experiment: {', '.join(PRESETS)}. Default: that of the run in --output, or "
        f"{_DEFAULT_PRESET}."
    ),
]
_OUTPUT = Annotated[str | None, typer.Option(help="Run folder. Default: runs/lds-<preset>.")]
_DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_FIRST = Annotated[int, typer.Option(help="First subset to work on.")]
_LAST = Annotated[int | None, typer.Option(help="Last subset to work on, excluded.")]
_PROCESSES = Annotated[int, typer.Option(help="Models worked on at once.")]
_TRACEBACK = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]


def _locate(preset: str | None, output: str | None) -> tuple[Path, str]:
    """The run folder, and the preset of the run in it or else the one asked for.

    Raises:
        ValueError: the folder holds a run of another preset, or there is no such preset.
    """
    wanted = _DEFAULT_PRESET if preset is None else get_preset(preset).name
    folder = Path(output) if output else Path("runs") / f"lds-{wanted}"
    found = recorded_preset(folder)
    _check_preset(preset, found, folder)
    return folder, found or wanted


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {count}")


def _check_timesteps(num_train_timesteps: int, option: str, count: int) -> None:
    if count > num_train_timesteps:
        raise ValueError(
            f"{option} must be at most {num_train_timesteps}, the model's number of training "
            f"timesteps, got {count}"
        )


def _check_preset(preset: str | None, found: str | None, folder: Path) -> None:
    if preset is not None and found is not None and preset != found:
        raise ValueError(
            f"--preset must be {found!r}, whose run {folder} holds, or left out, got {preset!r}: "
            "choose another --output"
        )


@dataclass(frozen=True)
class _TrainJob:
    """Makes the job of one training process."""

    folder: Path
    device: str

    def __call__(self, worker: int) -> Job:
        experiment = load_experiment(self.folder)
        device = _worker_device(self.device, worker)
        return lambda name, progress: train_one(experiment, name, device, progress)


@dataclass(frozen=True)
class _LossJob:
    """Makes the job of one process that measures losses."""

    folder: Path
    device: str
    settings: LossSettings
    batch_size: int

    def __call__(self, worker: int) -> Job:
        experiment = load_experiment(self.folder)
        device = _worker_device(self.device, worker)
        queries = query_sets(experiment, device)
        return lambda name, progress: evaluate_one(
            experiment,
            queries,
            self.settings,
            name,
            device,
            progress,
            batch_size=self.batch_size,
        )


def _worker_device(name: str, worker: int) -> torch.device:
    """The device of a worker: workers share the GPUs out between them."""
    device = choose_device(name)
    if name in ("auto", "cuda") and device.type == "cuda":
        return torch.device("cuda", worker % torch.cuda.device_count())
    return device


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
        folder, name = _locate(preset, output)
        experiment = prepare(
            folder,
            get_preset(name),
            data,
            num_subsets=num_subsets,
            num_model_seeds=num_model_seeds,
            num_validation=num_validation,
            num_generated=num_generated,
            num_retrain=num_retrain,
            model=model,
            mixed_precision=mixed_precision,
        )
        encode(experiment, _worker_device(device, 0), partial(progress_bar, console))
        size = int(experiment.subsets[0].sum())
        console.print(
            f"{experiment.folder}: {len(experiment.subsets)} subsets of {size} of "
            f"{len(experiment.data)} images, {len(experiment.names()) + 1} models to train",
            highlight=False,
        )
        if len(experiment.retrain):
            console.print(
                f"retrain family: {len(experiment.retrain)} subsets more, for methods that are "
                f"fitted to models, and for ensembles: train --family {RETRAIN}",
                highlight=False,
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
        _check_counts(processes=processes)
        folder, _ = _locate(preset, output)
        experiment = load_experiment(folder)
        names = [FULL, *experiment.names(first, last, check_choice("--family", family, FAMILIES))]
        missing = [name for name in names if not experiment.is_trained(name)]
        if missing:
            with model_bar(console, "train", len(missing)) as report:
                work(_TrainJob(folder, device), missing, processes, report)
        _say_what_is_left(console, len(trained_names(experiment, names)), len(names), "trained")
        if experiment.is_trained(FULL) and missing_queries(experiment):
            with progress_bar(console, "draw the queries") as progress:
                query_sets(experiment, _worker_device(device, 0), progress)


def _say_what_is_left(console: Console, done: int, total: int, verb: str) -> None:
    others = "" if done == total else "; another command is at work on the rest"
    console.print(f"{done} of {total} models are {verb}{others}", highlight=False)


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
            help=f"Random matrix: {', '.join(PROJECTIONS)}; of several separated by commas the "
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
        _check_counts(processes=processes, batch_size=batch_size)
        losses = LossSettings(loss_timesteps, noise_seeds)
        folder, _ = _locate(preset, output)
        settings = _settings(timesteps, projection, with_clip=clip is not None)
        sizes = [] if ensemble is None else parse_sizes(ensemble)
        if family is not None:
            check_choice("--family", family, FAMILIES)
        experiment = load_experiment(folder)
        main_device = _worker_device(device, 0)
        # what is missing is said before hours are spent on the losses
        if sizes and not losses_only:
            find_members(experiment, sizes[-1])
        encoder = None if clip is None or losses_only else ClipEncoder(clip, main_device)
        families = _families(experiment, family, (first, last))
        wanted = [name for each in families for name in experiment.names(first, last, each)]
        trained = trained_names(experiment, wanted)
        if experiment.is_trained(FULL) or not losses_only:
            T = experiment.load_model().num_train_timesteps
            _check_timesteps(T, "--loss-timesteps", loss_timesteps)
            _check_timesteps(T, "--timesteps", max(each.num_timesteps for each in settings))
        settings = name_raw(settings, experiment.task.raw)
        queries = query_sets(experiment, main_device)
        done = {name for each in families for name in measured_names(experiment, each, queries)}
        missing = [name for name in trained if name not in done]
        _say_what_is_outdated(experiment, queries, missing, console)
        claim_settings(experiment, losses)
        if missing:
            with model_bar(console, "losses", len(missing)) as report:
                work(_LossJob(folder, device, losses, batch_size), missing, processes, report)
        for each in families:
            total = len(experiment.names(family=each))
            label = "" if each == LDS else f"{each} family: "
            console.print(
                f"{label}losses of {len(measured_names(experiment, each, queries))} of {total} "
                "models are measured",
                highlight=False,
            )
        if losses_only:
            return
        bars = partial(progress_bar, console)
        predictor = Predictor(experiment, queries, main_device, bars, encoder)
        results = _predict(predictor, queries, losses, settings, sizes, console)
        save_results(folder / "results.npz", results)
        console.print(f"results: {folder / 'results.npz'}", highlight=False)
        _say_what_features_take(experiment, console)


def _say_what_is_outdated(
    experiment: Experiment, queries: Mapping[str, Samples], missing: Sequence[str], console: Console
) -> None:
    trained = [name for name in missing if is_outdated(experiment, name)]
    drawn = [name for name in missing if is_outdated(experiment, name, queries)]
    for what, names in (("trained", trained), ("queries drawn", sorted({*drawn} - {*trained}))):
        if names:
            console.print(
                f"{what} anew since their losses were measured: {', '.join(names)}",
                highlight=False,
                soft_wrap=True,
            )


def _say_what_features_take(experiment: Experiment, console: Console) -> None:
    size, of_members = feature_bytes(experiment)
    if not size:
        return
    part = f", {format_bytes(of_members)} of it of ensembles" if of_members else ""
    console.print(
        f"features: {experiment.folder / 'features'} takes {format_bytes(size)}{part}; they save "
        "time when subsets or methods are added, and may be deleted",
        highlight=False,
        soft_wrap=True,
    )


def _families(
    experiment: Experiment, family: str | None, bounds: tuple[int, int | None]
) -> list[str]:
    """The families whose losses are to be measured."""
    if family is not None:
        return [family]
    both = len(experiment.retrain) > 0 and bounds == (0, None)
    return list(FAMILIES) if both else [LDS]


def _settings(timesteps: str, projection: str, *, with_clip: bool = False) -> list[Setting]:
    """What to evaluate, from the command line."""
    try:
        numbers = [int(part) for part in timesteps.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ValueError(f"--timesteps must be positive integers, got {timesteps!r}")
    kinds = [part.strip() for part in projection.split(",")]
    for kind in kinds:
        check_choice("--projection", kind, PROJECTIONS)
    return list_settings(numbers, kinds, with_clip=with_clip)


def _predict(
    predictor: Predictor,
    queries: Mapping[str, Samples],
    losses: LossSettings,
    settings: Sequence[Setting],
    sizes: Sequence[int],
    console: Console,
) -> Results:
    """The results of an experiment as far as it has come."""
    experiment = predictor.experiment
    complete, measured = load_losses(experiment, LDS, queries)
    if len(complete) < 4:
        raise ValueError(
            f"models must be trained and measured on at least 4 subsets, got {len(complete)}"
        )
    entries = [_entry(prediction, complete) for prediction in predictor.predict(settings)]
    if sizes:
        predictions = ensemble_predictions(predictor, settings, sizes)
        entries += [_entry(prediction, complete) for prediction in predictions]
    subsets, about = experiment.subsets[complete], _about(experiment, complete, measured, losses)
    retrain = _retrain_family(experiment, queries, about, console)
    return Results(
        about, subsets, measured, entries + fitted_entries(subsets, measured, retrain), retrain
    )


def _entry(prediction: Prediction, complete: Sequence[int]) -> Entry:
    setting = prediction.setting
    return Entry(
        setting.method.name,
        setting.num_timesteps,
        setting.projection,
        prediction.kinds,
        prediction.rules,
        prediction.dampings,
        dense_ranks(prediction.values[:, list(complete)]),
    )


def _retrain_family(
    experiment: Experiment,
    queries: Mapping[str, Samples],
    about: dict[str, Any],
    console: Console,
) -> Family | None:
    """The retrain family as far as it has come, noted in ``about``; None where it is too small."""
    if not len(experiment.retrain):
        return None
    complete, measured = load_losses(experiment, RETRAIN, queries)
    if len(complete) < FEWEST_FITTED:
        console.print(
            f"datamodels and empirical influence are cross-fitted on the models they are judged "
            f"on: of the retrain family {FEWEST_FITTED} models must be measured, got "
            f"{len(complete)}",
            highlight=False,
        )
        return None
    about[RETRAIN] = {"models": len(complete), "subsets": complete, "seed": experiment.seeds[0]}
    return Family(experiment.retrain[complete], measured)


def _about(
    experiment: Experiment,
    complete: Sequence[int],
    losses: dict[str, torch.Tensor],
    settings: LossSettings,
) -> dict[str, Any]:
    preset, size = experiment.preset, int(experiment.subsets[0].sum())
    return {
        "preset": preset.name,
        "models": len(complete),
        "subsets": list(complete),
        "seeds": list(experiment.seeds),
        "samples": len(experiment.data),
        "subset_size": size,
        "steps": preset.recipe.num_steps(size),
        "recipe": preset.recipe.to_dict(),
        "data": experiment.data.fingerprint,
        "queries": {kind: values.shape[1] for kind, values in losses.items()},
        "loss_timesteps": settings.num_timesteps,
        "noise_seeds": settings.num_noise_seeds,
        **experiment.task.deciding(),
        "versions": {"dtrak": __version__, "torch": torch.__version__},
    }


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
        folder, _ = _locate(preset, output)
        table = _table(folder, preset, output, resamples, console)
        print_table(table, Console())
        reports = folder / "report"
        files = write_plots(table, reports)
        write_atomically(reports / "table.json", json.dumps(table, indent=1).encode())
        if markdown is not None:
            write_atomically(Path(markdown), render_markdown(table).encode())
        console.print(
            f"table: {reports / 'table.json'}\nplots: {', '.join(map(str, files))}",
            highlight=False,
            soft_wrap=True,
        )


def _table(
    folder: Path, preset: str | None, output: str | None, resamples: int, console: Console
) -> dict[str, Any]:
    """The table of the run in ``folder``, or the packaged one where there is no run."""
    file, kept = folder / "results.npz", folder / "report" / "table.json"
    if not file.is_file():
        packaged = packaged_results(preset or _DEFAULT_PRESET)
        if output is not None or (folder / "experiment.json").is_file() or packaged is None:
            raise ValueError(f"{folder} must hold results.npz: run evaluate first")
        console.print(f"no run in {folder}: these are the results in the package", highlight=False)
        results, table = packaged
        if table["num_resamples"] == resamples:
            return table
    else:
        results = load_results(file)
        _check_preset(preset, results.about["preset"], folder)
        found = read_table(kept, results)
        if found is not None and found["num_resamples"] == resamples:
            return found
    with progress_bar(console, "intervals") as progress:
        return make_table(results, num_resamples=resamples, progress=progress)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m dtrak.lds``."""
    run_app(app, "dtrak.lds", arguments)


if __name__ == "__main__":
    main()
