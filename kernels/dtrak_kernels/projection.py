"""A random matrix as a value: what every implementation regenerates, and none stores.

Importing it imports no torch: what options may be is known before anything heavy is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DENSE_KINDS = ("rademacher", "normal")
SKETCH_KINDS = ("sjlt", "kronecker")
KINDS = (*DENSE_KINDS, *SKETCH_KINDS, "none")
GENERATORS = ("philox", "fast_jl")

# streaming multiprocessors of the cards TRAK's features are made on
NUM_SMS = {"v100": 80, "a6000": 84, "a100": 108, "4090": 128, "h100": 132, "h200": 132, "l40s": 142}

# r of kind "kronecker"
DEFAULT_FACTOR_DIM = 16

# a smaller sketch of kind "sjlt" has no room for one tile
MIN_PROJ_DIM = 256
MAX_SEED = 2**63 - 1
# columns that share a warp in TRAK's CUDA projector
FAST_JL_GROUP = 32


@dataclass(frozen=True)
class Projection:
    """A random matrix ``R [P, K]``, as a value: equal fields mean equal matrices on every device.

    Scaled so that E[R Rᵀ] = I: inner products of features estimate inner products of gradients.

    Attributes:
        kind: ``"rademacher"`` (±1/√K) or ``"normal"`` (N(0, 1/K)), dense as in TRAK; ``"sjlt"``,
            the tile-chained sparse Johnson-Lindenstrauss sketch, which costs next to nothing;
            ``"kronecker"``, two-sided as in LoGra, the cheapest and the least accurate (see
            `kronecker`); ``"none"``, the identity (features are the gradients themselves: small
            models only).
        proj_dim: ``K``, a positive integer; for ``"none"`` nothing, K is the number of parameters.
        seed: key of the random stream, in ``[0, 2**63)``.
        generator: random stream of the dense kinds: ``"philox"``, or ``"fast_jl"``, TRAK's CUDA
            projector bit for bit on any device. That matrix depends on P and on the card it is made
            on, its K is a multiple of 32 and its seed below 2**32, and it is statistically poor for
            small P (several times the theoretical error at P = 1,000): it is here to continue
            features made elsewhere.
        num_sms: for ``"fast_jl"`` only, and then required: streaming multiprocessors of the card to
            imitate, a number or one of ``"v100"``, ``"a6000"``, ``"a100"``, ``"4090"``,
            ``"h100"``, ``"h200"``, ``"l40s"``; kept as the number.
        half_inputs: for ``"fast_jl"`` only: round gradients, and normal entries, to float16 as
            TRAK's kernel does. Entries beyond 65504 become infinite, those below 3e-8 zero.
        factor_dim: for ``"kronecker"`` only: r, to which a layer's input and output features are
            projected; 16 if ``None``.
    """

    kind: str
    proj_dim: int = 0
    seed: int = 0
    generator: str = "philox"
    num_sms: int | str | None = None
    half_inputs: bool = False
    factor_dim: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.proj_dim, bool) or not isinstance(self.proj_dim, int):
            raise TypeError(f"proj_dim must be an int, got {type(self.proj_dim).__name__}")
        if self.kind == "none" and self.proj_dim != 0:
            raise ValueError(f"proj_dim must be 0 for kind 'none', got {self.proj_dim}")
        if self.kind != "none" and self.proj_dim <= 0:
            raise ValueError(f"proj_dim must be at least 1, got {self.proj_dim}")
        if self.kind == "sjlt" and self.proj_dim < MIN_PROJ_DIM:
            raise ValueError(
                f"proj_dim must be at least {MIN_PROJ_DIM} for kind 'sjlt', got {self.proj_dim}: "
                "use 'rademacher' for a smaller one"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an int, got {type(self.seed).__name__}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.generator not in GENERATORS:
            raise ValueError(f"generator must be 'philox' or 'fast_jl', got {self.generator!r}")
        self._check_factor_dim()
        if self.generator == "fast_jl":
            self._check_fast_jl()
        elif self.num_sms is not None:
            raise ValueError(
                f"num_sms must be None for generator 'philox', got {self.num_sms!r}: its matrix "
                "does not depend on the card"
            )
        elif self.half_inputs:
            raise ValueError("half_inputs must be False for generator 'philox', got True")

    def _check_factor_dim(self) -> None:
        if self.kind != "kronecker":
            if self.factor_dim is not None:
                raise ValueError(
                    f"factor_dim must be None for kind {self.kind!r}, got {self.factor_dim!r}"
                )
            return
        factor_dim = DEFAULT_FACTOR_DIM if self.factor_dim is None else self.factor_dim
        if isinstance(factor_dim, bool) or not isinstance(factor_dim, int) or factor_dim < 1:
            raise ValueError(f"factor_dim must be a positive int, got {factor_dim!r}")
        object.__setattr__(self, "factor_dim", factor_dim)

    def _check_fast_jl(self) -> None:
        if self.kind not in DENSE_KINDS:
            raise ValueError(
                f"kind must be 'rademacher' or 'normal' for generator 'fast_jl', got {self.kind!r}"
            )
        if self.proj_dim % FAST_JL_GROUP:
            raise ValueError(
                f"proj_dim must be a multiple of {FAST_JL_GROUP} for generator 'fast_jl', "
                f"got {self.proj_dim}"
            )
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32 for generator 'fast_jl', got {self.seed}")
        num_sms = NUM_SMS.get(self.num_sms) if isinstance(self.num_sms, str) else self.num_sms
        if isinstance(num_sms, bool) or not isinstance(num_sms, int) or num_sms < 1:
            raise ValueError(
                f"num_sms must be a positive int or one of {', '.join(NUM_SMS)} for generator "
                f"'fast_jl', got {self.num_sms!r}"
            )
        # the value is the number: a card's name means nothing to the matrix
        object.__setattr__(self, "num_sms", num_sms)

    def num_features(self, grad_dim: int) -> int:
        """``K`` for a gradient of ``grad_dim`` parameters."""
        return grad_dim if self.kind == "none" else self.proj_dim

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return asdict(self)
