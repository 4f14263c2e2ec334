import pytest
import torch
from scipy.stats import spearmanr

from dtrak.lds import choose_damping, lds, lds_per_query


def problem(models=24, samples=30, queries=5, noise=0.0):
    torch.manual_seed(3)
    subsets = torch.rand(models, samples) < 0.5
    scores = torch.randn(queries, samples, dtype=torch.float64)
    losses = -(subsets.double() @ scores.T)
    return scores, subsets, losses + noise * torch.randn(models, queries, dtype=torch.float64)


def test_the_true_linear_model_scores_one_and_its_negative_minus_one():
    scores, subsets, losses = problem()
    assert lds(scores, subsets, losses) == pytest.approx(1, abs=1e-12)
    assert lds(-scores, subsets, losses) == pytest.approx(-1, abs=1e-12)


def test_equals_scipy_with_ties():
    scores, subsets, losses = problem(noise=3.0)
    losses, scores = losses.round(), scores.round()
    predictions = -(subsets.double() @ scores.T)
    expected = [spearmanr(predictions[:, q], losses[:, q]).statistic for q in range(5)]
    assert lds_per_query(scores, subsets, losses).tolist() == pytest.approx(expected, abs=1e-12)


def test_constant_losses_score_zero():
    scores, subsets, losses = problem()
    losses[:, 2] = 1.0
    assert lds_per_query(scores, subsets, losses)[2] == 0


def test_the_damping_is_chosen_on_one_half_and_judged_on_the_other():
    scores, subsets, losses = problem(models=40, noise=4.0)
    generator = torch.Generator().manual_seed(1)
    sweep = {
        float(strength): scores + strength * torch.randn(scores.shape, generator=generator).double()
        for strength in (0.0, 0.5, 1.0, 2.0)
    }
    choice = choose_damping(iter(sweep.items()), subsets, losses, seed=7)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(7))
    halves = order[:20], order[20:]
    first = {d: lds(s, subsets[halves[0]], losses[halves[0]]) for d, s in sweep.items()}
    assert choice.damping == max(first, key=first.get)
    assert choice.held_out_lds == lds(sweep[choice.damping], subsets[halves[1]], losses[halves[1]])
    whole = {d: lds(s, subsets, losses) for d, s in sweep.items()}
    assert (choice.in_sample_damping, choice.in_sample_lds) == max(
        whole.items(), key=lambda item: item[1]
    )


def test_refusals():
    scores, subsets, losses = problem()
    with pytest.raises(TypeError, match=r"subsets must be bool, got torch\.float32"):
        lds(scores, subsets.float(), losses)
    with pytest.raises(ValueError, match=r"subsets must be \[R, 30\] and losses \[R, 5\]"):
        lds(scores, subsets, losses[:, :4])
    with pytest.raises(ValueError, match="must be matrices"):
        lds(scores[0], subsets, losses)
    with pytest.raises(ValueError, match="at least 2 models, got 1"):
        lds(scores, subsets[:1], losses[:1])
    losses[3, 1] = float("nan")
    with pytest.raises(ValueError, match="losses must be finite, got row 3"):
        lds(scores, subsets, losses)
    with pytest.raises(ValueError, match="at least 4 models to split, got 3"):
        choose_damping([(1.0, scores)], subsets[:3], losses[:3])
    with pytest.raises(ValueError, match="at least one damping"):
        choose_damping([], subsets, problem()[2])
