"""Reading a finished run back."""

import json
import shutil

import pytest
import torch
from finished_run import make_images, results
from safetensors.torch import load_file, save_file

from dtrak.data.images import load_data
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.runs.results import ResultsError, load_attribution, read_scores


@pytest.fixture
def copy(finished, tmp_path):
    """A copy that a test may damage, moved away from where it was made."""
    shutil.copytree(finished, tmp_path / "moved")
    return tmp_path / "moved"


def test_everything_comes_back(finished, copy):
    run = load_attribution(copy)
    assert torch.equal(run.scores, load_file(results(finished) / "scores.safetensors")["scores"])
    assert run.scores.shape == (4, 60)
    assert run.train_ids == [f"{n:03d}.png" for n in range(60)]
    assert run.query_kind == "generated picture"
    inputs = run.load_inputs()
    images = load_data(finished.parent / "images", channels=1)
    assert torch.equal(inputs.train.images, images.images)
    drawn = load_data(finished / "generated", channels=1)
    assert torch.equal(inputs.queries.images, drawn.images)
    model = load(finished.parent / "model")
    assert hash_model(inputs.model.module) == hash_model(model.module)
    assert inputs.run.plan.settings.timesteps == (0, 500)
    assert inputs.run.plan.settings.projection.proj_dim == 256


def test_the_training_images_may_have_moved_but_not_changed(copy, finished, tmp_path):
    shutil.copytree(finished.parent / "images", tmp_path / "elsewhere")
    run = load_attribution(copy)
    assert len(run.load_inputs(str(tmp_path / "elsewhere")).train) == 60
    make_images(tmp_path / "fewer", 50)
    with pytest.raises(ValueError, match=r"data\.rows is 60 there and 50 here"):
        run.load_inputs(str(tmp_path / "fewer"))
    with pytest.raises(FileNotFoundError, match="no file or folder at"):
        run.load_inputs(str(tmp_path / "absent"))


def test_scores_of_other_images_are_refused(copy):
    metadata = {"rows": json.dumps(["a", "b", "c", "d"]), "columns": json.dumps(["x"] * 60)}
    save_file(
        {"scores": torch.zeros(4, 60)}, results(copy) / "scores.safetensors", metadata=metadata
    )
    with pytest.raises(ResultsError, match=r"the training images must be those .* 60 images with"):
        load_attribution(copy).load_inputs()


@pytest.mark.parametrize("name", ["manifest.json", "run.json"])
def test_unfinished_and_damaged_runs(copy, tmp_path, name):
    file = (results(copy) if name == "manifest.json" else copy) / name
    file.write_text("{")
    with pytest.raises(ResultsError, match=f"{name} must be JSON, but is damaged: run again"):
        load_attribution(copy)
    file.unlink()
    with pytest.raises(ResultsError, match=rf"finished run of dtrak\.attribute, got no .*{name}"):
        load_attribution(copy)
    with pytest.raises(FileNotFoundError, match="a run must be an existing folder"):
        load_attribution(tmp_path / "absent")


@pytest.mark.parametrize(
    "name, change",
    [
        ("manifest.json", lambda content: []),
        ("manifest.json", lambda content: {**content, "options": None}),
        ("manifest.json", lambda content: {**content, "options": {"a": 1}}),
        ("manifest.json", lambda content: {**content, "facts": 3}),
        ("manifest.json", lambda content: {**content, "stages": [{"name": "report"}]}),
        ("manifest.json", lambda content: {**content, "stages": [{"name": 1, "seconds": 1}]}),
        ("manifest.json", lambda content: {k: v for k, v in content.items() if k != "data"}),
        ("run.json", lambda content: "model"),
        ("run.json", lambda content: {}),
    ],
)
def test_runs_of_another_version_are_refused(copy, name, change):
    load_attribution(copy)
    file = (results(copy) if name == "manifest.json" else copy) / name
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ResultsError, match=r"must be a run of this version of dtrak\.attribute"):
        load_attribution(copy)


def test_scores_that_cannot_be_used(tmp_path):
    file = tmp_path / "scores.safetensors"
    with pytest.raises(FileNotFoundError, match="scores must be an existing file"):
        read_scores(file)
    file.write_bytes(b"nothing")
    with pytest.raises(ResultsError, match="is damaged, or holds no scores"):
        read_scores(file)
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(ResultsError, match="is damaged, or holds no scores"):
        read_scores(file)
    save_file({"scores": torch.zeros(2, 3)}, file, metadata={"rows": "[]"})
    with pytest.raises(ResultsError, match="must name its columns in its metadata"):
        read_scores(file)
    metadata = {"rows": '["a"]', "columns": '["b", "c", "d"]'}
    save_file({"scores": torch.zeros(2, 3)}, file, metadata=metadata)
    with pytest.raises(ResultsError, match=r"must hold scores \[1, 3\], got \[2, 3\]"):
        read_scores(file)
    for rows in ("{", "3", "null"):
        save_file({"scores": torch.zeros(2, 3)}, file, metadata={**metadata, "rows": rows})
        with pytest.raises(ResultsError, match="must name its rows and columns as lists of JSON"):
            read_scores(file)
