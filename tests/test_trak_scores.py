"""The score computer inside the TRAK library, and against the library's own."""

import functools

import pytest
import torch
from numerics import relative_error

from dtrak_kernels.adapters.trak_scores import RidgeScoreComputer

trak = pytest.importorskip("trak", reason="traker is not installed")
from trak.projectors import NoOpProjector  # noqa: E402
from trak.score_computers import BasicScoreComputer  # noqa: E402

SHAPES = [(12, 40), (40, 12)]


def rows(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def scored(computer, grads, targets):
    features = computer.get_x_xtx_inv(grads, computer.get_xtx(grads))
    accumulator = torch.zeros(len(grads), len(targets))
    computer.get_scores(features, targets, accumulator)
    return accumulator


@pytest.mark.parametrize("N, K", SHAPES)
def test_scores_are_the_definition(N, K):
    grads, targets = rows(N, K), rows(5, K, seed=1)
    damped = grads.double().T @ grads.double() + 0.3 * torch.eye(K, dtype=torch.float64)
    expected = grads.double() @ torch.linalg.solve(damped, targets.double().T)
    computer = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=0.3)
    assert relative_error(scored(computer, grads, targets), expected) < 1e-6


@pytest.mark.parametrize("N, K", SHAPES)
def test_trak_scale_is_the_library_s(N, K, monkeypatch):
    from dtrak_kernels.adapters import trak_scores

    monkeypatch.setattr(trak_scores, "_ROWS", 7)
    grads, targets = rows(N, K), rows(5, K, seed=1)
    theirs = BasicScoreComputer(torch.float32, torch.device("cpu"), lambda_reg=2.0)
    ours = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=2.0, trak_scale=True)
    assert relative_error(scored(ours, grads, targets), scored(theirs, grads, targets)) < 1e-5


def test_scale_of_features():
    grads, targets = rows(12, 40), rows(5, 40, seed=1)
    for trak_scale, factor in ((False, 0.1), (True, 10.0)):
        computer = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=1.0, trak_scale=trak_scale)
        larger = RidgeScoreComputer(torch.float32, "cpu", lambda_reg=100.0, trak_scale=trak_scale)
        features = computer.get_x_xtx_inv(grads, computer.get_xtx(grads))
        scaled = larger.get_x_xtx_inv(10 * grads, larger.get_xtx(grads))
        assert relative_error(scaled, factor * features) < 1e-5
    assert scored(computer, grads, targets).shape == (12, 5)


def test_refusals():
    with pytest.raises(ValueError, match="lambda_reg must be finite and at least 0, got -1"):
        RidgeScoreComputer(torch.float32, "cpu", lambda_reg=-1.0)
    computer = RidgeScoreComputer(torch.float32, "cpu")
    with pytest.raises(ValueError, match="the Gram is singular, rank 4 of 9"):
        computer.get_x_xtx_inv(rows(4, 9), torch.empty(0, 0))
    half = RidgeScoreComputer(torch.float16, "cpu", lambda_reg=1e-12)
    with pytest.raises(ValueError, match=r"features must fit torch.float16, got a largest entry"):
        half.get_x_xtx_inv(1e-6 * rows(4, 9), torch.empty(0, 0))
    half = RidgeScoreComputer(torch.float16, "cpu", lambda_reg=1e12)
    with pytest.raises(ValueError, match=r"features must fit torch.float16, got a largest entry"):
        half.get_x_xtx_inv(rows(4, 9), torch.empty(0, 0))
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinity in row 1"):
        computer.get_x_xtx_inv(torch.tensor([[1.0], [float("nan")]]), torch.empty(0, 0))


@pytest.mark.parametrize("trak_scale", [False, True])
def test_inside_traker(trak_scale, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    train = (rows(20, 6), torch.arange(20) % 3)
    query = (rows(4, 6, seed=1), torch.arange(4) % 3)

    def run(score_computer, name):
        traker = trak.TRAKer(
            model=model,
            task="image_classification",
            train_set_size=20,
            save_dir=str(tmp_path / name),
            device="cpu",
            projector=NoOpProjector(device="cpu"),
            use_half_precision=False,
            score_computer=score_computer,
            lambda_reg=0.5,
            logging_level="ERROR",
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(batch=train, num_samples=20)
        traker.finalize_features()
        traker.start_scoring_checkpoint("q", model.state_dict(), model_id=0, num_targets=4)
        traker.score(batch=query, num_samples=4)
        return torch.as_tensor(traker.finalize_scores("q")).float()

    ours = run(functools.partial(RidgeScoreComputer, trak_scale=trak_scale), "ours")
    theirs = run(BasicScoreComputer, "theirs")
    if trak_scale:
        assert relative_error(ours, theirs) < 1e-4
    # without the division the scores differ from theirs by one factor for the whole checkpoint
    factor = (ours * theirs).sum() / theirs.square().sum()
    assert relative_error(ours, factor * theirs) < 1e-4
