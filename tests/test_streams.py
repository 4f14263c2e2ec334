"""Every Philox in the package against the published known answers, and words made into normals."""

import pytest
import torch
import triton
import triton.language as tl

from dtrak_kernels.dense import reference
from dtrak_kernels.dense.torch import _Philox
from dtrak_kernels.random.normal import normal_pairs
from dtrak_kernels.random.words import Stream, philox_words
from dtrak_kernels.random.words import box_muller as box_muller_float64
from dtrak_kernels.random.words_triton import box_muller, philox_4x32

# (counters, seed, words): Random123's kat_vectors for philox4x32-10
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        0,
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        0xFFFFFFFFFFFFFFFF,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# words at which the range reductions of Box-Muller change branch, or the logarithm has few digits
EDGES = [0, 1, 2, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 0xB504F333, 0xB504F334]
EDGES += [2**32 - 2**29, 2**32 - 3, 2**32 - 2, 2**32 - 1]


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _words_kernel(counters_ptr, words_ptr, key_low, key_high, N: tl.constexpr):
    offs = tl.arange(0, N)
    c0 = tl.load(counters_ptr + offs).to(tl.uint32)
    c1 = tl.load(counters_ptr + N + offs).to(tl.uint32)
    c2 = tl.load(counters_ptr + 2 * N + offs).to(tl.uint32)
    c3 = tl.load(counters_ptr + 3 * N + offs).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32(c0, c1, c2, c3, key_low, key_high)
    tl.store(words_ptr + offs, w0.to(tl.int64))
    tl.store(words_ptr + N + offs, w1.to(tl.int64))
    tl.store(words_ptr + 2 * N + offs, w2.to(tl.int64))
    tl.store(words_ptr + 3 * N + offs, w3.to(tl.int64))


@triton.jit
def _normals_kernel(a_ptr, b_ptr, cos_ptr, sin_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x, y = box_muller(tl.load(a_ptr + offs).to(tl.uint32), tl.load(b_ptr + offs).to(tl.uint32))
    tl.store(cos_ptr + offs, x)
    tl.store(sin_ptr + offs, y)


def _triton_words(counters: torch.Tensor, seed: int) -> torch.Tensor:
    words = torch.empty_like(counters)
    _words_kernel[(1,)](
        counters_ptr=counters,
        words_ptr=words,
        key_low=seed & 0xFFFFFFFF,
        key_high=seed >> 32,
        N=counters.shape[1],
    )
    return words


@pytest.mark.parametrize("counters, seed, words", KNOWN_ANSWERS)
def test_eager_words_are_the_known_answers(counters, seed, words):
    assert tuple(int(w) for w in philox_words(*counters, seed)) == words
    tensors = tuple(torch.tensor(c) for c in counters)
    assert tuple(int(w) for w in reference.philox(tensors, seed)) == words


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32 - 1, 2**40 + 3, 2**63 - 1])
def test_every_implementation_gives_the_same_words(seed, device):
    counters = torch.randint(0, 2**32, (4, 64), generator=torch.Generator().manual_seed(seed % 99))
    counters[:, 0] = 2**32 - 1
    oracle = torch.stack(reference.philox(tuple(counters), seed))
    assert torch.equal(torch.stack(philox_words(*counters, seed)), oracle)
    assert torch.equal(_triton_words(counters.to(device), seed).cpu(), oracle)


def test_triton_words_are_a_known_answer(device):
    counters, seed, words = KNOWN_ANSWERS[2]
    counters = torch.tensor(counters, device=device)[:, None].expand(4, 16).contiguous()
    assert _triton_words(counters, seed)[:, 5].tolist() == list(words)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_buffered_words_are_the_reference_words_on_every_use(seed):
    philox = _Philox(seed, Stream.NORMAL, torch.device("cpu"))
    for first in (0, 2**32 - 2, 2**45):
        c0 = torch.arange(2**31 - 3, 2**31 + 4)[:, None]
        index = first + torch.arange(5)
        even, odd = philox(c0, index)
        words = [w & 0xFFFFFFFF for w in (even[0], odd[0], even[1], odd[1])]
        counters = (c0, index % 2**32, index // 2**32, torch.tensor(int(Stream.NORMAL)))
        assert torch.equal(torch.stack(words), torch.stack(reference.philox(counters, seed)))


def test_streams_of_one_seed_differ():
    words = [philox_words(1, 2, 0, stream, 5)[0] for stream in Stream]
    assert len({int(w) for w in words}) == len(Stream)


@pytest.fixture(scope="module")
def word_pairs() -> torch.Tensor:
    words = torch.randint(0, 2**32, (2, 2**17), generator=torch.Generator().manual_seed(0))
    edges = torch.tensor(EDGES)
    grid = torch.cartesian_prod(edges, edges).T
    words[:, : grid.shape[1]] = grid
    return words


def _assert_within_1e_6(actual: torch.Tensor, oracle: torch.Tensor) -> None:
    assert torch.isfinite(actual).all()
    error = (actual.double().cpu() - oracle).abs() / oracle.abs().clamp(min=1)
    assert error.max() <= 1e-6


def test_triton_normals_are_within_1e_6(word_pairs, device):
    a, b = word_pairs.to(device)
    x, y = torch.empty(2, a.numel(), device=device)
    _normals_kernel[(1,)](a_ptr=a, b_ptr=b, cos_ptr=x, sin_ptr=y, N=a.numel())
    oracle = box_muller_float64(*word_pairs)
    _assert_within_1e_6(x, oracle[0])
    _assert_within_1e_6(y, oracle[1])


def test_eager_normals_are_within_1e_6(word_pairs):
    oracle = box_muller_float64(*word_pairs)
    for dtype in (torch.float32, torch.float64):
        # the words arrive with unrelated bits above the low 32
        pair = normal_pairs(word_pairs[0] - 2**40, word_pairs[1] + 2**33, dtype)
        _assert_within_1e_6(pair[0], oracle[0])
        _assert_within_1e_6(pair[1], oracle[1])
