"""What training images are to themselves: which are by heart, and which are there twice.

Letters: N training images, K features. ``A = (ΦᵀΦ + λI)⁻¹``.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrak_kernels.ridge import RidgeSolver

from ..features.halves import Columns
from ..features.store import MANIFEST, FeatureStore
from ..runs.record import ResultsError
from ..runs.results import Attribution

# rows whose scores on all others are in memory at once
_ROWS = 512


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """What training images are to themselves and to each other.

    Attributes:
        ids: N names.
        own: ``[N]`` float64 in [0, 1), the score ``φᵀAφ`` of an image on itself: near 1 for one
            whose gradient no other image has, which a model can only have learnt from itself.
        nearest: ``[N]`` int64, the other image with the highest likeness.
        likeness: ``[N]`` float64 in [-1, 1], ``φᵢᵀAφⱼ / sqrt(φᵢᵀAφᵢ · φⱼᵀAφⱼ)`` of both: high for
            copies, however they differ in size or noise.
    """

    ids: list[str]
    own: Tensor
    nearest: Tensor
    likeness: Tensor

    def pairs(self) -> list[tuple[int, int, float]]:
        """Images and their nearest, with the likeness, the most alike first; each pair once."""
        found: dict[tuple[int, int], float] = {}
        for row in self.likeness.argsort(descending=True, stable=True).tolist():
            other = int(self.nearest[row])
            found.setdefault((min(row, other), max(row, other)), float(self.likeness[row]))
        return [(*pair, likeness) for pair, likeness in found.items()]


def self_influence(features: Any, damping: float, ids: list[str]) -> SelfInfluence:
    """The self-influence of every training image, and the image most like it.

    Args:
        features: ``[N, K]`` tensor or store, N at least 2.
        damping: λ in units of the Gram.
        ids: N names.

    Raises:
        ValueError: as `RidgeSolver.leverages`, or there is one image alone.

    Source:
        Self-influence as a finder of memorised images: Feldman and Zhang 2020 (arXiv:2008.03703),
        here by TRAK's formula.
    """
    N = features.shape[0]
    if N < 2:
        raise ValueError(f"training images must be at least 2, got {N}")
    solver = RidgeSolver(features)
    own = solver.leverages(damping)
    sizes, nearest, likeness = own.clamp(min=1e-300).sqrt(), [], []
    for first in range(0, N, _ROWS):
        rows = torch.as_tensor(features[first : first + _ROWS])
        last = first + len(rows)
        alike = solver.scores(rows, damping).double() / sizes / sizes[first:last, None]
        alike[torch.arange(len(rows)), torch.arange(first, last)] = -torch.inf
        best = alike.max(1)
        nearest.append(best.indices)
        likeness.append(best.values)
    return SelfInfluence(ids, own, torch.cat(nearest), torch.cat(likeness))


def of_run(run: Attribution) -> SelfInfluence:
    """`self_influence` of the features that a finished run has kept.

    Raises:
        ResultsError: its method has no damping, or its features are gone.
    """
    options = run.options
    if options.function is None or not options.what.is_damped:
        raise ResultsError(
            f"{run.results} must be of a method with a damping, such as d-trak, got "
            f"{options.what.name}"
        )
    folder = options.feature_folder(run.folder) / f"train{options.halves_suffix}"
    manifest = MANIFEST.read(folder)
    if manifest is None:
        raise ResultsError(f"{folder} must hold the run's features, got none: run it again")
    store = FeatureStore(folder, manifest)
    features: Any = Columns(store, 0) if options.noise_halves else store
    damping = float(str(run.manifest["settings"]["damping"]).split()[0])
    return self_influence(features.load(), damping, store.ids)


def write_csv(found: SelfInfluence, file: Path) -> None:
    """Write a line per training image, the highest self-influence first."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.writer(opened)
        writer.writerow(["training image", "self-influence", "most like", "likeness"])
        for row in found.own.argsort(descending=True).tolist():
            values = float(found.own[row]), float(found.likeness[row])
            other = found.ids[int(found.nearest[row])]
            writer.writerow([found.ids[row], f"{values[0]:.6g}", other, f"{values[1]:.6g}"])
