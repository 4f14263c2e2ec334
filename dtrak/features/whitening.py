"""Whitening of a model's gradients: fitted to some training images, once, and kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrak_kernels import Accumulator, Projection, Whitening
from dtrak_kernels.gradients.whitening.definition import TWO_SIDED_KINDS

from ..data.samples import Samples
from ..models.denoiser import Denoiser
from ..runs.files import write_atomically
from ..runs.folders import Record
from ..runs.ranks import ranks
from .extraction import (
    Extractor,
    FusedExtractor,
    condition_rows,
    deciding_settings,
    fitting_batch_size,
    given,
    gradient_scale,
    noisy_rows,
    output_rows,
)
from .settings import FILE as FILE
from .settings import FeatureSettings, WhiteningSettings

# images of a batch, at most
_BATCH = 10
_ROLE = "train/"

Progress = Callable[[int, int], None]


class WhiteningError(ValueError):
    """A kept whitening that does not fit what is asked, or is damaged; the message says which."""


# beside the file: what it was fitted to
RECORD = Record("whitening.json", "a whitening that was fitted otherwise", WhiteningError)


def open_whitening(
    model: Denoiser,
    settings: FeatureSettings,
    data: Samples,
    device: torch.device,
    file: Path | None = None,
    *,
    batch_size: int | None = None,
    stage: Callable[[], Any] | None = None,
) -> Whitening | None:
    """The whitening of a model's gradients: read where it is kept, else fitted and kept.

    Args:
        model: whose gradients; moved to ``device``.
        settings: of the features; without a whitening there is nothing to do.
        data: the N training images.
        device: where it is fitted.
        file: where it is kept; None keeps it in memory alone.
        batch_size: images per batch, at most 10; by default what fits memory.
        stage: opens a timed stage that yields a progress function, where anything is fitted.

    Returns:
        The whitening on the CPU; None for settings without.

    Raises:
        WhiteningError: the file is damaged, or of something else (what differs).
        ValueError: a gradient or the model's output is not finite.
    """
    asked = settings.whitening
    if asked is None:
        return None
    function = settings.output_function
    fitted_to = {} if file is None else _fitted_to(model, settings, data)
    # one process fits it, the others wait
    with nullcontext() if file is None else ranks().alone(file.parent, file.stem):
        if file is not None and file.is_file():
            found = _read(file, asked, function)
            if not RECORD.is_in(file.parent):
                raise WhiteningError(
                    f"{file} must have {RECORD.file_name} beside it, which says what it was fitted "
                    f"to, got none: delete {file.parent}"
                )
            RECORD.check(file.parent, fitted_to)
            return found
        with nullcontext() if stage is None else stage() as progress:
            whitening = fit_whitening(
                model, settings, data, device, batch_size=batch_size, progress=progress
            )
        if file is not None:
            # first: a file without it is not used
            RECORD.write(file.parent, fitted_to)
            write_atomically(file, whitening.to_bytes())
            # the same numbers now and when it is read again
            return _read(file, asked, function)
        return whitening


def open_extractor(
    model: Denoiser,
    settings: FeatureSettings,
    data: Samples,
    device: torch.device,
    folder: Path | None = None,
    *,
    batch_size: int | None = None,
    stage: Callable[[], Any] | None = None,
    kind: type[Extractor] = FusedExtractor,
) -> Extractor:
    """What makes features of a model, with the whitening that its settings ask for.

    Arguments and errors are those of `open_whitening`; ``folder`` is that of the features, in which
    the whitening is kept, and ``kind`` that of the extractor.
    """
    file = None if folder is None else folder / FILE
    whitening = open_whitening(
        model, settings, data, device, file, batch_size=batch_size, stage=stage
    )
    return kind(model, settings, device, whitening)


def _fitted_to(model: Denoiser, settings: FeatureSettings, data: Samples) -> dict[str, Any]:
    """Everything that decides a whitening; images are not mirrored for it, nor projected."""
    asked = settings.whitening
    assert asked is not None
    plain = replace(settings, whitening=None, flips=False)
    deciding = deciding_settings(model, plain, data, "whitening")
    del deciding["projection"]
    return {**deciding, "whitening": asdict(asked)}


def _read(file: Path, asked: WhiteningSettings, function: str) -> Whitening:
    expected = {"kind": asked.kind, "rank": asked.rank, "damping": asked.damping}
    try:
        return Whitening.load(file, function=function, **expected)
    # of a damaged file each library says something else
    except Exception as error:
        reason = " ".join(str(error).split())
        raise WhiteningError(f"{file} cannot be used ({reason}): delete {file.parent}") from error


def fit_whitening(
    model: Denoiser,
    settings: FeatureSettings,
    data: Samples,
    device: torch.device,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Whitening:
    """Fit a whitening to evenly spaced training images.

    The factors see a few of the timesteps for each of many images, a row each; the scales see
    gradients as features do, averaged over all timesteps, of fewer images.

    Args:
        model: whose gradients; moved to ``device``.
        settings: of the features, with a whitening.
        data: the N training images.
        device: where it is fitted.
        batch_size: images per batch, at most 10; by default what fits memory.
        progress: called with (images done, images).

    Raises:
        ValueError: a gradient or the model's output is not finite.
    """
    asked = settings.whitening
    assert asked is not None
    model.to(device, settings.dtype)
    model.prepare(data.conditions, device)
    if batch_size is None:
        plain = replace(settings, whitening=None, projection=Projection("none"))
        batch_size = fitting_batch_size(FusedExtractor(model, plain, device, into=_Forgets), data)
    size, S = min(batch_size, _BATCH), len(settings.timesteps)
    few = min(asked.factor_timesteps, S)
    is_rotated = asked.kind in TWO_SIDED_KINDS
    # as many rows in a batch of either
    many = size * S // few
    factors = _Batches(model, settings, data, device, many, asked.factor_images, few)
    scales = _Batches(model, settings, data, device, size, asked.scale_images)
    total = (len(factors) if is_rotated else 0) + len(scales)
    counter = _Counter(total, progress)
    return Whitening.fit(
        model.module,
        _Counted(scales, counter),
        kind=asked.kind,
        rank=asked.rank,
        damping=asked.damping,
        parameters=model.parameters(),
        rows_per_sample=S,
        factor_batches=_Counted(factors, counter),
        function=settings.output_function,
    )


class _Forgets(Accumulator):
    """Takes gradients, whose memory is measured, and makes no features."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        super().__init__(shapes, 0)

    def add(
        self, index: int, grads: Tensor, out: Tensor, samples: slice, first_row: int = 0
    ) -> None:
        """See `Accumulator.add`."""


@dataclass(frozen=True)
class _Batches:
    """Batches of training images, made anew each time they are gone through.

    Attributes:
        model: what is differentiated.
        settings: of the features.
        data: the training images.
        device: where they go.
        batch_size: images per batch.
        num_images: at most, evenly spaced in the training set.
        few: of the timesteps so many, drawn for every image, a row each; None for all of them,
            averaged.
    """

    model: Denoiser
    settings: FeatureSettings
    data: Samples
    device: torch.device
    batch_size: int
    num_images: int
    few: int | None = None

    def __len__(self) -> int:
        return min(self.num_images, len(self.data))

    def __iter__(self) -> Iterator[tuple[Callable[[], torch.Tensor], int]]:
        count, generator = len(self), torch.Generator().manual_seed(0)
        rows = [place * len(self.data) // count for place in range(count)]
        for first in range(0, count, self.batch_size):
            part = rows[first : first + self.batch_size]
            chosen = [self._timesteps(generator) for _ in part]
            per_sample = len(chosen[0]) if self.few is None else 1
            yield self._outputs(part, chosen), sum(map(len, chosen)) // per_sample

    def _timesteps(self, generator: torch.Generator) -> tuple[int, ...]:
        every = self.settings.timesteps
        if self.few is None:
            return every
        places = torch.randperm(len(every), generator=generator)[: self.few]
        return tuple(every[place] for place in places.tolist())

    def _outputs(
        self, rows: Sequence[int], chosen: Sequence[tuple[int, ...]]
    ) -> Callable[[], torch.Tensor]:
        model, settings, data = self.model, self.settings, self.data.select(rows)
        ids = [_ROLE + name for name in data.ids]
        inputs = given(model, data, slice(None), self.device).to(self.device)
        if settings.dtype == "float64":
            inputs = inputs.double()
        # images with the same timesteps together: of few there are many such
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, steps in enumerate(chosen):
            alike.setdefault(steps, []).append(place)
        parts = [
            noisy_rows(
                model, replace(settings, timesteps=steps), inputs[some], [ids[i] for i in some]
            )
            for steps, some in alike.items()
        ]
        count = len(chosen[0])
        back = torch.tensor([*chain.from_iterable(alike.values())], device=self.device).argsort()
        noisy, target, timesteps = (
            torch.cat(part).unflatten(0, (-1, count))[back].flatten(0, 1)
            for part in zip(*parts, strict=True)
        )
        condition = condition_rows(model, data.conditions, count, inputs)
        # averaged where all timesteps are, else every row by itself
        factor = gradient_scale(settings) / (count if self.few is None else 1)
        rows_of = noisy, target, timesteps
        return output_rows(model, settings, rows_of, data.ids, condition, factor)


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.progress, self.done = total, progress, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class _Counted:
    """Batches that say how far they are."""

    batches: _Batches
    counter: _Counter

    def __iter__(self) -> Iterator[tuple[Callable[[], torch.Tensor], int]]:
        done = 0
        for outputs, count in self.batches:
            yield outputs, count
            size = min(self.batches.batch_size, len(self.batches) - done)
            done += size
            self.counter.add(size)
