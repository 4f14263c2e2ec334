"""What evaluations beyond LDS are made of, and that their page is up to date."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
evaluation = importlib.import_module("quality_evaluation")


@pytest.mark.parametrize("name", ["quality_evaluation", "quality_findings"])
def test_the_page_is_what_the_rows_say(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--check"])
    # it exits with the reason where a table is another
    importlib.import_module(name).main()


def test_groups_agree_by_rank_and_without_the_first():
    generator = torch.Generator().manual_seed(0)
    scores, rises = torch.randn(2, 5, 8, generator=generator)
    rises[0] = scores[0].exp()
    found = evaluation.agreement(scores, rises)
    for row in range(5):
        first = max(range(8), key=lambda g, row=row: float(rises[row, g]))
        assert found["top1"][row] == (int(scores[row].argmax()) == first)
        wanted = spearmanr(scores[row].numpy(), rises[row].numpy()).statistic
        assert found["correlation"][row] == pytest.approx(wanted)
        left = [g for g in range(8) if g != first]
        wanted = spearmanr(scores[row][left].numpy(), rises[row][left].numpy()).statistic
        assert found["correlation_of_others"][row] == pytest.approx(wanted)
    assert found["top1"][0] == found["correlation"][0] == found["correlation_of_others"][0] == 1
    # groups that all score the same tell nothing
    assert evaluation.agreement(torch.zeros(1, 8), rises[:1])["correlation"] == [0.0]


def test_copies_are_the_images_they_are_said_to_be():
    train, pairs = evaluation.with_copies()
    kinds = list(pairs.values())
    assert [kinds.count(kind) for kind in evaluation.COPY_KINDS] == [evaluation.COPIES] * 3
    images, differences = train.images[:, 0], {}
    for (one, other), kind in pairs.items():
        assert train.ids[other] == f"{kind}/{train.ids[one]}"
        if kind == "moved":
            assert torch.equal(images[other][:, 1:], images[one][:, :-1])
            assert (images[other][:, 0] == -1).all()
        else:
            differences.setdefault(kind, []).append(images[other] - images[one])
    assert not torch.stack(differences["exact"]).any()
    assert abs(float(torch.stack(differences["noisy"]).std()) - evaluation.NOISE) < 0.02


def test_every_method_that_needs_no_retraining_has_its_turn():
    found = [how.variant for _, how in evaluation.combinations() if _ == "deletion"]
    assert len(found) == len(set(found)) == len(evaluation.settings())
    assert {"d-trak", "d-trak-unwhitened", "gas", "journey-trak", "random"} <= set(found)


def test_memorisation_is_what_being_left_out_costs():
    """Half-data models as they are drawn, of images whose losses are known."""
    masks = evaluation.halves()
    assert (masks.sum(1) == evaluation.FEW // 2).all()
    assert (masks[::2] != masks[1::2]).all()
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(evaluation.FEW, generator=generator).double()
    level = torch.rand(evaluation.FEW, generator=generator).double()
    losses = level + cost * ~masks
    assert torch.allclose(evaluation.memorisation(losses, masks), cost)
    # any two models that have all images between them say it
    assert torch.allclose(evaluation.memorisation(losses[2:4], masks[2:4]), cost)


def test_what_finds_the_most_memorised():
    truth = torch.arange(40.0)
    found = truth.clone()
    # two are the most memorised, of which one is found
    found[39] = -1
    wanted = spearmanr(found.numpy(), truth.numpy()).statistic
    assert evaluation.finds_memorised(found, truth) == (pytest.approx(wanted), 0.5)
    assert evaluation.finds_memorised(truth, truth) == (pytest.approx(1), 1.0)


def test_ships_need_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_rows", lambda case: [])
    with pytest.raises(ValueError, match=r"--data must say in which folder cifar10-test\.parquet"):
        evaluation.measure_planted(tmp_path, "ships", None, False)
