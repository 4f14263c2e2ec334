"""Distances, medians with intervals, and results that survive being written."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom
from test_baselines import clip  # noqa: F401

from dtrak.evaluation.counterfactual.results import (
    METRICS,
    Counterfactual,
    CounterfactualError,
    clip_similarities,
    compare_pictures,
    load_counterfactual,
    save_counterfactual,
    summarise,
    vector_distances,
)
from dtrak.methods.baselines import clip_embeddings, load_vae, vae_latents


def pictures(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def example(Q=6, R=2, size=8, methods=3, **encoders):
    drawn = {
        "d-trak": pictures(Q, R, 1, size, size, seed=1),
        "random": pictures(Q, R, 1, size, size, seed=2),
        "none": pictures(Q, R, 1, size, size, seed=3),
    }
    drawn = dict(list(drawn.items())[:methods])
    names = [f"{q:05d}.png" for q in range(Q)]
    settings = {"removed": 20, "training images": 100}
    return compare_pictures(names, pictures(Q, 1, size, size), drawn, settings, **encoders)


def test_distances_are_euclidean_over_pixels_in_plus_minus_one():
    results = example()
    assert list(results.values) == ["pixel_l2"]
    before = results.originals.numpy().astype(np.float64) / 127.5 - 1
    for method in results.methods:
        after = results.pictures[method].numpy().astype(np.float64) / 127.5 - 1
        expected = [
            [np.sqrt(((after[q, r] - before[q]) ** 2).sum()) for r in range(2)] for q in range(6)
        ]
        assert results.values["pixel_l2"][method].numpy() == pytest.approx(
            np.array(expected), rel=1e-6
        )


def test_a_rise_of_the_loss_is_a_metric_like_others():
    rises = {"d-trak": torch.tensor([[3.0, 5.0]] * 6), "random": torch.tensor([[1.0, 2.0]] * 6)}
    results = example(methods=2, rises=rises)
    assert results.values["loss"]["d-trak"].tolist() == [[3.0, 5.0]] * 6
    beyond = results.beyond_random("loss", "d-trak")
    assert (beyond.median, beyond.interval) == (2.5, (2.5, 2.5))


def test_a_picture_has_no_distance_from_itself(clip):  # noqa: F811
    before = pictures(3, 3, 20, 20).float() / 127.5 - 1
    assert (vector_distances(before, before[:, None]) == 0).all()
    assert clip_similarities(before, before[:, None], clip).numpy() == pytest.approx(1, abs=1e-6)


def test_clip_and_latents_compare_each_picture_with_its_own_original(clip, vae_folder):  # noqa: F811
    vae = load_vae(vae_folder)
    results = example(Q=3, size=20, clip=clip, vae=vae)
    assert set(results.values) == set(METRICS) - {"loss"}
    before = results.originals.float() / 127.5 - 1
    for q in range(3):
        for r in range(2):
            after = results.pictures["d-trak"][q, r][None].float() / 127.5 - 1
            a, b = (clip_embeddings(x, clip)[0].double() for x in (before[q][None], after))
            cosine = float(a @ b / a.norm() / b.norm())
            assert float(results.values["clip_cosine"]["d-trak"][q, r]) == pytest.approx(
                cosine, abs=1e-5
            )
            latents = vae_latents(after, vae) - vae_latents(before[q][None], vae)
            assert float(results.values["latent_l2"]["d-trak"][q, r]) == pytest.approx(
                float(latents.double().norm()), rel=1e-4
            )


def test_summaries_are_of_queries_not_of_retrainings():
    values = torch.tensor([[1.0, 3.0], [10.0, 20.0], [0.0, 1.0]])
    summary = summarise(values)
    assert (summary.median, summary.mean, summary.count) == (2.0, pytest.approx(17.5 / 3), 3)
    assert summary.interval is None


@pytest.mark.parametrize("n", [25, 41])
def test_intervals_are_exact_quantiles_of_resampled_medians(n):
    """The median of a resample is at most the k-th value if most draws are: a binomial."""
    values = torch.arange(float(n))[torch.randperm(n, generator=torch.Generator().manual_seed(n))]
    below = [binom.sf((n - 1) / 2, n, (k + 1) / n) for k in range(n)]
    ends = [next(k for k in range(n) if below[k] >= tail) for tail in (0.025, 0.975)]
    # no end is so close to its quantile that 9,999 resamples may miss it
    for end, tail in zip(ends, (0.025, 0.975), strict=True):
        assert min(abs(below[end] - tail), abs(below[end - 1] - tail)) > 0.004
    assert summarise(values[:, None]).interval == tuple(ends)
    assert summarise(values[:, None]).interval == summarise(values[:, None]).interval
    assert summarise(values[:, None]).median == (n - 1) / 2


def test_intervals_cover_the_median_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(3)
    hits = [
        low <= 0 <= high
        for low, high in (
            summarise(torch.randn(25, 1, generator=generator), seed=n).interval for n in range(60)
        )
    ]
    assert 52 <= sum(hits) <= 60


def test_beyond_random_is_paired_by_query():
    results = example()
    shift = results.values["pixel_l2"]["random"] + torch.arange(6.0)[:, None]
    results.values["pixel_l2"]["d-trak"] = shift
    assert results.beyond_random("pixel_l2", "d-trak").median == pytest.approx(2.5)
    assert results.beyond_random("pixel_l2", "random") is None
    assert results.beyond_random("pixel_l2", "none") is None
    del results.values["pixel_l2"]["random"]
    assert results.beyond_random("pixel_l2", "d-trak") is None


def test_results_come_back_as_they_were_written(tmp_path):
    results = example()
    save_counterfactual(results, tmp_path)
    found = load_counterfactual(tmp_path)
    assert (found.query_ids, found.settings) == (results.query_ids, results.settings)
    assert found.methods == ["d-trak", "random", "none"]
    assert torch.equal(found.originals, results.originals)
    for method in results.methods:
        assert torch.equal(found.pictures[method], results.pictures[method])
        values = results.values["pixel_l2"][method]
        assert torch.equal(found.values["pixel_l2"][method], values)
        table = json.loads((tmp_path / "results.json").read_text())["metrics"]["pixel_l2"][method]
        assert table["values"] == values.tolist()
        assert table["median"] == float(np.median(values.mean(1)))


def test_damaged_results_are_refused(tmp_path):
    with pytest.raises(CounterfactualError, match="must hold the results of"):
        load_counterfactual(tmp_path)
    save_counterfactual(example(), tmp_path)
    file = tmp_path / "results.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(CounterfactualError, match="is damaged"):
        load_counterfactual(tmp_path)
    file.write_bytes(content.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(CounterfactualError, match="must be of format 1, got 9"):
        load_counterfactual(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        (torch.zeros(3), r"values must be \[Q, R\], both at least 1, got \[3\]"),
        (torch.zeros(0, 1), r"values must be \[Q, R\], both at least 1, got \[0, 1\]"),
        (torch.full((2, 1), float("nan")), "values must be finite"),
    ],
)
def test_summaries_refuse(values, message):
    with pytest.raises(ValueError, match=message):
        summarise(values)


@pytest.mark.parametrize(
    "originals, others, message",
    [
        ((3, 1, 8, 8), (3, 1, 8, 8), r"\[Q, \.\.\.\] and \[Q, R, \.\.\.\] of one shape, got"),
        ((3, 1, 8, 8), (3, 2, 1, 8, 9), r"of one shape, got \[3, 1, 8, 8\] and \[3, 2, 1, 8, 9\]"),
        ((3, 1, 8, 8), (2, 2, 1, 8, 8), "others must be of 3 queries, got 2"),
    ],
)
def test_distances_refuse(originals, others, message):
    with pytest.raises(ValueError, match=message):
        vector_distances(torch.zeros(originals), torch.zeros(others))


def test_distances_refuse_what_is_not_finite():
    bad = torch.full((2, 1, 1, 4, 4), float("inf"))
    with pytest.raises(ValueError, match="others must be finite, got NaN or infinity"):
        vector_distances(torch.zeros(2, 1, 4, 4), bad)


def test_no_method_at_all():
    assert Counterfactual([], pictures(0, 1, 8, 8), {}, {"pixel_l2": {}}, {}).methods == []
