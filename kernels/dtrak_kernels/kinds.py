"""The kinds of random matrices and what they accept; importing it imports no torch."""

from __future__ import annotations

DENSE_KINDS = ("rademacher", "normal")
SKETCH_KINDS = ("sjlt", "kronecker")
KINDS = (*DENSE_KINDS, *SKETCH_KINDS, "none")

# a smaller sketch has no room for one tile
MIN_PROJ_DIM = 256
MAX_SEED = 2**63 - 1


def check_projection(kind: str, proj_dim: int, seed: int) -> None:
    """Refuse a kind, width and seed that no `Projection` has.

    Raises:
        TypeError: ``proj_dim`` or ``seed`` is not an int.
        ValueError: the kind is unknown, or a number is out of its range.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(proj_dim, bool) or not isinstance(proj_dim, int):
        raise TypeError(f"proj_dim must be an int, got {type(proj_dim).__name__}")
    if kind == "none" and proj_dim != 0:
        raise ValueError(f"proj_dim must be 0 for kind 'none', got {proj_dim}")
    if kind != "none" and proj_dim <= 0:
        raise ValueError(f"proj_dim must be at least 1, got {proj_dim}")
    if kind == "sjlt" and proj_dim < MIN_PROJ_DIM:
        raise ValueError(
            f"proj_dim must be at least {MIN_PROJ_DIM} for kind 'sjlt', got {proj_dim}: "
            "use 'rademacher' for a smaller one"
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
