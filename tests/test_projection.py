"""Dense projections: torch and Triton against the reference, and what must not matter."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from numerics import assert_as_good_as, moat, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from dtrak_kernels import tuning
from dtrak_kernels.dense import reference
from dtrak_kernels.dense.config import DenseConfig
from dtrak_kernels.dense.torch import WORKSPACE_BYTES, project_dense_
from dtrak_kernels.dense.triton import launch_project
from dtrak_kernels.ops import Projection, check_features, project, project_

# (B, C, K, offset): aligned; ragged on every axis; one row; a tail shorter than one stream word;
# several tiles of everything, far beyond 2**32
SHAPES = [
    (16, 512, 64, 256),
    (5, 333, 48, 0),
    (1, 64, 16, 1000),
    (3, 7, 33, 253),
    (37, 530, 70, 2**40 + 5),
]
KINDS = ["rademacher", "normal"]
IMPLEMENTATIONS = ["torch", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MATRICES = {"rademacher": reference.rademacher_matrix, "normal": reference.normal_matrix}
# tilings, spans and depths; none is a default
CONFIGS = [
    DenseConfig(block_b=16, block_k=16, splits=1),
    DenseConfig(block_b=32, block_k=64, num_warps=4, splits=3),
    DenseConfig(block_b=16, block_k=128, num_stages=3, splits=5),
]

# the interpreter's bfloat16 tl.dot is silently wrong, and only signs meet bfloat16
PRODUCTS = [
    pytest.param(*case, marks=pytest.mark.compiled)
    if case == ("triton", "rademacher", torch.bfloat16)
    else case
    for case in itertools.product(IMPLEMENTATIONS, KINDS, DTYPES)
]

each_kind = pytest.mark.parametrize("kind", KINDS)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def whole_numbers(*shape, device="cpu", seed=0):
    """Gradients whose signed sums are exact in float32: agreement can be bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).float().to(device)


def gaussian(*shape, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("implementation, kind, dtype", PRODUCTS)
@pytest.mark.parametrize("B, C, K, offset", SHAPES)
def test_matches_oracle(B, C, K, offset, implementation, kind, dtype, device):
    projection = Projection(kind, K, seed=2**40 + 7)
    grads = moat(gaussian(B, C, device=device).to(dtype))
    out = torch.zeros(B, K, device=device)
    project_(grads, projection, offset=offset, out=out, implementation=implementation)
    matrix = MATRICES[kind](C, K, projection.seed, offset=offset)
    oracle = reference.project(grads.cpu().double(), matrix)
    # half precision is the input's, not the arithmetic's
    eager = reference.project(grads.cpu().float(), matrix)
    assert_as_good_as(out, eager=eager.to(device), oracle=oracle.to(device))


@each_kind
def test_float64_gradients_give_float64_features(kind):
    grads = gaussian(4, 700).double()
    projection = Projection(kind, 40, seed=3)
    features = project(grads, projection)
    assert features.dtype == torch.float64
    oracle = reference.project(grads, MATRICES[kind](700, 40, 3))
    assert relative_error(features, oracle) < 1e-14


@pytest.mark.sweep
@each_implementation
@pytest.mark.parametrize("offset", [0, 37, 2**32 - 100, 2**40 + 37])
def test_identity_gives_the_reference_signs(offset, implementation, device):
    # K is a power of four, so the scale is a power of two and the features are exact
    P, K = 300, 64
    out = torch.zeros(P, K, device=device)
    projection = Projection("rademacher", K, seed=11)
    project_(
        torch.eye(P, device=device),
        projection,
        offset=offset,
        out=out,
        implementation=implementation,
    )
    signs = (out * 8).cpu()
    assert torch.equal(signs.abs(), torch.ones(P, K))
    assert torch.equal(signs, reference.rademacher_matrix(P, K, 11, offset=offset).float())


@each_implementation
@pytest.mark.parametrize("offset", [0, 37, 2**34 - 100])
def test_identity_gives_the_reference_normals(offset, implementation, device):
    P, K = 90, 64
    out = torch.zeros(P, K, device=device)
    projection = Projection("normal", K, seed=11)
    project_(
        torch.eye(P, device=device),
        projection,
        offset=offset,
        out=out,
        implementation=implementation,
    )
    error = (out.cpu().double() * 8 - reference.normal_matrix(P, K, 11, offset=offset)).abs()
    assert error.max() < 1e-6


# hexadecimal per parameter, bit k set where column k is -1: frozen, a change breaks every store
GOLDEN_SIGNS = {
    0: "635e ba51 033d 22d4 6c48 adc6 93a0 4e94 d14f 324f ffaf 9ff9 88b9 1164 0e58 f214 "
    "4aaf f4cb 5346 3283 f308 99f6 cec4 3ae7 9cdf a4c7 9ff6 4dfb 9605 a77e f2b7 b097",
    2**40 + 37: "6020 3ce9 1d3c 5184 b54f 9124 c214 e199 77d9 5185 b9ff d352 7cf5 5bda aa20 3b5e "
    "7424 596c 243a 3a2d 751c 01aa 9515 47a8 f1a0 f590 9e53 f1cb 3d85 287e 3afe 69d4",
}
GOLDEN_NORMALS = {
    0: [
        [-0.5584828388, -0.4517248179, 0.5289843948],
        [0.2011055745, -0.6318578502, 0.0394038912],
        [0.3257550916, -0.6062509651, 1.2010998204],
        [-1.6331931820, 0.4496793176, 1.3823004842],
    ],
    2**40 + 37: [
        [0.3766244352, -0.1811081922, -0.1519286525],
        [-1.2365943686, 0.0970233849, 0.6540038649],
        [-2.3613267090, 0.4564082082, 1.2362145787],
        [-0.3571781357, -2.7800376412, -0.0478036338],
    ],
}


@pytest.mark.parametrize("offset", GOLDEN_SIGNS)
def test_signs_are_the_golden_ones(offset):
    rows = [int(word, 16) for word in GOLDEN_SIGNS[offset].split()]
    golden = torch.tensor([[-1 if row >> k & 1 else 1 for k in range(16)] for row in rows])
    assert torch.equal(reference.rademacher_matrix(32, 16, 7, offset=offset), golden.to(torch.int8))


@pytest.mark.parametrize("offset", GOLDEN_NORMALS)
def test_normals_are_the_golden_ones(offset):
    difference = reference.normal_matrix(4, 3, 7, offset=offset) - torch.tensor(
        GOLDEN_NORMALS[offset], dtype=torch.float64
    )
    assert difference.abs().max() < 1e-9


@each_kind
def test_matrix_is_a_submatrix_of_every_larger_one(kind):
    whole = MATRICES[kind](600, 50, 5)
    part = MATRICES[kind](123, 21, 5, offset=400)
    assert torch.equal(whole[400:523, :21], part)


@pytest.mark.sweep
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_signs_do_not_depend_on_tiling(config, dtype, device):
    grads = whole_numbers(20, 700, device=device).to(dtype)
    projection = Projection("rademacher", 150, seed=1)
    eager = project(grads, projection, implementation="torch")
    out = torch.zeros_like(eager)
    launch_project(grads, projection, 0, out, config)
    # the scale is applied to exact sums, by each implementation in its own place
    assert relative_error(out, eager) < 1e-7
    assert torch.equal((out * 150**0.5).round(), (eager * 150**0.5).round())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_normals_do_not_depend_on_tiling(config, device):
    grads = gaussian(5, 700, device=device)
    projection = Projection("normal", 40, seed=1)
    oracle = reference.project(grads.cpu().double(), reference.normal_matrix(700, 40, 1))
    out = torch.zeros(5, 40, device=device)
    launch_project(grads, projection, 0, out, config)
    assert relative_error(out, oracle) < 5e-7


@each_implementation
@each_kind
def test_a_sample_does_not_depend_on_its_batch(kind, implementation, device):
    make = whole_numbers if kind == "rademacher" else gaussian
    grads = make(35, 90, device=device)
    projection = Projection(kind, 64, seed=2)
    whole = project(grads, projection, implementation=implementation)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0)).to(device)
    parts = [project(part, projection, implementation=implementation) for part in grads.split(16)]
    shuffled = project(grads[order], projection, implementation=implementation)
    if kind == "rademacher":
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(shuffled, whole[order])
    else:
        assert relative_error(torch.cat(parts), whole) < 2e-7
        assert relative_error(shuffled, whole[order]) < 2e-7


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_of_parameters_add_up(dtype, implementation, device):
    P, K = 1100, 64
    grads = whole_numbers(3, P, device=device).to(dtype)
    projection = Projection("rademacher", K, seed=4)
    whole = project(grads, projection, implementation=implementation)
    out = torch.zeros(3, K, device=device)
    # inside a block, across several, an aligned one, and no parameter at all
    for start, stop in itertools.pairwise([0, 3, 250, 250, 512, 1024, 1100]):
        project_(
            grads[:, start:stop],
            projection,
            offset=start,
            out=out,
            grad_dim=P,
            implementation=implementation,
        )
    assert torch.equal(out, whole)


@each_implementation
def test_only_out_is_written_and_it_is_added_to(implementation, device):
    grads = whole_numbers(3, 300, device=device)
    parent = torch.full((5, 90), 7.0, device=device)
    out = parent[1:4, 5:69]
    projection = Projection("rademacher", 64, seed=5)
    returned = project_(grads, projection, out=out, implementation=implementation)
    assert returned is out
    assert torch.equal(out, 7 + project(grads, projection, implementation="torch"))
    out.fill_(7)
    assert torch.equal(parent, torch.full_like(parent, 7))


@each_implementation
@each_kind
def test_same_input_gives_the_same_bits(kind, implementation, device):
    grads = gaussian(6, 1000, device=device)
    projection = Projection(kind, 40, seed=6)
    first = project(grads, projection, implementation=implementation)
    assert torch.equal(project(grads, projection, implementation=implementation), first)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equal_gradients_of_a_batch_give_equal_features(dtype, implementation, device):
    # the first and the last are summed in different groups of samples
    grads = gaussian(45, 1049, device=device).to(dtype)
    grads[-1] = grads[0]
    features = project(grads, Projection("rademacher", 96, seed=6), implementation=implementation)
    assert torch.equal(features[-1], features[0])


def test_the_number_of_threads_does_not_matter():
    grads, projection = gaussian(6, 3000), Projection("rademacher", 100, seed=6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = project(grads, projection, implementation="torch")
        torch.set_num_threads(2)
        assert torch.equal(project(grads, projection, implementation="torch"), first)
    finally:
        torch.set_num_threads(threads)


def test_rows_may_start_anywhere(device):
    # a whole aligned body between ragged ends, then rows no vector load may touch
    projection = Projection("rademacher", 64, seed=8)
    for stride, start in ((2048, 56), (2048, 1), (1999, 56)):
        parent = torch.full((4 * stride,), float("nan"), dtype=torch.float16, device=device)
        grads = parent.as_strided((3, 1300), (stride, 1), start)
        grads.copy_(whole_numbers(3, 1300))
        out = torch.zeros(3, 64, device=device)
        project_(grads, projection, offset=200, out=out, implementation="triton")
        expected = reference.project(
            grads.cpu().float(), reference.rademacher_matrix(1300, 64, 8, offset=200)
        )
        assert torch.equal(out.cpu(), expected)


# rows beyond the batch only reach outputs that are not stored, so no value can show that they were
# read: values end at a page nobody may touch
_GUARDED = """
import ctypes, mmap, sys
import torch
from dtrak_kernels.ops import Projection
from dtrak_kernels.dense.config import DenseConfig
from dtrak_kernels.dense.triton import _accumulate

page, rows = mmap.PAGESIZE, 3
memory = mmap.mmap(-1, 17 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page), 16 * page, 0) == 0
values = torch.frombuffer(memory, dtype=torch.float16, count=page // 2)
values = values[page // 2 - rows * 256 :].view(rows, 256)
values.fill_(1)
for kind in ("rademacher", "normal"):
    out = torch.zeros(rows, 32)
    config = DenseConfig(16, 32, splits=1)
    _accumulate(values, torch.ones(rows), out, Projection(kind, 32), 0, config)
    assert out.isfinite().all() and (out != 0).any()
print("untouched")
"""


@pytest.mark.skipif(
    torch.cuda.is_available() or "DTRAK_EMULATED" in os.environ,
    reason="guards the interpreter's memory",
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_rows_beyond_the_batch_are_not_read():
    done = subprocess.run([sys.executable, "-c", _GUARDED], capture_output=True, text=True)
    assert done.stdout == "untouched\n", (done.returncode, done.stderr[-2000:])


@pytest.mark.gpu
def test_offsets_pass_2_to_the_31(device):
    C = 2**31 + 300
    grads = torch.zeros(2, C, dtype=torch.float16, device=device)
    grads[1, C - 1] = 1
    out = project(grads, Projection("rademacher", 64, seed=9), implementation="triton")
    assert torch.equal(out[0].cpu(), torch.zeros(64))
    last = reference.rademacher_matrix(1, 64, 9, offset=C - 1)[0]
    assert torch.equal(8 * out[1].cpu(), last.float())


@pytest.mark.sweep
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
@each_implementation
def test_float32_accuracy_at_any_scale(scale, implementation, device):
    grads = gaussian(3, 500, device=device)
    grads[0] *= scale / grads[0].abs().max()
    out = project(grads, Projection("rademacher", 64, seed=1), implementation=implementation)
    oracle = reference.project(grads.cpu().double(), reference.rademacher_matrix(500, 64, 1))
    for row in range(3):
        # below 1e-37 float32 itself has fewer digits
        assert relative_error(out[row], oracle[row]) < (1e-6 if scale > 1e-37 else 1e-5)


# numpy warns where the interpreter meets the infinities put there on purpose
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@each_implementation
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bad_sample_stays_bad_and_alone(dtype, bad, implementation, device):
    grads = whole_numbers(4, 300, device=device).to(dtype)
    projection = Projection("rademacher", 64, seed=1)
    clean = project(grads, projection, implementation=implementation)
    grads[2, 17] = bad
    out = project(grads, projection, implementation=implementation)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@each_kind
@each_implementation
def test_empty_batches_and_empty_chunks(implementation, kind, device):
    projection = Projection(kind, 16)
    assert project(torch.empty(0, 50, device=device), projection).shape == (0, 16)
    out = torch.ones(3, 16, device=device)
    empty = torch.empty(3, 0, device=device)
    project_(empty, projection, offset=5, out=out, implementation=implementation)
    assert torch.equal(out, torch.ones_like(out))
    assert torch.equal(
        project(empty, projection, implementation=implementation), torch.zeros_like(out)
    )


def test_kind_none_returns_the_gradients(device):
    grads = gaussian(3, 20, device=device).to(torch.float16)
    features = project(grads, Projection("none", 0))
    assert features.dtype == torch.float32
    assert torch.equal(features, grads.float())
    out = torch.ones(3, 20, device=device)
    project_(grads[:, 5:9], Projection("none", 0), offset=5, out=out, grad_dim=20)
    expected = torch.ones(3, 20, device=device)
    expected[:, 5:9] += grads[:, 5:9]
    assert torch.equal(out, expected)


def test_kind_sjlt_sketches_parameter_by_parameter():
    from dtrak_kernels.sjlt.torch import project_sjlt

    grads, shapes = gaussian(2, 40 * 30 + 9), [(40, 30), (9,)]
    features = project(grads, Projection("sjlt", 2048, seed=3), shapes=shapes)
    expected = project_sjlt(grads, 2048, 3, shapes, torch.zeros(2, 2048))
    assert torch.equal(features, expected)
    assert relative_error(features.norm(dim=1), grads.norm(dim=1)) < 0.2


@each_implementation
@each_kind
def test_custom_op_contract(kind, implementation, device):
    grads, out = gaussian(3, 40, device=device), torch.zeros(3, 16, device=device)
    op = torch.ops.dtrak_kernels.project_.default
    torch.library.opcheck(op, (grads, out, kind, 16, 1, 0, 0.25, implementation))


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel() * value.element_size())
        return result


@each_kind
@pytest.mark.parametrize("B, P, K", [(40, 3000, 512), (1, 40_000, 16), (32, 600, 6000)])
def test_torch_never_holds_a_large_buffer(B, P, K, kind):
    projection = Projection(kind, K)
    grads, out = gaussian(B, P), torch.zeros(B, K)
    with _LargestTensor() as seen:
        project_dense_(grads, projection, 0, out)
    assert seen.largest <= WORKSPACE_BYTES


def _refused(**changes):
    case = {
        "grads": torch.zeros(2, 10),
        "projection": Projection("rademacher", 16),
        "out": torch.zeros(2, 16),
    }
    return case | changes


@pytest.mark.parametrize(
    "case, error, match",
    [
        (_refused(grads=torch.zeros(2, 10).int()), TypeError, "grads must be float32.*int32"),
        (_refused(grads=torch.zeros(10)), ValueError, r"grads must be \[B, P\], got shape \(10,\)"),
        (_refused(grads=torch.zeros(10, 2).T), ValueError, "grads must be contiguous in the last"),
        (_refused(projection=Projection("sjlt", 512)), ValueError, "kind must be .* got 'sjlt'"),
        (_refused(projection=Projection("normal", 2**31)), ValueError, "proj_dim must be at most"),
        (_refused(offset=-1), ValueError, "offset must be at least 0, got -1"),
        (_refused(offset=1.0), TypeError, "offset must be an int, got float"),
        (
            _refused(offset=91, grad_dim=100),
            ValueError,
            r"offset \+ C must be at most grad_dim = 100, got 91 \+ 10 = 101",
        ),
        (_refused(out=torch.zeros(2, 16).double()), TypeError, "out must be torch.float32"),
        (_refused(grads=torch.zeros(2, 10).double()), TypeError, "out must be torch.float64"),
        (_refused(out=torch.zeros(3, 16)), ValueError, r"out must have shape \(2, 16\)"),
        (_refused(out=torch.zeros(16, 2).T), ValueError, "out must be contiguous in its last"),
        (
            _refused(out=torch.zeros(2, 16, device="meta")),
            ValueError,
            "out must be on the device of grads, cpu, got meta",
        ),
        (_refused(implementation="cuda"), ValueError, "implementation must be 'torch' or 'triton'"),
        (
            _refused(
                grads=torch.zeros(2, 10).double(),
                out=torch.zeros(2, 16).double(),
                implementation="triton",
            ),
            TypeError,
            "for triton, got float64",
        ),
        (
            _refused(projection=Projection("none", 0), offset=10),
            ValueError,
            r"at most grad_dim = 16, got 10 \+ 10",
        ),
        (
            _refused(projection=Projection("none", 0), scale=1.0),
            ValueError,
            "scale must be None for kind 'none', got 1.0",
        ),
    ],
)
def test_project_in_place_refuses(case, error, match):
    with pytest.raises(error, match=match):
        project_(**case)


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"grads": torch.zeros(2, 3, 4)}, ValueError, r"grads must be \[B, P\], got shape"),
        ({"grads": torch.zeros(2, 4).long()}, TypeError, "grads must be float32.*int64"),
        ({"projection": Projection("sjlt", 512)}, ValueError, "shapes must be given for kind"),
        (
            {"projection": Projection("sjlt", 512), "shapes": [(2, 4), (3,)]},
            ValueError,
            r"shapes must add up to P = 10, got \[\(2, 4\), \(3,\)\]",
        ),
        (
            {"projection": Projection("sjlt", 512), "shapes": [(10,)], "scale": 1.0},
            ValueError,
            "scale must be None for kind 'sjlt', got 1.0",
        ),
        ({"implementation": "numpy"}, ValueError, "implementation must be 'torch' or 'triton'"),
    ],
)
def test_project_refuses(changes, error, match):
    arguments = {"grads": torch.zeros(2, 10), "projection": Projection("rademacher", 16)} | changes
    with pytest.raises(error, match=match):
        project(**arguments)


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr("dtrak_kernels.dense.triton.IS_INTERPRETED", False)
    with pytest.raises(ValueError, match=r"'triton' must have grads on a GPU .* got device cpu"):
        project(torch.zeros(2, 10), Projection("rademacher", 16), implementation="triton")


def test_seeds_out_of_range_are_refused():
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*63\)"):
            Projection("rademacher", 16, seed=seed)


def test_check_features_names_the_first_bad_row():
    good = gaussian(5, 8)
    assert check_features(good) is good
    assert check_features(good[:0]).shape == (0, 8)
    zero, nan = good.clone(), good.clone()
    zero[3] = 0
    with pytest.raises(
        ValueError, match=r"features must be finite and not all zero.*row 3 all zero \(1 of 5"
    ):
        check_features(zero)
    nan[1, 2], nan[4] = float("inf"), 0
    with pytest.raises(
        ValueError, match=r"query_features must be .* row 1 not finite \(2 of 5 rows"
    ):
        check_features(nan, "query_features")


@pytest.fixture(scope="module")
def normals():
    return reference.normal_matrix(4096, 48, seed=1)


def test_normals_have_normal_moments(normals):
    n = normals.numel()
    # standard errors of the first four moments of a standard normal
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        z = ((normals**power).mean().item() - expected) / (variance / n) ** 0.5
        assert abs(z) < 4, (power, z)


def test_normals_pass_kolmogorov_smirnov(normals):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    assert stats.kstest(normals.flatten().numpy(), "norm").pvalue > 1e-3
    # every residue of the 16-parameter pattern, and every fourth column, on its own
    pvalues = [stats.kstest(normals[r::16].flatten().numpy(), "norm").pvalue for r in range(16)]
    pvalues += [stats.kstest(normals[:, c].numpy(), "norm").pvalue for c in range(0, 48, 4)]
    assert min(pvalues) > 1e-4


def _correlations(columns: torch.Tensor) -> torch.Tensor:
    """Correlations of all pairs of columns, in standard errors."""
    columns = (columns - columns.mean(0)) / columns.std(0)
    size = columns.shape[1]
    upper = torch.triu_indices(size, size, offset=1)
    return (columns.T @ columns / len(columns) ** 0.5)[upper[0], upper[1]]


@each_kind
def test_columns_and_rows_are_uncorrelated(kind):
    matrix = MATRICES[kind](4096, 48, 1).double()
    rows = MATRICES[kind](96, 4096, 1).double().T
    for z in (_correlations(matrix), _correlations(rows)):
        # the largest of up to 4560 standard normals stays below 5; their spread is 1
        assert z.abs().max() < 5
        assert abs(z.std().item() - 1) < 0.1


def test_partners_of_a_box_muller_pair_are_independent(normals):
    even, odd = normals[0::2].flatten(), normals[1::2].flatten()
    pairs = torch.stack([even, odd, even**2, odd**2, even.abs(), even * odd], dim=1)
    z = _correlations(pairs)
    # a value against its own square or modulus aside
    cross = z[[0, 2, 6, 5, 9]]
    assert cross.abs().max() < 4


@each_kind
def test_signs_are_balanced_and_seeds_differ(kind):
    one, two = (MATRICES[kind](2048, 64, seed).double() for seed in (1, 2))
    n = one.numel()
    assert abs(one.sum().item()) < 4 * n**0.5
    assert abs((one * two).sum().item()) < 4 * n**0.5
    # seeds that differ in the high word only
    assert not torch.equal(one, MATRICES[kind](2048, 64, 1 + 2**32).double())


@each_kind
def test_nothing_repeats_beyond_2_to_the_32(kind):
    rows = [MATRICES[kind](256, 32, 1, offset=p) for p in (0, 2**32, 2**34, 2**40, 2**42, 2**61)]
    for a, b in itertools.combinations(rows, 2):
        assert abs((a.double() * b.double()).sum().item()) < 5 * a.numel() ** 0.5


def test_calls_of_distinct_entries_are_distinct():
    # every (call, word, bit) of 512 parameters x 64 columns is used once, by the specification
    p, k = torch.meshgrid(torch.arange(512), torch.arange(64), indexing="ij")
    call = (p >> 8) * 2**40 + 4 * (8 * (k >> 4) + (k & 7)) + ((p >> 1) & 3)
    word = 2 * ((k >> 3) & 1) + ((p >> 3) & 1)
    bit = 15 - ((p >> 4) & 15) + 16 * (p & 1)
    used = (call * 4 + word) * 32 + bit
    assert used.unique().numel() == used.numel()
    assert used.numel() % 128 == 0
    assert (call.unique().numel() * 128) == used.numel()
    # the last column the operation accepts still has a 32-bit coordinate
    last = 2**30 - 1
    assert 4 * (8 * (last >> 4) + (last & 7)) + 3 < 2**32


def test_tuned_configuration_of_the_nearest_size(tmp_path):
    (tmp_path / "project_rademacher.json").write_text(
        '{"Some GPU": [{"sizes": {"B": 8, "K": 512}, "config": {"block_b": 16}},'
        ' {"sizes": {"B": 128, "K": 32768}, "config": {"block_b": 128, "splits": 2}}]}'
    )
    find = tuning.nearest
    sizes = {"B": 100, "P": 10**7, "K": 20_000}
    assert DenseConfig(**find("project_rademacher", "Some GPU", sizes, tmp_path)).splits == 2
    sizes = {"B": 0, "P": 10, "K": 600}
    assert find("project_rademacher", "Some GPU", sizes, tmp_path) == {"block_b": 16}
    assert find("project_rademacher", "Another GPU", sizes, tmp_path) is None
    assert find("project_normal", "Some GPU", sizes, tmp_path) is None
