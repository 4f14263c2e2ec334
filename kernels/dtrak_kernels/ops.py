"""What is accepted: the public operations, validated. The implementation is chosen by the tensor's device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .streams import MAX_SEED

DENSE_KINDS = ("rademacher", "normal")
KINDS = (*DENSE_KINDS, "sjlt", "none")


@dataclass(frozen=True)
class Projection:
    """A random matrix ``R [P, K]``, as a value: equal fields mean equal matrices on every device.

    Scaled so that E[R Rᵀ] = I: inner products of features estimate inner products of gradients.

    Attributes:
        kind: ``"rademacher"`` (±1/√K) or ``"normal"`` (N(0, 1/K)), dense as in TRAK; ``"sjlt"``, the
            tile-chained sparse Johnson-Lindenstrauss sketch, which costs next to nothing; ``"none"``,
            the identity (features are the gradients themselves: small models only).
        proj_dim: ``K``, a positive integer; 0 for ``"none"``, whose K is the number of parameters.
        seed: key of the random stream, in ``[0, 2**63)``.
        generator: random stream of the dense kinds; ``"philox"``.
    """

    kind: str
    proj_dim: int
    seed: int = 0
    generator: str = "philox"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.proj_dim, bool) or not isinstance(self.proj_dim, int):
            raise TypeError(f"proj_dim must be an int, got {type(self.proj_dim).__name__}")
        if self.kind == "none" and self.proj_dim != 0:
            raise ValueError(f"proj_dim must be 0 for kind 'none', got {self.proj_dim}")
        if self.kind != "none" and self.proj_dim <= 0:
            raise ValueError(f"proj_dim must be at least 1, got {self.proj_dim}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.generator != "philox":
            raise ValueError(f"generator must be 'philox', got {self.generator!r}")

    def num_features(self, grad_dim: int) -> int:
        """``K`` for a gradient of ``grad_dim`` parameters."""
        return grad_dim if self.kind == "none" else self.proj_dim

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return asdict(self)
