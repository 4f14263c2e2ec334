"""Data set x timesteps -> features ``[N, K]``, streamed into a store that survives a crash."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dtrak_kernels import GradientSketcher, check_features

from .. import __version__
from ..models.stable_diffusion import TextToImageModel
from ..models.unet import DiffusionModel, hash_model
from ..runs.files import write_atomically
from ..runs.folders import describe_differences
from ..runs.measure import TensorMeter, available_bytes
from .noise import sample_noise
from .outputs import evaluate_output, training_target
from .settings import FeatureSettings

_FORMAT = 1
_ROWS_PER_SHARD = 64


class StoreError(ValueError):
    """A feature store that does not fit what is asked, or is damaged; the message says which."""


class Extractor(Protocol):
    """Turns images into features."""

    #: how the features are made, part of the manifest
    method: str
    #: ``P`` and ``K``
    grad_dim: int
    proj_dim: int

    def extract(
        self, images: Tensor, ids: Sequence[str], captions: Sequence[str] | None = None
    ) -> Tensor:
        """Features ``[B, K]`` of images ``[B, C, H, W]``; captions where images have them."""
        ...


class Samples(Protocol):
    """What features are made of: `ImageData`, or `LatentData` for a text-to-image model.

    Attributes:
        images: ``[N, C, H, W]`` float32, what the model is given before noise.
        ids: N sample ids.
        fingerprint: of the images and ids.
    """

    @property
    def images(self) -> Tensor:
        """See above."""
        ...

    @property
    def ids(self) -> list[str]:
        """See above."""
        ...

    @property
    def fingerprint(self) -> str:
        """See above."""
        ...

    def __len__(self) -> int:
        """``N``."""
        ...


def extract_rows(extractor: Extractor, data: Samples, rows: slice, role: str = "") -> Tensor:
    """Features of a slice of ``data``, ``[rows, K]``; for ``role`` see `fill_store`."""
    ids = [role + name for name in data.ids[rows]]
    captions = getattr(data, "captions", None)
    if captions is None:
        return extractor.extract(data.images[rows], ids)
    return extractor.extract(data.images[rows], ids, captions[rows])


def noisy_rows(
    model: DiffusionModel, settings: FeatureSettings, images: Tensor, ids: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """What the model sees: ``(noisy, target, timesteps)``, rows ``[B·S]`` sample by sample."""
    device, dtype = images.device, images.dtype
    shape = tuple(images.shape[1:])
    noise = sample_noise(
        ids, settings.timesteps, shape, seed=settings.noise_seed, device=device, dtype=dtype
    ).flatten(0, 1)
    timesteps = torch.tensor(settings.timesteps, device=device).repeat(len(images))
    clean = images.repeat_interleave(len(settings.timesteps), dim=0)
    noisy = model.scheduler.add_noise(clean, noise, timesteps)
    return noisy, training_target(model.scheduler, clean, noise, timesteps), timesteps


def text_rows(
    model: DiffusionModel, captions: Sequence[str] | None, rows_per_sample: int, images: Tensor
) -> Tensor | None:
    """What a text-to-image model reads beside ``images``, ``[B·S, T, D]``; None for the others.

    Raises:
        ValueError: a text-to-image model is given no captions, or not one for each image.
    """
    if not isinstance(model, TextToImageModel):
        return None
    if captions is None or len(captions) != len(images):
        got = "none" if captions is None else str(len(captions))
        raise ValueError(f"captions must be {len(images)}, one for each image, got {got}")
    return (
        model.embed(captions, images.device)
        .to(images.dtype)
        .repeat_interleave(rows_per_sample, dim=0)
    )


def predict(unet: Any, noisy: Tensor, timesteps: Tensor, text: Tensor | None) -> Tensor:
    """What the U-Net returns for noisy images, given their text if it reads any."""
    more = {} if text is None else {"encoder_hidden_states": text}
    prediction: Tensor = unet(noisy, timesteps, **more).sample
    return prediction


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


def trainable_parameters(model: DiffusionModel) -> list[str]:
    """Names of the parameters a feature is the gradient of, in ``named_parameters()`` order."""
    if isinstance(model, TextToImageModel):
        return model.lora_names
    return [name for name, _ in model.unet.named_parameters()]


def move_model(model: DiffusionModel, device: torch.device, dtype: str) -> None:
    """Put the U-Net on its device, its weights in float64 for ``"float64"``."""
    model.unet.to(device)
    if dtype == "float64":
        model.unet.double()


class FusedExtractor:
    """Features through `GradientSketcher`: one forward and one backward, no gradient stored.

    Of a text-to-image model only the LoRA parameters are differentiated.

    Args:
        model: the model; moved to ``device`` (and float64 if the settings say so).
        settings: what to compute.
        device: where.
    """

    method = "fused"

    def __init__(
        self, model: DiffusionModel, settings: FeatureSettings, device: torch.device
    ) -> None:
        move_model(model, device, settings.dtype)
        self.model, self.settings, self.device = model, settings, device
        self.sketcher = GradientSketcher(
            model.unet,
            settings.projection,
            parameters=trainable_parameters(model),
            rows_per_sample=len(settings.timesteps),
        )
        self.grad_dim, self.proj_dim = self.sketcher.grad_dim, self.sketcher.proj_dim

    def extract(
        self, images: Tensor, ids: Sequence[str], captions: Sequence[str] | None = None
    ) -> Tensor:
        """Features of a batch.

        Args:
            images: ``[B, C, H, W]`` in [-1, 1], or latents of a text-to-image model.
            ids: B sample ids, which decide the noise.
            captions: B captions, for a text-to-image model.

        Returns:
            ``[B, K]`` on the device.

        Raises:
            ValueError: the model's output is not finite (which sample, which timestep), or there
                are no captions for a model that reads them.
        """
        images = images.to(self.device, self.sketcher.dtype)
        noisy, target, timesteps = noisy_rows(self.model, self.settings, images, ids)
        text = text_rows(self.model, captions, len(self.settings.timesteps), images)

        def outputs() -> Tensor:
            with autocast(self.device, self.settings.dtype):
                prediction = predict(self.model.unet, noisy, timesteps, text)
            check_prediction(prediction, ids, timesteps)
            f = evaluate_output(
                self.settings.output_function,
                prediction,
                target,
                self.model.scheduler,
                timesteps,
            )
            # the gradient is averaged over timesteps, then projected once
            return f * (scale / len(self.settings.timesteps))

        # features are linear in f: scaling it keeps half-precision gradients out of the subnormals
        half = self.settings.dtype == "float16"
        # a sum over thousands of elements is large enough, and overflows if it is made larger
        scale = 1024.0 if half and self.settings.output_function != "l1_norm" else 1.0
        return self.sketcher.sketch(outputs, len(images)) / scale


def autocast(device: torch.device, dtype: str) -> Any:
    """Autocast for the 16-bit dtypes, nothing for the others."""
    if dtype in ("float32", "float64"):
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))


def fitting_batch_size(extractor: FusedExtractor, data: Samples) -> int:
    """The batch size that uses a modest share of the free memory, found by measuring one sample.

    On a CPU the working set is kept small enough for the caches (96 MB), except for the dense
    kinds, which regenerate their matrix once per batch and want a large one; on a GPU half the free
    memory.
    """
    # the first batch makes what a projection keeps, which does not grow with the next ones
    extract_rows(extractor, data, slice(0, 1))
    with TensorMeter(known=extractor.model.unet.state_dict().values()) as meter:
        extract_rows(extractor, data, slice(0, 1))
    cpu = extractor.device.type == "cpu"
    dense = extractor.settings.projection.kind in ("rademacher", "normal")
    budget = available_bytes(extractor.device) // 2
    if cpu:
        budget = min(budget, 10**9 if dense else 48 * 10**6)
    return max(1, min(budget // max(meter.peak_bytes, 1), 256, len(data)))


class FeatureStore:
    """Features ``[N, K]`` on disk: a manifest and shards, each written whole or not at all.

    Rows can be read in slices (``store[i:j]``), so nothing needs them in memory at once.

    Attributes:
        folder: where it lies.
        ids: N sample ids, the rows.
        shape: ``(N, K)``.
        rows_per_shard: rows of every shard but the last.
        batch_size: samples per batch the features were computed with.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.ids: list[str] = manifest["ids"]
        self.shape: tuple[int, int] = (len(self.ids), manifest["num_features"])
        self.rows_per_shard: int = manifest["rows_per_shard"]
        self.batch_size: int = manifest["batch_size"]

    @classmethod
    def open(
        cls,
        folder: str | Path,
        deciding: dict[str, Any],
        ids: Sequence[str],
        num_features: int,
        batch_size: int,
    ) -> FeatureStore:
        """Open the store in ``folder``, or begin one.

        Args:
            folder: of the store.
            deciding: everything that decides the numbers; JSON-serialisable.
            ids: N sample ids.
            num_features: ``K``.
            batch_size: samples per batch of a new store; an existing one keeps its own.

        Raises:
            StoreError: the folder holds a store made with other settings (the keys are named), or
                its manifest is unreadable.
        """
        folder = Path(folder)
        file = folder / "manifest.json"
        wanted = json.loads(json.dumps(deciding))
        if file.is_file():
            try:
                manifest = json.loads(file.read_text())
                found = manifest["deciding"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{file} must be the manifest of a feature store, but is damaged: delete "
                    f"{folder} to compute the features again"
                ) from error
            differing = describe_differences(found, wanted)
            if differing:
                raise StoreError(
                    f"{folder} holds features made with other settings: {differing}. Choose "
                    "another --output, or delete that folder"
                )
            return cls(folder, manifest)
        rows = batch_size * -(-_ROWS_PER_SHARD // batch_size)
        manifest = {
            "format": _FORMAT,
            "deciding": wanted,
            "num_features": num_features,
            "rows_per_shard": rows,
            "batch_size": batch_size,
            "ids": list(ids),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(manifest, indent=1).encode())
        return cls(folder, manifest)

    @property
    def num_shards(self) -> int:
        """Shards of the complete store."""
        return -(-self.shape[0] // self.rows_per_shard)

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.safetensors"

    def rows(self, shard: int) -> slice:
        """Rows of a shard."""
        first = shard * self.rows_per_shard
        return slice(first, min(first + self.rows_per_shard, self.shape[0]))

    def missing(self) -> list[int]:
        """Shards that are still to be computed."""
        return [shard for shard in range(self.num_shards) if not self._file(shard).is_file()]

    def write(self, shard: int, features: Tensor) -> None:
        """Write one shard, ``[rows of the shard, K]``, atomically."""
        write_atomically(self._file(shard), save({"features": features.cpu().contiguous()}))

    def _read(self, shard: int) -> Tensor:
        file, rows = self._file(shard), self.rows(shard)
        if not file.is_file():
            raise StoreError(
                f"{self.folder} is incomplete: {file.name} is missing; run again to resume"
            )
        try:
            with safe_open(file, "pt") as opened:
                features: Tensor = opened.get_tensor("features")
        except (SafetensorError, OSError, KeyError) as error:
            raise StoreError(
                f"{file} is damaged ({' '.join(str(error).split())}): delete it and run again to "
                "compute its rows anew"
            ) from error
        expected = (rows.stop - rows.start, self.shape[1])
        if tuple(features.shape) != expected:
            raise StoreError(f"{file} must hold features {expected}, got {tuple(features.shape)}")
        return features

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Features of a contiguous slice of rows, ``[rows, K]``."""
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError(f"a store is read in contiguous slices, got step {step}")
        parts = []
        for shard in range(start // self.rows_per_shard, -(-stop // self.rows_per_shard)):
            first = shard * self.rows_per_shard
            part = self._read(shard)
            parts.append(part[max(start - first, 0) : stop - first])
        return torch.cat(parts) if parts else torch.empty(0, self.shape[1])

    def load(self) -> Tensor:
        """All features, ``[N, K]``."""
        return self[:]


def model_identity(model: DiffusionModel) -> dict[str, str]:
    """Hashes of all weights that decide the features."""
    if isinstance(model, TextToImageModel):
        return model.identity
    return {"model": hash_model(model.unet)}


def deciding_settings(
    model: DiffusionModel, settings: FeatureSettings, data: Samples, method: str
) -> dict[str, Any]:
    """Everything that decides the features of ``data``, for the manifest of their store."""
    captions = getattr(data, "captions_hash", None)
    return {
        "version": __version__,
        "method": method,
        **model_identity(model),
        "schedule": model.schedule,
        "data": data.fingerprint,
        **({} if captions is None else {"captions": captions}),
        **settings.to_dict(),
    }


def fill_store(
    store: FeatureStore,
    extractor: Extractor,
    data: Samples,
    *,
    role: str = "",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compute the shards that are missing, one after the other.

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
    missing = store.missing()
    todo = sum(store.rows(shard).stop - store.rows(shard).start for shard in missing)
    done = len(store) - todo
    if progress is not None:
        progress(done, len(store))
    for shard in missing:
        rows = store.rows(shard)
        parts = []
        for first in range(rows.start, rows.stop, step):
            last = min(first + step, rows.stop)
            features = extract_rows(extractor, data, slice(first, last), role)
            ends = [repr(role + data.ids[row]) for row in (first, last - 1)]
            check_features(features, f"features of samples {' to '.join(ends)}")
            parts.append(features.cpu())
            done += last - first
            if progress is not None:
                progress(done, len(store))
        store.write(shard, torch.cat(parts))
