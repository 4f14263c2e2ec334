"""The draws of queries and of random removals, against scikit-learn and what was published."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from dtrak.evaluation.counterfactual.draw import Draw, choose_draw
from dtrak.evaluation.counterfactual.results import CounterfactualError
from dtrak.evaluation.counterfactual.retraining import removal_positions
from dtrak.training.presets import PRESETS

IDS = [f"{seed:05d}.png" for seed in range(1000)]
# as CIFAR-2's 02_counter.ipynb prints them
CIFAR2 = [
    521, 737, 740, 660, 411, 678, 626, 513, 859, 136, 811, 76, 636, 973, 938, 899, 280, 883, 761,
    319, 549, 174, 371, 527, 210, 235, 101, 986, 902, 947, 346, 139, 621, 499, 370, 198, 687, 584,
    901, 59, 328, 96, 312, 974, 299, 277, 924, 601, 439, 837, 570, 879, 261, 578, 23, 30, 617, 10,
    221, 820,
]  # fmt: skip
# the first five places that random removal of k leaves for a query, from the ids which the
# notebooks of CIFAR-2 (above) and ArtBench-2 print
KEPT = [
    (820, 2500, [0, 1, 7, 8, 10]),
    (617, 1000, [0, 3, 4, 5, 6]),
    (10, 1000, [1, 2, 3, 4, 5]),
    (23, 2500, [0, 2, 4, 6, 10]),
    (299, 1000, [0, 2, 3, 5, 6]),
    (319, 1000, [0, 2, 3, 6, 7]),
    (987, 1000, [1, 2, 3, 4, 5]),
    (582, 2500, [2, 3, 4, 5, 6]),
    (270, 2500, [1, 3, 5, 6, 7]),
]


@pytest.mark.parametrize("preset, seed", [("cifar2", 42), ("celeba", 0), ("artbench2", 0)])
def test_published_queries_are_those_of_scikit_learn(preset, seed):
    draw = choose_draw(None, None, preset, IDS, 5000)
    assert draw == choose_draw("published", None, preset, IDS, 5000) == Draw(preset)
    _, expected = train_test_split(range(1000), test_size=60, random_state=seed)
    assert draw.choose_queries(1000) == expected
    assert draw.choose_queries(2000) == expected
    assert draw.choose_queries(1000, 7) == expected[:7]
    assert f"random_state {seed} for queries" in draw.description
    for count in (0, 61):
        with pytest.raises(ValueError, match=rf"--num-queries must be in \[1, 60\] .* got {count}"):
            draw.choose_queries(1000, count)


def test_published_queries_are_those_the_notebook_prints():
    assert Draw("cifar2").choose_queries(1000) == CIFAR2


@pytest.mark.parametrize("query, k, kept", KEPT)
def test_random_removal_is_what_the_notebooks_print(query, k, kept):
    state = np.random.get_state()[1].copy()
    scores = Draw("celeba").random_scores(1000, 5000)
    removed = set(removal_positions(scores, [query], k)[0].tolist())
    assert [place for place in range(5000) if place not in removed][:5] == kept
    assert (np.random.get_state()[1] == state).all()


def test_more_queries_of_our_own_are_those_before_and_others():
    drawn = Draw(seed=3).choose_queries(20, 20)
    assert sorted(drawn) == list(range(20))
    for count in (1, 7, 19):
        assert Draw(seed=3).choose_queries(20, count) == drawn[:count]
    assert Draw(seed=3).choose_queries(20) == drawn[:16]
    assert len(Draw(seed=3).choose_queries(4)) == 4
    assert Draw(seed=4).choose_queries(20, 7) != drawn[:7]
    for count in (0, 21):
        with pytest.raises(ValueError, match=rf"--num-queries must be in \[1, 20\].* got {count}"):
            Draw().choose_queries(20, count)
    expected = torch.rand(2, 6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Draw(seed=3).random_scores(2, 6), expected)
    assert Draw(seed=3).description == "seed 3"


@pytest.mark.parametrize(
    "preset, ids, num_train, message",
    [
        (None, IDS, 5000, r"one of cifar2, celeba, artbench2, got a run whose preset is not known"),
        ("digits", IDS, 5000, r"one of cifar2, .* got preset 'digits'"),
        ("artbench5", IDS, 12_500, r"one of cifar2, .* got preset 'artbench5'"),
        ("cifar2", IDS[:999], 5000, r"needs the 1,000 pictures of seeds 0 to 999 .* got 999"),
        ("cifar2", ["other.png", *IDS], 5000, r"needs the 1,000 pictures of seeds 0 to 999"),
        ("celeba", IDS, 4999, r"needs the 5,000 training images of celeba, got 4,999"),
    ],
)
def test_where_the_published_draw_is_none(preset, ids, num_train, message):
    with pytest.raises(CounterfactualError, match=f"--draw published .*{message}.*--draw seed"):
        choose_draw("published", None, preset, ids, num_train)
    assert choose_draw(None, None, preset, ids, num_train) == Draw(seed=0)


def test_a_seed_asks_for_a_draw_of_our_own():
    assert choose_draw(None, 3, "cifar2", IDS, 5000) == Draw(seed=3)
    assert choose_draw("seed", None, "cifar2", IDS, 5000) == Draw(seed=0)
    with pytest.raises(ValueError, match="--seed is for --draw seed, got 3 with --draw published"):
        choose_draw("published", 3, "cifar2", IDS, 5000)
    with pytest.raises(ValueError, match="--draw must be one of published, seed"):
        choose_draw("publshed", None, "cifar2", IDS, 5000)
    with pytest.raises(ValueError, match=r"--seed must be in \[0, 2\*\*63\), got -1"):
        choose_draw(None, -1, "cifar2", IDS, 5000)


def test_presets_of_published_draws_exist():
    from dtrak.evaluation.counterfactual.draw import PUBLISHED_POOL, PUBLISHED_SEEDS

    for name in PUBLISHED_SEEDS:
        assert PRESETS[name].num_generated == PUBLISHED_POOL


def test_images_are_read_only_for_methods_that_compare_them():
    from types import SimpleNamespace

    from dtrak.cli.counterfactual_experiment import _Scorer

    # has no images to read
    origin = SimpleNamespace(
        data=range(5), queries=range(2), gradient_scores=lambda *_: torch.ones(2, 5)
    )
    scorer = _Scorer(origin, Path("x"), torch.device("cpu"), None, None, None, Draw(seed=3))
    assert scorer.scores("random").shape == (2, 5)
    assert scorer.scores("d-trak").shape == (2, 5)
