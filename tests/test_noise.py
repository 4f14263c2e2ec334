import hashlib
import math

import numpy as np
import pytest
import scipy.stats
import torch
from numerics import relative_error

import dtrak.features.noise
from dtrak.features.noise import sample_noise
from dtrak_kernels.dense import reference

NOISE_STREAM = 5

# ids "0" and "train/17", timesteps 0 and 900, seed 7
GOLDEN = [
    [
        [0.0979545089, -0.5710621904, -1.6309050207, -0.6117498901, 0.2412438535],
        [0.2461265570, 1.5900062636, 0.2017159666, 0.3824124758, -0.1121006105],
    ],
    [
        [-1.3965127945, 0.5912524263, -0.3150830055, -0.1685759006, 0.3074570537],
        [0.8050233284, -1.3065000865, -0.1508606776, -0.4054398965, -0.8553126906],
    ],
]


def oracle(name, timestep, size, seed):
    """float64, one element at a time."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    a, b = np.frombuffer(digest, "<u4")
    values = []
    for group in range(-(-size // 4)):
        counters = [timestep * 2**20 + group, int(a), int(b), NOISE_STREAM]
        words = reference.philox(tuple(torch.tensor([c]) for c in counters), seed)
        w = [int(word) for word in words]
        for first, second in ((w[0], w[1]), (w[2], w[3])):
            radius = math.sqrt(-2 * math.log((first + 1) / 2**32))
            angle = 2 * math.pi * second / 2**32
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(values[:size], dtype=torch.float64)


# multiples of four and not; one element; no axis
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (2, 3), (5,), (1,), ()])
def test_matches_oracle(shape, device):
    ids, timesteps, seed = ["digits/7", "ünï.png"], [0, 1, 999, 4095], 2**40 + 3
    noise = sample_noise(ids, timesteps, shape, seed=seed, device=device, dtype=torch.float64)
    size = math.prod(shape)
    expected = torch.stack(
        [torch.stack([oracle(name, t, size, seed) for t in timesteps]) for name in ids]
    )
    assert noise.shape == (2, 4, *shape)
    assert relative_error(noise, expected.reshape(noise.shape)) < 1e-14


def test_golden_values():
    """These must never change: stored features depend on them."""
    noise = sample_noise(["0", "train/17"], [0, 900], (5,), seed=7)
    expected = torch.tensor(GOLDEN)
    assert relative_error(noise, expected) < 1e-7


def test_depends_on_nothing_but_seed_id_and_timestep():
    ids, timesteps, shape = [f"image {i}" for i in range(6)], [0, 100, 250, 999], (1, 3, 5)
    whole = sample_noise(ids, timesteps, shape, seed=1)
    for i, name in enumerate(ids):
        for s, timestep in enumerate(timesteps):
            alone = sample_noise([name], [timestep], shape, seed=1)
            assert torch.equal(alone[0, 0], whole[i, s])
    order = [4, 1, 5]
    shuffled = sample_noise([ids[i] for i in order], timesteps[::-1], shape, seed=1)
    assert torch.equal(shuffled, whole[order].flip(1))
    twice = sample_noise([ids[2], ids[2]], [100, 100], shape, seed=1)
    assert torch.equal(twice, whole[2, 1].expand(2, 2, *shape))


def test_smaller_image_has_the_first_values_of_a_larger_one():
    large = sample_noise(["a"], [3], (64,), seed=0)[0, 0]
    for size in range(12):
        assert torch.equal(sample_noise(["a"], [3], (size,), seed=0)[0, 0], large[:size])


def test_is_standard_normal():
    x = sample_noise([str(i) for i in range(50)], [0, 500], (2001,), seed=0, dtype=torch.float64)
    x = x.flatten().numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3
    deviations = np.sqrt(np.array([1, 2, 6, 24]) / x.size)
    moments = [x.mean(), x.var() - 1, scipy.stats.skew(x), scipy.stats.kurtosis(x)]
    assert (np.abs(moments) < 4 * deviations).all(), moments


def test_distinct_keys_are_uncorrelated():
    ids = ["a", "b", "aa", "a ", "0", "1", "00"]
    blocks = [
        sample_noise(ids, [0, 1, 2, 999], (4099,), seed=s).flatten(0, 1) for s in (0, 1, 2**32)
    ]
    rows = torch.cat(blocks).double()
    correlations = torch.corrcoef(rows)[*torch.triu_indices(len(rows), len(rows), 1)]
    # 3,486 pairs: a normal deviate above 5.5 is one chance in ten thousand
    assert correlations.abs().max() < 5.5 / math.sqrt(rows.shape[1])


def test_neighbouring_elements_are_uncorrelated():
    x = sample_noise([str(i) for i in range(100)], [0, 1], (1000,), seed=3).double()
    for lag in range(1, 9):
        correlation = (x[..., lag:] * x[..., :-lag]).mean()
        assert abs(correlation) < 4.5 / math.sqrt(x[..., lag:].numel()), lag


def test_counters_of_the_largest_image_do_not_meet_those_of_the_next_timestep(monkeypatch):
    seen = []

    def words(c0, *rest):
        seen.append((int(c0.min()), int(c0.max())))
        return (torch.zeros(1, dtype=torch.int64).expand(c0.shape),) * 4

    monkeypatch.setattr(dtrak.features.noise, "philox_words", words)
    for timestep in (0, 1, 4095):
        sample_noise(["a"], [timestep], (2, 2**21), seed=0, dtype=torch.float16)
    assert seen[0][1] < seen[1][0]
    assert seen[2][1] < 2**32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes_are_float64_rounded_once(dtype):
    wide = sample_noise(["a", "b"], [5, 6], (33,), seed=0, dtype=torch.float64)
    assert torch.equal(sample_noise(["a", "b"], [5, 6], (33,), seed=0, dtype=dtype), wide.to(dtype))


def test_global_random_state_is_untouched():
    state = torch.get_rng_state()
    sample_noise(["a"], [0], (4,), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_asked_for_is_an_empty_answer():
    assert sample_noise([], [0], (2, 2), seed=0).shape == (0, 1, 2, 2)
    assert sample_noise(["a"], [], (2, 2), seed=0).shape == (1, 0, 2, 2)


def test_file_names_that_are_not_utf8_are_ids_too():
    odd = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    assert sample_noise([odd], [0], (3,), seed=0).isfinite().all()


@pytest.mark.parametrize(
    "timesteps, shape, seed, message",
    [
        ([-1, 5], (4,), 0, r"timesteps must be in \[0, 4096\), got \[-1, 5\]"),
        ([0, 4096], (4,), 0, r"timesteps must be in \[0, 4096\), got \[0, 4096\]"),
        ([0], (4, 2**20 + 1), 0, "shape must have at most 4194304 elements, got 4194308"),
        ([0], (4,), -1, r"noise seed must be in \[0, 2\*\*63\), got -1"),
        ([0], (4,), 2**63, r"noise seed must be in \[0, 2\*\*63\), got 9223372036854775808"),
    ],
)
def test_refuses(timesteps, shape, seed, message):
    with pytest.raises(ValueError, match=message):
        sample_noise(["a"], timesteps, shape, seed=seed)
