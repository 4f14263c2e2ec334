"""Attribution methods that need no gradients: images alike, retrained models compared, chance.

Letters: M queries, N training samples, R models trained on subsets, D embedding dimensions. Every
method gives scores ``[M, N]`` of one sign: positive scores are proponents, samples whose presence
lowers the query's loss. (D-TRAK's code gives empirical influence and datamodels the other sign.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import to_uint8
from ..data.samples import Samples, as_samples
from ..runs.files import expand_path

DATAMODEL_DAMPINGS = (0.1, 1.0, 10.0)


class EncoderError(ValueError):
    """A CLIP model or a VAE that cannot be used; the message says why and what was expected."""


def random_scores(M: int, N: int, seed: int) -> Tensor:
    """The baseline that knows nothing: independent scores, uniform in [0, 1).

    Args:
        M: queries.
        N: training samples.
        seed: of a generator of its own; the global random state is left as it was.

    Returns:
        ``[M, N]`` float32.

    Raises:
        ValueError: ``M`` or ``N`` is negative.
    """
    if M < 0 or N < 0:
        raise ValueError(f"M and N must be at least 0, got {M} and {N}")
    return torch.rand(M, N, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP image encoder with the preprocessing it was trained with.

    Attributes:
        model: a ``CLIPModel`` in evaluation mode, of which the image encoder is used.
        processor: its ``CLIPImageProcessor``.
    """

    model: Any
    processor: Any


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP model from a folder; nothing is downloaded.

    Args:
        folder: what ``CLIPModel.save_pretrained`` and ``CLIPImageProcessor.save_pretrained``, or a
            download of a CLIP repository, leave: config.json, the weights and
            preprocessor_config.json.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such folder.
        EncoderError: it holds no CLIP model, or its configuration, weights or preprocessing are
            missing or unreadable.
    """

    def read(folder: Path) -> tuple[Any, dict[str, Any], Any]:
        from transformers import CLIPImageProcessor, CLIPModel

        loader: Any = CLIPModel
        found = loader.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        return *found, CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    return Clip(*_load_encoder("CLIP", "CLIPModel", folder, device, read))


@dataclass(frozen=True, eq=False)
class Dino:
    """A general image encoder, DINO's or another, with its preprocessing.

    Attributes:
        model: what ``AutoModel`` makes of its folder, in evaluation mode.
        processor: what ``AutoImageProcessor`` does.
    """

    model: Any
    processor: Any


def load_dino(folder: str | Path, device: torch.device | str = "cpu") -> Dino:
    """Load an image encoder from a folder; nothing is downloaded.

    Args:
        folder: of a ViT (DINO), a Dinov2Model, or whatever image encoder ``AutoModel`` reads:
            config.json, the weights and preprocessor_config.json.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such folder.
        EncoderError: as `load_clip`, or the model takes no images.
    """

    def read(folder: Path) -> tuple[Any, dict[str, Any], Any]:
        from transformers import AutoImageProcessor, AutoModel

        loader: Any = AutoModel
        found, info = loader.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        if found.main_input_name != "pixel_values":
            raise ValueError(f"it must take pixel_values, got {found.main_input_name}")
        # the first token is taken, not what a head makes of it, which DINO has none of
        missing = [name for name in info["missing_keys"] if not name.startswith("pooler.")]
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return found, {"missing_keys": missing}, processor

    return Dino(*_load_encoder("DINO", "image encoder", folder, device, read))


def _load_encoder(
    name: str,
    kind: str,
    folder: str | Path,
    device: torch.device | str,
    read: Callable[[Path], tuple[Any, dict[str, Any], Any]],
) -> tuple[Any, Any]:
    folder = expand_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} must be an existing folder of a transformers {kind}, got {folder}"
        )
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise EncoderError(f"{name} must be a folder with {file}, got {folder} without it")
    with _quiet_transformers():
        try:
            model, info, processor = read(folder)
        # whatever broken files make their readers raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise EncoderError(
                f"the {name} model in {folder} could not be loaded: {reason}"
            ) from error
    # transformers fills what is missing with random numbers, and only remarks on it
    if info["missing_keys"]:
        raise EncoderError(
            f"the {name} model in {folder} must hold every weight, got none for "
            f"{min(info['missing_keys'])}"
        )
    return model.to(device).eval(), processor


@torch.no_grad()
def clip_embeddings(
    images: Samples | Tensor,
    model: Clip,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """CLIP's embedding of every image, to be compared as features are.

    Images go through 8 bits a channel and the model's own preprocessing (resize, crop, normalise);
    grey ones are repeated into three channels.

    Args:
        images: N pictures, or ``[N, C, H, W]`` in [-1, 1]; C 1 or 3.
        model: see `load_clip`.
        batch_size: images at a time.
        progress: called with (images done, images) after every batch.

    Returns:
        ``[N, D]`` float32 on the CPU, not normalised.

    Raises:
        ValueError: the images are not ``[N, 1 or 3, H, W]``, a pixel is not finite, or the batch
            size is below 1.

    Source:
        Radford et al. 2021 (arXiv:2103.00020); the "CLIP similarity" of D-TRAK (arXiv:2311.00500).
    """

    def encode(pixels: Tensor) -> Tensor:
        # by its parts: what get_image_features returns depends on the version of transformers
        encoded = model.model.vision_model(pixel_values=pixels)
        projected: Tensor = model.model.visual_projection(encoded.pooler_output)
        return projected

    width = int(model.model.config.projection_dim)
    return _embed(images, model, encode, width, batch_size, progress)


@torch.no_grad()
def dino_embeddings(
    images: Samples | Tensor,
    model: Dino,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """An encoder's first token for every image, or of one without tokens the mean over positions.

    Args:
        images: as `clip_embeddings`, whose preprocessing it shares.
        model: see `load_dino`.
        batch_size: images at a time.
        progress: as there.

    Returns:
        ``[N, D]`` float32 on the CPU, not normalised.

    Raises:
        ValueError: as `clip_embeddings`.

    Source:
        Caron et al. 2021 (arXiv:2104.14294); Oquab et al. 2023 (arXiv:2304.07193).
    """

    def encode(pixels: Tensor) -> Tensor:
        states: Tensor = model.model(pixel_values=pixels).last_hidden_state
        return states[:, 0] if states.ndim == 3 else states.flatten(2).mean(2)

    return _embed(images, model, encode, 0, batch_size, progress)


def _embed(
    images: Samples | Tensor,
    model: Clip | Dino,
    encode: Callable[[Tensor], Tensor],
    width: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """What ``encode`` makes of every image, ``[N, D]``; of none ``[0, width]``."""
    images = as_samples(images.float() if isinstance(images, Tensor) else images)
    if len(images.shape) != 3 or images.shape[0] not in (1, 3):
        raise ValueError(f"images must be [N, 1 or 3, H, W], got {[len(images), *images.shape]}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.model.parameters()).device
    parts = []
    for first in range(0, len(images), batch_size):
        pixels = to_uint8(images.pictures(slice(first, first + batch_size)))
        arrays = [image.expand(3, -1, -1).movedim(0, -1).numpy() for image in pixels]
        inputs = model.processor(
            images=arrays, return_tensors="pt", input_data_format="channels_last"
        )
        parts.append(encode(inputs["pixel_values"].to(device)).float().cpu())
        if progress is not None:
            progress(first + len(pixels), len(images))
    return torch.cat(parts) if parts else torch.empty(0, width)


def load_vae(folder: str | Path, device: torch.device | str = "cpu") -> Any:
    """Load the autoencoder of a latent diffusion model; nothing is downloaded.

    Args:
        folder: of an ``AutoencoderKL``, or of a pipeline that has one in ``vae/``.
        device: where the model goes.

    Returns:
        The ``AutoencoderKL`` in evaluation mode, float32.

    Raises:
        FileNotFoundError: there is no such folder.
        EncoderError: it holds no ``AutoencoderKL``, or its weights are missing or unreadable.
    """
    folder = expand_path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"VAE must be an existing folder of an AutoencoderKL, got {folder}")
    found = next((f for f in (folder / "vae", folder) if (f / "config.json").is_file()), None)
    if found is None:
        raise EncoderError(f"VAE must be a folder with config.json, got {folder} without it")
    from diffusers import AutoencoderKL

    loader: Any = AutoencoderKL
    try:
        # without low_cpu_mem_usage missing weights are an error, not random numbers
        vae, info = loader.from_pretrained(
            found, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
        )
    # whatever broken files make their readers raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise EncoderError(f"the VAE in {found} could not be loaded: {reason}") from error
    if info["missing_keys"]:
        raise EncoderError(
            f"the VAE in {found} must hold every weight, got none for {min(info['missing_keys'])}"
        )
    return vae.float().to(device).eval()


@torch.no_grad()
def vae_latents(images: Tensor, vae: Any, *, batch_size: int = 16) -> Tensor:
    """The mode of a VAE's posterior for every image, not scaled.

    Args:
        images: ``[N, C, H, W]`` in [-1, 1]; grey ones are repeated into as many channels as the VAE
            takes. Their memory layout, which convolutions round by, does not matter.
        vae: see `load_vae`.
        batch_size: images at a time.

    Returns:
        ``[N, c, h, w]`` float32 on the CPU.

    Raises:
        ValueError: the images are not ``[N, C, H, W]`` with the VAE's channels and sides it can
            halve as often as it does, or a pixel is not finite.

    Source:
        "Raw latents" and the latent distance of D-TRAK's notebooks at e2a0c2e.
    """
    channels = int(vae.config.in_channels)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if images.ndim != 4 or images.shape[1] not in (1, channels):
        raise ValueError(f"images must be [N, 1 or {channels}, H, W], got {list(images.shape)}")
    if images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(
            f"images must have sides that are multiples of {factor} for this VAE, got "
            f"{list(images.shape[2:])}"
        )
    _check_finite("images", images)
    parts = []
    for batch in images.split(batch_size):
        pixels = batch.expand(-1, channels, -1, -1).to(vae.device, torch.float32).contiguous()
        parts.append(vae.encode(pixels).latent_dist.mode().cpu())
    return torch.cat(parts)


def empirical_influence(subsets: Tensor, losses: Tensor) -> Tensor:
    """Mean loss of the models trained without a sample, minus that of the models trained with it.

    A sample that every model saw, or none, scores 0: nothing was observed about it.

    Args:
        subsets: ``[R, N]`` bool, which samples each of R models was trained on.
        losses: ``[R, M]`` loss of every query under every model.

    Returns:
        ``[M, N]`` float64.

    Raises:
        TypeError: ``subsets`` is not bool.
        ValueError: the shapes disagree, there is no model, or a loss is not finite.

    Source:
        Feldman and Zhang 2020 (arXiv:2008.03703).
    """
    _check_models(subsets, losses, at_least=1)
    mask, values = subsets.double(), losses.double()
    with_sample = mask.sum(0)
    without = len(mask) - with_sample
    sums = values.T @ mask
    totals = values.sum(0)[:, None]
    difference = (totals - sums) / without.clamp(min=1) - sums / with_sample.clamp(min=1)
    return torch.where((with_sample > 0) & (without > 0), difference, 0.0)


def datamodel(
    subsets: Tensor,
    losses: Tensor,
    dampings: Sequence[float] = DATAMODEL_DAMPINGS,
    *,
    folds: int = 5,
) -> Tensor:
    """Minus the coefficients of a ridge regression from "which samples" to "which loss".

    Every query has its own damping, chosen by `choose_datamodel_dampings`. The masks are shared by
    all queries, so each fold is decomposed once, ``[R, R]``, however many queries there are.

    Args:
        subsets: ``[R, N]`` bool, which samples each of R models was trained on.
        losses: ``[R, M]`` loss of every query under every model.
        dampings: λ to choose from, in units of ``XᵀX``, X being the centred masks.
        folds: of the cross-validation.

    Returns:
        ``[M, N]`` float64.

    Raises:
        TypeError: ``subsets`` is not bool.
        ValueError: the shapes disagree, there are fewer than ``2 · folds`` models, fewer than 2
            folds, no damping or one that is not positive and finite, or a loss is not finite.

    Source:
        Ilyas et al. 2022 (arXiv:2202.00622), with the ridge penalty of D-TRAK's code; the same
        numbers as ``RidgeCV(alphas=dampings, cv=folds)`` of scikit-learn on each query.
    """
    chosen = choose_datamodel_dampings(subsets, losses, dampings, folds=folds)
    ridge = _Ridge(subsets.double(), losses.double())
    scores = torch.zeros(losses.shape[1], subsets.shape[1], dtype=torch.float64)
    for damping in chosen.unique().tolist():
        queries = chosen == damping
        scores[queries] = -ridge.coefficients(damping, queries).T
    return scores


def choose_datamodel_dampings(
    subsets: Tensor, losses: Tensor, dampings: Sequence[float], *, folds: int = 5
) -> Tensor:
    """The damping of every query with the highest mean R² over folds of consecutive models.

    Args:
        subsets: as for `datamodel`.
        losses: as for `datamodel`.
        dampings: as for `datamodel`; the first of equally good ones is chosen.
        folds: as for `datamodel`.

    Returns:
        ``[M]`` float64, each one of ``dampings``.

    Raises:
        TypeError: as `datamodel`.
        ValueError: as `datamodel`.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    # a fold of one model has no R²
    _check_models(subsets, losses, at_least=2 * folds)
    candidates = torch.tensor([float(damping) for damping in dampings], dtype=torch.float64)
    if not len(candidates) or not ((candidates > 0) & torch.isfinite(candidates)).all():
        raise ValueError(
            f"dampings must be positive, finite and at least one, got {list(dampings)}"
        )
    mask, values = subsets.double(), losses.double()
    fits = torch.zeros(len(candidates), values.shape[1], dtype=torch.float64)
    for fold in torch.arange(len(mask)).tensor_split(folds):
        kept = torch.ones(len(mask), dtype=torch.bool)
        kept[fold] = False
        ridge = _Ridge(mask[kept], values[kept])
        for row, damping in enumerate(candidates.tolist()):
            fits[row] += _fit(ridge.predict(mask[fold], damping), values[fold])
    return candidates[fits.argmax(0)]


class _Ridge:
    """Ridge regressions with an intercept, of one matrix X ``[R, N]`` on targets Y ``[R, M]``."""

    def __init__(self, X: Tensor, Y: Tensor) -> None:
        self.x_mean, self.y_mean = X.mean(0), Y.mean(0)
        self.X = X - self.x_mean
        # R models are fewer than N samples: the dual, whose kernel is [R, R]
        eigenvalues, self.vectors = torch.linalg.eigh(self.X @ self.X.T)
        self.eigenvalues = eigenvalues.clamp(min=0)
        self.rotated = self.vectors.T @ (Y - self.y_mean)

    def _dual(self, damping: float, queries: Any = slice(None)) -> Tensor:
        weights = 1 / (self.eigenvalues + damping)
        return self.vectors @ (weights[:, None] * self.rotated[:, queries])

    def coefficients(self, damping: float, queries: Tensor) -> Tensor:
        """``[N, queries]``."""
        return self.X.T @ self._dual(damping, queries)

    def predict(self, X: Tensor, damping: float) -> Tensor:
        """``[rows of X, M]``."""
        return (X - self.x_mean) @ self.X.T @ self._dual(damping) + self.y_mean


def _fit(predictions: Tensor, targets: Tensor) -> Tensor:
    """R² of every column; for constant targets 1 if they are met and 0 if not."""
    residual = (targets - predictions).square().sum(0)
    total = (targets - targets.mean(0)).square().sum(0)
    constant = total == 0
    return torch.where(
        constant, (residual == 0).double(), 1 - residual / torch.where(constant, 1.0, total)
    )


def _check_models(subsets: Tensor, losses: Tensor, at_least: int) -> None:
    if subsets.dtype != torch.bool:
        raise TypeError(f"subsets must be bool, got {subsets.dtype}")
    if subsets.ndim != 2 or losses.ndim != 2 or len(subsets) != len(losses):
        raise ValueError(
            "subsets must be [R, N] and losses [R, M], got "
            f"{list(subsets.shape)} and {list(losses.shape)}"
        )
    if len(subsets) < at_least:
        raise ValueError(f"subsets must be of at least {at_least} models, got {len(subsets)}")
    _check_finite("losses", losses)


def _check_finite(name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value).flatten(1).all(1)
    if bad.any():
        raise ValueError(f"{name} must be finite, got row {int(bad.nonzero()[0])} that is not")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without a progress bar of its own, or remarks on an image library that is not installed."""
    from transformers.utils import logging as transformers_logging

    logger, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
