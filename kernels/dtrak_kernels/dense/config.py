"""How a launch of the dense kernels is cut up: what was measured on the card, or a default.

Measured configurations lie in ``configs/project_<kind>.json``, which `tuning` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import tuning


@dataclass(frozen=True)
class DenseConfig:
    """How a product is cut up; never what it computes.

    Attributes:
        block_b: most rows of values per program, a power of two of at least 16.
        block_k: columns of the matrix per program, a power of two of at least 16.
        num_warps: warps per program.
        num_stages: depth of the asynchronous loads.
        splits: spans of parameters; 0 fills the device.
    """

    block_b: int
    block_k: int = 128
    num_warps: int = 8
    num_stages: int = 2
    splits: int = 0


def default_config(arch: int | str, kind: str) -> DenseConfig:
    """What to launch with where nothing was measured.

    Args:
        arch: CUDA compute capability times ten (80, 90, ...), or the name of an AMD architecture.
        kind: of the matrix, ``"rademacher"`` or ``"normal"``.
    """
    # wgmma reads the right operand from shared memory. Elsewhere a wider tile does not fit: before
    # it in registers, on Blackwell in tensor memory (512 columns, beyond which Triton 3.7 emits a
    # trap), on AMD in 64 KB of shared memory
    if arch == 90:
        # ptxas serializes products that still run while normals of the next step are made (C7515);
        # values are loaded before normals are made, which hides that they come a step at a time
        return DenseConfig(block_b=128, num_stages=1 if kind == "normal" else 3)
    return DenseConfig(block_b=64, num_stages=2)


def read_config(entry: dict[str, Any], name: str) -> DenseConfig:
    """A configuration from a file.

    Args:
        entry: fields of `DenseConfig`.
        name: what to call it in an error.

    Raises:
        ValueError: a field is unknown, missing or not as `DenseConfig` says.
    """
    powers = {"block_b": (16, 256), "block_k": (16, 256), "num_warps": (1, 32)}
    counts = {"num_stages": (1, 16), "splits": (0, 2**15)}
    tuning.check_config(entry, name, powers, counts, required=("block_b",))
    return DenseConfig(**entry)


def config_on(kind: str, grads: Tensor, proj_dim: int) -> DenseConfig:
    """What to launch with on the device of ``grads [B, P]``: measured there, or the default."""
    if grads.device.type != "cuda":
        return DenseConfig(block_b=128, block_k=64, splits=2)
    sizes = {"B": len(grads), "P": grads.shape[1], "K": proj_dim}
    name = torch.cuda.get_device_name(grads.device)
    tuned = tuning.nearest(f"project_{kind}", name, sizes)
    if tuned is None:
        return default_config(tuning.arch_of(grads.device), kind)
    return read_config(tuned, f"configs/project_{kind}.json, {name}")
