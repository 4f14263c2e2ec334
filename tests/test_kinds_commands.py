"""Every kind end to end by command: data, adapter or whole model, drawn queries, page."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numerics import relative_error
from safetensors import safe_open
from tiny_pipelines import CLASSES, KINDS, build
from tiny_stable_diffusion import shake_lora, write_pictures
from typer.testing import CliRunner

from dtrak.cli.attribute import app
from dtrak.cli.generate import app as generate
from dtrak.data.images import load_data
from dtrak.features.extraction import FusedExtractor
from dtrak.features.settings import FeatureSettings, WhiteningSettings
from dtrak.models import load
from dtrak.training.drawing import draw_all
from dtrak_kernels import Projection, Whitening

pytestmark = pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
CPU = torch.device("cpu")
TEXT = [kind for kind in KINDS if kind != "dit"]


@pytest.fixture(scope="module")
def places(shared):
    def make(folder):
        for kind in (*KINDS, "qwen"):
            build(kind, folder / kind / "pipeline")
            shake_lora(load(folder / kind / "pipeline").put_adapter(2)).save(folder / kind / "lora")
        write_pictures(folder / "pictures")
        files = sorted((folder / "pictures").rglob("*.png"))
        rows = [
            {"img": {"bytes": file.read_bytes(), "path": file.name}, "label": row % CLASSES}
            for row, file in enumerate(files)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "labelled.parquet")

    return shared("kinds-commands", make)


def invoke(app, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def read_scores(folder):
    (file,) = folder.rglob("scores.safetensors")
    with safe_open(file, "pt") as opened:
        return opened.get_tensor("scores").double(), file.parent


@pytest.mark.pictures
@pytest.mark.parametrize(
    "kind, adapter",
    [
        # one that reads labels; a U-Net that reads captions, with a LoRA, is in
        # test_attribute_lora.py, and test_kinds.py explains flow matching
        ("dit", False),
        *(
            pytest.param(kind, adapter, marks=pytest.mark.full)
            for kind, adapter in (
                ("sd", False),
                ("flux", True),
                ("sdxl", True),
                ("sd3", True),
                ("schnell", False),
                ("sdxl", False),
                ("dit", True),
                ("sd3", False),
                ("flux", False),
                ("schnell", True),
                # by its recorded call
                ("qwen", True),
            )
        ),
    ],
)
def test_a_kind_is_explained_by_command(kind, adapter, places, tmp_path, monkeypatch):
    # instead of 50
    monkeypatch.setattr("dtrak.models.denoiser.Denoiser.num_inference_steps", 4)
    own = kind == "dit"
    source = places / ("labelled.parquet" if own else "pictures")
    given = ["--model", places / kind / "pipeline", "--data", source, "--output", tmp_path]
    given += ["--lora", places / kind / "lora"] if adapter else []
    given += ["--classes", "2,0"] if own else ["--prompts", "a fog", "--resolution", 16]
    small = ["--timesteps", 2, "--proj-dim", 256, "--num-queries", 2, "--damping", 0.5]
    code, output = invoke(app, *given, *small, "--batch-size", 4, "--device", "cpu")
    assert code == 0, output
    scores, results = read_scores(tmp_path)
    assert scores.shape == (2, 5)
    # the page and its picture
    assert (results / "report.png").stat().st_size > 10_000
    page = (results / "report.html").read_text()
    assert ("“a fog”" in page) is not own
    # the same from parts that know nothing of a run
    lora = places / kind / "lora" if adapter else None
    model, data = load(places / kind / "pipeline", lora), load_data(str(source))
    times = model.process.spread(2)
    (file,) = tmp_path.glob("features-lowrank/*/whitening.safetensors")
    whitening = Whitening.load(file, kind="lowrank", function="mean_squared_l2_norm")
    settings = FeatureSettings(
        "mean_squared_l2_norm", tuple(times), 0, Projection("sjlt", 256),
        whitening=WhiteningSettings("lowrank"),
    )  # fmt: skip
    captions = {"pictures": None, "labelled.parquet": data.labels}[source.name]
    if captions is None:
        from dtrak.data.captions import load_captions

        captions = load_captions(str(source), data)
    items = [2, 0] if own else ["a fog"] * 2
    drawn = draw_all(model, [0, 1], items=items, size=16)
    (folder,) = {file.parent for file in tmp_path.rglob("00001.png") if "drawn" not in str(file)}
    saved = load_data(str(folder)).images
    assert (saved - drawn).abs().max() < 0.6 / 127.5
    features = {}
    for role, images, ids, read in (
        ("train", data.images, data.ids, captions),
        ("query", saved, ["00000.png", "00001.png"], items),
    ):
        extractor = FusedExtractor(model, settings, CPU, whitening)
        latents = model.inputs(images, CPU)
        names = [f"{role}/{name}" for name in ids]
        features[role] = extractor.extract(latents, names, read).double()
    phi, psi = features["train"], features["query"]
    wanted = psi @ torch.linalg.inv(phi.T @ phi + 0.5 * torch.eye(256).double()) @ phi.T
    assert relative_error(scores, wanted) < 1e-3
    # nothing is done twice
    code, output = invoke(app, *given, *small, "--batch-size", 4, "--device", "cpu")
    assert code == 0, output


@pytest.mark.parametrize("kind", ["schnell", "dit"])
def test_a_kind_draws_by_command(kind, places, tmp_path):
    own = kind == "dit"
    given = ["--model", places / kind / "pipeline", "--output", tmp_path / "x", "--device", "cpu"]
    given += ["--num-images", 1] + ([] if own else ["--prompts", "fog"])
    if kind == "schnell":
        code, output = invoke(generate, *given, "--guidance-scale", 3)
        assert code == 2
        assert "must be None or 0 for a model without guidance, got 3" in output
    code, output = invoke(generate, *given)
    assert code == 0, output
    said = json.loads((tmp_path / "x" / "generation.json").read_text())["settings"]
    assert said["num_inference_steps"] == (50 if own else 4)
    assert said.get("guidance_scale") == (4.0 if own else None)


def test_what_is_missing_is_said(places, tmp_path):
    sd3, dit = (["--model", places / kind / "pipeline"] for kind in ("sd3", "dit"))
    # of one class folder alone nothing is known
    unlabelled = next(place for place in (places / "pictures").iterdir() if place.is_dir())
    for number, (given, message) in enumerate(
        (
            ([places / "labelled.parquet", *sd3, "--prompts", "x"], "must have captions"),
            ([unlabelled, *dit], "must have labels for a model that reads classes"),
            ([places / "pictures", *sd3, "--resolution", 16], "--prompts must say what to draw"),
            (
                [places / "pictures", *sd3, "--prompts", "x", "--resolution", 18, "--resize"],
                "sides that are multiples of 4, got 18x18",
            ),
            ([places / "labelled.parquet", *dit, "--prompts", "x"], "is for text-to-image models"),
            ([places / "pictures", *sd3, "--lora", places / "flux" / "lora"], "must fit the base"),
        )
    ):
        base = ["--output", tmp_path / str(number), "--device", "cpu", "--data"]
        code, output = invoke(app, *base, *given)
        assert code == 2, output
        assert message in output
        assert "Traceback" not in output


@pytest.mark.parametrize("kind", [pytest.param("flux", marks=pytest.mark.full), "dit"])
def test_an_adapter_is_trained_by_command_and_explained(kind, places, tmp_path, monkeypatch):
    from dtrak.cli.train import app as train

    monkeypatch.setattr("dtrak.models.denoiser.Denoiser.num_inference_steps", 4)
    own = kind == "dit"
    source = places / ("labelled.parquet" if own else "pictures")
    given = ["--model", places / kind / "pipeline", "--data", source, "--device", "cpu"]
    given += [] if own else ["--resolution", 16]
    words = [*given, "--lora-rank", 2, "--steps", 2, "--batch-size", 2]
    code, output = invoke(train, *words, "--output", tmp_path / "lora")
    assert code == 0, output
    said = json.loads((tmp_path / "lora" / "training.json").read_text())["settings"]
    if not own:
        assert (said["schedule"]["density"], said["model"]["guidance"]) == ("uniform", "3.5")
        # what is written down is how it is read
        said["schedule"] |= {"density": "mode", "shifted by": "resolution"}
        said["model"]["guidance"] = "1.5"
        (tmp_path / "lora" / "training.json").write_text(json.dumps({"settings": said}))
        model = load(places / kind / "pipeline", tmp_path / "lora")
        assert (model.process.density, model.process.shift) == ("mode", "resolution")
        assert model.guidance == 1.5
        # but for what is said
        assert load(places / kind / "pipeline", tmp_path / "lora", guidance=2.0).guidance == 2.0
    assert load(places / kind / "pipeline", tmp_path / "lora").adapter()["rank"] == 2
    code, output = invoke(train, *words, "--output", tmp_path / "lora")
    assert own is (code == 0), output
    more = ["--timesteps", 2, "--proj-dim", 256, "--num-queries", 1, "--damping", 0.5]
    more += [] if own else ["--prompts", "fog"]
    code, output = invoke(
        app, *given, *more, "--lora", tmp_path / "lora", "--output", tmp_path / "x"
    )
    assert code == 0, output
    assert read_scores(tmp_path / "x")[0].shape == (1, 5)
