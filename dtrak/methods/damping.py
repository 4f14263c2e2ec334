"""How much the kernel matrix is damped, as it is asked for and as a number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrak_kernels.ridge import RidgeSolver

_AUTO = "auto"


@dataclass(frozen=True)
class Damping:
    """λ before the features are known.

    Attributes:
        value: a number; None for the maximum of the leave-one-out likelihood.
        is_relative: whether it counts mean squared feature norms of the training set.
    """

    value: float | None
    is_relative: bool = False

    @classmethod
    def parse(cls, text: str | float) -> Damping:
        """``"auto"``, a number in units of the Gram, or one with an ``x`` behind it.

        Raises:
            ValueError: it is none of these, negative or not finite.
        """
        if text == _AUTO:
            return cls(None)
        words = str(text)
        is_relative = words.endswith("x")
        try:
            value = float(words.removesuffix("x"))
        except ValueError:
            value = math.nan
        if not 0 <= value < math.inf:
            raise ValueError(
                f"--damping must be 'auto', a finite number of at least 0, or one such as 1x, got "
                f"{text!r}"
            )
        return cls(value, is_relative)

    def __str__(self) -> str:
        if self.value is None:
            return _AUTO
        return repr(self.value).removesuffix(".0") + ("x" if self.is_relative else "")

    def resolve(self, solver: RidgeSolver) -> float:
        """λ in units of the Gram of the solver's features, a sum over training samples."""
        if self.value is None:
            return solver.auto_damping()
        return self.value * damping_unit(solver) if self.is_relative else self.value


def damping_unit(solver: RidgeSolver) -> float:
    """``1x``: the mean squared norm of the solver's features."""
    return solver.mean_squared_norm()
