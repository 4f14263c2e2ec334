"""Retraining without what a method ranks highest, from the scores to the results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..data.images import to_uint8
from ..evaluation.counterfactual.draw import Draw, choose_draw
from ..evaluation.counterfactual.options import (
    GRADIENT_METHODS,
    NOTHING,
    RANDOM,
    Options,
    check_options,
)
from ..evaluation.counterfactual.origin import Origin, open_origin
from ..evaluation.counterfactual.results import (
    Counterfactual,
    compare_pictures,
    save_counterfactual,
)
from ..evaluation.counterfactual.retraining import (
    Experiment,
    RetrainJob,
    check_removal,
    lock_name,
    prepare,
    removal_positions,
)
from ..methods.baselines import (
    Clip,
    clip_embeddings,
    load_clip,
    load_vae,
    vae_latents,
)
from ..methods.scores import gradient_cosine, gradient_dot
from ..methods.similarity import pixel_cosine, pixel_dot
from ..pages.counterfactual import distance_table, write_box_plot, write_strips
from ..runs.choices import counted
from ..runs.console import choose_device, progress_bar
from ..runs.files import expand_path
from ..runs.folders import alone_at
from ..runs.measure import available_bytes
from ..runs.ranks import ranks
from ..runs.results import read_scores
from ..runs.workers import NAME_BYTES, work_together

# the published part of the training set, 1,000 of 5,000
DEFAULT_PART = 0.2


@dataclass(frozen=True)
class _Scorer:
    """Finds or computes the scores of every method for the queries of a run."""

    origin: Origin
    folder: Path
    device: torch.device
    console: Console
    clip: Clip | None
    vae: Any
    draw: Draw

    def scores(self, method: str) -> Tensor:
        """``[M, N]``, positive for proponents."""
        name, _, file = method.partition("=")
        if file:
            return self._read(str(expand_path(file)))
        if name == RANDOM:
            return self.draw.random_scores(len(self.origin.queries), len(self.origin.data))
        if name in GRADIENT_METHODS:
            return self.origin.gradient_scores(
                GRADIENT_METHODS[name], self.folder / "scores" / name, self.device, self.console
            )
        kind, similarity = name.split("-")
        sides = self.origin.queries, self.origin.data
        if kind == "raw":
            return {"dot": pixel_dot, "cosine": pixel_cosine}[similarity](*sides)
        if kind == "clip":
            assert self.clip is not None
            vectors = [clip_embeddings(side, self.clip) for side in sides]
        else:
            vectors = [vae_latents(side.images, self.vae).flatten(1) for side in sides]
        return {"dot": gradient_dot, "cosine": gradient_cosine}[similarity](*vectors)

    def _read(self, file: str) -> Tensor:
        scores, metadata = read_scores(file)
        for names, wanted in (("rows", self.origin.queries), ("columns", self.origin.data)):
            if json.loads(metadata[names]) != wanted.ids:
                raise ValueError(
                    f"{file} must hold scores of the run's images, got {names} of other names"
                )
        return scores


def run_counterfactual(options: Options, console: Console) -> Counterfactual | None:
    """Run the whole experiment.

    Args:
        options: as `check_options` leaves them.
        console: where progress goes.

    Returns:
        The results, or None while another command is at work on the rest.

    Raises:
        ValueError: an option or a folder is refused; one clear line.
        FileNotFoundError: a path does not exist.
    """
    check_options(options)
    device, output, methods = choose_device(options.device), options.folder, options.method_names
    clip = None if options.clip is None else load_clip(options.clip, device)
    vae = None if options.vae is None else load_vae(options.vae, device)
    names = [method.partition("=")[0] for method in methods]
    origin = open_origin(
        options.run,
        output,
        recipe=options.recipe,
        preset=options.preset,
        source=options.data,
        timesteps=options.timesteps,
        queries=options.queries,
    )
    seed, retrainings = options.seed, options.retrainings
    drawn = choose_draw(options.draw, seed, origin.preset, origin.queries.ids, len(origin.data))
    rows = drawn.choose_queries(len(origin.queries), options.num_queries)
    k = options.top_k
    if k is None:
        k = max(1, round(DEFAULT_PART * len(origin.data)))
    check_removal(k, len(origin.data))
    models = retrainings * len(rows) * len(methods)
    if models * NAME_BYTES > available_bytes(torch.device("cpu")):
        raise ValueError(
            f"--retrainings must leave a number of models whose names fit in memory, got "
            f"{retrainings} and so {counted(models, 'model')}"
        )
    scorer = _Scorer(origin, output, device, console, clip, vae, drawn)
    # features take hours: a file that is refused is refused before
    removed = {
        method: removal_positions(scorer.scores(method), rows, k)
        for method in sorted(methods, key=GRADIENT_METHODS.__contains__)
        if method != NOTHING
    }
    removed[NOTHING] = torch.zeros(len(rows), 0, dtype=torch.int64)
    with ranks().alone(output, "prepare"):
        experiment = prepare(
            output,
            origin,
            [origin.queries.ids[row] for row in rows],
            {name: removed[method] for name, method in zip(names, methods, strict=True)},
            top_k=k,
            retrainings=retrainings,
            recipe=options.recipe,
            preset=options.preset,
            source=options.data,
            queries=options.queries,
        )
    if experiment.missing():
        origin.retraining.prepare(device, partial(progress_bar, console))
        _retrain(experiment, options.processes, device, console)
    if not ranks().is_main:
        return None
    left = experiment.missing()
    if left:
        console.print(
            f"another command is at work on {len(left)} of {counted(len(experiment.jobs), 'model')}"
        )
        return None
    return _measure(experiment, k, drawn, clip, vae, device)


def _retrain(
    experiment: Experiment, processes: int, device: torch.device, console: Console
) -> None:
    missing, folder = experiment.missing(), experiment.origin.retraining.folder
    steps = {job: experiment.steps(job) for job in missing}
    done = dict.fromkeys(missing, 0)
    devices = (str(device),)
    # one that was launched with others has one of its own
    if device.type == "cuda" and device.index is None:
        devices = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    with progress_bar(console, f"retrain {counted(len(missing), 'model')}") as progress:

        def report(job: str, steps_done: int, of: int) -> None:
            # another process has finished one of 0 steps
            done[job] = steps_done if of else steps[job]
            progress(sum(done.values()), sum(steps.values()))

        work_together(
            RetrainJob(experiment.folder, devices),
            missing,
            processes,
            report,
            lambda job, wait: alone_at(folder, lock_name(job), wait=wait),
            lambda job: experiment.file(job).is_file(),
        )


def _measure(
    experiment: Experiment, k: int, draw: Draw, clip: Clip | None, vae: Any, device: torch.device
) -> Counterfactual:
    origin = experiment.origin
    model = origin.load_model()
    vae = model.vae if vae is None else vae
    rows = [origin.queries.ids.index(query) for query in experiment.query_ids]
    originals = to_uint8(origin.queries.pictures(rows))
    model.to(device)
    again = origin.draw(model, experiment.query_ids, device)
    settings: dict[str, Any] = {
        "run": str(origin.folder),
        "training images": len(origin.data),
        "removed": k,
        "queries": len(experiment.query_ids),
        "retrainings of each removal": experiment.retrainings,
        "draw of queries and random removals": draw.description,
        "training steps": origin.retraining.recipe.num_steps(len(origin.data) - k),
        # what the run's own model, drawing alone instead of in a batch, already changes
        "largest change by drawing again": f"{_largest_change(originals, again)} of 255",
    }
    before = origin.losses(model, experiment.query_ids, device)[:, None]
    results = compare_pictures(
        experiment.query_ids,
        originals,
        experiment.pictures(),
        settings,
        rises={method: after - before for method, after in experiment.losses().items()},
        clip=clip,
        vae=vae,
    )
    save_counterfactual(results, experiment.folder)
    write_box_plot(experiment.folder / "distances.png", results)
    write_strips(experiment.folder / "strips.png", results)
    return results


def _largest_change(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def print_results(results: Counterfactual, folder: Path) -> None:
    """Show the distances, and where the pictures are."""
    console = Console()
    for metric in results.values:
        distance_table(results, metric).show(console)
    console.print(
        f"pictures: {folder / 'strips.png'}\nplot: {folder / 'distances.png'}\n"
        f"values: {folder / 'results.json'}",
        soft_wrap=True,
    )
