"""A run folder: what is drawn, what is trained, and what survives interruptions and mistakes."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.model_selection import train_test_split
from tiny import tiny_model
from tiny_lds import CPU, PRESET, first_step, interrupt, register, trained

from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.evaluation.lds import experiment as lds_experiment
from dtrak.evaluation.lds.experiment import (
    RETRAIN,
    ExperimentError,
    load_experiment,
    prepare,
    train_one,
    trained_names,
)
from dtrak.evaluation.lds.queries import generated_queries, query_sets
from dtrak.models.hashing import hash_model
from dtrak.runs import folders
from dtrak.runs.files import claim
from dtrak.training.command import save_model
from dtrak.training.presets import PRESETS
from dtrak.training.trainer import Recipe, train


@pytest.fixture(autouse=True)
def preset():
    register()


def test_subsets_are_stratified_halves_by_the_published_seeds(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET)
    assert experiment.subsets.shape == (6, 40)
    labels = torch.tensor(experiment.data.labels)
    for number, mask in enumerate(experiment.subsets):
        chosen, _ = train_test_split(
            range(40), train_size=20, random_state=42 + 2 * number, stratify=labels
        )
        assert sorted(chosen) == mask.nonzero().flatten().tolist()
        assert labels[mask].bincount().tolist() == [2] * 10
    assert len(experiment.validation) == 6
    # no subset model shares the full model's seed, which is 0
    assert experiment.names() == [f"{k:03d}-1" for k in range(6)]
    assert experiment.names(2, 4) == ["002-1", "003-1"]
    for first, last, message in (
        (-1, None, r"--first must be in \[0, 6\), the run's subsets, got -1"),
        (6, None, r"--first must be in \[0, 6\), the run's subsets, got 6"),
        (2, 7, r"--last must be in \[3, 6\], got 7"),
        (2, 2, r"--last must be in \[3, 6\], got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            experiment.names(first, last)


def test_adding_subsets_and_seeds_changes_nothing_that_was_there(tmp_path):
    first = prepare(tmp_path / "run", PRESET, num_subsets=3)
    second = prepare(tmp_path / "run", PRESET, num_subsets=5, num_model_seeds=2)
    assert torch.equal(second.subsets[:3], first.subsets)
    assert set(first.names()) < set(second.names())
    assert second.names() == [f"{k:03d}-{seed}" for seed in (1, 2) for k in range(5)]
    # and nothing is ever taken away
    third = prepare(tmp_path / "run", PRESET, num_subsets=2, num_model_seeds=1)
    assert third.names() == second.names()
    assert load_experiment(tmp_path / "run").names() == second.names()


def test_what_is_not_said_stays_as_it_is(tmp_path):
    folder = tmp_path / "run"
    preset = replace(PRESET, num_model_seeds=3, num_retrain=4)
    sizes = {"num_subsets": 3, "num_model_seeds": 1, "num_validation": 2, "num_generated": 5}
    prepare(folder, preset, num_retrain=1, **sizes)
    more = prepare(folder, preset, num_subsets=4)
    assert (len(more.subsets), len(more.seeds), len(more.retrain)) == (4, 1, 1)
    assert (len(more.validation), more.num_generated) == (2, 5)
    assert prepare(folder, preset).names() == more.names()
    with pytest.raises(ExperimentError, match="num_generated is 5 there and 6 here"):
        prepare(folder, preset, num_generated=6)


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_prepare_that_was_killed_is_called_again(tmp_path, monkeypatch, killed_at):
    folder, written = tmp_path / "run", []

    def write(file, content):
        written.append(file)
        if len(written) == killed_at:
            # what kill -9 leaves
            file.with_name(file.name + ".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        file.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_atomically", write)
        patch.setattr(lds_experiment, "write_atomically", write)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, PRESET)
    said = "made, got no experiment" if killed_at == 1 else "subsets.safetensors is damaged: run pr"
    with pytest.raises(ExperimentError, match=said):
        load_experiment(folder)
    assert torch.equal(prepare(folder, PRESET).subsets, load_experiment(folder).subsets)
    # somebody else's folder still is
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ExperimentError, match=r"a folder that prepare made, got no experiment"):
        prepare(tmp_path / "other", PRESET)


def test_pictures_another_process_draws_are_waited_for_and_kept(tmp_path):
    experiment = trained(tmp_path / "run", num_subsets=1)
    drawn, found = experiment.folder / "generated", []
    other = threading.Thread(target=lambda: found.append(generated_queries(experiment, CPU)))
    with claim(experiment.folder / "locks" / "generated.lock", wait=True) as ours:
        assert ours
        other.start()
        other.join(1)
        assert other.is_alive()
        drawn.mkdir()
        # as from another device: not what this one would draw
        for seed in range(5):
            image = torch.full((1, 8, 8), seed, dtype=torch.uint8)
            (drawn / f"{seed:05d}.png").write_bytes(encode_png(image))
    other.join(60)
    assert torch.equal(to_uint8(found[0].images).flatten(1)[:, 0], torch.arange(5).byte())


def test_the_retrain_family_has_the_published_seeds(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=2, num_retrain=3)
    labels = experiment.data.labels
    assert experiment.names(family=RETRAIN) == [f"retrain-{k:03d}-1" for k in range(3)]
    assert experiment.names(1, 2, RETRAIN) == ["retrain-001-1"]
    assert experiment.names() == ["000-1", "001-1"]
    for number, name in enumerate(experiment.names(family=RETRAIN)):
        chosen, _ = train_test_split(
            range(40), train_size=20, random_state=554 + 2 * number, stratify=labels
        )
        assert sorted(chosen) == experiment.retrain[number].nonzero().flatten().tolist()
        mask, seed = experiment.training_of(name)
        assert (mask.nonzero().flatten().tolist(), seed) == (sorted(chosen), 1)
    assert torch.equal(experiment.training_of("001-1")[0], experiment.subsets[1])
    # published: one training each, of the first seed
    several = prepare(tmp_path / "several", PRESET, num_model_seeds=2, num_retrain=1)
    assert several.names(family=RETRAIN) == ["retrain-000-1"]


def test_a_retrain_family_is_added_to_a_run_prepared_without(tmp_path):
    folder = tmp_path / "run"
    before = prepare(folder, PRESET, num_subsets=3)
    assert before.retrain.shape == (0, 40)
    # as such a run was written before there was the family
    manifest = json.loads((folder / "experiment.json").read_text())
    assert manifest.pop("num_retrain") == 0
    del manifest["retrain"]
    (folder / "experiment.json").write_text(json.dumps(manifest))
    save_file({"subsets": before.subsets}, folder / "subsets.safetensors")
    old = load_experiment(folder)
    assert torch.equal(old.subsets, before.subsets)
    assert len(old.retrain) == 0
    with pytest.raises(ExperimentError, match="must have a retrain family: run prepare with --num"):
        old.names(family=RETRAIN)
    after = prepare(folder, PRESET, num_subsets=3, num_retrain=2)
    assert torch.equal(after.subsets, before.subsets)
    assert len(load_experiment(folder).retrain) == 2
    # and it is never taken away
    assert len(prepare(folder, PRESET, num_retrain=0).retrain) == 2


def test_a_model_of_the_retrain_family_is_what_its_subset_gives_and_resumes(tmp_path, monkeypatch):
    preset = replace(PRESET, recipe=Recipe(steps=103, batch_size=1))
    monkeypatch.setitem(PRESETS, preset.name, preset)
    experiment = prepare(tmp_path / "run", preset, num_subsets=1, num_retrain=2)
    chosen, _ = train_test_split(
        range(40), train_size=20, random_state=556, stratify=experiment.data.labels
    )
    images = load_data("digits", limit=40).images[sorted(chosen)]
    expected = train(tiny_model(1), images, Recipe(steps=103, batch_size=1, seed=1))
    name = "retrain-001-1"

    def stop(done, total):
        if done == 102:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_one(experiment, name, CPU, stop)
    assert not experiment.is_trained(name)
    seen = []
    with claim(experiment.folder / "locks" / f"{name}.lock"):
        assert not train_one(experiment, name, CPU)
    assert train_one(experiment, name, CPU, lambda done, total: seen.append(done))
    assert seen[0] > 50, "the checkpoint was used"
    assert hash_model(experiment.load_model(name).module) == hash_model(expected.module)


def test_a_model_is_what_training_on_its_subset_gives(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_subsets=3, num_model_seeds=2)
    for name, subset, seed in (("002-1", 2, 1), ("001-2", 1, 2)):
        assert train_one(experiment, name, CPU)
        images = load_data("digits", limit=40).images[experiment.subsets[subset]]
        expected = train(tiny_model(seed), images, Recipe(steps=8, batch_size=4, seed=seed))
        assert hash_model(experiment.load_model(name).module) == hash_model(expected.module)
    assert not train_one(experiment, "002-1", CPU)
    assert trained_names(experiment, experiment.names()) == ["002-1", "001-2"]


def test_the_full_model_keeps_its_weights_at_every_quarter(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET)
    train_one(experiment, "full", CPU)
    assert experiment.checkpoint_steps == (2, 4, 6)
    hashes = [
        hash_model(model.module)
        for model in map(experiment.load_model, experiment.checkpoint_names)
    ]
    assert len(set(hashes)) == 4
    model, seen = tiny_model(0), {}

    def keep(done, total):
        seen[done] = hash_model(model.module)

    train(model, experiment.data.images, PRESET.recipe, progress=keep)
    assert hashes == [seen[step] for step in (2, 4, 6, 8)]


# slow: test_attribute.py has one that is killed
@pytest.mark.full
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    # long enough for a checkpoint, which never falls on a quarter
    preset = replace(PRESET, recipe=Recipe(steps=204, batch_size=1))
    monkeypatch.setitem(PRESETS, preset.name, preset)
    whole = prepare(tmp_path / "whole", preset)
    train_one(whole, "full", CPU)
    cut = prepare(tmp_path / "cut", preset)

    interrupt(cut, 120)
    assert first_step(cut) == 101, "the checkpoint at step 100 was used"
    for a, b in zip(
        map(whole.load_model, whole.checkpoint_names),
        map(cut.load_model, cut.checkpoint_names),
        strict=True,
    ):
        assert hash_model(a.module) == hash_model(b.module)


def test_a_claim_ends_with_the_process_that_holds_it(tmp_path):
    lock = tmp_path / "locks" / "a.lock"
    code = (
        "import sys, time, pathlib\n"
        "from dtrak.runs.files import claim\n"
        f"with claim(pathlib.Path({str(lock)!r})) as ours:\n"
        "    print(ours, flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "True"
    with claim(lock) as ours:
        assert not ours
    holder.kill()
    holder.wait()
    with claim(lock) as ours:
        assert ours


def test_a_model_another_process_is_at_is_left_alone(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET)
    with claim(experiment.folder / "locks" / "000-1.lock") as ours:
        assert ours
        assert not train_one(experiment, "000-1", CPU)
    assert train_one(experiment, "000-1", CPU)


def test_a_half_written_model_does_not_pass_for_one(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET)
    partial = experiment.folder / "models" / "000-1.partial"
    partial.mkdir(parents=True)
    (partial / "model_index.json").write_text("{}")
    assert not experiment.is_trained("000-1")
    save_model(tiny_model(3), experiment.model_folder("000-1"))
    assert experiment.is_trained("000-1")
    assert not partial.exists()


def test_queries_are_validation_images_and_what_the_full_model_draws(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET, num_validation=4)
    with pytest.raises(ExperimentError, match=r"model 'full' of .* is not trained yet: run train"):
        generated_queries(experiment, CPU)
    train_one(experiment, "full", CPU)
    queries = query_sets(experiment, CPU)
    assert list(queries) == ["validation", "generated"]
    assert torch.equal(
        queries["validation"].images, load_data("digits", split="validation", limit=4).images
    )
    assert len(queries["generated"]) == 5
    before = queries["generated"].fingerprint
    # a picture that is lost is drawn again, the same
    (experiment.folder / "generated" / "00003.png").unlink()
    assert generated_queries(experiment, CPU).fingerprint == before


def test_pictures_of_another_full_model_are_no_queries(tmp_path):
    experiment = prepare(tmp_path / "run", PRESET)
    train_one(experiment, "full", CPU)
    full, drawn = experiment.model_folder("full"), experiment.folder / "generated"
    before = generated_queries(experiment, CPU).fingerprint
    # the same training gives the same weights; where the model is gone, its pictures stay
    shutil.rmtree(full)
    assert generated_queries(experiment, CPU).fingerprint == before
    train_one(experiment, "full", CPU)
    assert generated_queries(experiment, CPU).fingerprint == before
    shutil.rmtree(full)
    tiny_model(9).save(full)
    message = r"generated holds pictures that another full model drew .* delete .*generated to draw"
    for lost in ((), ("00003.png",)):
        for name in lost:
            (drawn / name).unlink()
        kept = {file.name: file.read_bytes() for file in drawn.iterdir()}
        for ask in (generated_queries, query_sets):
            with pytest.raises(ExperimentError, match=message):
                ask(experiment, CPU)
        assert {file.name: file.read_bytes() for file in drawn.iterdir()} == kept
    # none left: all are drawn anew, by the model that is there
    for file in drawn.glob("*.png"):
        file.unlink()
    assert generated_queries(experiment, CPU).fingerprint != before
    assert generated_queries(experiment, CPU).ids == [f"{seed:05d}.png" for seed in range(5)]
    # a run of an older version does not say who drew, and is taken as it is
    (drawn / "drawn_by.json").unlink()
    shutil.rmtree(full)
    tiny_model(8).save(full)
    (drawn / "00003.png").unlink()
    assert len(generated_queries(experiment, CPU)) == 5
    assert not (drawn / "drawn_by.json").exists(), "who drew the others is not known"


def test_refusals(tmp_path):
    folder = tmp_path / "run"
    for option in ("num_subsets", "num_model_seeds", "num_generated", "num_validation"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            prepare(folder, PRESET, **{option: 0})
    with pytest.raises(ValueError, match=r"num_validation must be at most 6.* got 7"):
        prepare(folder, PRESET, num_validation=7)
    with pytest.raises(ValueError, match="num_retrain must be at least 0, got -1"):
        prepare(folder, PRESET, num_retrain=-1)
    # 100000.png would come before 99999.png
    with pytest.raises(ValueError, match=r"num_generated must be at most 100000, .* got 100001"):
        prepare(folder, PRESET, num_generated=100_001)
    for option in ("num_subsets", "num_model_seeds", "num_retrain"):
        with pytest.raises(ValueError, match=r"and num_retrain must fit in .* of memory, got .*00"):
            prepare(folder, PRESET, **{"num_subsets": 1, option: 10**14})
    # subset 256 of the one family is subset 0 of the other
    with pytest.raises(ValueError, match="num_subsets must be at most 256 beside a retrain family"):
        prepare(folder, PRESET, num_subsets=257, num_retrain=1)
    with pytest.raises(ValueError, match=r"--model must be left out for 'tiny', which .* got 'sd'"):
        prepare(folder, PRESET, model="sd")
    assert not folder.exists()
    with pytest.raises(ExperimentError, match="must be a folder that prepare made"):
        load_experiment(folder)
    prepare(folder, PRESET)
    with pytest.raises(ExperimentError, match=r"holds another run: num_generated is 5 there and 9"):
        prepare(folder, PRESET, num_generated=9)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    with pytest.raises(ExperimentError, match="must be a folder that prepare made"):
        prepare(other, PRESET)

    with pytest.raises(ValueError, match="did you mean 'retrain'"):
        prepare(folder, PRESET).names(family="retrian")
    masks = folder / "subsets.safetensors"
    kept = masks.read_bytes()
    masks.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ExperimentError, match="is not what prepare wrote"):
        load_experiment(folder)
    save_file({**load_file(masks), "retrain": torch.ones(1, 40, dtype=torch.bool)}, masks)
    with pytest.raises(ExperimentError, match="is not what prepare wrote"):
        load_experiment(folder)
    masks.write_bytes(kept[:-9])
    with pytest.raises(ExperimentError, match="is damaged: run prepare again"):
        load_experiment(folder)
    prepare(folder, PRESET)

    manifest = folder / "experiment.json"
    content = json.loads(manifest.read_text())
    for change, message in (
        ({"settings": {**content["settings"], "data": "0"}}, "prepared with something else: data"),
        ({"format": 9}, "must be of format 3, got 9"),
        ({"format": None}, "must be of format 3, got none"),
        ({"settings": None}, "is damaged: choose another --output, or delete"),
    ):
        manifest.write_text(json.dumps(content | change))
        with pytest.raises(ExperimentError, match=message):
            load_experiment(folder)
    for key in ("subject", "subsets", "num_model_seeds"):
        manifest.write_text(json.dumps({k: v for k, v in content.items() if k != key}))
        with pytest.raises(ExperimentError, match="is damaged: choose another --output"):
            load_experiment(folder)
    manifest.write_text(json.dumps(content | {"settings": {}}))
    with pytest.raises(ExperimentError, match="is damaged: choose another --output"):
        prepare(folder, PRESET)


def test_a_recipe_of_epochs_is_still_the_same(tmp_path, monkeypatch):
    epochs = replace(PRESET, recipe=Recipe(epochs=2, batch_size=4))
    monkeypatch.setitem(PRESETS, PRESET.name, epochs)
    prepare(tmp_path / "run", epochs)
    assert load_experiment(tmp_path / "run").retraining.recipe == epochs.recipe
    assert len(prepare(tmp_path / "run", epochs).subsets) == 6
    monkeypatch.setitem(PRESETS, PRESET.name, PRESET)
    with pytest.raises(ExperimentError, match=r"prepared with something else: recipe\.epochs is 2"):
        load_experiment(tmp_path / "run")


def test_all_of_it(tmp_path):
    experiment = trained(tmp_path / "run", num_subsets=2)
    assert trained_names(experiment, experiment.names()) == ["000-1", "001-1"]
    assert not list(experiment.folder.glob("training/*")), "checkpoints of finished models are gone"
