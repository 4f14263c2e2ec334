"""What the random matrices are for: inner products, unbiased, with the spread theory promises."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from dtrak_kernels import Projection, project
from dtrak_kernels.dense import reference

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality_projection.py"
sys.path.insert(0, str(SCRIPT.parent))
spec = importlib.util.spec_from_file_location("quality_projection", SCRIPT)
quality = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quality)

# (P, K, matrices): P from a hundred to a million, in seconds
SIZES = {
    "rademacher": [(100, 256, 60), (1000, 256, 40), (50_000, 256, 12), (1_000_000, 64, 4)],
    "normal": [(100, 256, 60), (1000, 256, 40), (50_000, 128, 6)],
}
FAMILIES = ["gaussian", "one-hot", "rank one", "hot channels", "constant"]
H100 = {"generator": "fast_jl", "num_sms": "h100"}


def cases(sizes=SIZES):
    return [(kind, *size) for kind, list_ in sizes.items() for size in list_]


def ratio(errors):
    """Root mean square of standardised errors: 1 in theory."""
    return errors.square().mean().item() ** 0.5


def assert_as_in_theory(errors):
    """Mean 0 and mean square 1, to five standard errors found from matrix to matrix.

    Errors of one matrix may be correlated; matrices of different seeds are independent.
    """
    for found, expected, spread in ((errors, 0, 1), (errors.square(), 1, 2**0.5)):
        means = found.mean(1)
        # never below what uncorrelated normal errors would have
        error = max(means.std().item(), spread / found.shape[1] ** 0.5) / len(means) ** 0.5
        assert abs(means.mean().item() - expected) < 5 * error


def test_theory_itself():
    """The variance the errors are divided by, on a matrix from torch's own generator."""
    grads = torch.cat(list(quality.families(200).values()))
    generator = torch.Generator().manual_seed(0)
    for kind in ("rademacher", "normal"):
        found = []
        for _ in range(200):
            matrix = torch.randn(200, 64, generator=generator)
            matrix = matrix.sign() if kind == "rademacher" else matrix
            found.append(quality.standard_errors(grads, grads @ matrix / 8, kind))
        errors = torch.stack(found)
        assert_as_in_theory(errors)
        # a factor of 1.1 on the features would show
        assert abs(ratio(errors) - 1) < 0.05


@pytest.mark.parametrize(
    "kind, P, K, seeds",
    [pytest.param(*case, marks=pytest.mark.full if case[1] >= 50_000 else ()) for case in cases()],
)
def test_philox_is_as_in_theory(kind, P, K, seeds):
    found = quality.measure({"kind": kind}, P, K, seeds)
    assert list(found) == FAMILIES
    for errors in found.values():
        assert_as_in_theory(errors)
    # the families with many independent pairs say it to a few percent
    many = torch.cat([found["gaussian"], found["constant"]], dim=1)
    assert abs(ratio(many) - 1) < 5 * (0.5 / many.numel()) ** 0.5


@pytest.mark.parametrize("P", [100, 1000, 50_000])
def test_norms_of_single_parameters_are_exact_with_signs(P):
    one_hot = quality.families(P)["one-hot"]
    features = project(one_hot, Projection("rademacher", 256, seed=1))
    assert torch.equal(features.abs(), torch.full_like(features, 1 / 16))


def test_fast_jl_is_six_times_worse_for_a_thousand_parameters():
    found = quality.measure({"kind": "rademacher", **H100}, 1000, 1024, 12)
    assert 5 < ratio(found["gaussian"]) < 9
    assert ratio(found["constant"]) > 12
    assert ratio(found["one-hot"]) > 9


@pytest.mark.full
def test_fast_jl_is_still_worse_for_fifty_thousand():
    found = quality.measure({"kind": "rademacher", **H100}, 50_000, 1024, 4)
    assert 1.4 < ratio(found["gaussian"]) < 2
    assert ratio(found["constant"]) > 12


def test_more_columns_do_not_help_fast_jl():
    """Its error is a property of its rows: relative to a theory that falls as K**-0.5, it grows."""
    few, many = (
        ratio(quality.measure({"kind": "rademacher", **H100}, 1000, K, 6)["gaussian"])
        for K in (256, 2048)
    )
    assert 2 < many / few < 4


@pytest.mark.parametrize(
    "P, K, seeds", [(1000, 256, 20), pytest.param(50_000, 128, 4, marks=pytest.mark.full)]
)
def test_fast_jl_normals_are_as_in_theory(P, K, seeds):
    found = quality.measure({"kind": "normal", **H100}, P, K, seeds)
    many = torch.cat([found["gaussian"], found["constant"]], dim=1)
    assert_as_in_theory(many)


def test_fast_jl_repeats_rows():
    def repeated_pairs(matrix):
        _, counts = matrix.unique(dim=0, return_counts=True)
        return int((counts * (counts - 1) // 2).sum())

    card = project(torch.eye(1000), Projection("rademacher", 512, 0, **H100))
    assert repeated_pairs(card) > 1000
    assert repeated_pairs(reference.rademacher_matrix(1000, 512, 0)) == 0


def test_the_documented_table_is_the_newest_row():
    page = quality.TABLE.page.read_text()
    assert quality.TABLE.rewritten(page) == page


def test_the_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(quality, "SEEDS", {100: 2})
    monkeypatch.setattr(sys, "argv", ["quality_projection.py", "--smoke"])
    quality.main()
    assert len(capsys.readouterr().out.splitlines()) == len(quality.MATRICES) * len(FAMILIES)
