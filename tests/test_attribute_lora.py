"""The main job on a text-to-image model: only its adapter, with captions and prompts."""

import json
import shutil

import pytest
import torch
from finished_run import results
from numerics import relative_error
from safetensors import safe_open
from tiny_stable_diffusion import PICTURES, build_pipeline, load_tiny, write_pictures
from typer.testing import CliRunner

from dtrak.cli.attribute import app
from dtrak.data.images import load_data
from dtrak.features.extraction import FeatureSettings, FusedExtractor
from dtrak.models.lora import save_lora
from dtrak.runs import inputs
from dtrak.training.drawing import draw_all
from dtrak_kernels import Projection

pytestmark = pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
SMALL = ["--timesteps", "2", "--proj-dim", "512", "--num-queries", "3", "--damping", "0.5"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture(scope="module")
def lora(folder, tmp_path_factory):
    save_lora(load_tiny(folder).module, tmp_path_factory.mktemp("lora"))
    return next(tmp_path_factory.getbasetemp().glob("lora*"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def run(folder, lora, pictures, tmp_path):
    def run(
        *arguments, model=folder, lora=lora, data=pictures, output=tmp_path / "run", batch_size=8
    ):
        fixed = ["--data", str(data), "--output", str(output), *SMALL]
        # measuring what fits takes longer than all features
        fixed += [] if batch_size is None else ["--batch-size", str(batch_size)]
        fixed += [] if model is None else ["--model", str(model)]
        fixed += [] if lora is None else ["--lora", str(lora)]
        result = CliRunner().invoke(app, [*fixed, *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    return run


def read_scores(folder):
    with safe_open(results(folder) / "scores.safetensors", "pt") as file:
        return file.get_tensor("scores"), dict(file.metadata())


def features_apart(folder, role, images, ids, captions):
    """Features from parts that know nothing of a run."""
    model = load_tiny(folder)
    settings = FeatureSettings("mean_squared_l2_norm", (0, 500), 0, Projection("sjlt", 512))
    latents = model.posterior(images, CPU)[:, 0]
    names = [f"{role}/{name}" for name in ids]
    return FusedExtractor(model, settings, CPU).extract(latents, names, captions).double()


@pytest.mark.pictures
def test_end_to_end(run, folder, pictures, tmp_path):
    plain = ["--whiten", "none"]
    code, output = run("--prompts", "a wave", *plain, batch_size=None)
    assert code == 0, output
    scores, metadata = read_scores(tmp_path / "run")
    data = load_data(pictures)
    assert json.loads(metadata["columns"]) == data.ids
    drawn = next((tmp_path / "run").glob("generated-*"))
    queries = load_data(drawn)
    assert queries.ids == ["00000.png", "00001.png", "00002.png"]
    texts = [
        json.loads(line)["text"] for line in (drawn / "metadata.jsonl").read_text().split("\n")[:3]
    ]
    assert texts == ["a wave"] * 3
    # drawn with the published guidance and number of steps, one seed a picture
    expected = draw_all(
        load_tiny(folder), [1], items=["a wave"], guidance_scale=7.5, num_inference_steps=50
    )
    assert (queries.images[1] - expected[0]).abs().max() < 2 / 255

    # the scores are those of dense algebra in float64 on features computed apart
    captions = [PICTURES[name] for name in data.ids]
    phi = features_apart(folder, "train", data.images, data.ids, captions)
    psi = features_apart(folder, "query", queries.images, queries.ids, texts)
    wanted = psi @ torch.linalg.inv(phi.T @ phi + 0.5 * torch.eye(512).double()) @ phi.T
    assert relative_error(scores, wanted) < 1e-4

    manifest = json.loads((results(tmp_path / "run") / "manifest.json").read_text())
    identity = load_tiny(folder).identity()
    assert {key: manifest[key] for key in identity} == identity
    features = tmp_path / "run" / "features" / "mean_squared_l2_norm"
    store = json.loads((features / "train" / "manifest.json").read_text())
    assert {"lora", "vae", "captions", "text_encoder", "model"} <= store["settings"].keys()
    assert manifest["captions"] == store["settings"]["captions"]
    assert manifest["facts"]["parameters"] == "1,968"
    page = (results(tmp_path / "run") / "report.html").read_text()
    # below each picture, and among the facts of the run
    assert page.count("“a wave”") == 3 + 1
    assert "“monk by the sea”" in page
    assert "no caption" in page


# slow: three runs; test_attribute.py has it of pixels
@pytest.mark.full
def test_a_second_run_reuses_everything_and_other_prompts_join(run, tmp_path, monkeypatch):
    assert run("--prompts", "a wave")[0] == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("generated-*/*.png")}
    with monkeypatch.context() as patch:
        patch.setattr("dtrak.models.stable_diffusion.StableDiffusion.posterior", None)
        patch.setattr("dtrak.features.extraction.FusedExtractor.extract", _count_one)
        code, output = run("--prompts", "a wave")
    assert code == 0, output
    for stage in ("latents of training images", "generate the queries", "features of queries"):
        assert f"{stage} " in output
    assert output.count("reused") == 5
    # two prompts in turn, pictures 0 and 2 of one and the same
    (tmp_path / "prompts.txt").write_text("fog\n\na wave\n")
    code, output = run("--prompts", tmp_path / "prompts.txt")
    assert code == 0, output
    folders = sorted((tmp_path / "run").glob("generated-*"))
    assert len(folders) == 2
    texts = [
        [json.loads(line)["text"] for line in (f / "metadata.jsonl").read_text().splitlines()]
        for f in folders
    ]
    assert sorted(texts) == [["a wave"] * 3, ["fog", "a wave", "fog"]]
    after = {p: p.stat().st_mtime_ns for p in before if "generated" in str(p)}
    assert after == {p: before[p] for p in after}


def _count_one(self, images, ids, captions=None):
    """Stands in for the one batch whose tensors are counted."""
    return torch.ones(len(ids), 512)


# slow: a run; prompts are in the case above
@pytest.mark.full
def test_queries_with_their_own_captions(run, pictures, tmp_path):
    """A folder's captions count, then --prompts, then --caption."""
    one = shutil.copytree(pictures, tmp_path / "own")
    code, output = run("--queries", one)
    assert code == 0, output
    own = read_scores(tmp_path / "run")[0]
    bare = write_pictures(tmp_path / "bare", metadata=False)
    code, output = run("--queries", bare, "--prompts", "fog")
    assert code == 0, output
    assert relative_error(read_scores(tmp_path / "run")[0], own) > 1e-4
    code, output = run("--queries", bare)
    assert (code, "must have captions: metadata.jsonl" in output) == (2, True)
    code, output = run(
        "--queries", bare, "--caption", "a {label} painting", output=tmp_path / "template"
    )
    assert code == 0, output
    code, output = run("--queries", "validation")
    assert "--queries must be 'generated' or a folder of images" in output


# slow: two runs; of pixels test_attribute.py compares with the published way in the fast lane
@pytest.mark.full
def test_no_fused_agrees_with_fused(run, pictures, tmp_path):
    pytest.importorskip("trak", reason="TRAK is not installed")
    # so strongly damped that scores are inner products, which both projections preserve
    wide = ["--proj-dim", "4096", "--damping", "1e6", "--queries", pictures]
    assert run(*wide)[0] == 0
    fused = read_scores(tmp_path / "run")[0]
    code, output = run("--no-fused", *wide)
    assert code == 0, output
    pair = torch.stack([fused.flatten(), read_scores(tmp_path / "run")[0].flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.95


# slow: a wide matrix; of pixels test_attribute.py has it in the fast lane
@pytest.mark.full
def test_compare_prints_their_agreement(run, pictures):
    pytest.importorskip("trak", reason="TRAK is not installed")
    wide = ["--proj-dim", "4096", "--damping", "1e6", "--queries", pictures]
    code, output = run("--compare", "--batch-size", "3", *wide)
    assert code == 0, output
    assert "relative error" in output


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.02)])
# slow: runs in another precision; of features they are in test_features.py
@pytest.mark.full
def test_other_dtypes(run, pictures, tmp_path, dtype, tolerance):
    fixed = ["--queries", pictures, "--damping", "1e6"]
    assert run(*fixed)[0] == 0
    single = read_scores(tmp_path / "run")[0]
    code, output = run(*fixed, "--dtype", dtype, output=tmp_path / dtype)
    assert code == 0, output
    assert relative_error(read_scores(tmp_path / dtype)[0], single) < tolerance


def failing(run, message, *arguments, **options):
    code, output = run(*arguments, **options)
    assert code == 2, output
    assert "error: " in output
    assert message in output, output
    assert "Traceback" not in output


def test_options_that_do_not_go_together(run, folder, lora, tmp_path):
    failing(run, "--model must name the base pipeline", model=None)
    failing(run, "--prompts must say what to draw")
    failing(run, "--prompts must be a text or a file of them", "--prompts", "no/such.txt")
    (tmp_path / "none.txt").write_text("\n\n")
    failing(run, "with one prompt per line, got none", "--prompts", tmp_path / "none.txt")
    failing(run, "--resolution must be at least 1", "--resolution", "0")
    failing(run, "guidance_scale must be a finite number", "--prompts", "x", "--guidance-scale", -1)
    # text-to-image options for a model that reads no text
    failing(run, "--prompts is for text-to-image", "--prompts", "x", model=None, lora=None)
    failing(run, "lora must be an existing file or folder", lora=tmp_path / "nowhere")
    failing(run, "must fit the model", "--preset", "cifar2")
    failing(run, "did you mean 'artbench", "--preset", "artbench1")


def test_data_that_does_not_fit(run, tmp_path, pictures):
    bare = write_pictures(tmp_path / "bare", metadata=False)
    failing(run, "must have captions: metadata.jsonl", data=bare)
    failing(run, "must have captions", "--resize", data="digits")
    failing(run, "--resize resizes and crops", "--resolution", "24")
    shutil.copytree(pictures, tmp_path / "odd")
    failing(
        run,
        "sides that are multiples of 2",
        "--resolution",
        "15",
        "--resize",
        data=tmp_path / "odd",
    )


# slow: a run; test_attribute.py has another model, test_lora.py bases that do not fit
@pytest.mark.full
def test_a_run_of_another_model_is_refused(run, folder, tmp_path, monkeypatch):
    assert run("--prompts", "a wave")[0] == 0
    save_lora(load_tiny(folder, seed=5).module, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "load_data", lambda *_, **__: pytest.fail("data was read"))
        failing(run, "holds another run: model.lora is", "--prompts", "x", lora=tmp_path / "other")
    failing(run, "holds another run: captions is", "--prompts", "x", "--caption", "painting")
    save_lora(load_tiny(folder, rank=2).module, tmp_path / "two")
    other = build_pipeline(tmp_path / "wide", block_out_channels=(12, 16))
    failing(run, "must fit the base model", model=other, output=tmp_path / "another")


# slow: a run; what a resolution does to pictures is in test_text_to_image.py
@pytest.mark.full
def test_another_resolution(run, pictures, tmp_path):
    options = ["--resolution", "24", "--resize", "--prompts", "fog", "--num-queries", "1"]
    code, output = run(*options)
    assert code == 0, output
    assert load_data(next((tmp_path / "run").glob("generated-*"))).images.shape[-2:] == (24, 24)
