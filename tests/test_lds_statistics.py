"""Rank correlations and their intervals against scipy, row by row."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import spearmanr

from dtrak.evaluation.lds.statistics import (
    ResampledRanks,
    bootstrap_spearman,
    choose_damping,
    confidence_interval,
    halves,
    lds,
    lds_per_query,
    resample_counts,
    spearman,
)


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
    parts = order[:20], order[20:]
    first = {d: lds(s, subsets[parts[0]], losses[parts[0]]) for d, s in sweep.items()}
    assert choice.damping == max(first, key=first.get)
    assert choice.held_out_lds == lds(sweep[choice.damping], subsets[parts[1]], losses[parts[1]])
    whole = {d: lds(s, subsets, losses) for d, s in sweep.items()}
    assert (choice.in_sample_damping, choice.in_sample_lds) == max(
        whole.items(), key=lambda item: item[1]
    )


@pytest.mark.parametrize("rounded", [False, True], ids=["distinct", "ties"])
def test_a_resample_is_scored_as_if_its_rows_were_copied_out(rounded):
    _, _, losses = problem(models=17, queries=3)
    predictions = losses + 2 * torch.randn(losses.shape, dtype=torch.float64)
    if rounded:
        losses, predictions = losses.round(), predictions.round()
    counts = resample_counts(17, 300, seed=5)
    counts[0], counts[1] = 1.0, 0.0
    counts[1, 4] = 17.0
    ranked = list(ResampledRanks(losses, counts).chunks())
    actual = bootstrap_spearman(predictions, ranked, counts)
    expected = []
    for row in counts.long():
        rows = torch.arange(17).repeat_interleave(row)
        values = [
            0.0 if row.max() == 17 else spearmanr(predictions[rows, q], losses[rows, q]).statistic
            for q in range(3)
        ]
        expected.append(np.mean(values))
    assert actual.tolist() == pytest.approx(expected, abs=1e-6)
    assert float(actual[0]) == pytest.approx(float(spearman(predictions, losses).mean()), abs=1e-6)


def test_resamples_are_uniform_and_repeatable():
    counts = resample_counts(30, 4000, seed=2)
    assert torch.equal(counts, resample_counts(30, 4000, seed=2))
    assert (counts.sum(1) == 30).all()
    # each model is drawn once on average, with the variance of a binomial
    assert counts.mean(0).sub(1).abs().max() < 5 * (29 / 30 / 4000) ** 0.5
    assert float(counts.var()) == pytest.approx(29 / 30, rel=0.03)


def rank_correlation(a, b, axis=-1):
    x, y = (stats.rankdata(v, axis=axis) for v in (a, b))
    x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
    return (x * y).sum(axis) / np.sqrt((x**2).sum(axis) * (y**2).sum(axis))


def test_intervals_equal_scipys_bootstrap():
    generator = np.random.default_rng(4)
    x = generator.normal(size=40)
    sample = (x, x + generator.normal(size=40) ** 3)
    draws = generator.integers(40, size=(9000, 40))
    kept = np.array([np.delete(np.arange(40), i) for i in range(40)])
    resampled, jackknifed = (
        torch.from_numpy(rank_correlation(sample[0][rows], sample[1][rows]))
        for rows in (draws, kept)
    )
    found = confidence_interval(rank_correlation(*sample), resampled, jackknifed)
    for method, interval in (("percentile", found.percentile), ("BCa", found.bca)):
        expected = stats.bootstrap(
            sample, rank_correlation, n_resamples=9000, paired=True, vectorized=True,
            method=method, rng=np.random.default_rng(9),
        ).confidence_interval  # fmt: skip
        # two sets of resamples: the ends agree to their own error
        assert interval == pytest.approx((expected.low, expected.high), abs=0.02), method
    assert found.bca != found.percentile


def test_bca_is_the_percentile_interval_without_bias_and_skewness():
    values = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    symmetric = torch.tensor([-1.0, 1.0, -2.0, 2.0])
    found = confidence_interval(0.0, values, symmetric)
    assert found.percentile == pytest.approx((-0.95, 0.95), abs=1e-3)
    assert found.bca == pytest.approx(found.percentile, abs=2e-3)
    # three quarters of the resamples lie below the estimate: both ends move up
    shifted = confidence_interval(0.5, values, symmetric)
    assert shifted.bca[0] > found.bca[0] + 0.1
    assert shifted.bca[1] > found.bca[1]
    # an estimate beyond all of them is no reason for NaN
    outside = confidence_interval(3.0, values, torch.zeros(4))
    assert np.isfinite(outside.bca).all()


# slow: a statistical proof
@pytest.mark.full
def test_intervals_cover_as_often_as_they_say():
    # rank correlation of a bivariate normal with Pearson correlation 0.5: (6 / π) asin(0.25)
    truth = 6 / np.pi * np.arcsin(0.25)
    generator = torch.Generator().manual_seed(0)
    hits = {"percentile": 0, "bca": 0}
    repeats, models = 200, 48
    counts, leave = resample_counts(models, 1000, 1), 1 - torch.eye(models)
    for _ in range(repeats):
        z = torch.randn(2, models, 1, generator=generator)
        x, y = z[0], 0.5 * z[0] + 0.75**0.5 * z[1]
        drawn = [
            bootstrap_spearman(x, list(ResampledRanks(y, c).chunks()), c) for c in (counts, leave)
        ]
        interval = confidence_interval(float(spearman(x, y)), *drawn)
        for name in hits:
            low, high = getattr(interval, name)
            hits[name] += low <= truth <= high
    assert 0.90 <= hits["bca"] / repeats <= 0.99
    assert 0.88 <= hits["percentile"] / repeats <= 0.99


def test_halves_divide_the_models():
    first, second = halves(11, seed=3)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(11))
    assert abs(len(first) - len(second)) == 1


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
