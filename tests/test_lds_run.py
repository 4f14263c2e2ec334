"""An experiment on a model of one's own: what its preset gives, and what only it can ask for."""

import json
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_lds import CPU, NAME, register
from typer.testing import CliRunner

from dtrak.cli import lds, train
from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.evaluation.lds import methods as lds_methods
from dtrak.evaluation.lds import names
from dtrak.evaluation.lds.experiment import load_experiment
from dtrak.evaluation.lds.table import load_results
from dtrak.features.extraction import FusedExtractor, extract_rows
from dtrak.features.settings import FeatureSettings
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak_kernels import Projection

METHODS = tuple(m for m in names.METHODS if m.title in ("D-TRAK", "TracInCP", "Random"))
SMALL = ("--loss-timesteps", 4, "--noise-seeds", 1, "--timesteps", 2)
SIZES = ("--num-subsets", 4, "--num-generated", 2)
CONFIG = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "layers_per_block": 1, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4, "add_attention": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    register()
    monkeypatch.setattr(names, "METHODS", METHODS)
    monkeypatch.setattr(lds_methods, "DEFAULT_PROJ_DIM", {"sjlt": 512, "none": 0})
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(module, *arguments):
    result = CliRunner().invoke(module.app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def done(module, *arguments):
    code, text = run(module, *arguments)
    assert code == 0, text
    return text


def experiment_of(where, prepared):
    """Everything from the subsets to the table."""
    device = ("--device", "cpu")
    text = done(lds, "prepare", *where, *SIZES, "--num-validation", 3, *device)
    assert prepared in text
    done(lds, "train", *where, *device)
    done(lds, "evaluate", *where, *SMALL, *device)
    assert "too few for intervals, which need 10" in done(lds, "report", *where)


# slow: all of it twice; of the fast lane test_lds.py has a preset's, and the next ones a run's
@pytest.mark.full
def test_a_run_gives_what_its_preset_gives(tmp_path):
    mine = tmp_path / "mine"
    done(train, "--preset", NAME, "--output", mine, "--device", "cpu", "--keep-checkpoints", 4)
    experiment_of(("--run", mine), "4 models to train, 8 steps each")
    experiment_of(
        ("--preset", NAME, "--output", tmp_path / "lds"), "5 models to train, 8 steps each"
    )
    own, preset = (load_results(tmp_path / f / "results.npz") for f in ("lds-mine", "lds"))
    assert (own.about["preset"], preset.about["preset"]) == ("mine", NAME)
    assert torch.equal(own.subsets, preset.subsets)
    assert own.losses.keys() == preset.losses.keys() == {"validation", "generated"}
    for kind in own.losses:
        assert torch.equal(own.losses[kind], preset.losses[kind])
    assert [e.method for e in own.entries] == [e.method for e in preset.entries]
    assert {"D-TRAK", "TracInCP"} < {e.method for e in own.entries}
    for one, other in zip(own.entries, preset.entries, strict=True):
        assert torch.equal(one.ranks, other.ranks)
    # the table is without intervals, which four models do not give
    table = json.loads((tmp_path / "lds-mine" / "report" / "table.json").read_text())
    assert "bca" not in json.dumps(table)
    # another model in that place is another experiment
    shutil.rmtree(mine)
    done(train, "--preset", NAME, "--output", mine, "--device", "cpu", "--seed", 9)
    code, text = run(lds, "prepare", "--run", mine, *SIZES)
    assert (code, "holds another run: " in text) == (2, True), text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model from a configuration, on digits in a folder."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    for row, image in enumerate(load_data("digits", limit=24).images):
        (folder / "images" / f"{row:02d}.png").write_bytes(encode_png(to_uint8(image)))
    (folder / "unet.json").write_text(json.dumps(CONFIG))
    done(
        train, "--data", folder / "images", "--config", folder / "unet.json", "--output",
        folder / "mine", "--steps", 4, "--batch-size", 6, "--flip", "--device", "cpu",
    )  # fmt: skip
    return folder


@pytest.fixture
def own(trained, tmp_path):
    shutil.copytree(trained / "mine", tmp_path / "mine")
    return tmp_path


def test_a_model_of_ones_own_from_training_to_table(own):
    where, device = ("--run", own / "mine"), ("--device", "cpu")
    text = done(lds, "prepare", *where, *SIZES, *device)
    assert "4 subsets of 12 of 24 images, 4 models to train, 4 steps each" in text
    assert "no held-out images: the queries are what the model draws" in text
    experiment = load_experiment(own / "lds-mine")
    assert hash_model(experiment.load_model().module) == hash_model(load(own / "mine").module)
    # halves, without classes to keep the proportions of
    assert experiment.subsets.sum(1).tolist() == [12] * 4
    done(lds, "train", *where, *device)
    text = done(lds, "evaluate", *where, *SMALL, *device)
    assert "left out: TracInCP, for which no models were kept on the way" in text
    assert "features: 2 sets of 26 images to make, 106 kB on disk, " in text
    assert list(load_results(own / "lds-mine" / "results.npz").losses) == ["generated"]
    # asked for by name it is refused; and a choice of methods is one
    code, text = run(lds, "evaluate", *where, *SMALL, "--methods", "tracincp")
    assert (code, "TracInCP must have models that were kept on the way" in text) == (2, True)
    done(lds, "evaluate", *where, *SMALL, *device, "--methods", "random,d-trak", "--flips",
         "--feature-batch-size", 5)  # fmt: skip
    flipped = load_results(own / "lds-mine" / "results.npz")
    assert [entry.method for entry in flipped.entries][:2] == ["D-TRAK", "Random"][::-1]
    assert flipped.about["flips"] is True
    assert (own / "lds-mine" / "features" / "mean_squared_l2_norm-sjlt-2-0-flips").is_dir()


def test_features_of_mirror_images_are_averaged_in(trained):
    data, model = load_data(trained / "images"), load(trained / "mine")
    settings = FeatureSettings("loss", (0, 500), 0, Projection("sjlt", 512))
    both = FusedExtractor(model, FeatureSettings(**{**vars(settings), "flips": True}), CPU)
    plain = FusedExtractor(model, settings, CPU)
    found = extract_rows(both, data, slice(2, 5), "train/")
    ids, images = data.ids[2:5], data.images[2:5]
    own_features = plain.extract(images, [f"train/{name}" for name in ids])
    others = plain.extract(images.flip(-1), [f"mirrored/train/{name}" for name in ids])
    torch.testing.assert_close(found, (own_features + others) / 2)
    assert not torch.allclose(found, own_features, rtol=0.1)
    assert both.settings.to_dict() == {**settings.to_dict(), "flips": True}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts", "a"], "--prompts is for models that read captions, which this one does not"),
        (["--num-validation", 3], "validation"),
        (["--validation", "./nowhere"], "no file or folder at './nowhere'"),
        (["--recipe", "nowhere.json"], "no record of a training at nowhere.json"),
        (["--data", "digits"], "must be trained on the images (and captions or labels) of digits"),
    ],
)
def test_what_cannot_be_asked_of_it(own, arguments, message):
    code, text = run(lds, "prepare", "--run", own / "mine", *SIZES, *arguments)
    assert (code, message in text) == (2, True), text
    assert not (own / "lds-mine").exists()
