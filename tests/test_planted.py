"""Images planted in a training set, and whether scores find them again."""

import json

import numpy as np
import pytest
import torch
from finished_run import make_images, make_model
from sklearn.metrics import average_precision_score, precision_score

import dtrak
from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.evaluation.planted.images import is_of_concept, load_concept, plant
from dtrak.evaluation.planted.retrieval import (
    Found,
    average_precisions,
    mean_interval,
    precisions,
    recalls,
)
from dtrak.evaluation.subject import subject_of_preset
from dtrak.methods import METHODS
from dtrak.planted import main
from dtrak.training.presets import get_preset


def test_retrieval_is_what_scikit_learn_says():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 90, generator=generator, dtype=torch.float64)
    relevant = torch.rand(90, generator=generator) < 0.2
    wanted = [average_precision_score(relevant.numpy(), row.numpy()) for row in scores]
    assert np.allclose(average_precisions(scores, relevant), wanted)
    for k in (1, 10, 33):
        for place, row in enumerate(scores):
            called = torch.zeros(90)
            called[row.topk(k).indices] = 1
            precision = precision_score(relevant, called)
            assert float(precisions(scores, relevant, k)[place]) == pytest.approx(precision)
            hits = precision * k / int(relevant.sum())
            assert float(recalls(scores, relevant, k)[place]) == pytest.approx(hits)


def test_equal_scores_find_nothing():
    """A method that says the same of every image must not be taken for one that knows."""
    for relevant in (torch.tensor([True, False, False, False]), torch.arange(4) == 3):
        assert average_precisions(torch.zeros(1, 4), relevant).tolist() == [0.25]
        assert precisions(torch.zeros(1, 4), relevant, 3).tolist() == [0]


@pytest.mark.parametrize(
    ("scores", "relevant", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.bool), r"got \[2, 3\], \[3\] and 0 that"),
        (torch.zeros(2, 3), torch.ones(4, dtype=torch.bool), r"got \[2, 3\], \[4\] and 4 that"),
        (torch.tensor([[1.0, torch.nan]]), torch.tensor([True, False]), "must be finite"),
    ],
)
def test_what_cannot_be_judged_says_so(scores, relevant, message):
    with pytest.raises(ValueError, match=message):
        average_precisions(scores, relevant)


def test_intervals_cover_the_mean():
    rng = np.random.default_rng(0)
    held = 0
    for number in range(50):
        mean, low, high = mean_interval(rng.exponential(size=60).tolist(), seed=number)
        assert low < mean < high
        held += low <= 1 <= high
    assert 43 <= held <= 50


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", channels=1, size=8)


@pytest.fixture(scope="module")
def subject():
    return subject_of_preset(get_preset("digits"))


def test_concepts_are_held_out_images_seen_otherwise(digits, subject):
    model = get_preset("digits").make_model()
    held = load_data("digits", channels=1, size=8, split="validation")
    held = held.without(digits)
    inverted = load_concept("inverted", None, subject, model, digits)
    assert torch.equal(inverted.images, -held.images)
    assert inverted.ids == [f"inverted/{name}" for name in held.ids]
    rotated = load_concept("rotated", None, subject, model, digits)
    assert torch.equal(rotated.images.rot90(-1, (2, 3)), held.images)
    found = plant(digits, inverted, 50, 32, seed=3)
    assert len(found.train) == 1050
    assert found.is_planted.nonzero().flatten().tolist() == list(range(1000, 1050))
    inside = found.train.select(found.is_planted)
    assert not set(inside.ids) & set(found.others.ids)
    assert set(inside.ids) | set(found.others.ids) == set(inverted.ids)
    assert found.held_out.ids == found.others.ids[:32]
    assert plant(digits, inverted, 50, 32, seed=4).train.ids != found.train.ids
    seen = digits.select(range(20)).images
    pictures = dtrak.images(torch.cat([seen, -seen]) * 0.9)
    assert is_of_concept(pictures, found).tolist() == [False] * 20 + [True] * 20


def test_who_was_planted_decides_no_query(digits, subject):
    """A picture that only a planted image resembles is not of the concept for that."""
    model = get_preset("digits").make_model()
    found = plant(digits, load_concept("inverted", None, subject, model, digits), 50, 32, seed=0)
    found.others.pixels.read = lambda rows: torch.full((len(rows), 1, 8, 8), 9.0)
    own = found.train.select(found.is_planted).images
    assert not is_of_concept(dtrak.images(own), found).any()


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    return end.value.code or 0


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that says how it was trained, and foreign images: inverted digits of two classes."""
    here = tmp_path_factory.mktemp("small")
    images = make_images(here / "images")
    make_model(here / "model", images)
    for number, image in enumerate(load_data("digits", split="validation", limit=24).images):
        file = here / "foreign" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(to_uint8(-image)))
    return here


def arguments_of(small, out):
    return [
        *("--run", small / "model", "--data", small / "images", "--concept", small / "foreign"),
        *("--planted", 8, "--num-queries", 3, "--generated", 2, "--timesteps", 2),
        *("--device", "cpu", "--output", out),
    ]


def rows_of(out):
    rows = map(Found.from_dict, json.loads((out / "results.json").read_text())["rows"])
    return {(row.variant, row.queries): row for row in rows}


HELD_OUT = "held-out images of the concept"


def test_foreign_images_are_planted_and_found(small, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = arguments_of(small, out)
    assert run(*arguments, "--methods", "raw-pixels-cosine") == 0
    text = capsys.readouterr()
    assert "68 images, 3 held-out queries" in text.err
    assert "3 queries, 8 planted images of 68" in text.out
    # inverted digits are like each other, and no digit is like them
    found = rows_of(out)["raw-pixels-cosine", HELD_OUT]
    assert found.average_precision == found.recall == (1.0,) * 3
    assert found.precision == (0.8,) * 3
    # what is there is kept, another method is added
    model = out / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    before = model.stat().st_mtime_ns
    assert run(*arguments, "--methods", "random") == 0
    text = capsys.readouterr()
    assert "scores: random" in text.err
    assert "train:" not in text.err
    assert "Raw pixels" not in text.out
    assert model.stat().st_mtime_ns == before
    rows = rows_of(out)
    assert {variant for variant, _ in rows} == {"raw-pixels-cosine", "random"}
    assert all(value < 0.6 for value in rows["random", HELD_OUT].average_precision)
    # planted otherwise, it is another experiment
    assert run(*arguments, "--methods", "random", "--seed", 1) == 2
    assert "holds another experiment: data is" in " ".join(capsys.readouterr().err.split())
    (out / "results.json").write_text("{")
    assert run(*arguments, "--methods", "random") == 2
    assert "results.json is damaged: delete it" in " ".join(capsys.readouterr().err.split())


def test_names_hold_wherever_foreign_images_lie(small, subject, digits):
    found = load_concept(
        str(small / "foreign"), [1], subject, get_preset("digits").make_model(), digits
    )
    assert len(found) == 12
    assert all(name.startswith("foreign/b/") for name in found.ids)
    assert found.source == "foreign"


@pytest.mark.full
def test_every_method_that_needs_no_retraining(small, tmp_path):
    assert run(*arguments_of(small, tmp_path / "out"), "--generated", 4) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    missing = set(METHODS) - {row["method"] for row in rows}
    others = {n for n, m in METHODS.items() if m.needs in ("models", "clip") or "latents" in n}
    drawn = {row["queries"] for row in rows} - {HELD_OUT}
    assert missing == others | (set() if drawn else {"journey-trak"})
    ways = {(row["method"], row["whitening"]) for row in rows}
    for name, method in METHODS.items():
        if method.is_damped and name not in missing:
            assert {("lowrank"), ("none")} == {way for one, way in ways if one == name}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--planted", 24), "must be below the number of images of the concept, 24, so that"),
        (("--concept", "inverted"), "must have held-out images of the data, got none|validation"),
        (("--labels", "7", "--planted", 1), "the number of images of the concept, 0"),
        (("--concept", "upside"), "--concept must be inverted or rotated, or: "),
        (("--output", "images/here"), "--output must not lie in the folder of --data"),
    ],
)
def test_what_cannot_be_planted_says_so(small, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(small)
    arguments = [
        *("--run", small / "model", "--data", small / "images", "--concept", small / "foreign"),
        *("--planted", 8, "--output", tmp_path / "out", *more),
    ]
    assert run(*arguments) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert any(part in said for part in message.split("|")), said
    assert not (tmp_path / "out").exists()
