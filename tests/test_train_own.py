"""Training what is no preset's: an adapter, and a model of one's own from its configuration."""

import json
import shutil
import warnings
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from claims import check_training_alone
from diffusers import DDPMScheduler, StableDiffusionPipeline
from tiny import tiny_model
from tiny_stable_diffusion import build_pipeline, build_unet, write_pictures
from typer.testing import CliRunner

from dtrak.cli.train import app
from dtrak.data.images import encode_png, load_data, to_uint8
from dtrak.evaluation.subject import find_trained
from dtrak.models import load
from dtrak.models.hashing import hash_model
from dtrak.models.lora import LoraError, hash_lora
from dtrak.training.data import DataSource
from dtrak.training.options import OWN_RECIPE, Options, plan_training
from dtrak.training.record import read_training
from dtrak.training.trainer import Trainer, train

pytestmark = pytest.mark.filterwarnings("ignore:.*captions have more than 16 tokens.*")


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def run(folder, pictures, tmp_path):
    def run(*arguments, model=folder, data=pictures, output=tmp_path / "lora"):
        fixed = ["--output", str(output), "--device", "cpu", "--steps", "4"]
        fixed += [] if model is None else ["--model", str(model), "--lora-rank", "2"]
        fixed += [] if data is None else ["--data", str(data)]
        # it remembers the precision of the first run of a process
        AcceleratorState._reset_state(reset_partial_state=True)
        command = [*fixed, "--batch-size", "3", *map(str, arguments)]
        result = CliRunner().invoke(app, command)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, " ".join(result.output.split())

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_writes_a_lora_that_diffusers_and_dtrak_read(run, folder, tmp_path):
    code, output = run("--keep-checkpoints", "2")
    assert code == 0, output
    # 16 attention layers of this base, two factors of rank 2
    assert "5 images, 1,312 parameters, 4 steps of 3 on 1 x cpu" in output
    model = load(folder, tmp_path / "lora")
    record = json.loads((tmp_path / "lora" / "training.json").read_text())
    assert record["facts"]["trained weights"] == hash_lora(model.module)
    assert record["settings"]["recipe"]["learning_rate"] == 3e-4
    assert record["settings"]["model"]["model"] == model.identity()["model"]
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(tmp_path / "lora")
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 16, 12)
    with torch.no_grad():
        assert torch.equal(pipeline.unet(*arguments).sample, model.module(*arguments).sample)
    half, last = (
        hash_lora(load(folder, tmp_path / "lora" / f"checkpoint-{step}").module) for step in (2, 4)
    )
    assert last == hash_lora(model.module) != half
    assert not (tmp_path / "lora" / "training.pt").exists()
    code, output = run("--keep-checkpoints", "2")
    assert (code, "already trained" in output) == (0, True)


def test_a_whole_pipeline_goes_on(run, folder, tmp_path):
    code, output = run("--model", folder, model=None, output=tmp_path / "whole")
    assert code == 0, output
    before, after = load(folder).identity(), load(tmp_path / "whole").identity()
    assert [name for name in before if before[name] != after[name]] == ["model"]
    record = read_training(tmp_path / "whole" / "training.json")
    assert (record.start.model, record.start.rank) == (str(folder), None)


def test_an_adapter_of_the_moving_average(run, folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    build_unet().save_pretrained(base / "unet_ema")
    code, output = run("--weights", "ema", model=base)
    assert code == 0, output
    average = load(base, weights="ema").identity()["model"]
    # what it was trained on is what it is read with
    assert load(base, tmp_path / "lora").identity()["model"] == average
    assert find_trained(tmp_path / "lora").load().identity()["model"] == average
    with pytest.raises(LoraError, match="says was trained on another"):
        load(base, tmp_path / "lora", weights="trained")
    code, output = run("--weights", "ema", "--config", folder / "unet" / "config.json", model=None)
    assert (code, "--weights must go with --model, got ema alone" in output) == (2, True)


def test_captions_that_are_cut_are_told_once(run):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, output = run("--caption", "a painting of more letters than the model reads")
    assert code == 0, output
    assert output.count("captions have more than 16 tokens and are cut: 5 of 5;") == 1


# test_lora_training.py has it without the command
@pytest.mark.full
def test_an_interrupted_training_resumes_with_the_same_bits(run, folder, tmp_path, monkeypatch):
    assert run(output=tmp_path / "whole")[0] == 0
    take_step = Trainer.take_step

    def interrupt(self, data, step, steps):
        if step == 3:
            raise KeyboardInterrupt
        take_step(self, data, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", interrupt)
        code, output = run("--checkpoint-every", "2")
    assert code == 130
    assert "interrupted: run the same command again" in output
    assert (tmp_path / "lora" / "training.pt").is_file()
    # the latents are kept: the VAE is not asked again
    with monkeypatch.context() as patch:
        patch.setattr("dtrak.models.stable_diffusion.StableDiffusion.posterior", None)
        assert run("--checkpoint-every", "2")[0] == 0
    hashes = {hash_lora(load(folder, tmp_path / name).module) for name in ("whole", "lora")}
    assert len(hashes) == 1


def test_without_some_images_and_shared_latents(run, pictures, tmp_path, monkeypatch):
    shared = ["--latents", tmp_path / "latents"]
    assert run(*shared, output=tmp_path / "whole")[0] == 0
    (tmp_path / "ids.txt").write_text("baroque/feast.png\n")
    monkeypatch.setattr("dtrak.models.stable_diffusion.StableDiffusion.posterior", None)
    code, output = run(*shared, "--without", tmp_path / "ids.txt")
    assert code == 0, output
    assert "4 images" in output
    settings = json.loads((tmp_path / "lora" / "training.json").read_text())["settings"]
    assert settings["data"]["without"] == ["baroque/feast.png"]
    assert settings["data"]["rows"] == 4
    (tmp_path / "ids.txt").write_text("nothing.png\n")
    failing(run, "got 1 others, such as 'nothing.png'", "--without", tmp_path / "ids.txt")
    (tmp_path / "ids.txt").write_text("\n".join(load_data(pictures).ids))
    failing(run, "must leave at least one image", "--without", tmp_path / "ids.txt")


def failing(run, message, *arguments, **options):
    code, output = run(*arguments, **options)
    assert code == 2, output
    assert "error: " in output
    assert message in output, output


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--lora-rank", 0, "--lora-rank must be at least 1, got 0"),
        ("--steps", 0, "--steps must be at least 1, got 0"),
        ("--batch-size", 0, "--batch-size must be at least 1, got 0"),
        ("--checkpoint-every", 0, "--checkpoint-every must be at least 1, got 0"),
        ("--keep-checkpoints", -1, "--keep-checkpoints must be at least 0, got -1"),
        ("--learning-rate", 0, "--learning-rate must be positive, got 0"),
        ("--caption-dropout", 2, "--caption-dropout must be in [0, 1], got 2"),
        ("--seed", -1, "--seed must be in [0, 2**32), got -1"),
        ("--subset", -1, "--subset must be at least 0, got -1"),
        ("--subset", 1, "--subset needs --preset"),
        ("--epochs", 1, "--epochs and --steps exclude each other"),
        ("--mixed-precision", "fp15", "did you mean 'fp16'?"),
        ("--mixed-precision", "fp16", "--mixed-precision fp16 must run on a GPU, got the CPU"),
        ("--preset", "artbench", "did you mean 'artbench"),
        ("--preset", "cifar2", "--model is not for --preset cifar2, which trains a model of its"),
        ("--config", "x.json", "--config and --model exclude each other, got both"),
        ("--resolution", 24, "(--resize resizes and crops)"),
    ],
)
def test_bad_values_give_one_clear_line(option, value, message, run, monkeypatch):
    if option != "--resolution":
        monkeypatch.setattr(DataSource, "load", lambda *_, **__: pytest.fail("data was read"))
    failing(run, message, option, value)


def test_another_model_is_refused_before_the_data_is_read(run, tmp_path, monkeypatch):
    assert run()[0] == 0
    record = (tmp_path / "lora" / "training.json").read_bytes()
    other = build_pipeline(tmp_path / "other", seed=1)
    monkeypatch.setattr(DataSource, "load", lambda *_, **__: pytest.fail("data was read"))
    failing(run, "holds another run: model.model is", model=other)
    failing(run, "start.rank is 2 there and 3 here", "--lora-rank", 3)
    assert (tmp_path / "lora" / "training.json").read_bytes() == record


def test_one_command_at_a_time_trains(run, tmp_path):
    check_training_alone(run, failing, tmp_path / "lora")


def test_inputs_that_do_not_go_together(run, folder, pictures, tmp_path):
    failing(run, "--data and --config or --model must be given", model=None)
    failing(run, "--data and --config or --model must be given", data=None)
    bare = write_pictures(tmp_path / "bare", metadata=False)
    failing(run, "must have captions: metadata.jsonl", data=bare)
    code, output = run("--caption", "a {label} painting", data=bare)
    assert code == 0, output
    failing(run, "holds another run: captions is", "--caption", "painting", data=bare)
    # the published data set is another one
    preset = ["--preset", "artbench2"]
    failing(run, "images", *preset, data=pictures, output=tmp_path / "preset")
    failing(run, "is the preset's own", *preset, "--caption", "x", output=tmp_path / "preset")


def test_the_recipe_is_the_published_one():
    own = {"model": "somewhere", "lora_rank": 2, "data": "pictures"}
    for options in (own, {"preset": "artbench2"}, {"preset": "artbench5"}):
        recipe = plan_training(Options("x", **options)).recipe
        assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (100, 64, 3e-4)
        assert (recipe.betas, recipe.weight_decay, recipe.max_grad_norm) == ((0.9, 0.999), 1e-6, 1)
        assert (recipe.dropout, recipe.flip, recipe.seed) == (0.1, True, 42)
        assert recipe.caption_dropout == 0.1
        # 79 steps an epoch of 5,000 images, the last batch short
        assert recipe.num_steps(5000) == 7900
    assert plan_training(Options("x", preset="artbench2", subset=3)).recipe.seed == 0


CONFIG = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8],
    "layers_per_block": 1, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4, "add_attention": False, "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip


@pytest.fixture
def own(tmp_path):
    """A configuration, and ten labelled digits in a parquet file."""
    (tmp_path / "unet.json").write_text(json.dumps(CONFIG))
    digits = load_data("digits", limit=10)
    rows = [{"bytes": encode_png(to_uint8(image)), "path": None} for image in digits.images]
    labels = [label % 3 for label in digits.labels]
    pq.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "digits.parquet")
    return tmp_path


def run_own(own, *arguments, start=("--config", "unet.json")):
    start = [start[0], own / start[1]]
    fixed = ["--data", own / "digits.parquet", *start, "--output", own / "run", "--device", "cpu"]
    AcceleratorState._reset_state(reset_partial_state=True)
    result = CliRunner().invoke(app, [*map(str, fixed), *map(str, arguments)])
    AcceleratorState._reset_state(reset_partial_state=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_a_model_from_its_configuration(own):
    options = ["--steps", 3, "--batch-size", 4, "--learning-rate", 1e-3, "--schedule", "constant",
               "--flip", "--seed", 7]  # fmt: skip
    code, text = run_own(own, *options)
    assert code == 0, text
    recipe = replace(
        OWN_RECIPE, steps=3, epochs=None, batch_size=4, learning_rate=1e-3, schedule="constant",
        flip=True, seed=7,
    )  # fmt: skip
    data = load_data(own / "digits.parquet", channels=1, size=8)
    expected = train(tiny_model(7), data, recipe)
    assert hash_model(load(own / "run").module) == hash_model(expected.module)
    # from the record it can be trained again, wherever one stands
    record = read_training(own / "run" / "training.json")
    assert (record.recipe, record.rows, record.fingerprint) == (recipe, 10, data.fingerprint)
    again = record.start.make(record.recipe.seed)
    found = record.data.load(again)
    assert found.fingerprint == data.fingerprint
    assert hash_model(train(again, found, record.recipe).module) == hash_model(expected.module)
    # and gone on from
    code, text = run_own(own, *options, "--output", own / "more", start=("--model", "run"))
    assert code == 0, text
    more = train(load(own / "run"), data, recipe)
    assert hash_model(load(own / "more").module) == hash_model(more.module)
    assert read_training(own / "more" / "training.json").start.model == str(own / "run")


def test_a_model_of_classes_and_its_noise_schedule(own):
    (own / "unet.json").write_text(json.dumps(CONFIG | {"num_class_embeds": 3}))
    schedule = {"_class_name": "DDPMScheduler", "beta_start": 1e-3, "beta_end": 0.03}
    (own / "scheduler_config.json").write_text(json.dumps(schedule))
    code, text = run_own(own, "--steps", 2, "--batch-size", 4)
    assert code == 0, text
    model = load(own / "run")
    assert (model.reads, model.process.scheduler.config["beta_end"]) == ("labels", 0.03)
    data = load_data(own / "digits.parquet", channels=1, size=8)
    start = tiny_model(0, DDPMScheduler(beta_start=1e-3, beta_end=0.03), num_class_embeds=3)
    recipe = replace(OWN_RECIPE, steps=2, epochs=None, batch_size=4)
    expected = train(start, data.conditioned(data.labels), recipe)
    assert hash_model(model.module) == hash_model(expected.module)


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"_class_name": "DiT"}', "must describe one of UNet2DModel, got 'DiT'"),
        ("[]", "must be a JSON object, got a list"),
        ('{"sample_sise": 8}', "no U-Net can be made from the configuration: UNet2DModel"),
        ('{"in_channels": 1, "out_channels": 2}', "must have as many out_channels as in_channels"),
        (json.dumps(CONFIG | {"num_class_embeds": 2}), "must be in [0, 2), the classes of the mod"),
        (json.dumps(CONFIG | {"sample_size": 12}), "(--resize resizes and crops)"),
    ],
)
def test_configurations_that_cannot_be_used(own, config, message):
    (own / "unet.json").write_text(config)
    code, text = run_own(own, "--steps", 2)
    assert (code, message in text) == (2, True), text
    assert not (own / "run").exists()
    code, text = run_own(own, start=("--config", "nothing.json"))
    assert (code, "--config must be a file with a configuration" in text) == (2, True), text
