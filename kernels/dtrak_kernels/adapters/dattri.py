"""A projector for the dattri library, on any device, its matrix never stored.

    dtrak_kernels.dattri.install()
    TRAKAttributor(task, ..., projector_kwargs={"proj_dim": 2048, "proj_type": "rademacher", ...})

dattri looks its classes up in one module when it needs one, so after `install` every attributor
projects with this one. It is not a subclass of dattri's ``AbstractProjector``, only registered as
one: dattri need not be installed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..projection import DENSE_KINDS, Projection
from .gradients import (
    Whitenings,
    keyed_seed,
    kind_of,
    project_any,
    whiten_any,
    whitening_of,
)

_REPLACED = ("BasicProjector", "CudaProjector")


def install() -> None:
    """Make dattri use `DattriProjector` for Rademacher and normal projections, in this process.

    dattri's own classes go on to serve its other kinds. Attributors made before keep theirs.
    Calling it again changes nothing.

    Raises:
        ImportError: dattri is not installed.
    """
    from dattri.func import projection

    for name in _REPLACED:
        original = getattr(projection, name)
        if not issubclass(original, _Choice):
            setattr(projection, name, type(name, (_Choice, original), {"original": original}))


class _Choice:
    """Made in place of dattri's class ``original``: ours for dense kinds, dattri's for others."""

    original: type

    def __new__(
        cls,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: Any,
        device: torch.device | str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if getattr(proj_type, "value", proj_type) in DENSE_KINDS:
            return DattriProjector(feature_dim, proj_dim, seed, proj_type, device)
        return cls.original(feature_dim, proj_dim, seed, proj_type, device, *args, **kwargs)


class DattriProjector:
    """dattri's ``AbstractProjector``: features divided by √K, in the dtype of the gradients.

    Members of an ensemble have matrices of their own: the key of the random stream is two words,
    ``seed`` and ``ensemble_id``.

    Args:
        feature_dim: ``P``.
        proj_dim: ``K``.
        seed: in ``[0, 2**32)``.
        proj_type: ``"rademacher"``, ``"normal"``, or ``"sjlt"``, which needs a dictionary; a string
            or a member of dattri's enumeration. dattri's other kinds are refused.
        device: where to project; gradients are moved there.
        dtype: accepted for dattri's sake.
        grass_multiplier: accepted for dattri's sake.
        implementation: see `project`.
        whitenings: by ``ensemble_id``, what gradients are multiplied with before.

    Raises:
        ValueError: ``proj_type`` is none of the above, or see `Projection`.

    Source:
        ``dattri/func/projection.py`` of dattri 0.3.0, ``AbstractProjector`` and
        ``make_random_projector``.
    """

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: Any,
        device: torch.device | str,
        *,
        dtype: torch.dtype | None = None,
        grass_multiplier: int | None = None,
        implementation: str | None = None,
        whitenings: Whitenings = None,
    ) -> None:
        self.feature_dim = operator.index(feature_dim)
        self.proj_dim = operator.index(proj_dim)
        self.seed = operator.index(seed)
        self.kind = kind_of(proj_type, ("rademacher", "normal", "sjlt"))
        self.proj_type = proj_type
        self.device = device
        self.implementation, self.whitenings = implementation, whitenings
        self.projection(0)

    def projection(self, ensemble_id: int) -> Projection:
        """The random matrix of a member of the ensemble.

        Raises:
            ValueError: ``ensemble_id`` is not in ``[0, 2**31)``.
        """
        seed = keyed_seed(self.seed, operator.index(ensemble_id), "ensemble_id")
        return Projection(self.kind, self.proj_dim, seed)

    def project(self, features: Mapping[str, Tensor] | Tensor, ensemble_id: int) -> Tensor:
        """Project a batch.

        Args:
            features: ``{name: [B, *shape]}`` or ``[B, P]``, floating.
            ensemble_id: the member of the ensemble.

        Returns:
            ``[B, K]`` on this projector's device, in the dtype of ``features``.

        Raises:
            TypeError: ``features`` is not floating.
            ValueError: they do not have ``feature_dim`` columns, or there are whitenings but none
                for this member and these parameters.
        """
        whitening = whitening_of(self.whitenings, ensemble_id, "ensemble_id")
        projected = project_any(
            features if whitening is None else whiten_any(features, whitening),
            self.projection(ensemble_id),
            self.feature_dim,
            self.device,
            scale=None,
            implementation=self.implementation,
        )
        first = next(iter(features.values())) if isinstance(features, Mapping) else features
        return projected.to(first.dtype)

    def free_memory(self) -> None:
        """Nothing to free: the matrix is never stored."""


try:
    from dattri.func.projection import AbstractProjector
except ImportError:
    pass
else:
    AbstractProjector.register(DattriProjector)
