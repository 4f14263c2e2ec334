"""Latents and captions: what a text-to-image model is given, kept on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..features.extraction import FeatureStore, fill_store
from ..models.stable_diffusion import TextToImageModel
from .captions import hash_captions
from .images import ImageData

# images the VAE encodes at a time: at 512 pixels each takes about a gigabyte
_BATCH = 4


@dataclass(frozen=True, eq=False)
class LatentData:
    """Images as a text-to-image model sees them, in a fixed order.

    Attributes:
        pictures: the N images themselves.
        captions: N texts.
        images: latents ``[N, C, h, w]`` float32 on the CPU: the mode of the VAE's posterior, times
            its scaling factor.
        captions_hash: of the captions and of the tokens the model reads them as.
        ids: N names, those of the pictures.
        fingerprint: that of the pictures.
    """

    pictures: ImageData
    captions: list[str]
    images: Tensor
    captions_hash: str
    ids: list[str] = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", self.pictures.ids)
        object.__setattr__(self, "fingerprint", self.pictures.fingerprint)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> LatentData:
        """The samples at ``indices``, in that order; their captions' hash is that of the whole."""
        positions = list(indices)
        return LatentData(
            self.pictures.select(positions),
            [self.captions[position] for position in positions],
            self.images[positions],
            self.captions_hash,
        )


class _Encoder:
    """Fills a store with posteriors instead of features."""

    method, grad_dim, proj_dim = "vae posterior", 0, 0

    def __init__(self, model: TextToImageModel, device: torch.device, flips: bool) -> None:
        self.model, self.device, self.flips = model, device, flips

    def extract(
        self, images: Tensor, ids: Sequence[str], captions: Sequence[str] | None = None
    ) -> Tensor:
        """The mode ``[B, C·h·w]``, or mean and deviation of images and mirror images."""
        posterior = self.model.encode(images, self.device)
        if not self.flips:
            return posterior[:, 0].flatten(1)
        mirrored = self.model.encode(images.flip(-1), self.device)
        return torch.stack([posterior, mirrored], dim=1).flatten(1)


def latent_shape(model: TextToImageModel, data: ImageData) -> tuple[int, int, int]:
    """``(C, h, w)`` of the latents of ``data``.

    Raises:
        ValueError: a side of the images is no multiple of the VAE's factor.
    """
    height, width = data.images.shape[-2:]
    if height % model.factor or width % model.factor:
        raise ValueError(
            f"images must have sides that are multiples of {model.factor}, got "
            f"{width}x{height} pixels"
        )
    channels = int(model.vae.config["latent_channels"])
    return channels, height // model.factor, width // model.factor


def open_latents(
    folder: str | Path, model: TextToImageModel, data: ImageData, *, flips: bool = False
) -> FeatureStore:
    """The store of the latents of ``data``, to be filled by `fill_latents`.

    Args:
        folder: of the store; begun if nothing is there.
        model: gives the VAE.
        data: N images.
        flips: keep what training needs: mean and standard deviation, of the images and of their
            mirror images; otherwise the mean alone.

    Raises:
        ValueError: a side of the images is no multiple of the VAE's factor.
        StoreError: the folder holds latents of other images or of another VAE, or is damaged.
    """
    return FeatureStore.open(
        folder,
        {
            "kind": "posteriors, mirrored too" if flips else "posterior modes",
            "vae": model.identity["vae"],
            "scaling_factor": float(model.vae.config["scaling_factor"]),
            "data": data.fingerprint,
        },
        data.ids,
        (4 if flips else 1) * math.prod(latent_shape(model, data)),
        _BATCH,
    )


def fill_latents(
    store: FeatureStore,
    model: TextToImageModel,
    data: ImageData,
    device: torch.device,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode the images whose latents are missing in ``store``.

    Args:
        store: of `open_latents`.
        model: as given there.
        data: as given there.
        device: where the VAE works.
        progress: as in `fill_store`.
    """
    if store.missing():
        flips = store.shape[1] != math.prod(latent_shape(model, data))
        fill_store(store, _Encoder(model, device, flips), data, progress=progress)


def read_latents(
    store: FeatureStore, model: TextToImageModel, data: ImageData, captions: Sequence[str]
) -> LatentData:
    """What the model is given for ``data``.

    Args:
        store: of `open_latents`, filled.
        model: gives the tokenizer.
        data: N images.
        captions: N texts.

    Raises:
        ValueError: there is not one caption for each image.
        StoreError: the store is incomplete or damaged.
    """
    if len(captions) != len(data):
        raise ValueError(f"captions must be {len(data)}, one for each image, got {len(captions)}")
    latents = store.load().unflatten(1, latent_shape(model, data))
    tokens = model.tokenize(captions)
    return LatentData(data, list(captions), latents, hash_captions(captions, tokens))


def read_posteriors(store: FeatureStore, model: TextToImageModel, data: ImageData) -> Tensor:
    """What `dtrak.training.lora_trainer.train_lora` draws latents from.

    Returns:
        ``[N, 2, 2, C, h, w]`` float32 on the CPU: images as they are and mirrored left to right,
        then mean and standard deviation, in the U-Net's units.

    Raises:
        StoreError: the store is incomplete or damaged.
    """
    return store.load().unflatten(1, (2, 2, *latent_shape(model, data)))
