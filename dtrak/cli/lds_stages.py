"""What the commands of `dtrak.lds` do, from the subsets to the table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import __version__
from ..evaluation.lds.clip import ClipEncoder
from ..evaluation.lds.ensembles import ensemble_predictions, find_members
from ..evaluation.lds.experiment import (
    Experiment,
    encode,
    load_experiment,
    missing_queries,
    prepare,
    query_sets,
    train_one,
    trained_names,
)
from ..evaluation.lds.losses import (
    claim_settings,
    evaluate_one,
    is_outdated,
    load_losses,
    measured_names,
)
from ..evaluation.lds.methods import (
    Prediction,
    Predictor,
    Setting,
    feature_bytes,
    list_settings,
    name_raw,
)
from ..evaluation.lds.options import (
    DEFAULT_PRESET,
    FAMILIES,
    FULL,
    LDS,
    RETRAIN,
    LossSettings,
    check_preset,
)
from ..evaluation.lds.table import (
    FEWEST_FITTED,
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
from ..features.extraction import Samples
from ..pages.lds_report import print_table, read_table, render_markdown, write_plots
from ..runs.console import choose_device, model_bar, progress_bar
from ..runs.files import write_atomically
from ..runs.measure import format_bytes
from ..runs.workers import Job, work
from ..training.presets import get_preset


def _check_timesteps(num_train_timesteps: int, option: str, count: int) -> None:
    if count > num_train_timesteps:
        raise ValueError(
            f"{option} must be at most {num_train_timesteps}, the model's number of training "
            f"timesteps, got {count}"
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


def prepare_run(
    folder: Path, preset: str, data: str | None, device: str, console: Console, **about: Any
) -> None:
    """Draw the subsets and take the queries.

    Args:
        folder: of the run.
        preset: its name.
        data: where the data set lies; None as in `experiment.prepare`.
        device: as typed.
        console: where progress goes.
        about: the options of `experiment.prepare`.
    """
    experiment = prepare(folder, get_preset(preset), data, **about)
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


def train_models(
    folder: Path,
    family: str,
    bounds: tuple[int, int | None],
    processes: int,
    device: str,
    console: Console,
) -> None:
    """Train the full model and those of a family that are missing, and draw the queries.

    Args:
        folder: of the run.
        family: whose models.
        bounds: first subset, and last, excluded.
        processes: models trained at once.
        device: as typed.
        console: where progress goes.
    """
    experiment = load_experiment(folder)
    names = [FULL, *experiment.names(*bounds, family)]
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


def evaluate(
    folder: Path,
    losses: LossSettings,
    features: tuple[list[int], list[str]],
    sizes: Sequence[int],
    *,
    family: str | None,
    bounds: tuple[int, int | None],
    processes: int,
    batch_size: int,
    device: str,
    clip: str | None,
    losses_only: bool,
    console: Console,
) -> None:
    """Measure the losses under the models trained so far, and predict them with every method.

    Args:
        folder: of the run.
        losses: how they are measured.
        features: numbers of timesteps and kinds of projections.
        sizes: of the ensembles.
        family: whose losses; None for both, or for the first where ``bounds`` are given.
        bounds: first subset, and last, excluded.
        processes: models worked on at once.
        batch_size: noisy images per forward pass.
        device: as typed.
        clip: folder of a CLIP model, if any.
        losses_only: leave the methods for later.
        console: where progress goes.
    """
    settings = list_settings(*features, with_clip=clip is not None)
    experiment = load_experiment(folder)
    main_device = _worker_device(device, 0)
    # what is missing is said before hours are spent on the losses
    if sizes and not losses_only:
        find_members(experiment, sizes[-1])
    encoder = None if clip is None or losses_only else ClipEncoder(clip, main_device)
    families = _families(experiment, family, bounds)
    wanted = [name for each in families for name in experiment.names(*bounds, each)]
    trained = trained_names(experiment, wanted)
    if experiment.is_trained(FULL) or not losses_only:
        T = experiment.load_model().process.num_timesteps
        _check_timesteps(T, "--loss-timesteps", losses.num_timesteps)
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


def show_table(
    folder: Path,
    preset: str | None,
    output: str | None,
    resamples: int,
    markdown: str | None,
    console: Console,
) -> None:
    """Show the table of a run, or of the preset as it comes with the package, and plot it.

    Args:
        folder: of the run.
        preset: as typed.
        output: as typed.
        resamples: of the models, for intervals.
        markdown: file of the table as Markdown, if any.
        console: where progress goes.
    """
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
        packaged = packaged_results(preset or DEFAULT_PRESET)
        if output is not None or (folder / "experiment.json").is_file() or packaged is None:
            raise ValueError(f"{folder} must hold results.npz: run evaluate first")
        console.print(f"no run in {folder}: these are the results in the package", highlight=False)
        results, table = packaged
        if table["num_resamples"] == resamples:
            return table
    else:
        results = load_results(file)
        check_preset(preset, results.about["preset"], folder)
        found = read_table(kept, results)
        if found is not None and found["num_resamples"] == resamples:
            return found
    with progress_bar(console, "intervals") as progress:
        return make_table(results, num_resamples=resamples, progress=progress)
