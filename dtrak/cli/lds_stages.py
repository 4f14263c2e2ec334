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
from ..evaluation.lds.commands import (
    EvaluateOptions,
    PrepareOptions,
    ReportOptions,
    TrainOptions,
)
from ..evaluation.lds.ensembles import ensemble_predictions, find_members
from ..evaluation.lds.experiment import (
    Experiment,
    encode,
    load_experiment,
    prepare,
    prepare_run,
    train_one,
    trained_names,
)
from ..evaluation.lds.losses import (
    claim_settings,
    estimate,
    evaluate_one,
    is_measured,
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
)
from ..evaluation.lds.names import names_of, of_latents
from ..evaluation.lds.options import (
    EXPERIMENT,
    FAMILIES,
    FEWEST_SUBSETS,
    FULL,
    LDS,
    RETRAIN,
    LossSettings,
    check_name,
)
from ..evaluation.lds.queries import missing_queries, query_sets
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
from ..evaluation.subject import find_trained, subject_of_run
from ..features.extraction import Samples
from ..methods import CHECKPOINTS, Method
from ..pages.index import refresh_index
from ..pages.lds_report import print_table, read_table, render_markdown, write_plots
from ..runs.choices import counted
from ..runs.console import choose_device, model_bar, progress_bar
from ..runs.files import encode_text, write_atomically
from ..runs.folders import alone_at, refuse_inside
from ..runs.measure import format_bytes
from ..runs.ranks import ranks
from ..runs.workers import Job, work_together
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
        return torch.device("cuda", (ranks().local + worker) % torch.cuda.device_count())
    return device


def prepare_experiment(folder: Path, name: str, options: PrepareOptions, console: Console) -> None:
    """Draw the subsets and take the queries.

    Args:
        folder: of the run.
        name: of its preset or model.
        options: as typed.
        console: where progress goes.
    """
    if options.run is None:
        experiment = prepare(
            folder,
            get_preset(name),
            options.data,
            model=options.model,
            mixed_precision=options.mixed_precision,
            **options.numbers,
        )
    else:
        experiment = _prepare_own(folder, options, console)
    encode(experiment, _worker_device(options.device, 0), partial(progress_bar, console))
    size = int(experiment.subsets[0].sum())
    left = [n for n in (FULL, *experiment.names()) if not experiment.is_trained(n)]
    console.print(
        f"{experiment.folder}: {counted(len(experiment.subsets), 'subset')} of {size} of "
        f"{counted(len(experiment.data), 'image')}, {counted(len(left), 'model')} to train, "
        f"{counted(experiment.retraining.recipe.num_steps(size), 'step')} each",
        highlight=False,
        soft_wrap=True,
    )
    if len(experiment.retrain):
        console.print(
            f"retrain family: {counted(len(experiment.retrain), 'subset')} more, for methods that "
            f"are fitted to models, and for ensembles: train --family {RETRAIN}",
            highlight=False,
        )


def _prepare_own(folder: Path, options: PrepareOptions, console: Console) -> Experiment:
    trained = find_trained(str(options.run), recipe=options.recipe, source=options.data)
    refuse_inside(folder, data=trained.training.data.source, validation=options.validation)
    subject = subject_of_run(
        trained,
        prompts=options.prompts,
        classes=options.class_numbers,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        validation=options.validation,
    )
    experiment = prepare_run(folder, subject, trained, **options.numbers)
    if subject.items is not None:
        shown = ", ".join(repr(item) for item in subject.items[:3])
        more = f" and {len(subject.items) - 3} more" if len(subject.items) > 3 else ""
        console.print(f"pictures are drawn from {shown}{more}", highlight=False, soft_wrap=True)
    if experiment.validation is None:
        console.print(
            "no held-out images: the queries are what the model draws (--validation FOLDER adds "
            "others)",
            highlight=False,
        )
    return experiment


def train_models(folder: Path, options: TrainOptions, console: Console) -> None:
    """Train the full model and those of a family that are missing, and draw the queries.

    Args:
        folder: of the run.
        options: as typed.
        console: where progress goes.
    """
    experiment = load_experiment(folder)
    names = [FULL, *experiment.names(options.first, options.last, options.family)]
    missing = [name for name in names if not experiment.is_trained(name)]
    if missing:
        with model_bar(console, "train", len(missing)) as report:
            work_together(
                _TrainJob(folder, options.device),
                missing,
                options.processes,
                report,
                lambda name, wait: alone_at(folder, name, wait=wait),
                experiment.is_trained,
            )
    _say_what_is_left(console, len(trained_names(experiment, names)), len(names), "trained")
    if experiment.is_trained(FULL) and missing_queries(experiment):
        with progress_bar(console, "draw the queries") as progress:
            query_sets(experiment, _worker_device(options.device, 0), progress)


def _say_what_is_left(console: Console, done: int, total: int, verb: str) -> None:
    others = "" if done == total else "; another command is at work on the rest"
    are = "is" if total == 1 else "are"
    text = f"{done} of {counted(total, 'model')} {are} {verb}{others}"
    console.print(text, highlight=False)


def evaluate_models(folder: Path, options: EvaluateOptions, console: Console) -> None:
    """Measure the losses under the models trained so far, and predict them with every method.

    Args:
        folder: of the run.
        options: as typed.
        console: where progress goes.
    """
    losses, sizes, bounds = options.losses, options.sizes, (options.first, options.last)
    device, clip, losses_only = options.device, options.clip, options.losses_only
    experiment = load_experiment(folder)
    methods = _usable_methods(experiment, options, console)
    numbers, projections, whitenings = options.features
    settings = list_settings(numbers, projections, methods, whitenings)
    main_device = _worker_device(device, 0)
    # what is missing is said before hours are spent on the losses
    if sizes and not losses_only:
        find_members(experiment, sizes[-1])
    encoder = None if clip is None or losses_only else ClipEncoder(clip, main_device)
    families = _families(experiment, options.family, bounds)
    wanted = [name for each in families for name in experiment.names(*bounds, each)]
    trained = trained_names(experiment, wanted)
    if experiment.is_trained(FULL) or not losses_only:
        T = experiment.load_model().process.num_timesteps
        _check_timesteps(T, "--loss-timesteps", losses.num_timesteps)
        _check_timesteps(T, "--timesteps", max(each.num_timesteps for each in settings))
    if not losses_only:
        _check_enough(experiment)
    queries = query_sets(experiment, main_device)
    done = {name for each in families for name in measured_names(experiment, each, queries)}
    missing = [name for name in trained if name not in done]
    _say_what_is_outdated(experiment, queries, missing, console)
    here = ranks()
    with here.alone(folder, "losses"):
        claim_settings(experiment, losses)
    if missing:
        if here.is_main:
            cost = estimate(
                experiment, queries, losses, missing, main_device, batch_size=options.batch_size
            )
            console.print(cost, highlight=False, soft_wrap=True)
        with model_bar(console, "losses", len(missing)) as report:
            work_together(
                _LossJob(folder, device, losses, options.batch_size),
                missing,
                options.processes,
                report,
                lambda name, wait: alone_at(folder, f"losses-{name}", wait=wait),
                lambda name: is_measured(experiment, name, queries),
            )
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
    predictor = Predictor(
        experiment,
        queries,
        main_device,
        bars,
        encoder,
        batch_size=options.feature_batch_size,
        flips=options.flips,
    )
    of_features = predictor.estimate(settings) if here.is_main else None
    if of_features is not None:
        console.print(of_features, highlight=False, soft_wrap=True)
    if here.is_launched:
        predictor.share(settings)
        if not here.is_main:
            return
    results = _predict(predictor, queries, losses, settings, sizes, console)
    if options.flips:
        results.about["flips"] = True
    save_results(folder / "results.npz", results)
    console.print(f"results: {folder / 'results.npz'}", highlight=False)
    _say_what_features_take(experiment, console)


def _usable_methods(
    experiment: Experiment, options: EvaluateOptions, console: Console
) -> list[Method]:
    """The methods that were asked for, without those whose models on the way were not kept."""
    chosen = options.chosen
    if experiment.retraining.like().encoding is not None:
        chosen = [of_latents(method) for method in chosen]
    if experiment.checkpoint_steps:
        return chosen
    lacking = [method for method in chosen if method.needs == CHECKPOINTS]
    if lacking:
        how = "dtrak.train --keep-checkpoints 4"
        if options.methods is not None:
            raise ValueError(
                f"--methods {names_of(lacking)} must have models that were kept on the way, this "
                f"run has none ({how})"
            )
        console.print(
            f"left out: {names_of(lacking)}, for which no models were kept on the way ({how})",
            highlight=False,
            soft_wrap=True,
        )
    return [method for method in chosen if method not in lacking]


def _check_enough(experiment: Experiment) -> None:
    """Refuse too few models before any loss is measured.

    Raises:
        ValueError: fewer subsets than a rank correlation can be judged on are trained.
    """
    counts = [
        all(experiment.is_trained(name) for name in experiment.names(subset, subset + 1))
        for subset in range(len(experiment.subsets))
    ]
    if sum(counts) < FEWEST_SUBSETS:
        raise ValueError(
            f"models must be trained on at least {FEWEST_SUBSETS} subsets, with every seed, got "
            f"{sum(counts)}: run train (or --losses-only, to measure those there are)"
        )


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
    if len(complete) < FEWEST_SUBSETS:
        raise ValueError(
            f"models must be trained and measured on at least {FEWEST_SUBSETS} subsets, got "
            f"{len(complete)}"
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
        setting.title,
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
    recipe, size = experiment.retraining.recipe, int(experiment.subsets[0].sum())
    return {
        "preset": experiment.subject.name,
        "models": len(complete),
        "subsets": list(complete),
        "seeds": list(experiment.seeds),
        "samples": len(experiment.data),
        "subset_size": size,
        "steps": recipe.num_steps(size),
        "recipe": recipe.to_dict(),
        "data": experiment.data.fingerprint,
        "queries": {kind: values.shape[1] for kind, values in losses.items()},
        "loss_timesteps": settings.num_timesteps,
        "noise_seeds": settings.num_noise_seeds,
        **experiment.retraining.deciding(),
        "versions": {"dtrak": __version__, "torch": torch.__version__},
    }


def show_table(folder: Path, name: str, options: ReportOptions, console: Console) -> None:
    """Show the table of a run, or of the preset as it comes with the package, and plot it.

    Args:
        folder: of the run.
        name: of its preset or model.
        options: as typed.
        console: where progress goes.
    """
    table = _table(folder, name, options, console)
    markdown = options.markdown
    print_table(table, Console())
    reports = folder / "report"
    files = write_plots(table, reports)
    write_atomically(reports / "table.json", json.dumps(table, indent=1).encode())
    if markdown is not None:
        write_atomically(Path(markdown), encode_text(render_markdown(table)))
    console.print(
        f"table: {reports / 'table.json'}\nplots: {', '.join(map(str, files))}",
        highlight=False,
        soft_wrap=True,
    )
    # of the run whose scores it judges, in the same folder or beside it
    for run in (folder, folder.with_name(folder.name.removeprefix("lds-"))):
        refresh_index(run)


def _table(folder: Path, name: str, options: ReportOptions, console: Console) -> dict[str, Any]:
    """The table of the run in ``folder``, or the packaged one where there is no run."""
    file, kept = folder / "results.npz", folder / "report" / "table.json"
    if not file.is_file():
        packaged = None if options.run is not None else packaged_results(name)
        is_run = EXPERIMENT.is_in(folder)
        if options.output is not None or is_run or packaged is None:
            raise ValueError(f"{folder} must hold results.npz: run evaluate first")
        console.print(f"no run in {folder}: these are the results in the package", highlight=False)
        results, table = packaged
        if table["num_resamples"] == options.resamples:
            return table
    else:
        results = load_results(file)
        check_name(options.preset, results.about["preset"], folder)
        found = read_table(kept, results)
        if found is not None and found["num_resamples"] == options.resamples:
            return found
    with progress_bar(console, "intervals") as progress:
        return make_table(results, num_resamples=options.resamples, progress=progress)
