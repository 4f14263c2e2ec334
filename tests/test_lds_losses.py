"""The loss of every query under every model: against the formula, and kept safely."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_lds import CPU, PRESET, register

from dtrak.data.images import load_data
from dtrak.data.samples import Samples
from dtrak.evaluation.lds.experiment import (
    RETRAIN,
    ExperimentError,
    prepare,
    train_one,
)
from dtrak.evaluation.lds.losses import (
    LossSettings,
    claim_settings,
    estimate,
    evaluate_one,
    is_outdated,
    load_losses,
    measured_names,
    query_losses,
)
from dtrak.evaluation.lds.queries import query_sets
from dtrak.features import cost
from dtrak.features.noise import sample_noise
from dtrak.models.unet import UNet
from dtrak.runs.files import claim

SETTINGS = LossSettings(num_timesteps=4, num_noise_seeds=2)


@pytest.fixture(autouse=True)
def preset():
    register()


def images(count=5):
    return load_data("digits", split="validation", limit=count)


def test_equals_the_denoising_loss_written_out():
    model, queries = tiny_model(3), images()
    actual = query_losses(model, queries, SETTINGS, CPU)
    assert actual.shape == (2, 4, 5)
    survive = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    for seed in range(2):
        for place, t in enumerate((0, 250, 500, 750)):
            for q, image in enumerate(queries.images.double()):
                noise = sample_noise(
                    [f"lds/{queries.ids[q]}"], [t], (1, 8, 8), seed=seed, dtype=torch.float64
                )[0, 0]
                noisy = survive[t].sqrt() * image + (1 - survive[t]).sqrt() * noise
                with torch.no_grad():
                    predicted = model.module(noisy[None].float(), torch.tensor([t])).sample[0]
                expected = (predicted.double() - noise).square().mean()
                assert float(actual[seed, place, q]) == pytest.approx(float(expected), rel=1e-4)


def test_a_query_keeps_its_loss_whatever_comes_with_it():
    model, queries = tiny_model(3), images()
    together = query_losses(model, queries, SETTINGS, CPU, batch_size=256)
    for batch_size in (1, 3, 9):
        split = query_losses(model, queries, SETTINGS, CPU, batch_size=batch_size)
        assert (split - together).abs().max() < 1e-5
    alone = query_losses(model, queries.select([3]), SETTINGS, CPU)
    assert (alone[:, :, 0] - together[:, :, 3]).abs().max() < 1e-5


def test_progress_counts_queries_and_noises():
    seen = []
    query_losses(
        tiny_model(), images(), SETTINGS, CPU, batch_size=8, progress=lambda *p: seen.append(p)
    )
    assert seen == [(done, 10) for done in (2, 4, 5, 7, 9, 10)]


def test_a_model_that_blows_up_is_named_by_its_query():
    model = tiny_model()
    with torch.no_grad():
        model.module.conv_out.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite for sample 'lds/digits/"):
        query_losses(model, images(), SETTINGS, CPU)


def test_losses_are_measured_once_and_averaged_over_seeds(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=3, num_model_seeds=2)
    for name in ("full", "000-1", "000-2", "002-1", "002-2", "001-1"):
        train_one(experiment, name, CPU)
    claim_settings(experiment, SETTINGS)
    queries = query_sets(experiment, CPU)
    seen = []
    for name in ("000-1", "000-2", "001-1", "002-1", "002-2"):
        progress = lambda *p: seen.append(p)
        assert evaluate_one(experiment, queries, SETTINGS, name, CPU, progress)
        assert seen[-1] == (2 * 11, 2 * 11)
        assert not evaluate_one(experiment, queries, SETTINGS, name, CPU)
    assert measured_names(experiment) == ["000-1", "001-1", "002-1", "000-2", "002-2"]
    # subset 1 has one of its two trainings
    complete, losses = load_losses(experiment)
    assert complete == [0, 2]
    assert {kind: values.shape for kind, values in losses.items()} == {
        "validation": (2, 6),
        "generated": (2, 5),
    }
    for kind, values in losses.items():
        for row, subset in enumerate(complete):
            parts = [
                query_losses(
                    experiment.load_model(f"{subset:03d}-{s}"), queries[kind], SETTINGS, CPU
                )
                for s in (1, 2)
            ]
            expected = torch.stack(parts).double().mean((0, 1, 2))
            assert (values[row].double() - expected).abs().max() < 1e-6
    assert load_file(experiment.folder / "losses" / "000-1.safetensors")["generated"].shape == (
        2,
        4,
        5,
    )


def test_losses_of_the_retrain_family_are_its_own(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=1, num_model_seeds=2, num_retrain=3)
    claim_settings(experiment, SETTINGS)
    queries = {"validation": images()}
    for name in ("000-1", "retrain-000-1", "retrain-002-1"):
        train_one(experiment, name, CPU)
        assert evaluate_one(experiment, queries, SETTINGS, name, CPU)
    assert measured_names(experiment) == ["000-1"]
    assert measured_names(experiment, RETRAIN) == ["retrain-000-1", "retrain-002-1"]
    assert load_losses(experiment) == ([], {})
    complete, losses = load_losses(experiment, RETRAIN)
    assert complete == [0, 2]
    for row, subset in enumerate(complete):
        model = experiment.load_model(f"retrain-{subset:03d}-1")
        expected = query_losses(model, images(), SETTINGS, CPU).double().mean((0, 1))
        assert (losses["validation"][row].double() - expected).abs().max() < 1e-6


def test_losses_of_a_model_that_was_trained_anew_are_measured_again(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=2)
    claim_settings(experiment, SETTINGS)
    queries = {"validation": images()}
    for name in experiment.names():
        train_one(experiment, name, CPU)
        assert evaluate_one(experiment, queries, SETTINGS, name, CPU)
    before = load_losses(experiment)[1]["validation"]
    # the same training gives the same weights, and a copy keeps them
    folder = experiment.model_folder("001-1")
    shutil.rmtree(folder)
    assert load_losses(experiment)[0] == [0, 1], "losses outlive their model"
    train_one(experiment, "001-1", CPU)
    assert load_losses(experiment)[0] == [0, 1]
    assert not evaluate_one(experiment, queries, SETTINGS, "001-1", CPU)
    shutil.rmtree(folder)
    tiny_model(7).save(folder)
    assert [is_outdated(experiment, name) for name in ("000-1", "001-1")] == [False, True]
    assert measured_names(experiment) == ["000-1"]
    assert load_losses(experiment)[0] == [0], "what is outdated is not used"
    assert evaluate_one(experiment, queries, SETTINGS, "001-1", CPU)
    complete, after = load_losses(experiment)
    assert complete == [0, 1]
    assert torch.equal(after["validation"][0], before[0])
    expected = query_losses(tiny_model(7), images(), SETTINGS, CPU).double().mean((0, 1))
    assert (after["validation"][1].double() - expected).abs().max() < 1e-6
    # a file of an older version does not say, and is taken as it is
    file = experiment.folder / "losses" / "001-1.safetensors"
    save_file(load_file(file), file)
    shutil.rmtree(folder)
    tiny_model(8).save(folder)
    assert measured_names(experiment) == ["000-1", "001-1"]


def test_losses_of_other_queries_are_measured_again(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=2)
    claim_settings(experiment, SETTINGS)
    first = {"validation": images(), "generated": images(3)}
    for name in experiment.names():
        train_one(experiment, name, CPU)
        assert evaluate_one(experiment, first, SETTINGS, name, CPU)
    before = load_losses(experiment, queries=first)[1]
    # the same names, other pictures
    other = Samples(-first["generated"].images, first["generated"].ids, None, "other")
    queries = first | {"generated": other}
    assert [is_outdated(experiment, "000-1", each) for each in (None, first, queries)] == [
        False,
        False,
        True,
    ]
    assert (measured_names(experiment, queries=queries), len(measured_names(experiment))) == ([], 2)
    assert load_losses(experiment, queries=queries) == ([], {}), "what is outdated is not used"
    # another kind was never measured; fewer kinds were
    assert is_outdated(experiment, "000-1", first | {"drawn": images(1)})
    assert not is_outdated(experiment, "000-1", {"validation": images()})
    assert evaluate_one(experiment, queries, SETTINGS, "000-1", CPU)
    assert not evaluate_one(experiment, queries, SETTINGS, "000-1", CPU)
    complete, after = load_losses(experiment, queries=queries)
    assert complete == [0]
    assert torch.equal(after["validation"][0], before["validation"][0])
    model = experiment.load_model("000-1")
    expected = query_losses(model, other, SETTINGS, CPU).double().mean((0, 1))
    assert (after["generated"][0].double() - expected).abs().max() < 1e-6
    # a file of an older version does not say, and is taken as it is
    file = experiment.folder / "losses" / "001-1.safetensors"
    save_file(load_file(file), file)
    assert measured_names(experiment, queries=queries) == ["000-1", "001-1"]


def test_the_cost_of_losses_is_said_of_what_is_missing(tmp_path, monkeypatch):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=2)
    train_one(experiment, "001-1", CPU)
    queries = {"validation": images(), "generated": images(3)}
    rows, predict = [], UNet.predict
    monkeypatch.setattr(UNet, "predict", lambda *a: rows.append(len(a[1])) or predict(*a))
    # two queries at four timesteps are a batch, and eight queries at two noises have to be measured
    monkeypatch.setattr(cost.time, "perf_counter", iter([3.0, 13.0]).__next__)
    text = estimate(experiment, queries, SETTINGS, ["001-1"], CPU, batch_size=8)
    assert text == "losses: 8 queries under 1 model to measure, 256 B on disk, 80 s or less"
    assert rows == [8, 8], "tables are made in the first"
    assert measured_names(experiment) == []
    claim_settings(experiment, SETTINGS)
    evaluate_one(experiment, queries, SETTINGS, "001-1", CPU)
    measured = load_file(experiment.folder / "losses" / "001-1.safetensors").values()
    assert sum(each.nbytes for each in measured) == 256


def test_a_model_another_process_measures_is_left_alone(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET)
    train_one(experiment, "000-1", CPU)
    claim_settings(experiment, SETTINGS)
    queries = {"validation": images()}
    with claim(experiment.folder / "locks" / "losses-000-1.lock"):
        assert not evaluate_one(experiment, queries, SETTINGS, "000-1", CPU)
    assert measured_names(experiment) == []


def test_refusals(tmp_path):
    for name in ("num_timesteps", "num_noise_seeds"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            LossSettings(**{name: 0})
    with pytest.raises(ValueError, match=r"timesteps must be in \[1, 1000\]"):
        query_losses(tiny_model(), images(), LossSettings(1001, 1), CPU)
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=1)
    # nothing was measured yet: nothing to protect
    claim_settings(experiment, LossSettings(5000, 1))
    claim_settings(experiment, SETTINGS)
    claim_settings(experiment, SETTINGS)
    (experiment.folder / "losses" / "001-1.safetensors").write_bytes(b"")
    with pytest.raises(ExperimentError, match=r"num_timesteps is 4 there and 5 here\. Choose"):
        claim_settings(experiment, LossSettings(5, 2))
    with pytest.raises(ExperimentError, match=r"'000-1' of .* is not trained yet"):
        evaluate_one(experiment, {"validation": images()}, SETTINGS, "000-1", CPU)
    file = experiment.folder / "losses" / "000-1.safetensors"
    file.write_bytes(b"half of a fi")
    with pytest.raises(ExperimentError, match="is damaged: delete it and run evaluate again"):
        load_losses(experiment)


def test_noise_is_not_that_of_the_features():
    # a query's features and losses must not meet the same noise: it would look like prediction
    queries = Samples(images().images, [f"q{i}" for i in range(5)], None, "q")
    loss = sample_noise(["lds/q0"], [0], (1, 8, 8), seed=0)
    feature = sample_noise(["query/q0"], [0], (1, 8, 8), seed=0)
    assert not torch.equal(loss, feature)
    assert len(queries) == 5
