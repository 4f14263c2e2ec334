"""Samples x timesteps -> features ``[N, K]``: the gradients of any `Denoiser`, into a store."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrak_kernels import (
    Accumulator,
    GradientSketcher,
    Whitening,
    check_features,
    compile_ahead,
)

from .. import NUMERICS
from ..data.samples import Samples
from ..models.denoiser import Condition, Denoiser
from ..runs.choices import FLOAT32
from ..runs.measure import TensorMeter, available_bytes
from .halves import combine_halves, order_halves
from .noise import sample_noise
from .outputs import evaluate_output
from .settings import FeatureSettings
from .store import ROWS_PER_PART, FeatureStore, Store, StoreInMemory

# before the id that decides the noise of a mirror image
_MIRRORED = "mirrored/"


# samples of a batch that is chosen here, where memory holds them
_LEAST = 4
# seconds after which it is looked up what other processes have made
_COUNTED_EVERY = 20.0


class Extractor(ABC):
    """Turns what a model is given into features.

    Args:
        model: what is explained; moved to ``device`` (and float64 if the settings say so).
        settings: what to compute.
        device: where.
        whitening: of the gradients, as `whitening.open_whitening` gives it for the settings.

    Attributes:
        method: how the features are made, part of the manifest.
        grad_dim: P.
        proj_dim: K; 2K for settings with halves.
        flips: whether features of mirror images are averaged with those of the images.

    Raises:
        ValueError: there is no whitening where settings have one, another kind, or one too many.
    """

    method: str
    grad_dim: int
    proj_dim: int

    def __init__(
        self,
        model: Denoiser,
        settings: FeatureSettings,
        device: torch.device,
        whitening: Whitening | None = None,
    ) -> None:
        check_whitening(settings, whitening)
        model.to(device, settings.dtype)
        self.model, self.settings, self.device = model, settings, device
        self.flips, self.whitening = settings.flips, whitening

    @abstractmethod
    def extract(
        self, inputs: Tensor, ids: Sequence[str], items: Sequence[Any] | None = None
    ) -> Tensor:
        """Features of a batch.

        Args:
            inputs: ``[B, ...]``, what noise is added to: pictures in [-1, 1], or their latents.
            ids: B sample ids, which decide the noise.
            items: B captions or labels, for a model that reads them.

        Returns:
            ``[B, K]`` on the device; ``[B, 2K]`` for settings with halves.

        Raises:
            ValueError: the model's output is not finite (which sample, which timestep), or there
                are no items for a model that reads them.
        """


def extract_rows(extractor: Extractor, data: Samples, rows: slice, role: str = "") -> Tensor:
    """Features of a slice of ``data``, ``[rows, K]``; for ``role`` see `fill_store`."""
    ids = [role + name for name in data.ids[rows]]
    inputs, items = given(extractor.model, data, rows, extractor.device), data.conditions_of(rows)
    features = extractor.extract(inputs, ids, items)
    if not extractor.flips:
        return features
    mirrored = extractor.model.inputs(data.pictures(rows).flip(-1), extractor.device)
    # another noise: one for both would count twice what it has in common with a query's
    return (features + extractor.extract(mirrored, [_MIRRORED + i for i in ids], items)) / 2


def given(model: Denoiser, data: Samples, rows: slice, device: torch.device) -> Tensor:
    """What noise is added to for a slice of ``data``, ``[rows, ...]``, made if it is not kept."""
    batch = data.batch(rows)
    return batch if data.is_encoded else model.inputs(batch, device)


def noisy_rows(
    model: Denoiser, settings: FeatureSettings, inputs: Tensor, ids: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model sees: ``(noisy, target, timesteps)``, rows ``[B·S]`` sample by sample."""
    device, dtype = inputs.device, inputs.dtype
    shape = tuple(inputs.shape[1:])
    noise = sample_noise(
        ids, settings.timesteps, shape, seed=settings.noise_seed, device=device, dtype=dtype
    ).flatten(0, 1)
    timesteps = torch.tensor(settings.timesteps, device=device).repeat(len(inputs))
    clean = inputs.repeat_interleave(len(settings.timesteps), dim=0)
    noisy = model.process.add(clean, noise, timesteps)
    return noisy, model.process.target(clean, noise, timesteps), timesteps


def condition_rows(
    model: Denoiser, items: Sequence[Any] | None, rows_per_sample: int, inputs: Tensor
) -> Condition:
    """What the model reads beside ``inputs [B, ...]``, a row for each timestep of a sample.

    Raises:
        ValueError: a model that reads something is given nothing, or not one item for each sample.
    """
    if model.reads is not None and (items is None or len(items) != len(inputs)):
        got = "none" if items is None else str(len(items))
        raise ValueError(f"{model.reads} must be {len(inputs)}, one for each image, got {got}")
    return {
        name: (values.to(inputs.dtype) if values.is_floating_point() else values).repeat_interleave(
            rows_per_sample, dim=0
        )
        for name, values in model.condition(items, inputs.device).items()
    }


def check_prediction(prediction: Tensor, ids: Sequence[str], timesteps: Tensor) -> None:
    """Refuse a model output that is not finite.

    Raises:
        ValueError: names the first sample and timestep, ``prediction`` being ``[B·S, ...]``.
    """
    bad = ~torch.isfinite(prediction.flatten(1)).all(1)
    if bad.any():
        row = int(bad.nonzero()[0])
        sample = row // (len(prediction) // len(ids))
        raise ValueError(
            f"the model's output is not finite for sample {ids[sample]!r} at timestep "
            f"{int(timesteps[row])} ({int(bad.sum())} of {len(bad)} rows of its batch)"
        )


def output_rows(
    model: Denoiser,
    settings: FeatureSettings,
    rows: tuple[Tensor, Tensor, Tensor],
    ids: Sequence[str],
    condition: Condition,
    factor: float,
) -> Callable[[], Tensor]:
    """A function that runs the model on rows and returns f of each, ``[R]``, times a factor.

    Args:
        model: the model.
        settings: with the output function and the dtype.
        rows: as `noisy_rows` gives them.
        ids: of the samples that the rows are of, for errors.
        condition: what the model reads beside, a row each.
        factor: see `gradient_scale`.
    """
    noisy, target, timesteps = rows
    weight = model.process.weight(timesteps, noisy.shape[1:])

    def outputs() -> Tensor:
        with autocast(noisy.device, settings.dtype):
            prediction = model.predict(noisy, timesteps, condition)
        check_prediction(prediction, ids, timesteps)
        return evaluate_output(settings.output_function, prediction, target, weight) * factor

    return outputs


def gradient_scale(settings: FeatureSettings) -> float:
    """What f is multiplied by, so that half-precision gradients stay out of the subnormals."""
    # a sum over thousands of elements is large enough, and overflows if it is made larger
    is_small = settings.dtype == "float16" and settings.output_function != "l1_norm"
    return 1024.0 if is_small else 1.0


def check_whitening(settings: FeatureSettings, whitening: Whitening | None) -> None:
    """Refuse features that would not be what their settings say.

    Raises:
        ValueError: there is no whitening where there must be, another kind, or one too many.
    """
    wanted = None if settings.whitening is None else settings.whitening.kind
    found = None if whitening is None else whitening.kind
    if wanted != found:
        raise ValueError(f"whitening must be of kind {wanted!r}, as settings say, got {found!r}")


class FusedExtractor(Extractor):
    """Features through `GradientSketcher`: one forward and one backward, no gradient stored.

    The parameters are those that the model says: of an adapter's model only the adapter's.

    Args:
        model: as `Extractor`, and so ``settings``, ``device`` and ``whitening``.
        settings: see there.
        device: see there.
        whitening: see there.
        into: where gradients go instead of a projection, as `GradientSketcher` takes it.
    """

    method = "fused"

    def __init__(
        self,
        model: Denoiser,
        settings: FeatureSettings,
        device: torch.device,
        whitening: Whitening | None = None,
        into: Callable[[list[tuple[int, ...]]], Accumulator] | None = None,
    ) -> None:
        super().__init__(model, settings, device, whitening)
        # of each sample, one after the other
        self._parts = 2 if settings.halves else 1
        self.sketcher = GradientSketcher(
            model.module,
            settings.projection if into is None else None,
            into=into,
            parameters=model.parameters(),
            rows_per_sample=len(settings.timesteps) // self._parts,
            whitening=whitening,
        )
        self.grad_dim = self.sketcher.grad_dim
        self.proj_dim = self._parts * self.sketcher.proj_dim
        # on a GPU the kernels of the first batch are compiled side by side, before it
        self.compiles = device.type == "cuda"

    def extract(
        self, inputs: Tensor, ids: Sequence[str], items: Sequence[Any] | None = None
    ) -> Tensor:
        """As `Extractor.extract`."""
        inputs = inputs.to(self.device, self.sketcher.dtype)
        steps, count = self.settings.timesteps, len(self.settings.timesteps)
        if self._parts == 2:
            steps = order_halves(steps)
        rows = noisy_rows(self.model, replace(self.settings, timesteps=steps), inputs, ids)
        condition = condition_rows(self.model, items, count, inputs)
        scale = gradient_scale(self.settings)
        # the gradient is averaged over timesteps, then projected once
        outputs = output_rows(self.model, self.settings, rows, ids, condition, scale / count)

        def run() -> Tensor:
            return self.sketcher.sketch(outputs, self._parts * len(inputs))

        if self.compiles:
            compile_ahead(run)
            self.compiles = False
        # features are linear in f; a whitening was fitted to gradients of that scale
        made = run() / scale if self.whitening is None else run()
        return made if self._parts == 1 else combine_halves(made)


def autocast(device: torch.device, dtype: str) -> Any:
    """Autocast for the 16-bit dtypes, nothing for the others."""
    if dtype in ("float32", "float64"):
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def fitting_batch_size(extractor: Extractor, data: Samples) -> int:
    """The batch size that uses a modest share of the free memory, found by measuring one sample.

    On a CPU the working set is kept small enough for the caches (96 MB), though not below four
    samples, between which threads can share the work; the dense kinds, which regenerate their
    matrix once per batch, want a large one. On a GPU half the free memory.
    """
    if extractor.settings.projection.kind != "none" or extractor.device.type != "cpu":
        # the first batch makes what a projection keeps, and on a GPU kernels, which does not grow
        extract_rows(extractor, data, slice(0, 1))
    with TensorMeter(known=extractor.model.module.state_dict().values()) as meter:
        extract_rows(extractor, data, slice(0, 1))
    cpu = extractor.device.type == "cpu"
    dense = extractor.settings.projection.kind in ("rademacher", "normal")
    each, free = max(meter.peak_bytes, 1), available_bytes(extractor.device) // 2
    budget = min(free, 10**9 if dense else 48 * 10**6) if cpu else free
    fitting = max(budget // each, min(_LEAST, free // each))
    return max(1, min(fitting, 256, len(data)))


def deciding_settings(
    model: Denoiser,
    settings: FeatureSettings,
    data: Samples,
    method: str,
    whitening: Whitening | None = None,
) -> dict[str, Any]:
    """Everything that decides the features of ``data``, for the manifest of their store.

    Raises:
        ValueError: see `check_whitening`.
    """
    check_whitening(settings, whitening)
    return {
        "numerics": NUMERICS,
        "method": method,
        **model.identity(),
        "schedule": model.process.describe(),
        "data": data.fingerprint,
        **item_identity(model, data),
        **({} if model.encoding is None else {"encoding": model.encoding}),
        **settings.to_dict(),
        **_levels(model, settings, data),
        **({} if whitening is None else {"whitening fitted": whitening.identity}),
        **_attributed(model),
    }


def _attributed(model: Denoiser) -> dict[str, str]:
    """Hash of the names of the parameters that count, where some of the network's do not."""
    names = model.parameters()
    if model.has_adapter or len(names) == len(list(model.module.named_parameters())):
        return {}
    return {"parameters": hashlib.sha256("\n".join(names).encode()).hexdigest()}


def _levels(model: Denoiser, settings: FeatureSettings, data: Samples) -> dict[str, list[float]]:
    """Noise levels σ of the timesteps, for a process that has them."""
    levels = model.process.levels(settings.timesteps, model.input_shape(data.shape))
    return {} if levels is None else {"sigmas": levels}


def item_identity(model: Denoiser, data: Samples) -> dict[str, str]:
    """Hash of what the model makes of what goes with the samples, under the name of that."""
    if model.reads is None or data.conditions is None:
        return {}
    found = model.identify_items(data.conditions)
    return {} if found is None else {model.reads: found}


def open_store(
    folder: Path | None,
    extractor: Extractor,
    data: Samples,
    role: str,
    batch_size: Callable[[], int],
    dtype: str = FLOAT32,
) -> Store:
    """The store of the features of ``data``, to be filled by `fill_store`.

    Args:
        folder: begun if nothing is there; None keeps them in memory.
        extractor: computes them, by its ``settings``.
        data: N images.
        role: part of what decides the features, as there.
        batch_size: called for the images per batch of a new store.
        dtype: what rows are kept as.

    Raises:
        StoreError: the folder holds features made with other settings, or a damaged manifest.
    """
    if folder is None:
        return StoreInMemory(data.ids, extractor.proj_dim, batch_size(), dtype)
    settings = replace(extractor.settings, flips=extractor.flips)
    deciding = deciding_settings(
        extractor.model, settings, data, extractor.method, extractor.whitening
    )
    deciding["role"] = role
    return FeatureStore.open(folder, deciding, data.ids, extractor.proj_dim, batch_size, dtype)


def left_in(store: Store) -> int:
    """Rows of a store that are still to be computed."""
    return len(store) - store.count()


def fill_store(
    store: Store,
    extractor: Extractor,
    data: Samples,
    *,
    role: str = "",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the shards that are missing, one after the other, or this process's part of them.

    Args:
        store: whose ids are those of ``data``.
        extractor: computes the features.
        data: the images.
        role: goes before the ids that decide the noise, so that a query and a training image of one
            name share none (shared noise looks like attribution).
        batch_size: samples per batch; by default the store's.
        progress: called with (rows done, rows) at the start and after every batch.

    Raises:
        ValueError: the model's output is not finite, or a feature row is zero or not finite
            (which).
    """
    step = batch_size or store.batch_size
    done, counted = store.count(), time.monotonic()
    if progress is not None:
        progress(done, len(store))
    if done < len(store):
        extractor.model.prepare(data.conditions, extractor.device)
    for shard in store.to_fill():
        if time.monotonic() > counted + _COUNTED_EVERY:
            # other processes make some meanwhile
            done, counted = store.count(), time.monotonic()
        rows, made = store.rows(shard), store.begun(shard)
        kept, new = len(made), []
        for first in range(rows.start + kept, rows.stop, step):
            last = min(first + step, rows.stop)
            features = extract_rows(extractor, data, slice(first, last), role)
            ends = [repr(role + data.ids[row]) for row in (first, last - 1)]
            check_features(features, f"features of samples {' to '.join(ends)}")
            new.append(features.cpu())
            done += last - first
            if progress is not None:
                progress(done, len(store))
            if last - rows.start - kept >= ROWS_PER_PART and last < rows.stop:
                store.keep(shard, kept, torch.cat(new))
                made, new, kept = torch.cat([made, *new]), [], last - rows.start
        store.write(shard, torch.cat([made, *new]))
    # what others made meanwhile
    if progress is not None and store.count() != done:
        progress(store.count(), len(store))


def complete_store(
    folder: Path,
    extractor: Extractor,
    data: Samples,
    role: str,
    progress_bar: Callable[[], Any],
    batch_size: int | None = None,
) -> Store:
    """The features of ``data`` in a folder, computed as far as they are not there.

    Args:
        folder: as `open_store`.
        extractor: computes them.
        data: N images.
        role: as there.
        progress_bar: opens one, where there is something to compute.
        batch_size: images per batch; None chooses one.

    Raises:
        ValueError: as `open_store` and `fill_store`.
    """
    store = open_store(
        folder, extractor, data, role, lambda: batch_size or fitting_batch_size(extractor, data)
    )
    if store.missing():
        with progress_bar() as progress:
            fill_store(
                store,
                extractor,
                data,
                role=f"{role}/",
                batch_size=batch_size,
                progress=progress,
            )
    return store


def complete_pair(
    folder: Path,
    extractor: Extractor,
    train: Samples,
    queries: Samples,
    progress_bar: Callable[[str], Any],
    batch_size: int | None = None,
) -> tuple[Store, Store]:
    """`complete_store` of training images and of queries, side by side in a folder.

    Of queries there are no mirror images; ``progress_bar`` is called with the role of either.
    """
    flips, stores = extractor.flips, []
    for role, data in (("train", train), ("query", queries)):
        extractor.flips = flips and role == "train"
        bar = partial(progress_bar, role)
        stores.append(complete_store(folder / role, extractor, data, role, bar, batch_size))
    extractor.flips = flips
    return stores[0], stores[1]
