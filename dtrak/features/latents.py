"""What a model is given in the place of pictures, kept on disk: latents, made once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.rows import Stored
from ..data.samples import Samples
from ..models.denoiser import Denoiser
from ..runs.stages import Stages
from .extraction import Extractor, fill_store
from .store import FeatureStore, StoreInMemory

# images an encoder takes at a time: at 512 pixels each takes about a gigabyte
_BATCH = 4


class _Encoder(Extractor):
    """Fills a store with what a model is given instead of features."""

    method, grad_dim, proj_dim, flips, whitening = "encoder", 0, 0, False, None

    def __init__(self, model: Denoiser, device: torch.device) -> None:
        self.model, self.device = model, device

    def extract(
        self, inputs: Tensor, ids: Sequence[str], items: Sequence[Any] | None = None
    ) -> Tensor:
        """What the model is given for pictures, ``[B, size]``."""
        return self.model.inputs(inputs, self.device).flatten(1)


class _PosteriorEncoder(_Encoder):
    """The same with posteriors, of which training draws latents."""

    def extract(
        self, inputs: Tensor, ids: Sequence[str], items: Sequence[Any] | None = None
    ) -> Tensor:
        """Mean and deviation of pictures, and of their mirror images."""
        mirrored = self.model.posterior(inputs.flip(-1), self.device)
        both = [self.model.posterior(inputs, self.device), mirrored]
        return torch.stack(both, dim=1).flatten(1)


def open_latents(
    folder: str | Path, model: Denoiser, data: Samples, *, flips: bool = False
) -> FeatureStore:
    """The store of what ``model`` is given for ``data``, to be filled by `fill_latents`.

    Args:
        folder: of the store; begun if nothing is there.
        model: encodes.
        data: N pictures.
        flips: keep what training needs: mean and standard deviation of the posterior, of the
            pictures and of their mirror images; otherwise the mode alone.

    Raises:
        ValueError: the model takes no pictures of that shape.
        StoreError: the folder holds latents of other pictures or of another encoder, or is damaged.
    """
    # whatever is read beside the pictures
    pictures = data.conditioned(None)
    return FeatureStore.open(
        folder,
        {
            "kind": "posteriors, mirrored too" if flips else "posterior modes",
            **(model.encoding or {}),
            "data": pictures.fingerprint,
        },
        data.ids,
        (4 if flips else 1) * math.prod(model.input_shape(data.shape)),
        _BATCH,
    )


def fill_latents(
    store: FeatureStore,
    model: Denoiser,
    data: Samples,
    device: torch.device,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode the pictures whose latents are missing in ``store``.

    Args:
        store: of `open_latents`.
        model: as given there.
        data: as given there.
        device: where the encoder works.
        progress: as in `fill_store`.
    """
    if not store.missing():
        return
    flips = store.shape[1] != math.prod(model.input_shape(data.shape))
    encoder = (_PosteriorEncoder if flips else _Encoder)(model, device)
    # of the pictures themselves, whatever else there is of them
    pictures = data.encoded(data.pixels).conditioned(None)
    fill_store(store, encoder, pictures, progress=progress)


def encode(
    model: Denoiser, data: Samples, stages: Stages, role: str, folder: Path | None = None
) -> Samples:
    """``data`` with what the model is given for it, made once.

    Args:
        model: encodes, on the device of the stages.
        data: N pictures.
        stages: where the work is shown.
        role: ``"train"``, ``"query"`` or ``"held-out"``.
        folder: of a run, in which it is kept and found again; None keeps it in memory.

    Raises:
        ValueError: as `open_latents`.
    """
    if model.encoding is None or data.is_encoded:
        return data
    kinds = {"train": "training images", "query": "queries", "held-out": "held-out images"}
    label = f"latents of {kinds[role]}"
    name = role if role == "train" else f"{role}-{data.conditioned(None).fingerprint[:12]}"
    store: Any
    if folder is None:
        size = math.prod(model.input_shape(data.shape))
        store = StoreInMemory(data.ids, size, _BATCH)
    else:
        store = open_latents(folder / "latents" / name, model, data)
    if not store.missing():
        stages.reuse(label, name)
    else:
        with stages.stage(label, name) as progress:
            fill_latents(store, model, data, stages.clock.device, progress=progress)
    return read_latents(store, model, data)


def read_latents(store: FeatureStore, model: Denoiser, data: Samples) -> Samples:
    """``data`` with what the model is given for it, read from ``store`` as it is needed.

    Args:
        store: of `open_latents`, filled.
        model: as given there.
        data: N pictures.
    """
    return data.encoded(Stored(store, model.input_shape(data.shape)))


def read_posteriors(store: FeatureStore, model: Denoiser, data: Samples) -> Tensor:
    """What `dtrak.training.trainer.train` draws latents from.

    Returns:
        ``[N, 2, 2, C, h, w]`` float32 on the CPU: images as they are and mirrored left to right,
        then mean and standard deviation, in the model's units.

    Raises:
        StoreError: the store is incomplete or damaged.
    """
    return store.load().unflatten(1, (2, 2, *model.input_shape(data.shape)))
