"""The loss of every query under every retrained model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dtrak_kernels import Projection

from ...data.samples import Samples
from ...features.cost import seconds_of
from ...features.extraction import autocast, check_prediction, condition_rows, given, noisy_rows
from ...features.outputs import evaluate_output
from ...features.settings import FeatureSettings
from ...features.timesteps import select_timesteps
from ...models.denoiser import Denoiser
from ...runs.choices import counted
from ...runs.console import format_seconds
from ...runs.files import write_atomically
from ...runs.folders import Record, alone_at
from ...runs.measure import format_bytes
from ...runs.workers import one_thread
from ..retraining import Progress
from .experiment import Experiment
from .options import LDS, ExperimentError, LossSettings

# before the ids that decide the noise: no query meets here the noise its features were made with
_ROLE = "lds/"
_SETTINGS = Record("settings.json", "losses measured otherwise", ExperimentError)
# key in a file of losses, of the digest of the weights they were measured under
_WEIGHTS = "weights"
# likewise, of the fingerprints of the queries by their kind
_QUERIES = "queries"


@torch.no_grad()
def query_losses(
    model: Denoiser,
    queries: Samples,
    settings: LossSettings,
    device: torch.device,
    *,
    batch_size: int = 256,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> Tensor:
    """The plain denoising loss of every query at every timestep and noise.

    Args:
        model: moved to ``device``.
        queries: M samples, whose captions are read without guidance.
        settings: timesteps and noises.
        device: where.
        batch_size: noisy images per forward pass.
        dtype: a key of `choices.DTYPES`; 16-bit types run under autocast.
        progress: called with (queries and noises done, of how many).

    Returns:
        ``[E, S, M]`` float32, E noise seeds; the mean over pixels of the squared error.

    Raises:
        ValueError: S is out of range, or the model's output is not finite (for which query).

    Source:
        D-TRAK's eval_unconditional.py and eval_text_to_image_lora.py at e2a0c2e, but with noise
        that does not depend on the position in a batch.
    """
    model.to(device)
    T = model.process.num_timesteps
    timesteps = select_timesteps(settings.num_timesteps, "uniform", T, model.process.spread)
    size, num_queries = _together(settings, batch_size), len(queries)
    losses = torch.empty(settings.num_noise_seeds, len(timesteps), num_queries)
    done, total = 0, settings.num_noise_seeds * num_queries
    for seed in range(settings.num_noise_seeds):
        rows = FeatureSettings("loss", tuple(timesteps), seed, Projection("none", 0))
        for first in range(0, num_queries, size):
            chosen = slice(first, first + size)
            ids = [_ROLE + name for name in queries.ids[chosen]]
            inputs = given(model, queries, chosen, device).to(device)
            noisy, target, times = noisy_rows(model, rows, inputs, ids)
            items = queries.conditions_of(chosen)
            condition = condition_rows(model, items, len(timesteps), inputs)
            parts = [slice(row, row + batch_size) for row in range(0, len(noisy), batch_size)]
            with autocast(device, dtype):
                prediction = torch.cat(
                    [
                        model.predict(
                            noisy[p], times[p], {name: v[p] for name, v in condition.items()}
                        )
                        for p in parts
                    ]
                )
            check_prediction(prediction, ids, times)
            weight = model.process.weight(times, noisy.shape[1:])
            values = evaluate_output("loss", prediction, target, weight)
            losses[seed, :, chosen] = values.reshape(len(ids), len(timesteps)).T.cpu()
            done += len(ids)
            if progress is not None:
                progress(done, total)
    return losses


def estimate(
    experiment: Experiment,
    queries: Mapping[str, Samples],
    settings: LossSettings,
    names: Sequence[str],
    device: torch.device,
    *,
    batch_size: int = 256,
) -> str:
    """What measuring the losses under the models called ``names`` will cost, one after the other.

    The time of a query and noise is measured on the first batch, under the first model.
    """
    model = experiment.load_model(names[0])
    images = next(iter(queries.values()))
    first = images.select(range(min(len(images), _together(settings, batch_size))))
    once = replace(settings, num_noise_seeds=1)
    dtype = experiment.retraining.dtype(device)
    # as the workers do
    with one_thread():
        seconds = seconds_of(
            lambda: query_losses(model, first, once, device, batch_size=batch_size, dtype=dtype),
            device,
        )
    count = sum(map(len, queries.values()))
    rows = count * settings.num_noise_seeds * len(names)
    return (
        f"losses: {counted(count, 'query', 'queries')} under {counted(len(names), 'model')} "
        f"to measure, {format_bytes(4 * rows * settings.num_timesteps)} on disk, "
        f"{format_seconds(seconds / len(first) * rows)} or less"
    )


def _together(settings: LossSettings, batch_size: int) -> int:
    """Queries of a forward pass: each has a row for every timestep."""
    return max(1, batch_size // settings.num_timesteps)


def claim_settings(experiment: Experiment, settings: LossSettings) -> None:
    """Make the settings those of the run, or refuse them where its losses were measured otherwise.

    Raises:
        ExperimentError: losses are there that were measured otherwise (what differs).
    """
    folder = experiment.folder / "losses"
    if not any(folder.glob("*.safetensors")):
        # settings that nothing was measured with yet bind nobody
        (folder / _SETTINGS.file_name).unlink(missing_ok=True)
    _SETTINGS.claim(folder, asdict(settings))


def evaluate_one(
    experiment: Experiment,
    queries: Mapping[str, Samples],
    settings: LossSettings,
    name: str,
    device: torch.device,
    progress: Progress | None = None,
    *,
    batch_size: int = 256,
) -> bool:
    """Measure the losses under the model called ``name``, unless that is done or being done.

    They are kept with a digest of the weights and the fingerprints of the queries, and measured
    again when the model or the queries are others.

    Returns:
        Whether this call measured them.
    """
    if is_measured(experiment, name, queries):
        return False
    with alone_at(experiment.folder, f"losses-{name}") as is_ours:
        if not is_ours or is_measured(experiment, name, queries):
            return False
        weights = experiment.sample_weights(name)
        dtype = experiment.retraining.dtype(device)
        model = experiment.load_model(name)
        total = settings.num_noise_seeds * sum(len(images) for images in queries.values())
        losses, before = {}, 0
        for kind, images in queries.items():

            def shifted(done: int, _: int, before: int = before) -> None:
                if progress is not None and before + done < total:
                    progress(before + done, total)

            losses[kind] = query_losses(
                model,
                images,
                settings,
                device,
                batch_size=batch_size,
                dtype=dtype,
                progress=shifted,
            )
            before += settings.num_noise_seeds * len(images)
        of = json.dumps({kind: images.fingerprint for kind, images in queries.items()})
        about = {_WEIGHTS: str(weights), _QUERIES: of}
        write_atomically(_file(experiment, name), save(losses, metadata=about))
        if progress is not None:
            progress(total, total)
        return True


def _file(experiment: Experiment, name: str) -> Path:
    return experiment.folder / "losses" / f"{name}.safetensors"


def is_outdated(
    experiment: Experiment, name: str, queries: Mapping[str, Samples] | None = None
) -> bool:
    """Whether the losses of the model called ``name`` were measured before it was trained anew.

    Losses that do not say under which weights or of which queries, as those of older versions, are
    taken for those that are there; where the model is gone, losses are kept for what they were.

    Args:
        experiment: the run.
        name: of the model.
        queries: by kind; losses of others are outdated too. None does not look at them.
    """
    try:
        with safe_open(_file(experiment, name), "pt") as opened:
            about = opened.metadata() or {}
        measured_of: dict[str, str] | None = json.loads(about.get(_QUERIES, "null"))
    except (OSError, SafetensorError):
        # missing or damaged: that is said where they are read
        return False
    if queries is not None and measured_of is not None:
        fingerprints = {kind: images.fingerprint for kind, images in queries.items()}
        if not fingerprints.items() <= measured_of.items():
            return True
    weights = about.get(_WEIGHTS)
    return weights is not None and experiment.sample_weights(name) not in (None, weights)


def is_measured(
    experiment: Experiment, name: str, queries: Mapping[str, Samples] | None = None
) -> bool:
    """Whether the losses under the model called ``name`` are there and not outdated."""
    return _file(experiment, name).is_file() and not is_outdated(experiment, name, queries)


def measured_names(
    experiment: Experiment, family: str = LDS, queries: Mapping[str, Samples] | None = None
) -> list[str]:
    """The models of a family whose losses are there, and not outdated."""
    names = experiment.names(family=family)
    return [name for name in names if is_measured(experiment, name, queries)]


def load_losses(
    experiment: Experiment, family: str = LDS, queries: Mapping[str, Samples] | None = None
) -> tuple[list[int], dict[str, Tensor]]:
    """The losses of the subsets of a family that are complete: every seed trained and measured.

    Args:
        experiment: the run.
        family: whose subsets.
        queries: as in `is_outdated`.

    Returns:
        R subset numbers, and by kind of query ``[R, M]`` float32, averaged over the seeds of the
        training, the noises and the timesteps.

    Raises:
        ExperimentError: a file is damaged.
    """
    measured = set(measured_names(experiment, family, queries))
    names = [
        experiment.names(subset, subset + 1, family)
        for subset in range(len(experiment.subsets if family == LDS else experiment.retrain))
    ]
    complete = [subset for subset, trainings in enumerate(names) if measured.issuperset(trainings)]
    losses: dict[str, list[Tensor]] = {}
    for subset in complete:
        parts: dict[str, list[Tensor]] = {}
        for name in names[subset]:
            file = _file(experiment, name)
            try:
                found = load_file(file)
            except (OSError, SafetensorError) as error:
                raise ExperimentError(
                    f"{file} is damaged: delete it and run evaluate again"
                ) from error
            for kind, values in found.items():
                parts.setdefault(kind, []).append(values.double().mean(dim=(0, 1)))
        for kind, trainings in parts.items():
            losses.setdefault(kind, []).append(torch.stack(trainings).mean(0).float())
    return complete, {kind: torch.stack(rows) for kind, rows in losses.items()}
