"""LoRA experiments: what is trained, measured and predicted, against the parts taken by hand."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_lds_lora
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from numerics import relative_error
from rich.console import Console
from safetensors.torch import load_file
from tiny_lds import first_step, interrupt, quiet
from tiny_lds_lora import CPU, NAME, PRESET, pictures, register
from tiny_stable_diffusion import build_pipeline, write_pictures
from typer.testing import CliRunner

from dtrak import attribute, lds, models
from dtrak import train as train_command
from dtrak.data.images import load_data, to_uint8
from dtrak.data.samples import Samples
from dtrak.evaluation.counterfactual.origin import open_origin
from dtrak.evaluation.lds import methods as lds_methods
from dtrak.evaluation.lds.experiment import (
    ExperimentError,
    encode,
    load_experiment,
    prepare,
    train_one,
)
from dtrak.evaluation.lds.losses import LossSettings, claim_settings, evaluate_one, query_losses
from dtrak.evaluation.lds.methods import METHODS, Predictor, Setting
from dtrak.evaluation.lds.names import of_latents
from dtrak.evaluation.lds.queries import generated_queries, query_sets
from dtrak.evaluation.lds.table import load_results
from dtrak.evaluation.retraining import RetrainingError
from dtrak.features import extraction
from dtrak.features.extraction import FeatureSettings, FusedExtractor
from dtrak.features.noise import sample_noise
from dtrak.features.store import FeatureStore
from dtrak.models import load
from dtrak.models.lora import LoraError, hash_lora
from dtrak.training.drawing import draw_all
from dtrak.training.presets import PRESETS, get_preset
from dtrak.training.record import read_training
from dtrak.training.trainer import train as train_model
from dtrak_kernels import Projection

BY_NAME = {method.title: method for method in METHODS}
SMALL = ("--loss-timesteps", 4, "--noise-seeds", 1, "--timesteps", "2")
K = 512


@pytest.fixture(autouse=True)
def small(monkeypatch):
    register()
    monkeypatch.setattr(lds_methods, "DEFAULT_PROJ_DIM", {"sjlt": K, "none": 0})
    # measuring one sample takes longer here than all of them
    monkeypatch.setattr(extraction, "fitting_batch_size", lambda *_: 8)
    # it remembers the precision of the first run of a process
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tiny_pipeline):
    return tiny_pipeline


def run(command, *arguments, app=lds.app):
    """Run a command; gives (exit code, everything printed)."""
    result = CliRunner().invoke(app, [*command.split(), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def lds_run(command, folder, *arguments):
    return run(command, "--preset", NAME, "--output", folder, "--device", "cpu", *arguments)


@pytest.fixture(scope="module")
def folder(base, shared, tmp_path_factory):
    """A run with every model trained, by the commands; a copy, to which tests add."""
    register()

    def train(folder):
        code, text = lds_run("prepare", folder, "--model", base)
        assert (code, "4 subsets of 4 of 8 images, 5 models to train" in text) == (0, True), text
        code, text = lds_run("train", folder)
        assert (code, "5 of 5 models are trained" in text) == (0, True), text

    return shutil.copytree(shared("LDS of LoRAs", train), tmp_path_factory.mktemp("lds") / "run")


@pytest.fixture
def experiment(folder):
    return load_experiment(folder)


def ready(folder, base, preset=PRESET, **options):
    """A prepared run without models."""
    register(preset)
    experiment = prepare(folder, preset, model=str(base), **options)
    encode(experiment, CPU, quiet)
    return experiment


# slow: the whole of test_lds.py, of a LoRA
@pytest.mark.full
def test_from_the_trained_models_to_the_table(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "run")
    loaded = []
    monkeypatch.setattr(models, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    code, text = lds_run("evaluate", copy, *SMALL)
    assert (code, "losses of 4 of 4 models are measured" in text) == (0, True), text
    assert len(loaded) == 2, "once by the command, once by its worker, whatever the models"
    results = load_results(copy / "results.npz")
    assert results.about["mixed_precision"] == "no"
    assert results.about["start"]["rank"] == 2
    assert results.about["steps"] == 8
    expected = {name.replace("pixels", "latents") for name in BY_NAME} | {
        "Empirical influence, cross-fitted",
        "D-TRAK, whitened",
        "TRAK, whitened",
        "D-TRAK, mean, whitened",
    }
    assert {entry.method for entry in results.entries} == expected
    assert {kind: tuple(v.shape) for kind, v in results.losses.items()} == {
        "validation": (4, 3),
        "generated": (4, 4),
    }
    code, text = lds_run_report(copy)
    assert code == 0, text
    assert "Raw latents, cosine" in text
    assert "tiny-lora, 4 generated queries, 4 models" in text
    # what is done is not done again, and subsets can be added; the base is remembered
    code, text = lds_run("prepare", copy, "--num-subsets", 5)
    assert (code, "5 subsets" in text) == (0, True), text
    code, text = lds_run("train", copy)
    assert (code, "train 004-0" in text, "train 003-0" in text) == (0, True, False), text


def lds_run_report(folder):
    return run("report", "--preset", NAME, "--output", folder, "--resamples", 1000)


# slow: trainings of every kind again; of pixels test_lds_experiment.py has it in the fast lane
@pytest.mark.full
def test_loras_are_those_of_the_training_command(folder, base, experiment, tmp_path):
    """Subset and seed, and the full LoRA at every quarter, are what `dtrak.train` makes."""
    for arguments, names in (
        (["--subset", 2, "--seed", 0], {"": "002-0"}),
        (
            ["--keep-checkpoints", 4],
            {f"checkpoint-{s}": f"full-step-{s:06d}" for s in (2, 4, 6)} | {"": "full"},
        ),
    ):
        output = tmp_path / names[""]
        AcceleratorState._reset_state(reset_partial_state=True)
        code, text = run(
            "--preset", NAME, "--model", base, "--device", "cpu", "--output", output, *arguments,
            app=train_command.app,
        )  # fmt: skip
        assert code == 0, text
        hashes = set()
        for there, name in names.items():
            lora = load(base, output / there).module
            assert hash_lora(lora) == hash_lora(experiment.load_model(name).module)
            hashes.add(hash_lora(lora))
        assert len(hashes) == len(names)
    assert experiment.checkpoint_names == (*(f"full-step-{s:06d}" for s in (2, 4, 6)), "full")


def test_a_lora_never_sees_the_other_half(base, folder, tmp_path):
    experiment = ready(tmp_path / "run", base)
    again = experiment.retraining
    again._posteriors[~experiment.subsets[1]] = float("nan")
    again._checked_posteriors = lambda: again._posteriors
    again._data = again.data.conditioned(
        [
            caption if kept else "a hill"
            for caption, kept in zip(
                again.data.conditions, experiment.subsets[1].tolist(), strict=True
            )
        ]
    )
    assert train_one(experiment, "001-0", CPU)
    found = hash_lora(experiment.load_model("001-0").module)
    assert found == hash_lora(load_experiment(folder).load_model("001-0").module)


def test_folders_are_as_diffusers_writes_and_reads_them(folder, base, experiment):
    model = experiment.load_model("003-0")
    place = folder / "models" / "003-0"
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.load_lora_weights(place)
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 12)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(*arguments).sample, model.module(*arguments).sample)
    record = json.loads((place / "training.json").read_text())
    assert record["facts"]["trained weights"] == hash_lora(model.module)
    assert record["settings"]["data"] == {
        "preset": NAME,
        "fingerprint": experiment.data.select(experiment.subsets[3]).fingerprint,
        "rows": 4,
    }
    assert record["settings"]["recipe"]["seed"] == 0
    assert record["places"] == {"model": str(base)}
    assert read_training(place / "training.json").start == experiment.retraining.training.start
    assert hash_lora(load(base, place).module) == hash_lora(model.module)


# slow: three hundred steps; of the fast lane test_lora_training.py has it
@pytest.mark.full
def test_a_killed_training_goes_on_and_ends_with_the_same_bits(base, tmp_path):
    preset = replace(PRESET, recipe=replace(PRESET.recipe, steps=104, batch_size=1))
    whole = ready(tmp_path / "whole", base, preset)
    train_one(whole, "full", CPU)
    cut = ready(tmp_path / "cut", base, preset)

    interrupt(cut, 102)
    # another process starts from the base anew
    assert first_step(load_experiment(cut.folder)) == 101, "the checkpoint at step 100 was used"
    for a, b in zip(
        map(whole.load_model, whole.checkpoint_names),
        map(cut.load_model, cut.checkpoint_names),
        strict=True,
    ):
        assert hash_lora(a.module) == hash_lora(b.module)
    register()


# slow: five trainings; test_counterfactual_training.py follows a mixed precision in the fast lane
@pytest.mark.full
def test_one_base_serves_trainings_one_after_the_other_in_mixed_precision(base, tmp_path):
    both = ready(tmp_path / "both", base, mixed_precision="bf16")
    one = ready(tmp_path / "one", base, mixed_precision="bf16")
    for name in ("000-0", "001-0"):
        assert train_one(both, name, CPU)
    assert train_one(one, "001-0", CPU)
    hashes = [hash_lora(run.load_model("001-0").module) for run in (both, one)]
    assert hashes[0] == hashes[1]
    single = ready(tmp_path / "single", base)
    train_one(single, "001-0", CPU)
    assert hash_lora(single.load_model("001-0").module) != hashes[0]
    # losses are measured in it too
    train_one(both, "full", CPU)
    queries = {"validation": query_sets(both, CPU)["validation"]}
    settings = LossSettings(2, 1)
    claim_settings(both, settings)
    assert evaluate_one(both, queries, settings, "001-0", CPU)
    mixed = load_file(both.folder / "losses" / "001-0.safetensors")["validation"]
    exact = query_losses(both.load_model("001-0"), queries["validation"], settings, CPU)
    assert 1e-5 < relative_error(mixed, exact) < 0.05


def parts(base, place):
    """Diffusers' own pipeline with a LoRA, in float64."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.load_lora_weights(place)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.double().eval()
    return pipeline


def test_losses_equal_the_denoising_loss_written_out(folder, base, experiment):
    settings = LossSettings(num_timesteps=4, num_noise_seeds=2)
    queries = query_sets(experiment, CPU)
    captions = {
        "validation": ["a fog painting", "a sea painting", "a fog painting"],
        "generated": ["a sea painting"] * 2 + ["a fog painting"] * 2,
    }
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    survive = (1 - betas).cumprod(0)
    pictures_of = {
        "validation": pictures("validation"),
        "generated": load_data(folder / "generated"),
    }
    for name in ("002-0", "000-0"):
        pipeline = parts(base, folder / "models" / name)
        model = experiment.load_model(name)
        for kind, images in pictures_of.items():
            actual = query_losses(model, queries[kind], settings, CPU, batch_size=6)
            for row, image in enumerate(images.images.double()):
                ids = pipeline.tokenizer(
                    captions[kind][row], padding="max_length", max_length=16, return_tensors="pt"
                ).input_ids
                with torch.no_grad():
                    text = pipeline.text_encoder(ids)[0]
                    posterior = pipeline.vae.encode(image[None]).latent_dist
                    clean = posterior.mode() * pipeline.vae.config.scaling_factor
                for seed, (place, t) in [(s, p) for s in (0, 1) for p in enumerate((0, 250, 750))]:
                    place = 3 if t == 750 else place
                    key = [f"lds/{images.ids[row]}"]
                    noise = sample_noise(key, [t], (4, 8, 8), seed=seed, dtype=torch.float64)[0]
                    noisy = survive[t].sqrt() * clean + (1 - survive[t]).sqrt() * noise
                    with torch.no_grad():
                        out = pipeline.unet(noisy, t, encoder_hidden_states=text).sample
                    expected = (out - noise).square().mean()
                    assert float(actual[seed, place, row]) == pytest.approx(
                        float(expected), rel=1e-4
                    )


def test_queries_are_drawn_from_prompts_by_index_with_guidance(folder, base, experiment):
    texts = ["a sea painting", "a sea painting", "a fog painting", "a fog painting"]
    lines = (folder / "generated" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts
    model = load(base, folder / "models" / "full")
    drawn = draw_all(model, [0, 1, 2, 3], items=texts, guidance_scale=7.5, num_inference_steps=2)
    saved = load_data(folder / "generated").images
    # 8 bits a channel
    assert (saved - drawn).abs().max() <= 0.51 / 127.5
    # a picture that is missing is drawn again, the others are left
    file = folder / "generated" / "00002.png"
    before = file.read_bytes()
    file.unlink()
    generated_queries(experiment, CPU)
    assert file.read_bytes() == before


@pytest.fixture
def predictor(experiment):
    return Predictor(experiment, query_sets(experiment, CPU), CPU, quiet)


def groups(experiment, scores):
    """Minus the sum over the images of each subset, by a loop."""
    return torch.stack([-scores[:, mask].sum(1) for mask in experiment.subsets])


def test_features_are_those_of_the_main_command(folder, base, predictor, tmp_path):
    output = tmp_path / "attribution"
    code, text = run(
        "", "--preset", NAME, "--model", base, "--lora", folder / "models" / "full",
        "--queries", "validation", "--num-queries", 3, "--timesteps", 2, "--proj-dim", K,
        "--device", "cpu", "--output", output, "--output-function", "mean_squared_l2_norm",
        "--whiten", "none", app=attribute.app,
    )  # fmt: skip
    assert code == 0, text
    setting = Setting(BY_NAME["D-TRAK"], 2, "sjlt")
    train, queries = predictor._features(setting, -1)
    for found, name in ((train.load(), "train"), (queries[:3], "query-*")):
        (place,) = (output / "features").glob(f"*/{name}")
        manifest = json.loads((place / "manifest.json").read_text())
        expected = FeatureStore(place, manifest).load()
        assert relative_error(found, expected.double()) < 1e-5


# slow: of pixels test_lds_methods.py has it in the fast lane
@pytest.mark.full
def test_checkpoints_and_journeys_are_of_the_right_lora(folder, base, experiment, predictor):
    settings = [Setting(BY_NAME[name], 2, "sjlt") for name in ("TracInCP", "Journey-TRAK")]
    found = {p.setting.method.title: p for p in predictor.predict(settings)}
    train, joined = predictor.train, predictor.queries
    assert isinstance(train, Samples)
    projection = Projection("sjlt", K)
    dots = 0
    for name in ("full-step-000002", "full-step-000004", "full-step-000006", "full"):
        model = load(base, folder / "models" / name)
        extractor = FusedExtractor(model, FeatureSettings("loss", (0, 500), 0, projection), CPU)
        features, queries = (
            extractor.extract(
                s.batch(range(len(s))), [role + i for i in s.ids], s.conditions
            ).double()
            for s, role in ((train, "train/"), (joined, "query/"))
        )
        dots = dots + queries @ features.T
    assert relative_error(found["TracInCP"].values[0], groups(experiment, dots / 4)) < 1e-4
    # the clean latents predicted with guidance, each under its own noise and the prompt
    prompts = ["a sea painting"] * 2 + ["a fog painting"] * 2
    (drawn,) = model.draw(range(4), prompts, num_inference_steps=2, trajectories=True)
    paths = drawn.trajectories
    total = 0
    for step, t in enumerate((501, 1)):
        at = FusedExtractor(model, FeatureSettings("loss", (t,), 0, projection), CPU)
        ids = [f"journey/{seed}" for seed in range(4)]
        total = total + at.extract(paths[:, step], ids, prompts).double()
    damping = found["Journey-TRAK"].dampings[8]
    gram = features.T @ features + damping * torch.eye(K, dtype=torch.float64)
    scores = total / 2 @ torch.linalg.solve(gram, features.T)
    assert found["Journey-TRAK"].kinds == ("generated",)
    assert relative_error(found["Journey-TRAK"].values[8], groups(experiment, scores)) < 1e-4


def test_raw_similarities_are_of_latents(base, experiment, predictor):
    setting = Setting(BY_NAME["Raw pixels, dot"])
    named = replace(setting, method=of_latents(setting.method))
    assert named.method.title == "Raw latents, dot"
    (found,) = predictor.predict([named])
    vae = StableDiffusionPipeline.from_pretrained(base, local_files_only=True).vae.double()
    images = [
        pictures("train").images,
        torch.cat([pictures("validation").images, generated_queries(experiment, CPU).images]),
    ]
    with torch.no_grad():
        train, queries = (vae.encode(i.double()).latent_dist.mode().flatten(1) for i in images)
    scores = queries @ train.T * vae.config.scaling_factor**2
    assert relative_error(found.values[0], groups(experiment, scores)) < 1e-4


def refused(text, code, message):
    assert code == 2, text
    assert text.count("error:") == 1
    assert message in text, text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "no/such/folder"}, "model must be a folder that Diffusers wrote, or a hub name"),
        ({"mixed_precision": "fp15"}, "--mixed-precision must be"),
    ],
)
def test_bases_that_cannot_be_used(base, tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(tiny_lds_lora, "pictures", lambda _: pytest.fail("data was read"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(tmp_path / "run", PRESET, **{"model": str(base), **options})
    assert not (tmp_path / "run").exists()


def test_a_model_from_scratch_has_no_base(tmp_path):
    digits = get_preset("digits")
    message = "--mixed-precision must be left out for 'digits', which .* got 'bf16'"
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "run", digits, mixed_precision="bf16")


def test_another_base_is_refused(folder, base, tmp_path, monkeypatch):
    other = build_pipeline(tmp_path / "other", seed=1)
    before = (folder / "experiment.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(tiny_lds_lora, "pictures", lambda _: pytest.fail("data was read"))
        code, text = lds_run("prepare", folder, "--model", other)
    refused(text, code, f"the base model in {other} must be the one {folder} was prepared with: ")
    assert "model is" in text
    assert (folder / "experiment.json").read_bytes() == before
    code, text = lds_run("prepare", folder, "--mixed-precision", "bf16")
    refused(text, code, 'mixed_precision is "no" there and "bf16" here')
    # the same one elsewhere is welcome, and where it lies is kept
    moved = shutil.copytree(base, tmp_path / "moved")
    copy = shutil.copytree(folder, tmp_path / "run")
    assert lds_run("prepare", copy, "--model", moved)[0] == 0
    places = json.loads((copy / "experiment.json").read_text())["subject"]["training"]["places"]
    assert places["model"] == str(moved)
    # a base that changed since
    shutil.rmtree(moved)
    shutil.copytree(other, moved)
    shutil.rmtree(copy / "models" / "000-0")
    code, text = lds_run("train", copy)
    refused(text, code, "must be the one")
    assert "model is" in text


def test_half_precision_needs_a_gpu(base, tmp_path):
    ready(tmp_path / "run", base, mixed_precision="fp16")
    code, text = lds_run("train", tmp_path / "run")
    refused(text, code, "--device must be a GPU for mixed precision fp16")


def test_latents_that_are_gone_or_others(base, tmp_path):
    experiment = ready(tmp_path / "run", base)
    latents = experiment.folder / "latents" / "train"
    (shard,) = latents.glob("*.safetensors")
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(RetrainingError, match="train is incomplete: run prepare again"):
        train_one(load_experiment(experiment.folder), "full", CPU)
    # prepare makes the same ones again
    assert lds_run("prepare", experiment.folder)[0] == 0
    assert shard.read_bytes() == content
    damaged = bytearray(content)
    damaged[-1] ^= 1
    shard.write_bytes(bytes(damaged))
    with pytest.raises(RetrainingError, match="does not hold what prepare wrote: run prepare"):
        train_one(load_experiment(experiment.folder), "full", CPU)
    code, text = lds_run("prepare", experiment.folder)
    refused(text, code, "must hold the latents this run was prepared with, got others")


def test_a_damaged_lora_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "run")
    experiment = load_experiment(copy)
    file = copy / "models" / "001-0" / "pytorch_lora_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LoraError, match="must hold LoRA weights, got an unreadable file"):
        experiment.load_model("001-0")
    # and the next one is loaded all the same
    assert experiment.load_model("002-0").parameters()


def test_a_recipe_that_changed_is_refused(folder, monkeypatch):
    changed = replace(PRESET, lora=replace(PRESET.lora, rank=3))
    monkeypatch.setitem(PRESETS, NAME, changed)
    with pytest.raises(ExperimentError, match=r"something else: start\.rank is 2 there and 3 here"):
        load_experiment(folder)


# slow: retrainings; of pixels it is in the fast lane
@pytest.mark.full
def test_a_counterfactual_takes_the_run(folder, experiment, tmp_path):
    """Retrained on everything with its own seed, the full LoRA and its pictures come back."""
    origin = open_origin(folder, tmp_path)
    origin.retraining.prepare(CPU, quiet)
    made = []
    assert origin.retraining.train_once(
        "a", None, (42, 42), CPU, is_done=lambda: False, finish=made.append
    )
    (model,) = made
    assert hash_lora(model.module) == hash_lora(experiment.load_model().module)
    drawn = origin.draw(model, ["00001.png", "00003.png"], CPU)
    assert torch.equal(drawn, to_uint8(origin.queries.images[[1, 3]]))
    # what is made goes to the experiment's folder, latents are where they were
    assert {path.name for path in tmp_path.iterdir()} == {"locks", "training"}
    console = Console(quiet=True)
    scores = origin.gradient_scores("mean_squared_l2_norm", tmp_path / "f", CPU, console)
    assert scores.shape == (4, 8)


def test_a_counterfactual_draws_in_the_precision_of_the_run(base, tmp_path):
    """Else the precision alone changes every picture, by which removals would be judged."""
    experiment = ready(tmp_path / "run", base, mixed_precision="bf16")
    train_one(experiment, "full", CPU)
    pictures = to_uint8(generated_queries(experiment, CPU).images)
    origin = open_origin(tmp_path / "run", tmp_path / "cf")
    ids = origin.queries.ids
    assert torch.equal(origin.draw(origin.load_model(), ids, CPU), pictures)
    before = origin.identity()["training"]
    assert before["drawing"]["dtype"] == "bfloat16"
    origin.retraining.drawing = replace(origin.retraining.drawing, dtype="float32")
    assert not torch.equal(origin.draw(origin.load_model(), ids, CPU), pictures)
    assert origin.identity()["training"] != before


# slow: a training and an LDS; of pixels test_lds_run.py has it in the fast lane
@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")
def test_a_lora_of_ones_own(base, tmp_path):
    """From its training to losses of models trained again on halves of its captioned images."""
    pictures, lora = write_pictures(tmp_path / "pictures"), tmp_path / "lora"
    code, text = run(
        "", "--model", base, "--data", pictures, "--lora-rank", 2, "--steps", 3, "--batch-size", 2,
        "--learning-rate", 0.05, "--output", lora, "--device", "cpu", app=train_command.app,
    )  # fmt: skip
    assert code == 0, text
    AcceleratorState._reset_state(reset_partial_state=True)
    where = ("--run", lora, "--device", "cpu")
    sizes = ("--num-subsets", 4, "--num-generated", 2, "--num-inference-steps", 2)
    code, text = run("prepare", *where, *sizes)
    assert (code, "4 subsets of 2 of 5 images, 4 models to train, 3 steps" in text) == (0, True), (
        text
    )
    experiment = load_experiment(tmp_path / "lds-lora")
    own = load(base, lora)
    assert hash_lora(experiment.load_model().module) == hash_lora(own.module)
    code, text = run("train", *where)
    assert (code, "5 of 5 models are trained" in text) == (0, True), text
    drawn = (tmp_path / "lds-lora" / "generated" / "metadata.jsonl").read_text().splitlines()
    captions = list(dict.fromkeys(experiment.data.conditions))[:2]
    assert [json.loads(line)["text"] for line in drawn] == captions
    code, text = run("evaluate", *where, "--losses-only", *SMALL[:4])
    assert (code, "losses of 4 of 4 models are measured" in text) == (0, True), text
    # one of them by hand
    name, mask = experiment.names()[2], experiment.subsets[2]
    again = experiment.retraining.fresh(experiment.seeds[0], CPU)
    data = experiment.retraining._encoded().select(mask)
    recipe = replace(experiment.retraining.recipe, seed=experiment.seeds[0])
    expected = hash_lora(train_model(again, data, recipe).module)
    assert hash_lora(experiment.load_model(name).module) == expected


# slow: of pixels test_lds.py has it in the fast lane
@pytest.mark.full
def test_a_retrain_family_of_loras_its_ensemble_and_clip(folder, base, tmp_path, clip_folder):
    copy = shutil.copytree(folder, tmp_path / "run")
    code, text = lds_run("prepare", copy, "--model", base, "--num-retrain", 2)
    assert (code, "retrain family: 2 subsets more" in text) == (0, True), text
    code, text = lds_run("train", copy, "--family", "retrain")
    assert (code, "3 of 3 models are trained" in text) == (0, True), text
    code, text = lds_run("evaluate", copy, *SMALL, "--ensemble", 2, "--clip", clip_folder)
    assert (code, "retrain family: losses of 2 of 2 models are measured" in text) == (0, True), text
    names = {entry.method for entry in load_results(copy / "results.npz").entries}
    titles = ("single half-data model", "mean of 2 models")
    added = {f"{name}, {title}" for name in ("D-TRAK", "TRAK") for title in titles}
    assert added | {"CLIP, dot", "CLIP, cosine", "Empirical influence, cross-fitted"} < names
    # each of its own LoRA: the features are those of the model loaded by hand
    experiment = load_experiment(copy)
    settings = FeatureSettings("loss", (0, 500), 0, Projection("sjlt", K))
    train, found = experiment.retraining.samples("train", experiment.data, CPU), []
    for name in experiment.names(family="retrain"):
        place = copy / "features" / f"loss-sjlt-2-{name}" / "train"
        kept = FeatureStore(place, json.loads((place / "manifest.json").read_text())).load()
        extractor = FusedExtractor(experiment.load_model(name), settings, CPU)
        ids = [f"train/{image}" for image in train.ids]
        found.append(extractor.extract(train.batch(slice(None)), ids, train.conditions))
        assert relative_error(kept, found[-1]) < 1e-4
    assert relative_error(found[0], found[1]) > 1e-3
