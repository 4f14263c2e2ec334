"""Many draws of the sketch against exact gradients: the arithmetic, against one written anew."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import spearmanr
from tiny_lds import PRESET, register

from dtrak.evaluation.lds.table import Results
from dtrak.features import extraction
from dtrak.features.extraction import FeatureSettings, FusedExtractor
from dtrak.features.timesteps import select_timesteps
from dtrak_kernels import Projection
from dtrak_kernels.ridge import RidgeSolver
from dtrak_kernels.sjlt.reference import sjlt_matrix

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
quality = importlib.import_module("quality_lds")

SHAPES, K, DRAWS = [(64, 48), (48,)], 512, 3
N, R = 40, 12


@pytest.fixture(scope="module")
def gradients():
    """Few directions and little noise, so that the damping decides the order of predictions."""
    generator = torch.Generator().manual_seed(0)
    P = 64 * 48 + 48
    directions = torch.randn(6, P, generator=generator) * torch.logspace(1, -1, 6)[:, None]
    return {
        name: torch.randn(size, 6, generator=generator) @ directions
        + 0.3 * torch.randn(size, P, generator=generator)
        for name, size in (("train", N), ("validation", 3), ("generated", 5))
    }


@pytest.fixture(scope="module")
def results():
    generator = torch.Generator().manual_seed(1)
    subsets = torch.rand(R, N, generator=generator) < 0.5
    losses = {
        kind: torch.randn(R, size, generator=generator)
        for kind, size in (("generated", 5), ("validation", 3))
    }
    return Results({}, subsets, losses, [])


def expected_lds(features, results, kind):
    """From the formula of a score and scipy's rank correlation."""
    train, queries = (features[name].double().numpy() for name in ("train", kind))
    damping = RidgeSolver(features["train"]).auto_damping()
    inverse = np.linalg.inv(train @ train.T + damping * np.eye(N))
    scores = queries @ train.T @ inverse
    losses = results.losses[kind].numpy()
    predictions = [-scores[:, subset].sum(1) for subset in results.subsets.numpy()]
    correlations = [
        spearmanr(predicted, actual).statistic
        for predicted, actual in zip(np.transpose(predictions), losses.T, strict=True)
    ]
    return np.mean(correlations)


@pytest.fixture(scope="module")
def found(gradients, results):
    return quality.measure(gradients, SHAPES, results, proj_dim=K, draws=DRAWS)


@pytest.mark.parametrize("kind", ["generated", pytest.param("validation", marks=pytest.mark.full)])
def test_the_lds_of_every_draw_is_that_of_its_matrix(kind, gradients, results, found):
    assert_allclose(found[kind]["exact"], expected_lds(gradients, results, kind), atol=1e-12)
    expected = []
    for seed in range(DRAWS):
        matrix = sjlt_matrix(SHAPES, K, seed)
        features = {name: (rows.double() @ matrix) for name, rows in gradients.items()}
        expected.append(expected_lds(features, results, kind))
    assert_allclose(found[kind]["sjlt"], expected, atol=1e-12)
    # draws that say something
    assert len({*expected, found[kind]["exact"]}) == DRAWS + 1


def test_the_summary_is_of_differences_to_the_exact_lds():
    found = quality.summary(0.2, [0.205, 0.195, 0.185, 0.211])
    # +0.5, -0.5, -1.5 and +1.1 points
    assert_allclose(found["mean"], -0.001, atol=1e-12)
    deviation = np.std([0.005, -0.005, -0.015, 0.011], ddof=1)
    assert_allclose(found["deviation"], deviation, rtol=1e-9)
    assert_allclose(found["standard_error"], deviation / 2, rtol=1e-9)
    assert_allclose(found["largest"], 0.015, atol=1e-12)
    assert found["within"] == 2


def test_gradients_are_those_of_the_full_model_and_kept(tmp_path, monkeypatch):
    register()
    run = quality.trained_run(tmp_path / "run", PRESET, {"generated": 3, "validation": 2})
    experiment, queries = run
    assert {kind: len(images) for kind, images in queries.items()} == {
        "generated": 3,
        "validation": 2,
    }
    gradients, shapes = quality.exact_gradients(experiment, queries, "loss", 2)
    model = experiment.load_model()
    timesteps = select_timesteps(2, "uniform", model.process.num_timesteps)
    settings = FeatureSettings("loss", tuple(timesteps), 0, Projection("none", 0))
    extractor = FusedExtractor(model, settings, torch.device("cpu"))
    for name, data in (("train", experiment.data), *queries.items()):
        role = "train/" if name == "train" else "query/"
        expected = extractor.extract(data.images, [role + text for text in data.ids])
        assert_allclose(gradients[name], expected, rtol=1e-4, atol=1e-6)
    assert [tuple(p.shape) for p in model.module.parameters()] == [tuple(s) for s in shapes]

    def refuse(*_, **__):
        raise AssertionError("made anew")

    monkeypatch.setattr(extraction, "fill_store", refuse)
    again, _ = quality.exact_gradients(experiment, queries, "loss", 2)
    assert all(torch.equal(again[name], rows) for name, rows in gradients.items())


# the smoke run rehearses
@pytest.mark.full
def test_the_rehearsal_runs_and_keeps_nothing(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["quality_lds.py", "--smoke", "--folder", str(folder)])
    quality.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not folder.exists()
