"""Gaussian noise that is a function of (noise seed, sample id, timestep) and of nothing else.

A sample keeps its noise whatever the batch size, the order of the data or the other timesteps, so
features computed today can be continued tomorrow. (Reseeding a generator per batch, as the
published code does, ties a sample's noise to its position in the batch.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dtrak_kernels.random.words import Stream, box_muller, philox_words

from ..runs.choices import check_seed
from .timesteps import MAX_TIMESTEPS

# a counter of 32 bits holds the timestep above the index of a group of four elements
_GROUP_BITS = 20
_MAX_ELEMENTS = 4 * 2**_GROUP_BITS
assert MAX_TIMESTEPS == 2 ** (32 - _GROUP_BITS)


def _id_words(ids: Sequence[str]) -> Tensor:
    """Two 32-bit words of every id, ``[N, 2]`` int64."""
    # file names that are not UTF-8 reach Python as surrogates
    names = [name.encode("utf-8", "surrogateescape") for name in ids]
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names]
    words = [(int.from_bytes(d[:4], "little"), int.from_bytes(d[4:], "little")) for d in digests]
    return torch.tensor(words, dtype=torch.int64).reshape(-1, 2)


def sample_noise(
    ids: Sequence[str],
    timesteps: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise for every sample at every timestep.

    Elements ``4g`` to ``4g + 3`` of the flattened image come from the four Philox words at counters
    ``(2²⁰·timestep + g, a, b, Stream.NOISE)``, where ``a`` and ``b`` are the two little-endian
    words of the 8-byte BLAKE2b digest of the id; words 0, 1 and words 2, 3 each give a Box-Muller
    pair.

    Args:
        ids: N sample ids.
        timesteps: S timestep indices in ``[0, 4096)``.
        shape: shape of one image (or latent), at most 4,194,304 elements.
        seed: noise seed, in ``[0, 2**63)``.
        device: where the noise is made; another device may round the last bit of float64 otherwise.
        dtype: its dtype. The noise is made in float64 and rounded once, so dtypes agree.

    Returns:
        ``[N, S, *shape]``.

    Raises:
        ValueError: an image is too large, or a timestep or the seed is out of range.
    """
    size = math.prod(shape)
    groups = -(-size // 4)
    if size > _MAX_ELEMENTS:
        raise ValueError(f"shape must have at most {_MAX_ELEMENTS} elements, got {size}")
    if timesteps and not 0 <= min(timesteps) <= max(timesteps) < MAX_TIMESTEPS:
        raise ValueError(f"timesteps must be in [0, {MAX_TIMESTEPS}), got {list(timesteps)}")
    check_seed("noise seed", seed)
    words = _id_words(ids).to(device)
    steps = torch.tensor(list(timesteps), dtype=torch.int64, device=device) << _GROUP_BITS
    counter = steps[:, None] + torch.arange(groups, device=device)
    bits = philox_words(
        counter[None], words[:, 0, None, None], words[:, 1, None, None], int(Stream.NOISE), seed
    )
    normals = torch.stack([*box_muller(bits[0], bits[1]), *box_muller(bits[2], bits[3])], dim=-1)
    return normals.flatten(2)[..., :size].reshape(len(ids), len(timesteps), *shape).to(dtype)
