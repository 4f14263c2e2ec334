"""Trials of accuracy: every change of a score against its formula, written anew."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lds import PRESET

from dtrak.evaluation.lds.statistics import lds
from dtrak.evaluation.lds.table import Results
from dtrak.features.extraction import FusedExtractor
from dtrak.features.settings import FeatureSettings
from dtrak.training import presets
from dtrak_kernels import Projection, Whitening

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
trials = importlib.import_module("quality_trials")
cost = importlib.import_module("quality_cost")

N, M, P, R = 30, 4, 12, 16


@pytest.fixture(scope="module")
def grads():
    generator = torch.Generator().manual_seed(0)
    return trials.Gradients(*(torch.randn(n, P, generator=generator) for n in (N, 2 * M)))


@pytest.fixture(scope="module")
def judge():
    generator = torch.Generator().manual_seed(1)
    subsets = torch.rand(R, N, generator=generator) < 0.5
    losses = {kind: torch.randn(R, M, generator=generator) for kind in trials.QUERIES}
    return trials.Judge(Results({}, subsets, losses, []))


def kernel(grads, damping):
    train, queries = grads.train.double().numpy(), grads.queries.double().numpy()
    inverse = np.linalg.inv(train.T @ train + damping * np.eye(P))
    return train, inverse, torch.from_numpy(queries @ inverse @ train.T)


def test_the_pages_are_up_to_date():
    for module in (trials, cost):
        module.TABLE.bring_up_to_date(only_check=True)


def test_changed_scores_are_their_formulas(grads, judge, monkeypatch):
    monkeypatch.setattr(trials, "RESAMPLES", 20)
    changes = {"plain": trials.plain_scores, "squared": trials.squared, "left": trials.left_out}
    entries = list(judge.kernel(grads, changes))
    unit = float(grads.train.double().square().sum(1).mean())
    train, inverse, plain = kernel(grads, unit)
    leverage = torch.from_numpy(np.einsum("ij,jk,ik->i", train, inverse, train))
    wanted = {"plain": plain, "squared": plain.square(), "left": plain / (1 - leverage)}
    for case in judge.table(entries, "plain"):
        losses = judge.results.losses[case["queries"]]
        first = trials.QUERIES.index(case["queries"]) * M
        found = lds(wanted[case["method"]][first : first + M], judge.results.subsets, losses)
        assert case["1"]["lds"] == pytest.approx(found, abs=2e-6)
        assert (case["over"] is None) == (case["method"] == "plain")


def test_layers_are_weighted_to_make_the_best_stand_out(grads, monkeypatch):
    groups = [(0, 5), (5, P)]
    monkeypatch.setattr(trials, "_TOP", 3)
    seen = []

    def weights_of(scores):
        seen.append(scores.shape[1])
        return torch.tensor([1.0, 1.0]).double()

    monkeypatch.setattr(trials, "_weights", weights_of)
    sizes = [1, len(grads.queries) - 1]
    scores, norm, _ = trials.layer_weighted(grads, groups, sizes)
    # all weights 1 is the plain score
    assert torch.allclose(scores(norm), kernel(grads, norm)[2], rtol=1e-6)
    # chosen for each kind of query by itself
    assert seen == sizes
    monkeypatch.undo()
    monkeypatch.setattr(trials, "_TOP", 3)
    noise = torch.randn(1, 3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    peaks = torch.zeros(1, 3, 50, dtype=torch.float64)
    peaks[..., :3] = 5
    weights = trials._weights(torch.cat([noise, peaks]))
    assert weights.sum() == pytest.approx(1)
    assert weights[1] > 0.6


def test_layers_are_modules():
    names = ["a.weight", "a.bias", "b.c.weight"]
    assert trials.layers_of(names, [(2, 3), (2,), (4,)]) == [(0, 8), (8, 12)]


def test_ekfac_influence_is_its_formula():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x = torch.randn(40, 4)
    whitening = Whitening.fit(
        model, [(lambda: model(x).square().mean(1), 40)], kind="kfac", function="f"
    )
    made = trials.Gradients(torch.randn(20, 15), torch.randn(5, 15))
    found = trials.ekfac_influence(made, whitening)(0.5)
    weight = whitening.parameters[0]
    U = [torch.linalg.eigh(root.matrix[0].double())[1] for root in (weight.rows, weight.columns)]
    rotated = []
    for grads in (made.train.double(), made.queries.double()):
        matrix = U[0].T @ grads[:, :12].unflatten(1, (3, 4)) @ U[1]
        rotated.append(torch.cat([matrix.flatten(1), grads[:, 12:] @ U[0]], 1))
    train, queries = rotated
    moments = train.square().mean(0)
    means = torch.cat([part.mean().expand(len(part)) for part in moments.split([12, 3])])
    wanted = (queries / (moments + 0.5 * means)) @ train.T
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_rows_are_drawn_as_the_scheme_says(monkeypatch):
    ids, every = ["train/a", "train/b"], list(range(0, 1000, 100))
    assert trials.drawn_timesteps("", ids, every, 1000) == [every, every]
    for scheme in ("stratified", "both"):
        found = trials.drawn_timesteps(scheme, ids, every, 1000)
        width = 200 if scheme == "both" else 100
        assert found[0] != found[1]
        for steps in found:
            assert [step // width for step in steps] == list(range(len(steps)))
    assert trials.drawn_timesteps("antithetic", ids, every, 1000)[0] == every[::2]


def test_averaged_rows_are_the_features_of_the_product(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, PRESET.name, PRESET)
    experiment, queries = importlib.import_module("quality_lds").trained_run(
        tmp_path / "run", PRESET, {"validation": 2, "generated": 2}
    )
    model = experiment.load_model()
    steps = tuple(range(0, 1000, 100))
    settings = FeatureSettings("loss", steps, 0, Projection("none"))
    parts = dict(queries) | {
        trials.TRAIN: experiment.retraining.samples(
            trials.TRAIN, experiment.data, torch.device("cpu")
        ).select(range(3))
    }
    found, unit = (
        trials.averaged(model, settings, parts, "", change, "test")
        for change in (lambda grads: grads, trials.unit)
    )
    extractor = FusedExtractor(model, settings, torch.device("cpu"))
    data = parts[trials.TRAIN]
    wanted = extractor.extract(data.batch(slice(None)), [f"train/{i}" for i in data.ids])
    assert torch.allclose(found.train, wanted, rtol=1e-3, atol=1e-6)
    assert (unit.train.norm(dim=1) <= 1 + 1e-5).all()
    # pairs of noises cancel what is odd in the noise
    paired = trials.averaged(model, settings, parts, "antithetic", lambda grads: grads, "test")
    assert not torch.allclose(paired.train, wanted, rtol=1e-2)
