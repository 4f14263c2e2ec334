"""How far retrained models draw from the original: distances, medians with intervals, storage.

Letters: Q queries, R retrainings of each removal, C, H, W the picture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...data.images import from_uint8
from ...methods.baselines import Clip, clip_embeddings, vae_latents
from ...runs.files import expand_path, write_atomically
from .options import NOTHING, RANDOM, CounterfactualError

RESAMPLES, CONFIDENCE = 9_999, 0.95
# below this a bootstrap interval says more about the resampling than about the queries
FEWEST_QUERIES = 5
_FORMAT = 1
FILE = "results.safetensors"


class Metric(NamedTuple):
    """A way to compare two pictures: its name in words, and whether more means more change."""

    title: str
    rises: bool


METRICS = {
    "loss": Metric("Rise of the model's loss on the picture", True),
    "pixel_l2": Metric("L2 distance of pixels", True),
    "latent_l2": Metric("L2 distance of latents", True),
    "clip_cosine": Metric("CLIP similarity", False),
}


def vector_distances(originals: Tensor, others: Tensor) -> Tensor:
    """Euclidean distance of every picture (or latent) from its original, as plain vectors.

    Args:
        originals: ``[Q, ...]``, pixels in [-1, 1] or latents.
        others: ``[Q, R, ...]``.

    Returns:
        ``[Q, R]`` float64.

    Raises:
        ValueError: the shapes disagree or a value is not finite.
    """
    _check_pictures(originals, others)
    return (others.double() - originals.double()[:, None]).flatten(2).norm(dim=2)


def clip_similarities(originals: Tensor, others: Tensor, clip: Clip) -> Tensor:
    """Cosine of CLIP's embeddings of every picture and its original.

    Args:
        originals: ``[Q, C, H, W]`` in [-1, 1].
        others: ``[Q, R, C, H, W]`` in [-1, 1].
        clip: see `baselines.load_clip`.

    Returns:
        ``[Q, R]`` float64 in [-1, 1].

    Raises:
        ValueError: the shapes disagree or a value is not finite.
    """
    _check_pictures(originals, others)
    a = clip_embeddings(originals, clip).double()[:, None]
    b = clip_embeddings(others.flatten(0, 1), clip).double().unflatten(0, others.shape[:2])
    return torch.nn.functional.cosine_similarity(a, b, dim=2)


def _check_pictures(originals: Tensor, others: Tensor) -> None:
    if others.ndim != originals.ndim + 1 or others.shape[2:] != originals.shape[1:]:
        raise ValueError(
            "originals and others must be [Q, ...] and [Q, R, ...] of one shape, got "
            f"{list(originals.shape)} and {list(others.shape)}"
        )
    if len(others) != len(originals):
        raise ValueError(f"others must be of {len(originals)} queries, got {len(others)}")
    for name, value in (("originals", originals), ("others", others)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


@dataclass(frozen=True)
class Summary:
    """Values of Q queries in short.

    Attributes:
        median: of the queries, each the mean of its retrainings.
        mean: of the same.
        interval: 95 % bootstrap interval of the median over queries, or None where there are fewer
            than `FEWEST_QUERIES`. It does not cover the choice of training seeds.
        count: Q.
    """

    median: float
    mean: float
    interval: tuple[float, float] | None
    count: int


def summarise(values: Tensor, *, seed: int = 0) -> Summary:
    """Median, mean and the median's percentile bootstrap interval.

    Args:
        values: ``[Q, R]``, Q at least 1.
        seed: of the resampling.

    Returns:
        The summary; `RESAMPLES` resamples of whole queries.

    Raises:
        ValueError: ``values`` is not ``[Q, R]`` with a query and a retraining, or not finite.

    Source:
        Efron and Tibshirani 1993, chapter 13. The bias-corrected interval is not used: the
        jackknife it rests on fails for medians.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values must be [Q, R], both at least 1, got {list(values.shape)}")
    if not torch.isfinite(values).all():
        raise ValueError("values must be finite, got NaN or infinity")
    per_query = values.double().mean(1).numpy()
    interval = None
    if len(per_query) >= FEWEST_QUERIES:
        rng = np.random.default_rng(seed)
        drawn = rng.choice(per_query, (RESAMPLES, len(per_query)))
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(np.median(drawn, axis=1), (tail, 1 - tail))
        interval = (float(low), float(high))
    return Summary(float(np.median(per_query)), float(per_query.mean()), interval, len(per_query))


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Pictures before and after their top training images were removed.

    Attributes:
        query_ids: Q names.
        originals: ``[Q, C, H, W]`` uint8, the pictures of the model trained on everything.
        pictures: by method, ``[Q, R, C, H, W]`` uint8, drawn from the same seeds by the models
            retrained without what the method ranked highest.
        values: by metric (a key of `METRICS`) and method, ``[Q, R]`` float64.
        settings: what decided the numbers, as name and value.
    """

    query_ids: list[str]
    originals: Tensor
    pictures: dict[str, Tensor]
    values: dict[str, dict[str, Tensor]]
    settings: dict[str, Any]

    @property
    def methods(self) -> list[str]:
        """Names of the methods."""
        return list(self.pictures)

    def summary(self, metric: str, method: str) -> Summary:
        """One method under one metric."""
        return summarise(self.values[metric][method])

    def beyond_random(self, metric: str, method: str) -> Summary | None:
        """How much more than random removal the method changes each query; None without both."""
        values = self.values[metric]
        if RANDOM not in values or method in (RANDOM, NOTHING):
            return None
        change = values[method].mean(1, keepdim=True) - values[RANDOM].mean(1, keepdim=True)
        return summarise(change)


def compare_pictures(
    query_ids: Sequence[str],
    originals: Tensor,
    pictures: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    *,
    rises: Mapping[str, Tensor] | None = None,
    clip: Clip | None = None,
    vae: Any = None,
) -> Counterfactual:
    """Measure every picture against its original.

    Args:
        query_ids: Q names.
        originals: ``[Q, C, H, W]`` uint8.
        pictures: by method, ``[Q, R, C, H, W]`` uint8.
        settings: what decided the numbers.
        rises: by method, ``[Q, R]``, how much the loss of each query rose; adds it.
        clip: see `baselines.load_clip`; adds CLIP similarity.
        vae: see `baselines.load_vae`; adds the distance of latents.

    Raises:
        ValueError: the shapes disagree, or the pictures do not fit ``vae``.
    """
    before = from_uint8(originals)
    values: dict[str, dict[str, Tensor]] = {"pixel_l2": {}}
    if vae is not None:
        values["latent_l2"] = {}
    if clip is not None:
        values["clip_cosine"] = {}
    if rises is not None:
        values["loss"] = {method: rises[method].double() for method in pictures}
    for method, drawn in pictures.items():
        after = from_uint8(drawn)
        values["pixel_l2"][method] = vector_distances(before, after)
        if vae is not None:
            latents = vae_latents(after.flatten(0, 1), vae).unflatten(0, after.shape[:2])
            values["latent_l2"][method] = vector_distances(vae_latents(before, vae), latents)
        if clip is not None:
            values["clip_cosine"][method] = clip_similarities(before, after, clip)
    return Counterfactual(list(query_ids), originals, dict(pictures), values, dict(settings))


def save_counterfactual(results: Counterfactual, folder: Path) -> None:
    """Write results where `load_counterfactual` finds them, and the table as JSON beside."""
    tensors = {"originals": results.originals}
    tensors |= {f"pictures/{method}": drawn for method, drawn in results.pictures.items()}
    for metric, methods in results.values.items():
        tensors |= {f"{metric}/{method}": values for method, values in methods.items()}
    header = {
        "format": _FORMAT,
        "query_ids": results.query_ids,
        "methods": results.methods,
        "metrics": list(results.values),
        "settings": results.settings,
    }
    content = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata={"results": json.dumps(header)},
    )
    write_atomically(folder / FILE, content)
    table = {
        metric: {
            method: {
                "queries": results.query_ids,
                "values": results.values[metric][method].tolist(),
                "median": results.summary(metric, method).median,
                "mean": results.summary(metric, method).mean,
                "interval": results.summary(metric, method).interval,
            }
            for method in results.methods
        }
        for metric in results.values
    }
    write_atomically(
        folder / "results.json",
        json.dumps({"settings": results.settings, "metrics": table}, indent=1).encode(),
    )


def load_counterfactual(folder: str | Path) -> Counterfactual:
    """Read results back.

    Raises:
        CounterfactualError: there are none, or they are damaged.
    """
    file = expand_path(folder) / FILE
    if not file.is_file():
        raise CounterfactualError(
            f"{folder} must hold the results of dtrak.counterfactual, got no {FILE}"
        )
    try:
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["results"])
            if header["format"] != _FORMAT:
                raise CounterfactualError(
                    f"{file} must be of format {_FORMAT}, got {header['format']}"
                )
            return Counterfactual(
                header["query_ids"],
                opened.get_tensor("originals"),
                {name: opened.get_tensor(f"pictures/{name}") for name in header["methods"]},
                {
                    metric: {
                        name: opened.get_tensor(f"{metric}/{name}") for name in header["methods"]
                    }
                    for metric in header["metrics"]
                },
                header["settings"],
            )
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CounterfactualError(f"{file} is damaged: run dtrak.counterfactual again") from error
