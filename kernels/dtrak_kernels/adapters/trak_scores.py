"""A score computer for the TRAK library that never forms or inverts ``XᵀX``.

    TRAKer(..., score_computer=RidgeScoreComputer, lambda_reg=...)

The library's own computer inverts ``XᵀX + λI`` in float32 and divides the inverse by its mean
absolute entry, so its scores have no absolute scale: multiplying every gradient by 10 multiplies
its features by 10 instead of 0.1, and checkpoints are averaged with arbitrary weights. Here the
inverse comes from a float64 factorisation of the smaller Gram, and the division is off unless
``trak_scale=True``:

    TRAKer(..., score_computer=functools.partial(RidgeScoreComputer, trak_scale=True))
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..ridge.solver import RidgeSolver

# rows of the score matrix, or of the inverse, held at once
_ROWS = 4096


class RidgeScoreComputer:
    """The three methods ``TRAKer`` calls, on :class:`RidgeSolver`.

    ``lambda_reg`` keeps the library's name and meaning: it is added to ``XᵀX``, where X are the
    library's stored gradients, projected and divided by the root of the number of parameters.

    Args:
        dtype: of the returned features; the library passes float16 unless ``use_half_precision`` is
            off, and unscaled features may not fit it (see :meth:`get_x_xtx_inv`).
        device: where the factorisation is done.
        logging_level: accepted for the library's sake; nothing is logged.
        lambda_reg: λ >= 0; 0 is refused where ``XᵀX`` is singular.
        trak_scale: divide the inverse by its mean absolute entry, as the library does.

    Raises:
        ValueError: ``lambda_reg`` is negative or not finite.

    Source:
        ``trak/score_computers.py`` of traker 0.3.2, ``AbstractScoreComputer`` for the interface and
        ``BasicScoreComputer.get_x_xtx_inv`` for the rescaling.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device | str,
        logging_level: int = logging.INFO,
        lambda_reg: float = 0.0,
        *,
        trak_scale: bool = False,
    ) -> None:
        if not 0.0 <= lambda_reg < float("inf"):
            raise ValueError(f"lambda_reg must be finite and at least 0, got {lambda_reg}")
        self.dtype = dtype
        self.device = device
        self.lambda_reg = lambda_reg
        self.trak_scale = trak_scale

    def get_xtx(self, grads: Tensor) -> Tensor:
        """An empty ``[0, 0]`` tensor: ``XᵀX`` may be the larger Gram, and is not needed."""
        return torch.empty(0, 0, dtype=torch.float32, device=self.device)

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """``X (XᵀX + λI)⁻¹``, from ``grads`` alone.

        Args:
            grads: ``[N, K]`` projected gradients X.
            xtx: ignored.

        Returns:
            ``[N, K]`` in this computer's dtype.

        Raises:
            ValueError: λ = 0 where ``XᵀX`` is singular, a non-finite row of ``grads``, or features
                that overflow ``dtype`` or vanish in it.
        """
        solver = RidgeSolver(grads.to(self.device))
        features = solver.preconditioned(self.lambda_reg)
        if self.trak_scale:
            features /= self._mean_abs_inverse(solver)
        limits = torch.finfo(self.dtype)
        largest = float(features.abs().max())
        if largest > limits.max or 0.0 < largest < limits.tiny:
            raise ValueError(
                f"features must fit {self.dtype}, got a largest entry of {largest:.3e}; turn half "
                "precision off or trak_scale on"
            )
        return features.to(self.dtype)

    def get_scores(self, features: Tensor, target_grads: Tensor, accumulator: Tensor) -> None:
        """Add ``features @ target_gradsᵀ`` to ``accumulator``, computed in float32.

        Args:
            features: ``[N, K]`` from :meth:`get_x_xtx_inv`.
            target_grads: ``[M, K]``.
            accumulator: ``[N, M]`` on any device, added to in place.
        """
        targets = target_grads.float().T
        for start in range(0, features.shape[0], _ROWS):
            scores = features[start : start + _ROWS].float() @ targets
            accumulator[start : start + _ROWS] += scores.to(accumulator.device)

    def _mean_abs_inverse(self, solver: RidgeSolver) -> float:
        """The mean absolute entry of ``(XᵀX + λI)⁻¹``, a block of its rows at a time."""
        K, total = solver.num_features, 0.0
        for start in range(0, K, _ROWS):
            stop = min(start + _ROWS, K)
            unit = torch.zeros(stop - start, K, dtype=torch.float64, device=self.device)
            unit[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
            total += float(solver.inverse_times(unit, self.lambda_reg).abs().sum())
        return total / K**2
