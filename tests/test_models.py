"""Kinds of models: one of classes from data to report, and one of your own on vectors."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finished_run import results
from numerics import relative_error
from test_reproduce import parse
from tiny import tiny_model
from torch import nn

from dtrak.cli.attribute import app
from dtrak.cli.generate import app as generate
from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.data.samples import Samples
from dtrak.features.extraction import FusedExtractor, deciding_settings, extract_rows
from dtrak.features.noise import sample_noise
from dtrak.features.published import PublishedExtractor
from dtrak.features.settings import FeatureSettings
from dtrak.models import Denoiser, Drawn, ModelError, load
from dtrak.models.process import DiscreteProcess, linear_process
from dtrak.models.unet import UNet
from dtrak.runs.inputs import _labels
from dtrak.runs.results import load_attribution
from dtrak.training.drawing import draw_all, draw_missing, keep
from dtrak.training.recipe import Recipe
from dtrak.training.trainer import train
from dtrak_kernels import Projection, RidgeSolver, Whitening, project

CPU = torch.device("cpu")
CLASSES = 3
SETTINGS = FeatureSettings("mean_squared_l2_norm", (0, 400, 900), 3, Projection("none"), "float64")


def class_model(seed=0, **options):
    return tiny_model(seed, num_class_embeds=CLASSES, **options)


def labelled(count=12):
    data = load_data("digits", limit=count)
    labels = [number % CLASSES for number in range(count)]
    return Samples(data.images, data.ids, labels, "digits").conditioned(labels)


def write_parquet(file, count=12, labels=None):
    """Digits with a column of labels, as the hub has them."""
    images = to_uint8(load_data("digits", limit=count).images)
    labels = [n % CLASSES for n in range(count)] if labels is None else labels
    table = pa.table(
        {"image": [{"bytes": encode_png(i), "path": None} for i in images], "label": labels}
    )
    pq.write_table(table, file)
    return file


def looped(model, data, role=""):
    """One backward per sample and timestep, written out for a U-Net of classes, in float64."""
    unet = model.module.double()
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32), 0).double()
    rows = []
    for name, image, label in zip(data.ids, data.images.double(), data.conditions, strict=True):
        total = 0
        for t in SETTINGS.timesteps:
            noise = sample_noise([role + name], [t], (1, 8, 8), seed=3, dtype=torch.float64)[0]
            x = bars[t].sqrt() * image + (1 - bars[t]).sqrt() * noise
            u = unet(x, torch.tensor([t]), class_labels=torch.tensor([label])).sample
            grads = torch.autograd.grad((u**2).mean(), list(unet.parameters()), allow_unused=True)
            total = total + torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for g, p in zip(grads, unet.parameters(), strict=True)
                ]
            )
        rows.append(total / len(SETTINGS.timesteps))
    return torch.stack(rows)


def test_features_of_a_model_of_classes_are_its_gradients():
    data = labelled(4)
    extractor = FusedExtractor(class_model(), SETTINGS, CPU)
    features = extract_rows(extractor, data, slice(0, 4))
    assert relative_error(features, looped(class_model(), data)) < 1e-6
    others = data.conditioned([2, 0, 1, 2])
    assert relative_error(extract_rows(extractor, others, slice(0, 4)), features) > 1e-3
    with pytest.raises(ValueError, match="labels must be 4, one for each image, got none"):
        extract_rows(extractor, data.conditioned(None), slice(0, 4))
    with pytest.raises(ValueError, match=r"labels must be whole numbers in \[0, 3\), got 7"):
        extract_rows(extractor, data.conditioned([7, 0, 1, 2]), slice(0, 4))


def test_the_published_way_reads_classes_too():
    pytest.importorskip("trak", reason="TRAK is not installed")
    data, chosen = labelled(3), Projection("rademacher", 64)
    settings = FeatureSettings("loss", (0, 500), 3, chosen, "float64")
    fused = FusedExtractor(class_model(), settings, CPU)
    published = PublishedExtractor(class_model(), settings, CPU)
    grads = published.gradients(data.images, data.ids, data.conditions)
    expected = project(grads, chosen, shapes=fused.sketcher.shapes)
    assert relative_error(extract_rows(fused, data, slice(0, 3)), expected) < 1e-6


def test_labels_are_part_of_what_decides():
    model, data = class_model(), labelled()
    base = deciding_settings(model, SETTINGS, data, "fused")
    other = deciding_settings(model, SETTINGS, data.conditioned([1] * 12), "fused")
    assert base["data"] != other["data"]
    assert data.fingerprint != data.conditioned(None).fingerprint
    assert [
        a == b
        for a, b in zip(data.fingerprints(), data.conditioned([1] * 12).fingerprints(), strict=True)
    ] == [label == 1 for label in data.labels]


def test_training_reads_the_labels():
    recipe = Recipe(steps=6, batch_size=4, learning_rate=1e-2, seed=1)
    data = labelled()
    trained = train(class_model(), data, recipe)
    again = train(class_model(), data, recipe)
    other = train(class_model(), data.conditioned([0] * 12), recipe)
    name = "class_embedding.weight"
    first, start = trained.module.state_dict()[name], class_model().module.state_dict()[name]
    assert torch.equal(first, again.module.state_dict()[name])
    assert (first != start).any(1).all()
    # classes that no image has are left as they were, but for the decay of weights
    moved = (other.module.state_dict()[name] - start).norm(dim=1)
    assert (moved[1:] < 1e-6).all()
    assert moved[0] > 1e-3
    with pytest.raises(ValueError, match="data must have labels for a model that reads them"):
        train(class_model(), data.conditioned(None), recipe)


def test_pictures_are_drawn_by_class():
    model = class_model()
    images = draw_all(model, [3, 4], items=[0, 2], num_inference_steps=4)
    alone = draw_all(model, [4], items=[2], num_inference_steps=4)
    assert relative_error(alone[0], images[1]) < 1e-5
    others = draw_all(model, [3, 4], items=[1, 2], num_inference_steps=4)
    assert relative_error(others[0], images[0]) > 1e-4
    with pytest.raises(ValueError, match="labels must be 2, one for each seed, got none"):
        model.draw([3, 4])
    with pytest.raises(ValueError, match="guidance_scale must be None for a U-Net of pixels"):
        model.draw([3], [0], guidance_scale=2.0)


def run(*arguments, code=0):
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    class_model(2).save(folder / "model")
    write_parquet(folder / "digits.parquet")
    return folder


COMMON = ("--timesteps", 2, "--proj-dim", 256, "--device", "cpu", "--top-k", 3, "--batch-size", 4)


# slow: three runs; test_kinds_commands.py explains a model of classes
@pytest.mark.full
def test_from_labelled_data_to_a_report(places, tmp_path):
    model, data = places / "model", places / "digits.parquet"
    output = tmp_path / "run"
    where = ("--fused", "--model", model, "--data", data, "--output", output, *COMMON)
    said = run(*where, "--queries", "generated", "--num-queries", 5)
    assert "classes of the pictures 0, 1, 2" in said
    (drawn,) = output.glob("generated-*")
    expected = draw_all(load(model), range(5), items=[0, 1, 2, 0, 1])
    assert (load_data(drawn).images - expected).abs().max() <= 0.51 / 127.5
    deciding = json.loads((output / "run.json").read_text())["settings"]
    assert {"labels", "data", "model", "schedule"} <= set(deciding)
    # the scores are those of dense algebra on gradients of an oracle
    attribution = load_attribution(output)
    inputs = attribution.load_inputs()
    assert inputs.train.conditions == [n % CLASSES for n in range(12)]
    assert inputs.queries.conditions == [0, 1, 2, 0, 1]
    settings = inputs.run.plan.settings
    whitening = Whitening.load(next(output.glob("features-*/*/whitening.safetensors")))
    extractor = FusedExtractor(load(model), settings, CPU, whitening)
    phi, psi = (
        extract_rows(extractor, samples, slice(0, len(samples)), role)
        for samples, role in ((inputs.train, "train/"), (inputs.queries, "query/"))
    )
    damping = float(attribution.manifest["settings"]["damping"].split()[0])
    scores = RidgeSolver(phi).scores(psi, damping=damping)
    assert relative_error(attribution.scores, scores) < 1e-3
    assert "class 2" in (results(output) / "report.html").read_text()
    # the same again has nothing to do; other classes are other pictures beside them
    assert "reused" in run(*where, "--queries", "generated", "--num-queries", 5)
    run(*where, "--queries", "generated", "--num-queries", 2, "--classes", "2,1")
    assert len(list(output.glob("generated-*"))) == 2
    # queries in a folder have no labels of their own
    shown = run(*where, "--queries", drawn, code=2)
    assert "must have labels for a model that reads classes, got none" in shown
    run(*where, "--queries", drawn, "--classes", "0,1,2")


def test_what_does_not_fit_a_model_of_classes_is_refused(places, tmp_path):
    where = ("--fused", "--model", places / "model", "--output", tmp_path / "run", *COMMON)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(encode_png(to_uint8(load_data("digits", limit=1).images[0])))
    assert "must have labels for a model that reads classes" in run(
        *where, "--data", folder, code=2
    )
    wide = write_parquet(tmp_path / "wide.parquet", 4, [0, 1, 2, 9])
    said = run(*where, "--data", wide, code=2)
    assert "must be in [0, 3), the classes of the model, got 9" in said
    data = ("--data", places / "digits.parquet")
    assert "--classes must be in [0, 3), got 5" in run(*where, *data, "--classes", "5", code=2)
    assert "--classes must be numbers such as 0,3,5, got 'one'" in run(
        *where, *data, "--classes", "one", code=2
    )
    assert "--prompts is for text-to-image models" in run(*where, *data, "--prompts", "a", code=2)
    tiny_model().save(tmp_path / "plain")
    said = run("--model", tmp_path / "plain", *data, "--classes", "1", *COMMON, code=2)
    assert "--classes is for models that read classes, which this one does not" in said


def test_the_command_that_draws_knows_classes(places, tmp_path):
    from typer.testing import CliRunner

    where = ["--model", places / "model", "--output", tmp_path / "drawn", "--device", "cpu"]
    more = ["--num-images", 3, "--num-inference-steps", 3, "--classes", "1,0"]
    done = CliRunner().invoke(generate, [str(a) for a in (*where, *more)])
    assert done.exit_code == 0, done.output
    expected = draw_all(load(places / "model"), range(3), items=[1, 0, 1], num_inference_steps=3)
    drawn = load_data(tmp_path / "drawn").images
    assert (drawn - expected).abs().max() <= 0.51 / 127.5
    done = CliRunner().invoke(generate, [str(a) for a in (*where, *more[:4])])
    assert done.exit_code == 2
    assert "labels is" in " ".join(done.output.split())


class Mlp(nn.Module):
    """Noise of vectors, of the vector and its timestep."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.time, self.outer = nn.Linear(5, 8), nn.Linear(1, 8), nn.Linear(8, 5)

    def forward(self, x, t):
        return self.outer(torch.tanh(self.inner(x) + self.time(t[:, None] / 1000)))


def predict(module, noisy, timesteps, condition):
    shift = condition.get("shift", 0.0)
    return module(noisy, timesteps.to(noisy.dtype)) + shift


def shift(items, device):
    return {"shift": torch.tensor(items, dtype=torch.float64, device=device)[:, None]}


def test_a_model_of_your_own_on_vectors():
    data = Samples(torch.randn(7, 5), [f"v{n}" for n in range(7)], None, "vectors")
    settings = FeatureSettings("loss", (10, 600), 0, Projection("sjlt", 256), "float64")
    model = Denoiser.of(Mlp(), linear_process(), predict)
    features = extract_rows(FusedExtractor(model, settings, CPU), data, slice(0, 7))
    module = Mlp().double()
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float32), 0).double()
    rows = []
    for name, x in zip(data.ids, data.images.double(), strict=True):
        loss = 0
        for t in settings.timesteps:
            noise = sample_noise([name], [t], (5,), seed=0, dtype=torch.float64)[0]
            noisy = bars[t].sqrt() * x + (1 - bars[t]).sqrt() * noise
            u = module(noisy, torch.tensor([t], dtype=torch.float64))
            loss = loss + (u - noise).square().mean() / 2
        grads = torch.autograd.grad(loss, list(module.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    shapes = [tuple(p.shape) for p in module.parameters()]
    expected = project(torch.stack(rows), settings.projection, shapes=shapes)
    assert relative_error(features, expected) < 1e-6
    with pytest.raises(ModelError, match="a Mlp that does not: give the pictures to explain"):
        model.draw([0])
    for refused in (lambda: model.fresh(0), lambda: model.save("x"), lambda: model.put_adapter(2)):
        with pytest.raises(ModelError, match="Mlp"):
            refused()


def test_a_condition_of_your_own():
    data = Samples(torch.randn(4, 5), list("abcd"), None, "vectors")
    settings = FeatureSettings("mean_squared_l2_norm", (10,), 0, Projection("none"), "float64")
    model = Denoiser.of(Mlp(), linear_process(), predict, shift)
    extractor = FusedExtractor(model, settings, CPU)
    plain = extract_rows(
        FusedExtractor(Denoiser.of(Mlp(), linear_process(), predict), settings, CPU),
        data,
        slice(0, 4),
    )
    shifted = extract_rows(extractor, data.conditioned([0.0, 0.0, 1.0, 1.0]), slice(0, 4))
    assert relative_error(shifted[:2], plain[:2]) < 1e-12
    assert relative_error(shifted[2:], plain[2:]) > 1e-2
    with pytest.raises(ValueError, match="conditions must be 4, one for each image, got none"):
        extract_rows(extractor, data, slice(0, 4))


def test_a_pipeline_is_judged_by_its_index(tmp_path):
    tiny_model().save(tmp_path)
    assert isinstance(load(tmp_path), UNet)
    file = tmp_path / "model_index.json"
    for kind, said in (
        ("LDMPipeline", r"got 'LDMPipeline' \(the latents of a VQ autoencoder\): .*Denoiser.of"),
        (
            "ChromaPipeline",
            "a ChromaPipeline must have a transformer or a unet and a vae .* got unet",
        ),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": kind}))
        with pytest.raises(ModelError, match=said):
            load(tmp_path)
    file.unlink()
    with pytest.raises(ModelError, match="--lora must go with a pipeline that takes one"):
        load(tmp_path, "lora")


def test_a_fresh_model_is_of_the_same_configuration():
    model = class_model(4)
    fresh, again = model.fresh(1), model.fresh(1)
    assert fresh.process is model.process
    assert fresh.num_classes == CLASSES
    assert fresh.identity() == again.identity() != model.identity()
    assert class_model(1).identity() == fresh.identity()


def test_a_process_says_what_decides():
    from diffusers import DDPMScheduler

    base = linear_process().describe()
    assert json.loads(json.dumps(base)) == base
    other = DiscreteProcess(DDPMScheduler(beta_start=2e-4)).describe()
    assert other["betas"] != base["betas"]
    assert math.isclose(
        float(linear_process().weight(torch.tensor([0]))[0]), 0.5 / (1 - 1e-4), rel_tol=1e-6
    )


PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()


def test_the_page_on_models_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    where = {}
    exec(code, where)
    assert where["scores"].shape == (3, 100)
    for line in re.findall(r"^python -m .*$", PAGE, re.MULTILINE):
        parse(line)


# slow: trainings; the case of labelled data to a report draws other classes
@pytest.mark.full
def test_each_round_of_classes_has_pictures_of_its_own(places, tmp_path):
    where = ("--model", places / "model", "--data", places / "digits.parquet", *COMMON)
    for classes, items in (("0,0,1", [0, 0, 1]), ("0,1", [0, 1, 0])):
        run(*where, "--output", tmp_path, "--num-queries", 3, "--classes", classes)
        queries = load_attribution(tmp_path, results(tmp_path).name).load_inputs().queries
        assert queries.conditions == items
        expected = draw_all(load(places / "model"), range(3), items=items)
        assert (queries.images - expected).abs().max() <= 0.51 / 127.5


def test_a_refused_drawing_claims_no_folder(places, tmp_path):
    from typer.testing import CliRunner

    output = tmp_path / "drawn"
    where = ["--model", places / "model", "--output", output, "--device", "cpu"]
    for wrong in (["--guidance-scale", 2], ["--num-inference-steps", 5000]):
        done = CliRunner().invoke(generate, [str(a) for a in (*where, *wrong)])
        assert done.exit_code == 2, done.output
        assert not output.exists()


def test_the_label_that_is_wrong_is_named():
    data = Samples(torch.zeros(3, 1, 8, 8), list("abc"), [-1, 0, 1], "s")
    with pytest.raises(ValueError, match=r"must be in \[0, 3\).* got -1"):
        _labels(class_model(), data, "s")


def test_the_published_way_gives_a_model_of_your_own_its_timesteps_in_rows():
    pytest.importorskip("trak", reason="TRAK is not installed")
    settings = FeatureSettings("loss", (10, 600), 0, Projection("rademacher", 16), "float64")
    model = Denoiser.of(Mlp(), linear_process(), predict)
    data = Samples(torch.randn(3, 5), list("abc"), None, "vectors")
    grads = PublishedExtractor(model, settings, CPU).gradients(data.images, data.ids)
    exact = FeatureSettings("loss", (10, 600), 0, Projection("none"), "float64")
    expected = extract_rows(FusedExtractor(model, exact, CPU), data, slice(0, 3))
    assert relative_error(grads, expected) < 1e-6


class Halved(UNet):
    """A U-Net that is given something else than pixels."""

    @property
    def encoding(self):
        return {"halved": True}

    def inputs(self, pixels, device):
        return pixels.to(device) / 2


def test_a_model_of_something_else_than_pixels_is_trained_on_that():
    images, recipe = torch.rand(6, 1, 8, 8), Recipe(steps=2, batch_size=4, flip=True)
    plain = train(tiny_model(), images / 2, recipe)
    halved = train(Halved(tiny_model().module, tiny_model().process), images, recipe)
    assert halved.identity() == plain.identity()
    with pytest.raises(ValueError, match=r"must be pictures .* to be mirrored"):
        train(Denoiser.of(Mlp(), linear_process(), predict), torch.randn(6, 5), recipe)


def test_what_is_no_picture_is_not_kept_as_one(tmp_path):
    with pytest.raises(ValueError, match=r"must draw pictures .* got \[2, 5\]"):
        keep(tmp_path, Drawn([0, 1], torch.zeros(2, 5), None))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="must know how to draw"):
        draw_missing(Denoiser.of(Mlp(), linear_process(), predict), [0], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_features_of_one_function_are_not_those_of_another():
    """The functions around a module decide features, and so are part of what a store is of."""

    def doubled(module, noisy, timesteps, condition):
        return 2 * predict(module, noisy, timesteps, condition)

    def found(*functions):
        torch.manual_seed(0)
        return Denoiser.of(Mlp(), linear_process(), *functions).identity()

    same, others = found(predict), (found(doubled), found(predict, shift), found(abs))
    assert same == found(predict)
    assert len({one["functions"] for one in (same, *others)}) == 4
    assert {one["model"] for one in others} == {same["model"]}


# slow: a process that imports Diffusers
@pytest.mark.full
def test_loading_a_unet_imports_no_other_kind(places):
    """Theirs takes seconds, and has remarks to make."""
    script = (
        "import sys; from dtrak.models import load; load(sys.argv[1]); "
        "sys.exit('dtrak.models.stable_diffusion' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(places / "model")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_default_that_is_spelled_out_is_the_same_drawing(places, tmp_path):
    from typer.testing import CliRunner

    where = ["--model", places / "model", "--output", tmp_path / "drawn", "--device", "cpu"]
    every = ",".join(map(str, range(load(places / "model").num_classes)))
    for more in ((), ("--classes", every)):
        words = [*where, "--num-images", 2, "--num-inference-steps", 2, *more]
        done = CliRunner().invoke(generate, [str(a) for a in words])
        assert done.exit_code == 0, done.output
    assert "already drawn" in done.output
