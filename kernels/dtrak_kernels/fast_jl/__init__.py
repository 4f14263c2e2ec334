"""The six functions of TRAK's CUDA extension ``fast_jl``, in torch, for any device.

    import dtrak_kernels.fast_jl as fast_jl          # or dtrak_kernels.trak.install()

The same matrices bit for bit: ``num_feature_tiles`` is the number of multiprocessors callers read
from their GPU, and may be that of another card. Entries are ±1 or N(0, 1), not divided by √N. What
differs from the extension: any device, any batch, N a multiple of 32 instead of 512, bfloat16 and
float64 as well, and gradients are not rounded to float16 unless ``half_inputs`` says so. The number
in a name is the batch the extension compiles for, and changes nothing here.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import project
from ..projection import Projection


def _project(
    kind: str, grads: Tensor, proj_dim: int, seed: int, num_sms: int, half_inputs: bool
) -> Tensor:
    # callers pass numpy integers, and seeds that the extension's argument wraps
    projection = Projection(
        kind, int(proj_dim), int(seed) % 2**32, "fast_jl", int(num_sms), half_inputs
    )
    return project(grads.detach(), projection, scale=1.0)


def project_rademacher_8(
    input: Tensor, N: int, seed: int, num_feature_tiles: int, *, half_inputs: bool = False
) -> Tensor:
    """``input @ R``, R the extension's unscaled ±1 matrix, never stored.

    Args:
        input: ``[B, P]`` floating, last dimension contiguous.
        N: columns of R, a multiple of 32.
        seed: taken modulo 2**32.
        num_feature_tiles: multiprocessors of the GPU whose matrix is wanted.
        half_inputs: round ``input`` (and normal entries) to float16 as the extension does.

    Returns:
        ``[B, N]`` float32 (float64 if ``input`` is).

    Raises:
        TypeError: ``input`` is not floating.
        ValueError: ``input`` is not ``[B, P]`` with contiguous rows, N is not a positive multiple
            of 32, or ``num_feature_tiles`` is not positive.

    Source:
        fast_jl 0.1.3, ``project_rademacher_8``.
    """
    return _project("rademacher", input, N, seed, num_feature_tiles, half_inputs)


def project_rademacher_16(
    input: Tensor, N: int, seed: int, num_feature_tiles: int, *, half_inputs: bool = False
) -> Tensor:
    """The same as `project_rademacher_8`."""
    return _project("rademacher", input, N, seed, num_feature_tiles, half_inputs)


def project_rademacher_32(
    input: Tensor, N: int, seed: int, num_feature_tiles: int, *, half_inputs: bool = False
) -> Tensor:
    """The same as `project_rademacher_8`."""
    return _project("rademacher", input, N, seed, num_feature_tiles, half_inputs)


def project_normal_8(
    input: Tensor, N: int, seed: int, num_feature_tiles: int, *, half_inputs: bool = False
) -> Tensor:
    """As `project_rademacher_8`, with N(0, 1) entries, equal to the extension's to 1e-5."""
    return _project("normal", input, N, seed, num_feature_tiles, half_inputs)


def project_normal_16(
    input: Tensor, N: int, seed: int, num_feature_tiles: int, *, half_inputs: bool = False
) -> Tensor:
    """The same as `project_normal_8`."""
    return _project("normal", input, N, seed, num_feature_tiles, half_inputs)


def project_normal_32(
    input: Tensor, N: int, seed: int, num_feature_tiles: int, *, half_inputs: bool = False
) -> Tensor:
    """The same as `project_normal_8`."""
    return _project("normal", input, N, seed, num_feature_tiles, half_inputs)
