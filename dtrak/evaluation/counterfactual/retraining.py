"""Retraining without the training images a method ranks highest, and drawing the picture again.

A folder holds which images are removed for which query under which method, and one small file per
retrained model: the picture it drew. Each depends on its own removal and seed alone, so methods,
queries and retrainings can be added later, several processes or commands may share a folder, and
all may be given up at any moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ...models.denoiser import Denoiser
from ...models.hashing import hash_tensors
from ...runs.files import write_atomically
from ...runs.workers import Job
from .options import NOTHING, PLAN, CounterfactualError
from .origin import Origin, open_origin

Progress = Callable[[int, int], None]


# in the file of a model
_PICTURES, _LOSSES = "pictures", "losses"


@dataclass(frozen=True, eq=False)
class Experiment:
    """What is to be retrained.

    Attributes:
        folder: where everything lies.
        origin: the run whose queries are drawn again.
        query_ids: Q of its queries.
        removed: by method, positions ``[Q, k]`` int64 in its data; none for `NOTHING`.
        retrainings: R models of each removal, which differ in their seed.
    """

    folder: Path
    origin: Origin
    query_ids: list[str]
    removed: dict[str, Tensor]
    retrainings: int

    @property
    def jobs(self) -> list[str]:
        """Names of the models, query by query: ``method/query/retraining``."""
        per_query = [method for method in self.removed if method != NOTHING]
        names = [f"{NOTHING}/all/{r}" for r in self._repeats if NOTHING in self.removed]
        return names + [
            f"{method}/{Path(query).stem}/{r}"
            for r in self._repeats
            for query in self.query_ids
            for method in per_query
        ]

    @property
    def _repeats(self) -> range:
        return range(self.retrainings)

    def steps(self, job: str) -> int:
        """Optimiser steps of a model."""
        method = job.split("/")[0]
        kept = len(self.origin.data) - self.removed[method].shape[1]
        return self.origin.retraining.recipe.num_steps(kept)

    def file(self, job: str) -> Path:
        """Where the pictures of a model lie, retrained or not yet."""
        return self.folder / "pictures" / f"{job}.safetensors"

    def missing(self) -> list[str]:
        """Models that are still to be trained.

        Raises:
            CounterfactualError: a model there was trained without other images.
        """
        for job in self.jobs:
            if self.file(job).is_file():
                self._read(job)
        return [job for job in self.jobs if not self.file(job).is_file()]

    def pictures(self) -> dict[str, Tensor]:
        """What the retrained models drew: by method, ``[Q, R, C, H, W]`` uint8.

        Raises:
            CounterfactualError: a model is not trained yet, or without other images.
        """
        return self._collect(_PICTURES)

    def losses(self) -> dict[str, Tensor]:
        """Losses of the queries under the retrained models: by method, ``[Q, R]`` float32.

        Raises:
            CounterfactualError: as `pictures`.
        """
        return self._collect(_LOSSES)

    def _collect(self, what: str) -> dict[str, Tensor]:
        found = {}
        for method in self.removed:
            columns = []
            for r in self._repeats:
                if method == NOTHING:
                    rows = [self.origin.queries.ids.index(query) for query in self.query_ids]
                    columns.append(self._read(f"{NOTHING}/all/{r}", what)[rows])
                    continue
                names = [f"{method}/{Path(query).stem}/{r}" for query in self.query_ids]
                columns.append(torch.cat([self._read(name, what) for name in names]))
            found[method] = torch.stack(columns, dim=1)
        return found

    def _removal(self, job: str) -> Tensor:
        method, query, _ = job.split("/")
        if method == NOTHING:
            return torch.zeros(0, dtype=torch.int64)
        row = [Path(name).stem for name in self.query_ids].index(query)
        return self.removed[method][row].sort().values

    def _drawn(self, job: str) -> list[str]:
        """Which queries a model draws: one that nothing was removed for serves them all."""
        method, query, _ = job.split("/")
        return self.origin.queries.ids if method == NOTHING else [f"{query}.png"]

    def _identity(self, job: str) -> str:
        removed = hash_tensors({"removed": self._removal(job)})
        return json.dumps({"removed": removed, "drawn": self._drawn(job)})

    def _read(self, job: str, what: str = _PICTURES) -> Tensor:
        file = self.file(job)
        if not file.is_file():
            raise CounterfactualError(f"model {job!r} of {self.folder} is not trained yet")
        try:
            with safe_open(file, "pt") as opened:
                found: Tensor = opened.get_tensor(what)
                identity = opened.metadata()["identity"]
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise CounterfactualError(f"{file} is damaged: delete it and run again") from error
        if identity != self._identity(job):
            raise CounterfactualError(
                f"{file} was drawn by a model trained without other images: the scores, the draw "
                "or the run's queries have changed since. Choose another --output, or delete that "
                "file"
            )
        return found

    def retrain(self, job: str, device: torch.device, progress: Progress | None = None) -> bool:
        """Train a model, draw its picture and measure its loss, unless that is done or under way.

        Args:
            job: one of `jobs`.
            device: where.
            progress: called with (steps done, steps) after every step.

        Returns:
            Whether this call finished the model.

        Raises:
            ValueError: as `trainer.train`, or a picture is not finite.
        """
        method, _, repeat = job.split("/")
        retraining = self.origin.retraining
        kept = torch.ones(len(self.origin.data), dtype=torch.bool)
        kept[self._removal(job)] = False
        seed = retraining.recipe.seed + int(repeat)
        # the run's own seed on the run's own data would only train the same model again
        order = seed + 1 if method == NOTHING else seed

        def finish(model: Denoiser) -> None:
            drawn = self._drawn(job)
            found = {
                _PICTURES: self.origin.draw(model, drawn, device),
                _LOSSES: self.origin.losses(model, drawn, device),
            }
            self.file(job).parent.mkdir(parents=True, exist_ok=True)
            content = save(found, metadata={"identity": self._identity(job)})
            write_atomically(self.file(job), content)

        return retraining.train_once(
            lock_name(job),
            kept,
            (seed, order),
            device,
            is_done=self.file(job).is_file,
            finish=finish,
            progress=progress,
        )


def lock_name(job: str) -> str:
    """What a job is claimed by, in its folder."""
    return job.replace("/", "-")


def removal_positions(scores: Tensor, rows: Sequence[int], k: int) -> Tensor:
    """The k training images with the highest scores, of ties the first.

    Args:
        scores: ``[M, N]``.
        rows: Q positions of queries.
        k: in ``[1, N)``.

    Returns:
        ``[Q, k]`` int64.

    Raises:
        ValueError: ``k`` is out of range, or a score is not finite.
    """
    check_removal(k, scores.shape[1])
    chosen = scores[list(rows)]
    if not torch.isfinite(chosen).all():
        raise ValueError("scores must be finite, got NaN or infinity")
    return chosen.argsort(dim=1, descending=True, stable=True)[:, :k]


def check_removal(k: int, num_train: int) -> None:
    """Refuse a number of removed images that leaves none, or removes none.

    Raises:
        ValueError: it does.
    """
    if not 1 <= k < num_train:
        raise ValueError(f"--top-k must be in [1, {num_train}), got {k}")


def prepare(
    folder: Path,
    origin: Origin,
    query_ids: Sequence[str],
    removed: Mapping[str, Tensor],
    *,
    top_k: int,
    retrainings: int = 1,
    recipe: str | None = None,
    preset: str | None = None,
    source: str | None = None,
    queries: str | None = None,
) -> Experiment:
    """Write down what is to be retrained, or add to what was.

    Args:
        folder: made if missing.
        origin: the run.
        query_ids: Q of its queries.
        removed: by method, positions ``[Q, k]``, or ``[Q, 0]`` for `NOTHING`.
        top_k: k.
        retrainings: R.
        recipe: as given to `open_origin`, for the processes that open it again.
        preset: likewise.
        source: likewise.
        queries: likewise.

    Raises:
        CounterfactualError: the folder holds another experiment (what differs), or something else.
        ValueError: ``retrainings`` is below 1.
    """
    if retrainings < 1:
        raise ValueError(f"--retrainings must be at least 1, got {retrainings}")
    plan = {
        "run": str(origin.folder),
        "recipe": recipe,
        "preset": preset,
        "source": source,
        "set": queries,
        "queries": list(query_ids),
        "methods": list(removed),
        "retrainings": retrainings,
    }
    with ExitStack() as held:
        deciding = {"top_k": top_k, **origin.identity()}
        PLAN.claim(folder, deciding, held, also=plan, renew=True)
        write_atomically(
            folder / "removed.safetensors",
            save({method: rows.contiguous() for method, rows in removed.items()}),
        )
    return Experiment(folder, origin, list(query_ids), dict(removed), retrainings)


def load_experiment(folder: Path) -> Experiment:
    """Open a folder that `prepare` wrote.

    Raises:
        CounterfactualError: it holds no experiment, or a damaged one.
    """
    plan = PLAN.read(folder)
    if plan is None:
        raise CounterfactualError(f"{folder} must hold {PLAN.file_name}, got none")
    file = folder / "removed.safetensors"
    try:
        removed = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CounterfactualError(f"{file} is damaged: run again to write it anew") from error
    return Experiment(
        folder,
        open_origin(
            plan["run"],
            folder,
            recipe=plan["recipe"],
            preset=plan["preset"],
            source=plan["source"],
            queries=plan["set"],
        ),
        plan["queries"],
        {method: removed[method] for method in plan["methods"]},
        plan["retrainings"],
    )


@dataclass(frozen=True)
class RetrainJob:
    """Makes the job of one retraining process; see `workers.work`."""

    folder: Path
    devices: tuple[str, ...]

    def __call__(self, worker: int) -> Job:
        """The job of worker number ``worker``."""
        experiment = load_experiment(self.folder)
        device = torch.device(self.devices[worker % len(self.devices)])
        return lambda job, progress: experiment.retrain(job, device, progress)
