"""One-pass Gram-vector product: ΦᵀΦV without ΦᵀΦ, each feature row fetched from memory once.

    features [N, K], vectors [K, M]  ->  partials [PARTS, K, M] float32  ->  summed over PARTS

One program owns a run of consecutive rows and ``BLOCK_M`` vectors, and takes its rows ``BLOCK_N``
at a time. It walks K to form ``ΦV [BLOCK_N, BLOCK_M]`` in registers and walks K again to add
``Φᵀ(ΦV)`` to its own partial; the second walk finds the ``[BLOCK_N, K]`` rows in cache. ``ΦV`` is
never stored, there are no atomics, and the number of parts depends on N alone: the same input gives
the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..compiling import launch

# runs of rows: enough programs for the largest card, fixed so that sums do not depend on the card
_MAX_PARTS = 256
# bytes of partials held at once; more vectors are taken in groups
_PARTIAL_BYTES = 256 * 2**20

DEFAULT_CONFIG: dict[str, int] = {
    "BLOCK_N": 16,
    "BLOCK_K": 64,
    "BLOCK_M": 32,
    "num_warps": 4,
    "num_stages": 2,
}


@triton.jit(do_not_specialize=["N", "rows_per_part"])
def _gram_product_partial_kernel(  # type: ignore[no-untyped-def]
    features_ptr,  # [N, K]
    vectors_ptr,  # [K, M] float32
    partials_ptr,  # [PARTS, K, M] float32
    N,
    K,
    M,
    rows_per_part,
    stride_fn,
    stride_vk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Partial ``[K, BLOCK_M]`` of one run of rows; accumulates in float32."""
    pid_part = tl.program_id(0).to(tl.int64)
    pid_m = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    begin = pid_part * rows_per_part
    end = tl.minimum(begin + rows_per_part, N)

    for start in range(begin, end, BLOCK_N):
        # int64 (begin is): rows x stride passes 2**31
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end

        # [BLOCK_N, BLOCK_M]
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            # [BLOCK_N, BLOCK_K]; kept in cache for the second walk
            f = tl.load(
                features_ptr + offs_n[:, None] * stride_fn + offs_k[None, :],
                mask=mask_n[:, None] & mask_k[None, :],
                other=0.0,
                eviction_policy="evict_last",
            ).to(tl.float32)
            # [BLOCK_K, BLOCK_M]
            v = tl.load(
                vectors_ptr + offs_k[:, None].to(tl.int64) * stride_vk + offs_m[None, :],
                mask=mask_k[:, None] & mask_m[None, :],
                other=0.0,
            )
            acc = tl.dot(f, v, acc, input_precision="ieee")

        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            f = tl.load(
                features_ptr + offs_n[:, None] * stride_fn + offs_k[None, :],
                mask=mask_n[:, None] & mask_k[None, :],
                other=0.0,
                eviction_policy="evict_first",
            ).to(tl.float32)
            partial_ptrs = partials_ptr + (pid_part * K + offs_k[:, None]) * M + offs_m[None, :]
            mask = mask_k[:, None] & mask_m[None, :]
            # [BLOCK_K, BLOCK_M]; the first rows of a run start the partial, whatever memory held
            partial = tl.load(partial_ptrs, mask=mask & (start > begin), other=0.0)
            partial = tl.dot(tl.trans(f), acc, partial, input_precision="ieee")
            tl.store(partial_ptrs, partial, mask=mask)
        # the next rows read this partial back, perhaps in other threads
        tl.debug_barrier()


# for the compile lane: (kernel, argument types, constexprs, launch options)
KERNELS: dict[str, tuple[Any, str, dict[str, int], dict[str, int]]] = {
    f"gram_product_{name}": (
        _gram_product_partial_kernel,
        f"features_ptr:*{dtype} vectors_ptr:*fp32 partials_ptr:*fp32 N:i32 K:i32 M:i32 "
        "rows_per_part:i32 stride_fn:i64 stride_vk:i32",
        {key: DEFAULT_CONFIG[key] for key in ("BLOCK_N", "BLOCK_K", "BLOCK_M")},
        {key: DEFAULT_CONFIG[key] for key in ("num_warps", "num_stages")},
    )
    for name, dtype in (("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16"))
}


def read_config(entry: dict[str, Any], name: str) -> dict[str, int]:
    """A configuration from a file: all fields of `DEFAULT_CONFIG`.

    Args:
        entry: the fields.
        name: what to call it in an error.

    Raises:
        ValueError: a field is unknown, missing or impossible.
    """
    powers = {"BLOCK_N": (16, 256), "BLOCK_K": (16, 256), "BLOCK_M": (16, 256)}
    powers["num_warps"] = (1, 32)
    tuning.check_config(entry, name, powers, {"num_stages": (1, 16)}, required=DEFAULT_CONFIG)
    return entry


def _config(features: Tensor, M: int) -> dict[str, int]:
    """The tuned configuration of the device, or the default one."""
    if features.device.type != "cuda":
        return DEFAULT_CONFIG
    name = torch.cuda.get_device_name(features.device)
    sizes = {"N": features.shape[0], "K": features.shape[1], "M": M}
    tuned = tuning.nearest("gram_product", name, sizes)
    if tuned is None:
        return DEFAULT_CONFIG
    return read_config(tuned, f"configs/gram_product.json, {name}")


def launch_gram_product(
    features: Tensor, vectors: Tensor, damping: float, *, config: dict[str, int] | None = None
) -> Tensor:
    """``Φᵀ(ΦV) + λV`` ``[K, M]`` float32 for ``features [N, K]``, ``vectors [K, M]`` float32."""
    N, K = features.shape
    vectors = vectors.contiguous()
    M = vectors.shape[1]
    if N == 0 or M == 0:
        return vectors * damping
    config = _config(features, M) if config is None else config
    block_n = config["BLOCK_N"]
    # whole row blocks per run
    rows_per_part = triton.cdiv(triton.cdiv(N, _MAX_PARTS), block_n) * block_n
    parts = triton.cdiv(N, rows_per_part)
    group = max(1, min(M, _PARTIAL_BYTES // (4 * parts * K)))
    out = torch.empty_like(vectors)
    for first in range(0, M, group):
        v = vectors[:, first : first + group].contiguous()
        partials = v.new_empty(parts, K, v.shape[1])
        launch(
            _gram_product_partial_kernel,
            (parts, triton.cdiv(v.shape[1], config["BLOCK_M"])),
            features_ptr=features,
            vectors_ptr=v,
            partials_ptr=partials,
            N=N,
            K=K,
            M=v.shape[1],
            rows_per_part=rows_per_part,
            stride_fn=features.stride(0),
            stride_vk=v.stride(0),
            **config,
        )
        torch.add(partials.sum(dim=0), v, alpha=damping, out=out[:, first : first + group])
    return out
