"""TRAK's CUDA projector on any device: its matrix bit for bit, from any place in it."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import assert_as_good_as, moat, relative_error
from torch import nn

from dtrak_kernels import GradientSketcher, Projection, project, project_
from dtrak_kernels.dense.torch import WORKSPACE_BYTES
from dtrak_kernels.fast_jl import reference
from dtrak_kernels.fast_jl.torch import Xorwow, _uniform

with np.load(Path(__file__).parent / "fixtures" / "fast_jl.npz") as file:
    GOLDEN = {key: file[key] for key in file}
CASES = [key for key in GOLDEN if not key.endswith("_rows")]
KINDS = ["rademacher", "normal"]
# (P, num_sms): one tile; less than a step; ragged; tiles that stay empty; fewer rows than tiles
TILINGS = [(90, 1), (50, 7), (333, 5), (109, 108), (9, 132)]

each_kind = pytest.mark.parametrize("kind", KINDS)


def fast_jl(kind, proj_dim=64, seed=7, num_sms=5, **changes):
    return Projection(kind, proj_dim, seed, "fast_jl", num_sms, **changes)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of_matrix(projection, grad_dim, rows, device):
    """Rows of the unscaled matrix, one `project_` of a run of them at a time."""
    parts = []
    for first in range(0, len(rows), 64):
        index = torch.as_tensor(rows[first : first + 64], dtype=torch.int64)
        low, high = int(index.min()), int(index.max()) + 1
        one_hot = nn.functional.one_hot(index - low, high - low).float().to(device)
        out = torch.zeros(len(index), projection.proj_dim, device=device)
        parts.append(
            project_(one_hot, projection, offset=low, out=out, grad_dim=grad_dim, scale=1.0)
        )
    return torch.cat(parts).cpu()


@pytest.mark.parametrize("case", CASES)
def test_matrix_is_the_golden_one(case, device):
    P, K, seed, tiles = map(int, re.findall(r"\d+", case))
    kind = case.split("_")[0]
    rows = GOLDEN[case + "_rows"]
    actual = rows_of_matrix(fast_jl(kind, K, seed, tiles), P, rows, device)
    if kind == "rademacher":
        golden = 2.0 * torch.from_numpy(np.unpackbits(GOLDEN[case], axis=1)) - 1
        assert torch.equal(actual, golden)
    else:
        # the host and a GPU differ in the last bits of a logarithm
        assert (actual[:, :64] - torch.from_numpy(GOLDEN[case])).abs().max() < 1e-5


@pytest.mark.parametrize(
    "case", ["rademacher_P37_K512_seed7_tiles132", "normal_P50_K512_seed0_tiles132"]
)
def test_reference_is_the_golden_one(case):
    P, _, seed, tiles = map(int, re.findall(r"\d+", case))
    kind = case.split("_")[0]
    matrix = reference.matrix(kind, P, 64, seed, tiles)
    if kind == "rademacher":
        golden = 2.0 * torch.from_numpy(np.unpackbits(GOLDEN[case][:, :8], axis=1)) - 1
        assert torch.equal(matrix, golden.double())
    else:
        assert (matrix - torch.from_numpy(GOLDEN[case]).double()).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [0, 1, 15, 16, 17, 1000, 20_000])
def test_jumping_is_stepping(steps):
    seeds = torch.tensor([[0, 1, 2**32 - 1], [42, 10_042, 2**31]])
    jumped, stepped = Xorwow(seeds), Xorwow(seeds)
    jumped.jump(steps)
    for _ in range(steps):
        stepped()
    words = torch.stack([jumped().clone() for _ in range(6)])
    assert torch.equal(words, torch.stack([stepped().clone() for _ in range(6)]))


def test_jumps_add_up_far_out():
    seeds = torch.arange(5000)
    one, two = Xorwow(seeds), Xorwow(seeds)
    one.jump(10**12 + 7)
    for steps in (10**12 - 10**6, 10**6 + 7):
        two.jump(steps)
    assert torch.equal(one(), two())


def test_uniform_numbers_are_rounded_to_float32_as_curand_does():
    # near 1 that decides the radius: rarely, so no golden entry shows it
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 200, 2**32 - 100, 2**32 - 1])
    found = _uniform((words - 2**32 * (words >= 2**31)).to(torch.int32), 2.0**-32)
    rounded = words.numpy().astype(np.uint32).astype(np.float32) * np.float32(2.0**-32)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), rounded + np.float32(2.0**-33))
    assert found[-1] == 1


@each_kind
@pytest.mark.parametrize("P, num_sms", TILINGS)
def test_matches_oracle(P, num_sms, kind, device):
    matrix = reference.matrix(kind, P, 64, 7, num_sms)
    for B, dtype in ((1, torch.float32), (35, torch.float32), (5, torch.float16)):
        grads = moat(gaussian(B, P).to(device, dtype))
        out = project(grads, fast_jl(kind, num_sms=num_sms))
        oracle = grads.cpu().double() @ matrix / 8
        eager = grads.cpu().float() @ matrix.float() / 8
        assert_as_good_as(out.cpu(), eager=eager, oracle=oracle)


@each_kind
def test_float64_gradients_give_float64_features(kind):
    grads = gaussian(3, 200).double()
    features = project(grads, fast_jl(kind), scale=1.0)
    assert features.dtype == torch.float64
    # normal entries themselves are float32, as on the card
    oracle = grads @ reference.matrix(kind, 200, 64, 7, 5)
    assert relative_error(features, oracle) < (1e-14 if kind == "rademacher" else 1e-6)


@each_kind
@pytest.mark.parametrize("P, num_sms", [(1100, 3), (1100, 132), (333, 5)])
def test_chunks_of_parameters_add_up(P, num_sms, kind, device):
    grads = torch.round(4 * gaussian(3, P)).to(device)
    projection = fast_jl(kind, num_sms=num_sms)
    whole = project(grads, projection, scale=1.0)
    out = torch.zeros_like(whole)
    # inside a step, across tiles, none at all, whole tiles
    cuts = [0, 3, 20, 20, 150, P - P // 3, P]
    for start, stop in itertools.pairwise(cuts):
        part = grads[:, start:stop]
        project_(part, projection, offset=start, out=out, grad_dim=P, scale=1.0)
    if kind == "rademacher":
        assert torch.equal(out, whole)
    else:
        assert relative_error(out, whole) < 1e-6


@each_kind
def test_a_wide_projection_is_cut_into_columns(kind, monkeypatch):
    whole = project(gaussian(2, 100), fast_jl(kind, 512))
    monkeypatch.setattr("dtrak_kernels.fast_jl.torch._STREAMS", 96)
    assert relative_error(project(gaussian(2, 100), fast_jl(kind, 512)), whole) < 1e-6


@each_kind
def test_half_inputs_round_as_the_card_does(kind):
    grads = gaussian(4, 300)
    grads[0] *= 1e-7
    matrix = reference.matrix(kind, 300, 64, 7, 5)
    features = project(grads, fast_jl(kind, half_inputs=True), scale=1.0)
    oracle = grads.half().double() @ matrix.half().double()
    for row in range(4):
        assert relative_error(features[row], oracle[row]) < 1e-5
    exact = project(grads, fast_jl(kind), scale=1.0)
    assert relative_error(exact[0], grads[0].double() @ matrix) < 1e-6
    # most of the first row is below the smallest float16
    assert relative_error(features[0], exact[0]) > 0.05


@pytest.mark.parametrize("projection", [fast_jl(kind) for kind in KINDS], ids=lambda p: p.kind)
def test_sketcher_gives_projected_gradients(projection):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(6 * 16, 5), nn.Tanh()
    ).double()
    x = gaussian(3, 2, 6, 6).double()
    grads = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        model(sample[None]).square().sum(), list(model.parameters())
                    )
                ]
            )
            for sample in x
        ]
    )
    sketcher = GradientSketcher(model, projection)
    features = sketcher.sketch(lambda: model(x).square().sum(1), 3)
    expected = project(grads, projection)
    tolerance = 1e-12 if projection.kind == "rademacher" else 1e-6
    assert relative_error(features, expected) < tolerance


@each_kind
def test_custom_op_contract(kind, device):
    grads, out = gaussian(3, 40).to(device), torch.zeros(3, 32, device=device)
    op = torch.ops.dtrak_kernels.project_fast_jl_.default
    torch.library.opcheck(op, (grads, out, kind == "normal", 1, 3, 0, 40, False, 1.0))


@each_kind
def test_same_input_gives_the_same_bits(kind, device):
    grads = gaussian(6, 700).to(device)
    first = project(grads, fast_jl(kind))
    assert torch.equal(project(grads, fast_jl(kind)), first)


@pytest.mark.parametrize("B, P, K", [(40, 3000, 512), (1, 40_000, 32), (32, 600, 6016)])
@each_kind
def test_torch_never_holds_a_large_buffer(B, P, K, kind):
    from test_projection import _LargestTensor

    grads, out = gaussian(B, P), torch.zeros(B, K)
    with _LargestTensor() as seen:
        project_(grads, fast_jl(kind, K, num_sms=132), out=out, grad_dim=P)
    assert seen.largest <= WORKSPACE_BYTES


def test_cards_are_numbers():
    assert fast_jl("normal", num_sms="a100") == fast_jl("normal", num_sms=108)
    assert fast_jl("normal", num_sms="h100") == fast_jl("normal", num_sms="h200")
    assert fast_jl("normal", num_sms="v100").to_dict() == {
        "kind": "normal",
        "proj_dim": 64,
        "seed": 7,
        "generator": "fast_jl",
        "num_sms": 80,
        "half_inputs": False,
        "factor_dim": None,
    }
    assert Projection(**fast_jl("normal", num_sms="l40s").to_dict()).num_sms == 142


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"generator": "mt19937"}, "generator must be 'philox' or 'fast_jl', got 'mt19937'"),
        ({"kind": "sjlt", "proj_dim": 512}, "kind must be 'rademacher' or 'normal'.*got 'sjlt'"),
        ({"proj_dim": 100}, "proj_dim must be a multiple of 32 for generator 'fast_jl', got 100"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32 for generator 'fast_jl', got 4294967296"),
        ({"num_sms": None}, "num_sms must be a positive int or one of v100, .*got None"),
        ({"num_sms": "gtx"}, "num_sms must be a positive int or one of v100, .*got 'gtx'"),
        ({"num_sms": 0}, "num_sms must be a positive int .*got 0"),
        ({"num_sms": 108.0}, "num_sms must be a positive int .*got 108.0"),
        ({"generator": "philox"}, "num_sms must be None for generator 'philox', got 5"),
        (
            {"generator": "philox", "num_sms": None, "half_inputs": True},
            "half_inputs must be False for generator 'philox'",
        ),
    ],
)
def test_projection_refuses(changes, match):
    fields = fast_jl("rademacher").to_dict() | changes
    with pytest.raises(ValueError, match=match):
        Projection(**fields)


def test_project_refuses():
    grads, out = torch.zeros(2, 10), torch.zeros(2, 64)
    with pytest.raises(ValueError, match="grad_dim must be given for generator 'fast_jl'"):
        project_(grads, fast_jl("normal"), out=out)
    with pytest.raises(
        ValueError, match="must be 'torch' or None for generator 'fast_jl', got 'triton'"
    ):
        project(grads, fast_jl("normal"), implementation="triton")
