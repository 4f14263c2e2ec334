"""`dtrak.explain`: from a model, images and queries to scores, with and without a folder."""

import csv
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import is_full
from diffusers import DDPMPipeline
from PIL import Image
from test_sketcher import small_unet
from tiny_encoders import build_clip
from tiny_stable_diffusion import build_pipeline, load_tiny

import dtrak
from dtrak.data.images import DataError, encode_png, to_uint8
from dtrak.features.extraction import FusedExtractor
from dtrak.features.noise import sample_noise
from dtrak.methods import METHODS, NOTHING, Method
from dtrak.methods.evidence import Retrained
from dtrak.models.process import linear_process
from dtrak.models.unet import UNet
from dtrak.runs.folders import OutputError
from dtrak.runs.record import ResultsError

N, M = 9, 3
HOW = {"timesteps": 2, "proj_dim": 256, "device": "cpu", "batch_size": 4, "progress": False}
# of what a whitening is no part
PLAIN = {**HOW, "whiten": "none"}


@pytest.fixture(scope="module")
def model():
    return UNet(small_unet().float(), linear_process())


def pictures(count, seed=0):
    """Pixels that 8 bits hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return levels.float().div(127.5).sub(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("given") / "data"
    place.mkdir()
    for number, image in enumerate(to_uint8(pictures(N))):
        (place / f"{number}.png").write_bytes(encode_png(image))
    return place


def gradients(model, images, ids, role):
    """The mean gradient of ‖output‖² over two timesteps, one sample at a time, in float64."""
    net = small_unet().double()
    scheduler, rows = model.process.scheduler, []
    for image, name in zip(images.double(), ids, strict=True):
        total = 0.0
        for t in (0, 500):
            noise = sample_noise([f"{role}/{name}"], [t], (1, 8, 8), seed=0, dtype=torch.float64)[0]
            kept = scheduler.alphas_cumprod.double()[t]
            noisy = kept.sqrt() * image[None] + (1 - kept).sqrt() * noise
            output = net(noisy, torch.tensor([t])).sample
            parts = torch.autograd.grad(output.square().mean(), list(net.parameters()))
            total = total + torch.cat([part.flatten() for part in parts]) / 2
        rows.append(total)
    return torch.stack(rows)


def test_scores_are_those_of_single_backwards_and_dense_algebra(model):
    train, queries = pictures(N), pictures(M, seed=1)
    found = dtrak.explain(
        model, train, queries, **{**HOW, "proj_dim": None}, projection="none", damping=0.5,
        dtype="float64", whiten="none",
    )  # fmt: skip
    ids = [str(row) for row in range(N)]
    phi, psi = (
        gradients(model, x, ids[: len(x)], r) for x, r in ((train, "train"), (queries, "query"))
    )
    kernel = torch.linalg.inv(phi @ phi.T + 0.5 * torch.eye(N).double())
    # ψ (ΦᵀΦ + λI)⁻¹ Φᵀ = ψ Φᵀ (ΦΦᵀ + λI)⁻¹
    expected = psi @ phi.T @ kernel
    assert found.scores.shape == (M, N)
    assert (found.scores - expected).norm() < 1e-5 * expected.norm()
    assert (found.ids, found.query_ids) == (ids, ids[:M])
    model.module.float()


def test_a_folder_keeps_features_and_changes_nothing(model, tmp_path, monkeypatch):
    train, queries = dtrak.images(pictures(N)), pictures(M, seed=1)
    plain = dtrak.explain(model, train, queries, **HOW)
    kept = dtrak.explain(model, train, queries, store=tmp_path / "run", **HOW)
    assert torch.equal(plain.scores, kept.scores)
    assert plain.settings == kept.settings
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / "run" / "features-lowrank").rglob("*")}
    # other queries cost only themselves
    seen = []
    extract = FusedExtractor.extract

    def watched(self, inputs, ids, items=None):
        seen.extend(ids)
        return extract(self, inputs, ids, items)

    monkeypatch.setattr(FusedExtractor, "extract", watched)
    dtrak.explain(model, train, pictures(1, seed=2), store=tmp_path / "run", **HOW)
    # beside the batch whose tensors are counted
    assert [name for name in seen if name.startswith(("train/", "query/"))] == ["query/0"]
    assert all(f.stat().st_mtime_ns == t for f, t in files.items() if f.is_file())
    with pytest.raises(OutputError, match=r"holds another run: data\.fingerprint"):
        dtrak.explain(model, pictures(N, seed=3), queries, store=tmp_path / "run", **HOW)


def test_without_a_folder_no_disk_is_touched(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dtrak.explain(model, pictures(N), 2, **PLAIN)
    assert not list(tmp_path.iterdir())


# a whitening that is fitted again differs in last bits, before its directions are rounded
@pytest.mark.parametrize(
    "whiten, rtol, atol",
    [
        ("none", 1e-4, 1e-6),
        pytest.param("channels", 1e-4, 1e-6, marks=pytest.mark.full),
        pytest.param("auto", 5e-3, 1e-4, marks=pytest.mark.full),
    ],
)
def test_models_as_people_hold_them(model, folder, tmp_path, whiten, rtol, atol):
    model.save(tmp_path / "model")
    given = [
        model,
        dtrak.load(tmp_path / "model"),
        tmp_path / "model",
        str(tmp_path / "model"),
        DDPMPipeline.from_pretrained(tmp_path / "model"),
        dtrak.Denoiser.of(
            small_unet().float(), linear_process(), lambda net, x, t, c: net(x, t).sample
        ),
    ]
    scores = [dtrak.explain(one, folder, folder, whiten=whiten, **HOW).scores for one in given]
    for other in scores[1:]:
        assert torch.allclose(scores[0], other, rtol=rtol, atol=atol)
    with pytest.raises(ValueError, match="got a Linear"):
        dtrak.explain(torch.nn.Linear(2, 2), folder, folder, **HOW)


def test_queries_that_the_model_draws(model):
    found = dtrak.explain(model, pictures(N), 2, **PLAIN)
    assert found.query_ids == ["00000.png", "00001.png"]
    drawn = torch.cat([batch.images for batch in model.draw([0, 1])])
    assert torch.equal(found.queries.images, to_uint8(drawn).float().div(127.5).sub(1))
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        dtrak.explain(model, pictures(N), 0, **PLAIN)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "d-track"}, "did you mean 'd-trak'"),
        ({"timesteps": "many"}, "--timesteps must be a number"),
        ({"damping": "-1x"}, "--damping must be 'auto'"),
        ({"method": "random", "output_function": "mean"}, "is for methods that take gradients"),
        ({"method": "gas"}, "--checkpoints FOLDER: python -m dtrak.train"),
        ({"method": "journey-trak"}, "--queries generated"),
        ({"method": "clip-dot"}, "--clip FOLDER"),
        ({"method": "datamodel"}, "python -m dtrak.lds evaluate --methods datamodel"),
        ({"method": "raw-latents-dot"}, "see raw-pixels-dot"),
    ],
)
def test_what_cannot_be_is_refused_by_what_is_missing(model, options, message):
    with pytest.raises(ValueError, match=message):
        dtrak.explain(model, pictures(N), pictures(M), **{**HOW, **options})


def test_an_unknown_option_is_no_option(model):
    with pytest.raises(TypeError, match="nonsense"):
        dtrak.explain(model, pictures(N), pictures(M), nonsense=3)


# those of latents and of CLIP have models of their own below
OTHERS = {"raw-latents-dot", "raw-latents-cosine", "clip-dot", "clip-cosine"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """What methods share is made once: a whitening, and features of each function."""
    return tmp_path_factory.mktemp("kept") / "run"


# slow: TRAK's formula with another output function, which test_outputs.py has
ALIKE = [name for name in METHODS if name.startswith(("d-trak-l", "trak-"))]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full if name in ALIKE else ())
        for name in METHODS
        if name not in OTHERS
    ],
)
def test_every_method_scores_everything(model, name, kept, pytestconfig):
    needs = METHODS[name].needs
    subsets = torch.rand(12, N, generator=torch.Generator().manual_seed(0)) > 0.5
    more = {
        "checkpoints": {"checkpoints": [model, model]},
        "models": {"retrained": Retrained(subsets, torch.rand(12, M))},
    }.get(needs, {})
    queries = M if needs == "trajectory" else pictures(M)
    # whitening is one for all: the full lane has it for each function
    if name not in ("d-trak", "trak") and not is_full(pytestconfig):
        more["whiten"] = "none"
    found = dtrak.explain(model, pictures(N), queries, method=name, store=kept, **more, **HOW)
    assert found.scores.shape == (M, N)
    assert found.scores.dtype == torch.float32
    assert torch.isfinite(found.scores).all()
    assert found.settings["method"] == name


def test_methods_of_latents(tmp_path):
    latent = load_tiny(build_pipeline(tmp_path / "pipeline"))
    colours = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    given = dtrak.images(colours, captions=list("abcd"))
    # as the encoder's own numbers say, scale included
    config = latent.vae.config
    with torch.no_grad():
        latents = latent.vae.encode(colours).latent_dist.mode() * config.scaling_factor
    flat = latents.flatten(1).double()
    lengths = flat.norm(dim=1)
    expected = {"dot": flat @ flat.T, "cosine": flat @ flat.T / (lengths[:, None] * lengths)}
    for kind, scores in expected.items():
        for store in (None, tmp_path / kind):
            found = dtrak.explain(
                latent, given, given, method=f"raw-latents-{kind}", store=store, **HOW
            )
            assert (found.scores - scores).norm() < 1e-5 * scores.norm()


def test_methods_of_clip(model, tmp_path):
    from dtrak.methods.baselines import clip_embeddings, load_clip

    folder = build_clip(tmp_path / "clip")
    train, queries = (
        clip_embeddings(pictures(count), load_clip(folder)).double() for count in (N, M)
    )
    product = queries @ train.T
    lengths = queries.norm(dim=1)[:, None] * train.norm(dim=1)
    expected = {"dot": product, "cosine": product / lengths}
    for kind, scores in expected.items():
        found = dtrak.explain(
            model, pictures(N), pictures(M), method=f"clip-{kind}", clip=folder, **HOW
        )
        assert (found.scores - scores).norm() < 1e-5 * scores.norm()


def test_methods_are_their_formulas(model):
    train, queries = pictures(N), pictures(M, seed=1)

    def score(name, **more):
        return dtrak.explain(model, train, queries, method=name, **more, **PLAIN).scores

    flat, other = train.flatten(1).double(), queries.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(other[:, None], flat[None], dim=2)
    assert torch.allclose(score("raw-pixels-cosine"), cosine.float(), atol=1e-6)
    assert torch.allclose(score("raw-pixels-dot"), (other @ flat.T).float(), atol=1e-5)
    # two checkpoints that are one
    once = score("gradient-dot")
    assert torch.allclose(score("tracincp", checkpoints=[model, model]), once, rtol=1e-6)
    # D-TRAK and TRAK are one formula
    assert torch.equal(score("trak", output_function="mean_squared_l2_norm"), score("d-trak"))


def test_a_method_of_ones_own(model):
    def brightness(queries, train):
        return train.images.mean((1, 2, 3)).expand(len(queries), -1)

    own = Method("Brightness", NOTHING, brightness)
    found = dtrak.explain(model, pictures(N), pictures(M), method=own, **HOW)
    assert torch.allclose(found.scores[0], pictures(N).mean((1, 2, 3)))
    assert found.settings["method"] == "brightness"


class Pairs(torch.utils.data.Dataset):
    """Tensors or PIL images with labels."""

    def __init__(self, convert):
        self.convert = convert

    def __len__(self):
        return N

    def __getitem__(self, row):
        return self.convert(to_uint8(pictures(N))[row]), row % 3


def as_pil(pixels):
    return Image.fromarray(pixels[0].numpy())


def test_images_as_people_hold_them(folder):
    levels = to_uint8(pictures(N))
    pil = [as_pil(pixels) for pixels in levels]
    given = {
        "folder": folder,
        "pil": pil,
        "float": pictures(N),
        "uint8": levels,
        "array": levels.numpy(),
        "tensors": Pairs(lambda pixels: pixels),
        "pairs": Pairs(as_pil),
        "datasets": datasets.Dataset.from_dict({"image": pil, "label": [0] * N}).cast_column(
            "image", datasets.Image()
        ),
    }
    for name, source in given.items():
        found = dtrak.images(source)
        assert torch.equal(found.images, pictures(N)), name
        expected = {"pairs": [0, 1, 2] * 3, "tensors": [0, 1, 2] * 3, "datasets": [0] * N}
        assert found.labels == expected.get(name), name
        if name not in ("folder", "datasets"):
            assert found.ids == [str(row) for row in range(N)], name
    assert len(dtrak.images(pil[0])) == 1
    assert len(dtrak.images(folder / "0.png")) == 1
    assert len(dtrak.images(Pairs(as_pil), limit=4)) == len(dtrak.images(levels, limit=4)) == 4
    named = dtrak.images(levels, labels=range(N), ids=list("abcdefghi"), captions="a")
    assert (named.ids[1], named.labels[1], named.conditions[1]) == ("b", 1, "a")
    assert dtrak.images(levels, captions=list("abcdefghi")).conditions[2] == "c"


@pytest.mark.parametrize(
    "source, error, message",
    [
        (3.5, ValueError, "got a float"),
        (["a"], ValueError, "items that are a str"),
        ([], DataError, "at least one, got none"),
        (torch.zeros(4, 8, 8, dtype=torch.int32), ValueError, r"got \[4, 8, 8\] torch.int32"),
        ([torch.rand(1, 8, 8), torch.rand(1, 7, 8)], DataError, r"got \[1, 7, 8\] at 1"),
        (Pairs(lambda pixels: torch.rand(1, 8, 8)), DataError, "leave out its random transforms"),
        (to_uint8(pictures(2)).float(), ValueError, "got floating values up to 2"),
        ("absent.parquet", FileNotFoundError, "no file or folder at"),
    ],
)
def test_what_are_no_images(source, error, message):
    with pytest.raises(error, match=message):
        _ = dtrak.images(source).images


def test_an_attribution_is_looked_at_saved_and_read(model, folder, tmp_path):
    found = dtrak.explain(model, folder, pictures(M, seed=1), **PLAIN)
    for row, best in zip(found.scores, found.top(3), strict=True):
        order = row.argsort(descending=True)[:3]
        assert [match.id for match in best] == [found.ids[i] for i in order]
        assert [match.score for match in best] == row[order].tolist()
    with pytest.raises(ValueError, match="k must be"):
        found.top(N + 1)
    assert [len(row) for row in found.top()] == [N] * M
    lines = list(csv.reader(found.to_csv(tmp_path / "a.csv", k=2).open(encoding="utf-8")))
    assert lines[0] == ["query", "rank", "training image", "score"]
    assert lines[1][:3] == ["0", "1", found.top(1)[0][0].id]
    assert len(lines) == 1 + 2 * M
    assert float(lines[1][3]) == pytest.approx(found.top(1)[0][0].score, rel=1e-8)
    again = dtrak.explain(model, folder, pictures(M, seed=1), **PLAIN)
    one, two = found.save(tmp_path / "one"), again.save(tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    read = dtrak.Attribution.open(tmp_path / "one")
    assert torch.equal(read.scores, found.scores)
    assert (read.ids, read.query_ids, read.settings) == (found.ids, found.query_ids, found.settings)
    page = found.report(tmp_path / "page.html")
    assert "Which training images" in page.read_text()
    assert Image.open(tmp_path / "page.png").size[0] > 500
    html = found._repr_html_()
    # a query and its five best
    assert html.count("<img") == sum(1 + sum(m.score > 0 for m in row) for row in found.top(5))
    assert "Attribution(d-trak, 3 queries x 9 training images)" in repr(read)
    shown = read._repr_html_()
    assert all(f"{m.id} {m.score:+.3g}" in shown for row in read.top(5) for m in row)
    with pytest.raises(ValueError, match="got one read from a file"):
        read.report(tmp_path / "other.html")
    with pytest.raises(FileNotFoundError):
        dtrak.Attribution.open(tmp_path / "absent")


def test_what_reads_more_must_be_given_it():
    class Captioned(UNet):
        reads = "captions"

    with pytest.raises(ValueError, match=r"data must have captions.*captions=\["):
        dtrak.explain(
            Captioned(small_unet().float(), linear_process()), pictures(2), pictures(2), **HOW
        )


def test_the_signature_names_every_option():
    import inspect

    names = inspect.signature(dtrak.explain).parameters
    assert {"model", "data", "queries", "store", "method", "timesteps", "damping"} <= set(names)
    assert "options" not in names


def test_public_names_cost_nothing_until_they_are_used():
    import subprocess
    import sys

    code = (
        "import sys, dtrak; print({'torch', 'diffusers'} & set(sys.modules)); "
        "print([n for n in dtrak.__all__ if n not in dir(dtrak)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "[]"]
    assert all(getattr(dtrak, name) is not None for name in dtrak.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'attribut'"):
        _ = dtrak.attribut


def test_runs_of_several_queries_are_opened_by_name(model, tmp_path):
    for name in ("a-11111111", "b-22222222"):
        place = tmp_path / "run" / "queries" / name
        found = dtrak.explain(model, pictures(N), pictures(M), method="random", **HOW)
        found.save(place)
        (place / "manifest.json").write_text(json.dumps({}))
    (tmp_path / "run" / "run.json").write_text("{}")
    assert dtrak.Attribution.open(tmp_path / "run", "a").scores.shape == (M, N)
    with pytest.raises(ResultsError, match="a-11111111, b-22222222: got none"):
        dtrak.Attribution.open(tmp_path / "run")
    with pytest.raises(ResultsError, match="got 'c'"):
        dtrak.Attribution.open(tmp_path / "run", "c")
    assert np.isfinite(found.scores.numpy()).all()


def test_what_goes_with_samples_reaches_a_network_of_ones_own():
    def condition(items, device):
        return {"scale": torch.tensor([float(item) for item in items], device=device)}

    def predict(net, noisy, timesteps, given):
        return net(noisy, timesteps).sample * given["scale"][:, None, None, None]

    own = dtrak.Denoiser.of(small_unet().float(), linear_process(), predict, condition)
    plain = dtrak.Denoiser.of(
        small_unet().float(), linear_process(), lambda net, x, t, c: net(x, t).sample
    )
    train, queries = (dtrak.images(pictures(n), labels=[2] * n) for n in (N, M))
    scores = [
        dtrak.explain(one, train, queries, damping="1x", **PLAIN).scores for one in (own, plain)
    ]
    # twice the output is four times its square, everywhere alike
    assert torch.allclose(scores[0], scores[1], rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="data must have conditions"):
        dtrak.explain(own, pictures(N), pictures(M), **PLAIN)


def test_a_list_of_timesteps_is_those(model):
    given = {**PLAIN, "timesteps": [3]}
    found = dtrak.explain(model, pictures(N), pictures(M), **given)
    assert found.settings["timesteps"] == "3 explicit"
    other = dtrak.explain(model, pictures(N), pictures(M), **{**PLAIN, "timesteps": 3})
    assert other.settings["timesteps"] == "3 uniform"


def test_settings_tell_checkpoints_and_batches_apart(model):
    other = UNet(small_unet().float(), linear_process())
    with torch.no_grad():
        other.module.conv_out.weight.mul_(2)
    settings = [
        dtrak.explain(
            model, pictures(N), pictures(M), method="gas", checkpoints=[one, model],
            **{**HOW, "batch_size": size},
        ).settings
        for one, size in ((model, 4), (other, 4), (model, 3))
    ]  # fmt: skip
    assert len({json.dumps(one, sort_keys=True) for one in settings}) == 3


def test_double_precision_leaves_the_callers_model_alone(model, tmp_path):
    how = {**PLAIN, "store": tmp_path / "run"}
    before = dtrak.explain(model, pictures(N), pictures(M), **how)
    other = {**PLAIN, "dtype": "float64", "store": tmp_path / "double"}
    dtrak.explain(model, pictures(N), pictures(M), **other)
    assert next(model.module.parameters()).dtype == torch.float32
    again = dtrak.explain(model, pictures(N), pictures(M), **how)
    assert torch.equal(before.scores, again.scores)


@pytest.mark.parametrize(
    "data, queries, message",
    [
        (pictures(N), pictures(1)[0], r"queries must be images \[N, 1, H, W\].* got \[1, 8, 8\]"),
        (pictures(N).repeat(1, 3, 1, 1), 1, r"data must be images .* got \[9, 3, 8, 8\]"),
        (pictures(N), True, "queries must be at least 1, got True"),
    ],
)
def test_shapes_that_do_not_fit_the_model(model, data, queries, message):
    with pytest.raises(ValueError, match=message):
        dtrak.explain(model, data, queries, **HOW)


def test_needs_are_refused_before_anything_is_made(model, tmp_path):
    with pytest.raises(ValueError, match="--checkpoints FOLDER"):
        dtrak.explain(model, pictures(N), 2, method="gas", store=tmp_path / "run", **HOW)
    assert not (tmp_path / "run").exists()


def test_ids_are_different():
    with pytest.raises(ValueError, match="ids must be different"):
        dtrak.images(pictures(2), ids=["a", "a"])
    assert dtrak.images(pictures(2), ids=range(2)).ids == ["0", "1"]
    with pytest.raises(DataError, match="labels must be whole numbers, got 'cat'"):
        dtrak.images([(torch.zeros(1, 2, 2), "cat")])
