"""`--whiten`: fitted once to training images, kept beside its features, in every kind of run."""

import json
import re
from dataclasses import replace

import pytest
import torch
from finished_run import RECIPE, make_images, make_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_explain import gradients, pictures
from test_sketcher import small_unet
from typer.testing import CliRunner

import dtrak
from dtrak.attribute import app
from dtrak.cli.attribution import run_attribution
from dtrak.evaluation.counterfactual.origin import open_origin
from dtrak.evaluation.lds.methods import list_settings
from dtrak.evaluation.lds.options import parse_features
from dtrak.features import whitening as whitenings
from dtrak.features.extraction import FusedExtractor, deciding_settings, noisy_rows
from dtrak.features.settings import FeatureSettings, WhiteningSettings
from dtrak.features.whitening import WhiteningError, fit_whitening, open_whitening
from dtrak.methods import METHODS
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.choices import WHITENINGS
from dtrak.runs.options import ExplainOptions, Options
from dtrak_kernels import Projection, Whitening
from dtrak_kernels.gradients.whitening.definition import KINDS

N, M = 9, 3
CPU = torch.device("cpu")
HOW = {"timesteps": 2, "proj_dim": 256, "device": "cpu", "batch_size": 4, "progress": False}
FOLDER = "features-lowrank/mean_squared_l2_norm"
FILE = f"{FOLDER}/whitening.safetensors"


@pytest.fixture(scope="module")
def model():
    return UNet(small_unet().float(), linear_process())


def settings(kind, **changes):
    how = {"output_function": "mean_squared_l2_norm", "timesteps": (0, 500), "noise_seed": 0}
    return FeatureSettings(
        **{**how, "projection": Projection("none"), **changes}, whitening=WhiteningSettings(kind)
    )


def test_kinds_are_those_of_the_kernels():
    assert WHITENINGS == KINDS


def test_scores_are_dense_algebra_on_whitened_gradients(model, tmp_path):
    train, queries = pictures(N), pictures(M, seed=1)
    found = dtrak.explain(
        model, train, queries, store=tmp_path, **{**HOW, "proj_dim": None}, projection="none",
        dtype="float64",
    )  # fmt: skip
    names = [str(row) for row in range(N)]
    whitening = Whitening.load(tmp_path / FILE, kind="lowrank", function="mean_squared_l2_norm")
    phi, psi = (
        whitening.apply(gradients(model, x, names[: len(x)], role))
        for x, role in ((train, "train"), (queries, "query"))
    )
    # every parameter that has a gradient has a mean squared entry of 1
    sizes = [shape.numel() for shape in map(torch.Size, whitening.shapes)]
    for name, part in zip(whitening.names, phi.split(sizes, dim=1), strict=True):
        wanted = 0 if name in whitening.floored else 1
        assert part.square().mean() == pytest.approx(wanted, abs=1e-5), name
    # λ = 1x
    unit = phi.square().sum(1).mean()
    expected = psi @ phi.T @ torch.linalg.inv(phi @ phi.T + unit * torch.eye(N).double())
    assert (found.scores - expected).norm() < 1e-5 * expected.norm()
    assert found.settings["whitening"] == "lowrank"
    assert found.settings["damping in mean squared feature norms"] == "1x"
    model.module.float()


@pytest.mark.parametrize("kind", ["scale", "channels", "kfac"])
def test_other_kinds(model, kind):
    train = dtrak.images(pictures(N))
    asked = settings(kind, dtype="float64")
    whitening = fit_whitening(model, asked, train, CPU)
    assert (whitening.kind, whitening.function) == (kind, "mean_squared_l2_norm")
    extractor = FusedExtractor(model, asked, CPU, whitening)
    found = extractor.extract(train.images, [f"train/{name}" for name in train.ids])
    expected = whitening.apply(gradients(model, train.images, train.ids, "train"))
    assert (found - expected).norm() < 1e-9 * expected.norm()
    model.module.float()


def test_it_is_fitted_once_and_kept(model, tmp_path, monkeypatch):
    train = dtrak.images(pictures(N))
    plain = dtrak.explain(model, train, pictures(M, seed=1), **HOW)
    kept = dtrak.explain(model, train, pictures(M, seed=1), store=tmp_path, **HOW)
    assert torch.equal(plain.scores, kept.scores)
    monkeypatch.setattr(Whitening, "fit", lambda *_, **__: pytest.fail("fitted again"))
    dtrak.explain(model, train, pictures(1, seed=2), store=tmp_path, **HOW)
    # other methods with the same gradients share it, those of the papers have none
    dtrak.explain(model, train, pictures(M, seed=1), store=tmp_path, whiten="none", **HOW)
    dtrak.explain(
        model, train, pictures(M, seed=1), store=tmp_path, method="relative-influence",
        output_function="mean_squared_l2_norm", **HOW,
    )  # fmt: skip
    assert {file.name for file in tmp_path.glob("features*")} == {"features", "features-lowrank"}


def test_features_of_another_whitening_are_refused(model, tmp_path):
    train, queries = dtrak.images(pictures(N)), pictures(M, seed=1)
    dtrak.explain(model, train, queries, store=tmp_path, **HOW)
    file = tmp_path / FILE
    kept = file.read_bytes()
    # fitted again it is the same: it depends on nothing that a second command changes
    file.unlink()
    dtrak.explain(model, train, queries, store=tmp_path, **HOW)
    assert file.read_bytes() == kept
    file.write_bytes(kept[:-4])
    with pytest.raises(WhiteningError, match=r"whitening\.safetensors cannot be used"):
        dtrak.explain(model, train, queries, store=tmp_path, **HOW)
    other = fit_whitening(model, settings("lowrank"), dtrak.images(pictures(N, seed=5)), CPU)
    other.save(file)
    with pytest.raises(ValueError, match="made with other settings: whitening fitted is"):
        dtrak.explain(model, train, queries, store=tmp_path, **HOW)
    fit_whitening(model, settings("kfac"), train, CPU).save(file)
    with pytest.raises(WhiteningError, match="must be of kind 'lowrank', got 'kfac'"):
        dtrak.explain(model, train, queries, store=tmp_path, **HOW)


def test_a_fit_to_something_else_is_not_used_in_silence(model, tmp_path):
    train, file = dtrak.images(pictures(N)), tmp_path / "x" / "whitening.safetensors"
    asked = settings("scale")
    kept = open_whitening(model, asked, train, CPU, file)
    # neither a projection nor mirrored features decide it
    same = settings("scale", projection=Projection("sjlt", 256), flips=True)
    assert open_whitening(model, same, train, CPU, file).identity == kept.identity
    for other, data, said in (
        (settings("scale", timesteps=(0, 400)), train, "timesteps is [0, 500] there and [0, 400]"),
        (settings("scale", noise_seed=1), train, "noise_seed is 0 there and 1"),
        (asked, dtrak.images(pictures(N, seed=3)), "data is "),
    ):
        with pytest.raises(WhiteningError, match=re.escape(f"fitted otherwise: {said}")):
            open_whitening(model, other, data, CPU, file)
    # a run that is killed between the two files fits again
    file.unlink()
    assert open_whitening(model, asked, train, CPU, file).identity == kept.identity
    (file.parent / "whitening.json").unlink()
    with pytest.raises(WhiteningError, match=r"must have whitening\.json beside it"):
        open_whitening(model, asked, train, CPU, file)


def test_it_hardly_depends_on_the_batch_size_and_not_on_the_timesteps_left_out(model):
    train = dtrak.images(pictures(N))
    asked = settings("kfac", dtype="float64")
    first, other = (fit_whitening(model, asked, train, CPU, batch_size=b) for b in (1, 4))
    probe = torch.randn(4, sum(map(torch.Size.numel, map(torch.Size, first.shapes)))).double()
    a, b = first.apply(probe), other.apply(probe)
    assert (a - b).norm() < 1e-8 * a.norm()
    model.module.float()


def test_many_images_are_sampled_evenly(model, monkeypatch):
    seen = []
    noisy_rows = whitenings.noisy_rows

    def watched(model, settings, inputs, ids):
        seen.extend((name, settings.timesteps) for name in ids)
        return noisy_rows(model, settings, inputs, ids)

    monkeypatch.setattr(whitenings, "noisy_rows", watched)
    few = WhiteningSettings("channels", factor_images=6, factor_timesteps=2, scale_images=3)
    steps = (0, 200, 400, 600, 800)
    asked = FeatureSettings("loss", steps, 0, Projection("none"), whitening=few)
    done = []
    fit_whitening(
        model, asked, dtrak.images(pictures(12)), CPU, batch_size=4,
        progress=lambda *numbers: done.append(numbers),
    )  # fmt: skip
    factors, scales = seen[:6], seen[6:]
    # those with the same timesteps come together
    assert sorted(name for name, _ in factors) == sorted(f"train/{row}" for row in range(0, 12, 2))
    assert [name for name, _ in scales] == [f"train/{row}" for row in range(0, 12, 4)]
    assert all(len(set(chosen)) == 2 and set(chosen) <= set(steps) for _, chosen in factors)
    assert len({chosen for _, chosen in factors}) > 1
    assert {chosen for _, chosen in scales} == {steps}
    # as many rows in a batch: 2 a factor, 5 a scale
    assert done == [(6, 9), (9, 9)]


def test_rows_stay_with_what_their_images_come_with(model, monkeypatch):
    """Images with the same timesteps are given noise together."""
    seen, output_rows = [], whitenings.output_rows

    def watched(model, settings, rows, ids, condition, factor):
        seen.append((rows, ids))
        return output_rows(model, settings, rows, ids, condition, factor)

    monkeypatch.setattr(whitenings, "output_rows", watched)
    few = WhiteningSettings("channels", factor_images=9, factor_timesteps=2, scale_images=2)
    asked = FeatureSettings("loss", (0, 200, 400), 0, Projection("none"), whitening=few)
    train = dtrak.images(pictures(9))
    fit_whitening(model, asked, train, CPU, batch_size=10)
    ((noisy, target, timesteps), ids), _ = seen
    assert ids == train.ids
    alone = [
        noisy_rows(model, replace(asked, timesteps=tuple(steps)), image[None], [f"train/{name}"])
        for image, name, steps in zip(train.images, ids, timesteps.view(9, 2).tolist(), strict=True)
    ]
    for found, expected in zip((noisy, target, timesteps), zip(*alone, strict=True), strict=True):
        assert torch.equal(found, torch.cat(expected))
    # there is something to put back
    assert len(set(map(tuple, timesteps.view(9, 2).tolist()))) < 9


def test_half_precision_gradients_are_scaled_alike(model):
    train = dtrak.images(pictures(N))
    ids = [f"train/{name}" for name in train.ids]
    features = []
    for dtype in ("float32", "float16"):
        asked = settings("scale", dtype=dtype)
        whitening = fit_whitening(model, asked, train, CPU)
        features.append(FusedExtractor(model, asked, CPU, whitening).extract(train.images, ids))
    assert (features[1] - features[0]).norm() < 0.05 * features[0].norm()


def test_features_that_are_not_what_their_settings_say(model):
    train = dtrak.images(pictures(N))
    whitening = fit_whitening(model, settings("scale"), train, CPU)
    with pytest.raises(ValueError, match="must be of kind 'lowrank', as settings say, got None"):
        FusedExtractor(model, settings("lowrank"), CPU)
    with pytest.raises(ValueError, match="must be of kind 'lowrank', as settings say, got 'scale'"):
        FusedExtractor(model, settings("lowrank"), CPU, whitening)
    with pytest.raises(ValueError, match="must be of kind 'scale', as settings say, got None"):
        deciding_settings(model, settings("scale"), train, "fused")
    assert (
        open_whitening(model, FeatureSettings("loss", (0,), 0, Projection("none")), train, CPU)
        is None
    )


@pytest.mark.parametrize(
    "options, kind, damping",
    [
        ({}, "lowrank", "1x"),
        ({"method": "trak"}, "lowrank", "1x"),
        ({"projection": "kronecker"}, "channels", "1x"),
        ({"projection": "none"}, "lowrank", "1x"),
        ({"fused": False}, "lowrank", "1x"),
        ({"whiten": "none"}, "none", "auto"),
        ({"whiten": "kfac", "damping": "auto"}, "kfac", "auto"),
        ({"method": "gradient-dot"}, "none", None),
        ({"method": "tracincp"}, "none", None),
        ({"method": "tracincp", "whiten": "scale"}, "scale", None),
        ({"method": "raw-pixels-dot"}, "none", None),
    ],
)
def test_what_is_whitened_where_nothing_is_said(options, kind, damping):
    how = ExplainOptions(**options)
    assert how.whitening == kind
    if damping is not None:
        assert str(how.damped) == str(ExplainOptions(damping=damping).damped)
    if how.function is not None:
        found = how.feature_settings().whitening
        assert found == (None if kind == "none" else WhiteningSettings(kind))


def test_what_is_refused():
    for options, message in (
        ({"whiten": "low-rank"}, "--whiten must be one of auto, none, .* did you mean 'lowrank'"),
        ({"whiten": "kfac", "projection": "kronecker"}, "--whiten must be channels, diagonal"),
        ({"whiten": "scale", "method": "random"}, "--whiten is for methods that take gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            ExplainOptions(**options)
    with pytest.raises(ValueError, match="--whiten must be channels, diagonal"):
        parse_features("10", "sjlt,kronecker", "none,lowrank")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a trained model, and a run with its own pictures, whitened and not."""
    folder = tmp_path_factory.mktemp("whitened")
    images = make_images(folder / "images", 24)
    model = make_model(folder / "model", images, RECIPE)
    options = {"model": str(model), "data": str(images), "output": str(folder / "run")}
    options |= {"timesteps": "2", "proj_dim": 256, "num_queries": 2, "device": "cpu", "top_k": 2}
    # measuring what fits takes longer than all features
    options |= {"batch_size": 12}
    for more in ({}, {"whiten": "none"}, {"method": "tracincp", "whiten": "scale"}):
        more = more if "method" not in more else {**more, "checkpoints": str(folder)}
        run_attribution(Options(**{**options, **more}), Console(quiet=True))
    return folder


def test_both_ways_lie_side_by_side(place):
    run = place / "run"
    names = sorted(
        file.parent.relative_to(run / "queries").as_posix().partition("/")[2]
        for file in run.rglob("scores.safetensors")
    )
    assert names == ["", "d-trak-unwhitened", "tracincp-scale"]
    assert {folder.name for folder in run.glob("features*")} == {
        "features", "features-lowrank", "features-scale",
    }  # fmt: skip
    # every checkpoint has its own
    assert len(list(run.glob("features-scale/loss/checkpoint-*/whitening.safetensors"))) == 1
    report = (min(run.glob("queries/*/report.html"))).read_text()
    assert "lowrank" in report


# slow: test_attribute.py compares whitened features in the fast lane
@pytest.mark.full
def test_a_command_that_compares_both_ways(place):
    pytest.importorskip("trak", reason="TRAK is not installed")
    options = ["--model", place / "model", "--data", place / "images", "--output", place / "run"]
    more = ["--timesteps", 2, "--proj-dim", 256, "--device", "cpu", "--compare", "--batch-size", 6]
    found = CliRunner().invoke(app, [str(one) for one in (*options, *more)])
    assert found.exit_code == 0, found.output
    error = float(" ".join(found.output.split()).partition("relative error ")[2].split()[0])
    assert error < 1e-4


def test_pictures_drawn_again_take_the_scores_of_a_run(place, tmp_path):
    origin = open_origin(place / "run", tmp_path, queries="generated")
    assert origin.settings.whitening == WhiteningSettings("lowrank")
    (own,) = (place / "run" / "queries").glob("*/scores.safetensors")
    assert torch.equal(origin.scores["mean_squared_l2_norm"], load_file(own)["scores"])
    # those of another method have a whitening of their own, kept beside their features
    console = Console(quiet=True)
    first = origin.gradient_scores("loss", tmp_path / "trak", CPU, console)
    whitening = Whitening.load(tmp_path / "trak" / "whitening.safetensors", function="loss")
    assert whitening.kind == "lowrank"
    assert torch.equal(origin.gradient_scores("loss", tmp_path / "trak", CPU, console), first)


def test_settings_of_an_evaluation():
    methods = [METHODS[name] for name in ("d-trak", "d-trak-mean", "gradient-dot", "random")]
    listed = list_settings([10], ["sjlt", "kronecker"], methods, ["none", "auto", "kfac"][:2])
    assert [(s.title, s.projection, s.whitening) for s in listed] == [
        ("Random", "", "none"),
        ("D-TRAK", "sjlt", "none"),
        ("D-TRAK, mean", "sjlt", "none"),
        ("Gradient dot", "sjlt", "none"),
        ("D-TRAK, whitened", "sjlt", "lowrank"),
        ("D-TRAK, mean, whitened", "sjlt", "lowrank"),
        ("D-TRAK", "kronecker", "none"),
        ("D-TRAK, whitened", "kronecker", "channels"),
    ]
    first = list_settings([10], ["sjlt"], methods, ["kfac", "lowrank", "auto"])
    assert [s.title for s in first[1:]] == [
        "D-TRAK, whitened (kfac)", "D-TRAK, mean, whitened (kfac)", "Gradient dot",
        "D-TRAK, whitened", "D-TRAK, mean, whitened",
    ]  # fmt: skip
    assert len({s.key for s in (*listed, *first)}) == 10


def test_a_file_of_other_tensors(model, tmp_path):
    file = tmp_path / "whitening.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(WhiteningError, match="must hold a whitening, got other tensors"):
        open_whitening(model, settings("scale"), dtrak.images(pictures(N)), CPU, file)
    assert json.loads(json.dumps(settings("scale").to_dict()))["whitening"]["kind"] == "scale"
