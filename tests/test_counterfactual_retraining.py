"""Retraining without some images: the same bits as training without them by hand."""

import pickle
from dataclasses import replace

import pytest
import torch
from finished_run import RECIPE
from safetensors.torch import load_file, save_file

from dtrak.data.images import to_uint8
from dtrak.evaluation import retraining
from dtrak.evaluation.counterfactual import origin as module
from dtrak.evaluation.counterfactual.origin import open_origin
from dtrak.evaluation.counterfactual.results import CounterfactualError
from dtrak.evaluation.counterfactual.retraining import (
    RetrainJob,
    load_experiment,
    prepare,
    removal_positions,
)
from dtrak.features.noise import sample_noise
from dtrak.models.unet import digits_model
from dtrak.training.drawing import draw_all
from dtrak.training.trainer import train

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture
def origin(finished, tmp_path, monkeypatch):
    # as the processes that open the experiment again do
    monkeypatch.setattr(module, "fitting_steps", lambda model: STEPS)
    return open_origin(finished, tmp_path / "cf")


@pytest.fixture
def experiment(origin, tmp_path):
    scores = torch.rand(4, 60, generator=torch.Generator().manual_seed(0))
    removed = {
        "d-trak": removal_positions(scores, [2, 0], 12),
        "none": torch.zeros(2, 0, dtype=torch.int64),
    }
    ids = ["00002.png", "00000.png"]
    return prepare(tmp_path / "cf", origin, ids, removed, top_k=12, retrainings=2)


def trained_by_hand(origin, without, init_seed, seed):
    kept = [image for row, image in enumerate(origin.data.images) if row not in without]
    model = digits_model(init_seed)
    train(model, torch.stack(kept), replace(RECIPE, seed=seed))
    return model


@torch.no_grad()
def loss_by_hand(model, image, name):
    """The mean squared error of the noise at 100 timesteps, one at a time."""
    total = 0.0
    for t in range(0, 1000, 10):
        noise = sample_noise([name], [t], (1, 8, 8), seed=0)[0]
        kept = model.process.scheduler.alphas_cumprod[t]
        noisy = kept.sqrt() * image + (1 - kept).sqrt() * noise
        output = model.module(noisy, torch.tensor([t])).sample
        total += float((output - noise).square().mean()) / 100
    return total


def by_hand(origin, without, init_seed, seed, drawn):
    """The pictures of a model trained on the kept images, in their order."""
    model = trained_by_hand(origin, without, init_seed, seed)
    return to_uint8(draw_all(model, drawn, num_inference_steps=STEPS))


def test_removal_positions_are_the_highest_scores():
    scores = torch.tensor([[1.0, 5.0, 3.0, 5.0, 2.0], [0.0, -1.0, 2.0, 1.0, 9.0]])
    assert removal_positions(scores, [1, 0, 1], 3).tolist() == [[4, 2, 3], [1, 3, 2], [4, 2, 3]]
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"--top-k must be in \[1, 5\), got {k}"):
            removal_positions(scores, [0], k)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="scores must be finite"):
        removal_positions(scores, [1], 2)
    assert removal_positions(scores, [0], 1).tolist() == [[1]]


def test_models_are_those_trained_by_hand(origin, experiment):
    assert experiment.jobs == [
        "none/all/0", "none/all/1", "d-trak/00002/0", "d-trak/00000/0", "d-trak/00002/1",
        "d-trak/00000/1",
    ]  # fmt: skip
    assert experiment.missing() == experiment.jobs
    seen = []
    for job in experiment.jobs:
        assert experiment.retrain(job, CPU, lambda *progress: seen.append(progress))
    assert seen[: RECIPE.steps] == [(n + 1, RECIPE.steps) for n in range(RECIPE.steps)]
    assert experiment.missing() == []
    assert not list((experiment.folder / "training").iterdir())
    pictures = experiment.pictures()
    assert {name: tuple(p.shape) for name, p in pictures.items()} == {
        "d-trak": (2, 2, 1, 8, 8), "none": (2, 2, 1, 8, 8)
    }  # fmt: skip
    for r in (0, 1):
        seed = RECIPE.seed + r
        for row, drawn in enumerate((2, 0)):
            without = set(experiment.removed["d-trak"][row].tolist())
            expected = by_hand(origin, without, seed, seed, [drawn])
            assert torch.equal(pictures["d-trak"][row, r], expected[0])
        # drawn together: a batch of another size may round otherwise
        expected = by_hand(origin, set(), seed, seed + 1, [0, 1, 2, 3])
        assert torch.equal(pictures["none"][:, r], expected[[2, 0]])
    assert not torch.equal(pictures["none"][:, 0], pictures["d-trak"][:, 0])
    # the loss of a query under a model trained without its images, by hand
    losses = experiment.losses()
    assert {name: tuple(x.shape) for name, x in losses.items()} == {
        "d-trak": (2, 2), "none": (2, 2)
    }  # fmt: skip
    without = set(experiment.removed["d-trak"][0].tolist())
    model = trained_by_hand(origin, without, RECIPE.seed, RECIPE.seed)
    expected = loss_by_hand(model, origin.queries.pictures([2]), "lds/00002.png")
    assert float(losses["d-trak"][0, 0]) == pytest.approx(expected, rel=1e-5)


def test_what_is_done_is_not_done_again(experiment):
    job = experiment.jobs[2]
    assert experiment.retrain(job, CPU)
    before = experiment.file(job).stat().st_mtime_ns
    assert not experiment.retrain(job, CPU)
    # as a process that is spawned gets it
    again = pickle.loads(pickle.dumps(RetrainJob(experiment.folder, ("cpu",))))(0)
    assert not again(job, lambda *_: None)
    assert experiment.file(job).stat().st_mtime_ns == before
    assert load_experiment(experiment.folder).missing() == [j for j in experiment.jobs if j != job]


def test_an_interrupted_training_goes_on_with_the_same_bits(experiment, monkeypatch):
    job = experiment.jobs[2]
    assert experiment.retrain(job, CPU)
    whole = load_file(experiment.file(job))["pictures"]
    experiment.file(job).unlink()
    monkeypatch.setattr(retraining, "_CHECKPOINT_EVERY", 2)
    steps = []

    def stop(done, total):
        steps.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.retrain(job, CPU, stop)
    assert not experiment.file(job).exists()
    assert experiment.retrain(job, CPU, lambda done, total: steps.append(done))
    # the checkpoint of step 4 was the last
    assert steps == [1, 2, 3, 4, 5, 5, 6]
    assert torch.equal(load_file(experiment.file(job))["pictures"], whole)


def test_methods_queries_and_retrainings_can_be_added(origin, experiment):
    assert experiment.retrain("d-trak/00002/0", CPU)
    more = prepare(
        experiment.folder,
        origin,
        ["00002.png", "00000.png", "00001.png"],
        {
            "d-trak": torch.cat([experiment.removed["d-trak"], torch.arange(12)[None]]),
            "raw": torch.arange(36).reshape(3, 12),
        },
        top_k=12,
        retrainings=3,
    )
    assert len(more.jobs) == 18
    assert set(more.jobs) - set(more.missing()) == {"d-trak/00002/0"}


@pytest.mark.parametrize("change", ["removed", "queries"])
def test_pictures_of_other_removals_are_refused(origin, experiment, change):
    assert experiment.retrain("d-trak/00002/0", CPU)
    assert experiment.retrain("none/all/0", CPU)
    if change == "removed":
        experiment.removed["d-trak"][0, 3] = 59 - experiment.removed["d-trak"][0, 3]
    else:
        fewer = origin.queries.select([0, 2, 3])
        experiment = replace(experiment, origin=replace(origin, drawn=fewer))
    with pytest.raises(CounterfactualError, match="a model trained without other images"):
        experiment.missing()


def test_damaged_and_missing_pictures(experiment):
    with pytest.raises(CounterfactualError, match=r"model 'd-trak/00002/0' of .* is not trained"):
        experiment.pictures()
    file = experiment.file("d-trak/00002/0")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"nothing")
    with pytest.raises(CounterfactualError, match="is damaged: delete it and run again"):
        experiment.missing()
    save_file({"pictures": torch.zeros(1)}, file)
    with pytest.raises(CounterfactualError, match="is damaged: delete it and run again"):
        experiment.missing()


def test_folders_of_other_experiments_are_refused(origin, experiment, tmp_path):
    folder, removed = experiment.folder, experiment.removed
    with pytest.raises(CounterfactualError, match="another experiment: top_k is 12 there and 13"):
        prepare(folder, origin, [], removed, top_k=13)
    again = origin.retraining.elsewhere(folder)
    again.training = replace(again.training, recipe=replace(RECIPE, steps=7))
    other = replace(origin, retraining=again)
    with pytest.raises(CounterfactualError, match=r"training\.recipe\.steps is 6 there and 7 here"):
        prepare(folder, other, [], removed, top_k=12)
    with pytest.raises(ValueError, match="--retrainings must be at least 1, got 0"):
        prepare(folder, origin, [], removed, top_k=12, retrainings=0)
    with pytest.raises(CounterfactualError, match=r"must hold plan\.json, got none"):
        load_experiment(tmp_path)
    (folder / "removed.safetensors").write_bytes(b"")
    with pytest.raises(CounterfactualError, match="is damaged: run again to write it anew"):
        load_experiment(folder)
    (folder / "plan.json").write_text('{"format": 7}')
    with pytest.raises(CounterfactualError, match="must be of format 4, got 7"):
        load_experiment(folder)
    (folder / "plan.json").write_text("[]")
    with pytest.raises(CounterfactualError, match=r"plan\.json is damaged"):
        prepare(folder, origin, [], removed, top_k=12)
