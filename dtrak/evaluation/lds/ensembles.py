"""Scores averaged over several models, none of which any score is judged on.

The models are the first of the ``retrain`` family, each trained on its own half of the data. Every
one gives features of all training images and queries, and scores with a damping of its own: λ is
one multiple, for all, of each model's mean squared feature norm (or each model's "auto").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ...runs.choices import counted
from .experiment import Experiment
from .methods import Prediction, Predictor, Setting
from .options import RETRAIN, ExperimentError

_METHODS = ("d-trak", "trak")


def find_members(experiment: Experiment, size: int) -> list[str]:
    """Names of the first ``size`` models of the retrain family.

    Raises:
        ExperimentError: the run has no such family, it is smaller, or they are not all trained.
    """
    R = len(experiment.retrain)
    if size > R:
        raise ExperimentError(
            f"--ensemble {size} must have a retrain family of {size} subsets or more, "
            f"{experiment.folder} has {R} (a score must not be judged on models it has seen): "
            f"run prepare --num-retrain {size}, then train --family {RETRAIN} --last {size}"
        )
    members = experiment.names(0, size, RETRAIN)
    missing = [name for name in members if not experiment.is_trained(name)]
    if missing:
        raise ExperimentError(
            f"--ensemble {size} must have its models trained, {missing[0]!r} is not: run train "
            f"--family {RETRAIN} --last {size}"
        )
    return members


def ensemble_predictions(
    predictor: Predictor, settings: Sequence[Setting], sizes: Sequence[int]
) -> Iterator[Prediction]:
    """What one model of the retrain family predicts by itself, and what several do together.

    The prediction for a subset is a sum of scores, so that the mean of the predictions is the
    prediction of the mean scores.

    Args:
        predictor: of the run.
        settings: what is evaluated on the full model; of them D-TRAK and TRAK with the first
            projection are.
        sizes: numbers of models, ascending.

    Yields:
        By setting the prediction of the first model alone and of the first n for n in ``sizes``;
        dampings are the mean of the models'.

    Raises:
        ExperimentError: as `find_members`, or as `Predictor.predict`.
    """
    members = find_members(predictor.experiment, sizes[-1])
    projection = next((s.projection for s in settings if s.projection), "")
    for setting in settings:
        if setting.method.name not in _METHODS or setting.projection != projection:
            continue
        found = list(predictor.predict([replace(setting, model=name) for name in members]))
        values = torch.stack([prediction.values for prediction in found])
        dampings = torch.tensor([prediction.dampings for prediction in found], dtype=torch.float64)
        for size in (1, *sizes):
            title = "single half-data model" if size == 1 else f"mean of {counted(size, 'model')}"
            yield replace(
                found[0],
                setting=replace(setting, ensemble=title),
                dampings=tuple(dampings[:size].mean(0).tolist()),
                values=values[:size].mean(0),
            )
