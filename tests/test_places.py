"""Models as people have them: parts of pipelines, checkpoints of trainings, files of weights."""

import json
import shutil
import warnings
from collections import OrderedDict

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file
from tiny import tiny_unet
from tiny_stable_diffusion import build_pipeline

import dtrak
from dtrak.models import ModelError, load
from dtrak.models.hashing import hash_model

VELOCITY = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def silent(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(name, **options)


def predicts(model):
    return model.process.scheduler.config["prediction_type"]


def write_pipeline(folder, seed=0, **schedule):
    pipeline = DDPMPipeline(tiny_unet(seed), DDPMScheduler(**{**VELOCITY, **schedule}))
    pipeline.save_pretrained(folder)
    return folder


def write_checkpoint(folder):
    """As the training scripts of Diffusers do: weights, their average, what accelerate keeps."""
    tiny_unet(1).save_pretrained(folder / "unet")
    average = EMAModel(
        tiny_unet(2).parameters(), model_cls=UNet2DModel, model_config=tiny_unet().config
    )
    average.save_pretrained(folder / "unet_ema")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"")
    return folder


def is_from(model, seed):
    return hash_model(model.module) == hash_model(tiny_unet(seed))


def rewrite(file, **changes):
    config = json.loads(file.read_text())
    for name, value in changes.items():
        if value is None:
            config.pop(name, None)
        else:
            config[name] = value
    file.write_text(json.dumps(config))


def test_a_part_of_a_pipeline_is_read_with_its_schedule(tmp_path):
    pipeline = write_pipeline(tmp_path / "pipe")
    assert predicts(silent(pipeline)) == "v_prediction"
    with pytest.warns(UserWarning, match="is a part of the pipeline"):
        model = load(pipeline / "unet")
    assert predicts(model) == "v_prediction"
    assert is_from(model, 0)


def test_a_bare_network_says_that_its_schedule_is_a_guess(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    with pytest.warns(UserWarning, match="is a guess"):
        assert predicts(load(tmp_path / "unet")) == "epsilon"
    DDPMScheduler(**VELOCITY).save_pretrained(tmp_path / "scheduler")
    with pytest.warns(UserWarning, match=r"scheduler_config\.json"):
        assert predicts(load(tmp_path / "unet")) == "v_prediction"
    # its own is as good as said, and the folder's may not contradict it
    DDPMScheduler(**VELOCITY).save_pretrained(tmp_path / "unet")
    assert predicts(silent(tmp_path / "unet")) == "v_prediction"
    DDPMScheduler().save_pretrained(tmp_path / "unet")
    with pytest.raises(
        ModelError, match=r"must say the same of the noise schedule.*prediction_type"
    ):
        load(tmp_path / "unet")


def test_checkpoints_of_a_training(tmp_path):
    write_checkpoint(tmp_path / "out" / "checkpoint-500")
    DDPMScheduler(**VELOCITY).save_pretrained(tmp_path / "out" / "scheduler")
    with pytest.warns(UserWarning, match="--weights ema takes the moving average"):
        model = load(tmp_path / "out" / "checkpoint-500")
    assert is_from(model, 1)
    assert predicts(model) == "v_prediction"
    for place in ("checkpoint-500", "checkpoint-500/unet", "checkpoint-500/unet_ema"):
        with pytest.warns(UserWarning, match="noise schedule of"):
            model = load(tmp_path / "out" / place, weights="ema")
        assert is_from(model, 2)
        assert predicts(model) == "v_prediction"
    assert is_from(load(tmp_path / "out/checkpoint-500/unet_ema"), 2)
    assert is_from(load(tmp_path / "out/checkpoint-500/unet_ema", weights="trained"), 1)
    with pytest.raises(ModelError, match=r"name one of its checkpoints.*checkpoint-500"):
        load(tmp_path / "out")
    # the finished training beside it: the pipeline's other parts go with the checkpoint's weights
    write_pipeline(tmp_path / "out", 3)
    with pytest.warns(UserWarning, match="all else of the model is read from"):
        model = load(tmp_path / "out" / "checkpoint-500", weights="trained")
    assert is_from(model, 1)
    assert predicts(model) == "v_prediction"


def test_weights_that_are_not_there(tmp_path):
    pipeline = write_pipeline(tmp_path / "pipe")
    with pytest.raises(ModelError, match="--weights ema must be of a model with a moving average"):
        load(pipeline, weights="ema")
    with pytest.raises(ValueError, match=r"--weights must be one of trained, ema, got 'emma'; did"):
        load(pipeline, weights="emma")
    assert is_from(silent(pipeline, weights="trained"), 0)
    tiny_unet(2).save_pretrained(pipeline / "unet_ema")
    assert is_from(silent(pipeline, weights="ema"), 2)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".safetensors"])
def test_files_of_weights(tmp_path, suffix):
    write_pipeline(tmp_path / "pipe")
    trained, average = tiny_unet(1).state_dict(), tiny_unet(2).state_dict()
    file = tmp_path / "pipe" / f"last{suffix}"
    if suffix == ".safetensors":
        flat = {f"model.unet.{k}": v for k, v in trained.items()}
        save_file({**flat, **{f"ema_unet.{k}": v.clone() for k, v in average.items()}}, file)
    elif suffix == ".ckpt":
        torch.save({"state_dict": trained, "ema": average, "step": 7, "lr": [0.1]}, file)
    else:
        shadow = EMAModel(tiny_unet(2).parameters()).state_dict()
        torch.save({"model": OrderedDict(trained), "ema_model": shadow, "epoch": 3}, file)
    with pytest.warns(UserWarning, match="it holds a moving average too"):
        model = load(file)
    assert is_from(model, 1)
    assert predicts(model) == "v_prediction"
    assert is_from(load(file, weights="ema"), 2)
    assert is_from(load(file, weights="trained"), 1)


def test_an_average_beside_what_it_averages(tmp_path):
    tiny_unet().save_config(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    state = {"ema": {"initted": torch.tensor(True), "step": torch.tensor(3)}}
    for seed, name in ((1, "online_model"), (2, "ema_model")):
        state["ema"] |= {f"{name}.{k}": v for k, v in tiny_unet(seed).state_dict().items()}
    torch.save({**state, "model": tiny_unet(1).state_dict()}, tmp_path / "last.pt")
    assert is_from(load(tmp_path / "last.pt", weights="ema"), 2)
    assert is_from(load(tmp_path / "last.pt", weights="trained"), 1)


def test_files_of_weights_that_are_refused(tmp_path):
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": tiny_unet().state_dict()}, file)
    with pytest.raises(ModelError, match=r"must have the config\.json of its network beside it"):
        load(file)
    tiny_unet().save_config(tmp_path)
    with pytest.raises(ModelError, match="must hold a moving average of the network once, got 0"):
        load(file, weights="ema")
    torch.save({"a": tiny_unet().state_dict(), "b": tiny_unet(1).state_dict()}, file)
    with pytest.raises(ModelError, match=r"once, got 2 .*'a\.', 'b\.'"):
        load(file)
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"CompVis.*from_single_file"):
        load(file)
    torch.save({"state_dict": tiny_unet(block_out_channels=(16,)).state_dict()}, file)
    with pytest.raises(ModelError, match=r"does not match its configuration: .* should be"):
        load(file)
    less = tiny_unet().state_dict()
    less.pop("conv_out.bias")
    torch.save(less, file)
    with pytest.raises(ModelError, match=r"conv_out\.bias is missing"):
        load(file)
    torch.save({**tiny_unet().state_dict(), "conv_out.scale": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"conv_out\.scale is unknown"):
        load(file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="must hold weights, got an unreadable file"):
        load(file)


class Trap:
    """Runs code where a pickle is read by Python's own machine."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    tiny_unet().save_config(tmp_path)
    state = {"state_dict": tiny_unet().state_dict(), "hyper": Trap(tmp_path / "ran")}
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(ModelError, match="Python objects beside weights, which could run code"):
        load(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_folder_with_weights_of_another_name(tmp_path):
    tiny_unet().save_config(tmp_path)
    (tmp_path / "optimizer.bin").write_bytes(b"")
    save_file(tiny_unet(1).state_dict(), tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="is a guess"):
        assert is_from(load(tmp_path), 1)
    save_file(tiny_unet(1).state_dict(), tmp_path / "best.safetensors")
    with pytest.raises(ModelError, match=r"got best\.safetensors, model\.safetensors: name one"):
        load(tmp_path)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_folder_with_one_variant_of_the_weights(tmp_path, variant):
    pipeline = DDPMPipeline(tiny_unet(1), DDPMScheduler())
    pipeline.save_pretrained(tmp_path, variant=variant)
    assert is_from(silent(tmp_path), 1)
    shutil.copy(
        tmp_path / f"unet/diffusion_pytorch_model.{variant}.safetensors",
        tmp_path / "unet/diffusion_pytorch_model.other.safetensors",
    )
    with pytest.raises(ModelError, match=r"one variant of the weights, got .*: keep one"):
        load(tmp_path)


def test_a_network_of_latents_is_not_given_pixels(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "vqvae/config.json").write_text('{"_class_name": "VQModel"}')
    for place in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ModelError, match=r"\(vqvae\), which says that it sees no pixels"):
            load(place)
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    for place in (tmp_path, tmp_path / "unet"):
        with pytest.raises(ModelError, match=r"LDMPipeline.*latents of a VQ autoencoder"):
            load(place)
    for kind in ("DDPMPipeline", "DDIMPipeline"):
        rewrite(tmp_path / "model_index.json", _class_name=kind)
        with pytest.raises(ModelError, match=r"must name a U-Net of pixels .* got vqvae beside"):
            load(tmp_path)
    rewrite(tmp_path / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    with pytest.raises(ModelError, match=r"got \['pipeline', 'MyPipeline'\]"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["unet", "scheduler"])
def test_an_index_that_contradicts_its_files(tmp_path, name):
    write_pipeline(tmp_path)
    other = {"unet": "UNet2DConditionModel", "scheduler": "FlowMatchEulerDiscreteScheduler"}[name]
    rewrite(tmp_path / "model_index.json", **{name: ["diffusers", other]})
    with pytest.raises(ModelError, match=f"names a {other} as its {name}, but .* a "):
        load(tmp_path)
    rewrite(tmp_path / "model_index.json", unet=["diffusers", "UNet2DModel"])
    rewrite(tmp_path / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    assert predicts(silent(tmp_path)) == "v_prediction"


def test_what_a_schedule_predicts(tmp_path):
    pipeline = write_pipeline(tmp_path)
    file = pipeline / "scheduler" / "scheduler_config.json"
    rewrite(file, prediction_type=None, predict_epsilon=False)
    assert predicts(silent(pipeline)) == "sample"
    rewrite(file, predict_epsilon=True)
    assert predicts(silent(pipeline)) == "epsilon"
    for found in ("v_prediction", "sample"):
        rewrite(file, prediction_type=found)
        with pytest.raises(ModelError, match="must say once what the network predicts"):
            load(pipeline)
    rewrite(file, prediction_type="flow_prediction", predict_epsilon=None)
    with pytest.raises(ModelError, match="must be one of epsilon, sample, v_prediction, got 'flow"):
        load(pipeline)


def test_checkpoints_of_a_pipeline_of_latents(tmp_path):
    base = build_pipeline(tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        for parameter in pipeline.unet.parameters():
            parameter.mul_(1.5)
    expected = hash_model(pipeline.unet)
    # alone, it says nothing of its VAE
    pipeline.unet.save_pretrained(tmp_path / "alone" / "unet")
    with pytest.raises(ModelError, match="got 'UNet2DConditionModel', whose pipeline is not there"):
        load(tmp_path / "alone")
    pipeline.unet.save_pretrained(base / "checkpoint-3" / "unet")
    with pytest.warns(UserWarning, match="all else of the model is read from"):
        model = load(base / "checkpoint-3")
    assert hash_model(model.module) == expected
    pipeline.unet.save_pretrained(base / "unet_ema")
    assert hash_model(load(base, weights="ema").module) == expected
    with pytest.warns(UserWarning, match="--weights ema takes the moving average"):
        assert hash_model(load(base).module) != expected
    # a network of another kind in the pipeline's folder
    tiny_unet().save_pretrained(base / "checkpoint-4" / "unet")
    with pytest.raises(ModelError, match="UNet2DModel"):
        load(base / "checkpoint-4")


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    for place in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        with pytest.raises(ModelError, match="give it as --lora, and its base as --model"):
            load(place)


def test_home_is_where_models_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_pipeline(tmp_path / "pipe")
    assert is_from(silent("~/pipe"), 0)
    with pytest.raises(ValueError, match="must be of a user's home folder, got '~nobody-here/x'"):
        load("~nobody-here/x")


def test_frozen_parameters_are_not_attributed(tmp_path):
    unet = tiny_unet(time_embedding_type="fourier")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    names = [n for n, p in unet.named_parameters() if p.requires_grad]
    assert len(names) < len(list(unet.parameters()))
    assert load(tmp_path).parameters() == names
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.startswith("up_blocks"))
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    found = dtrak.models.wrap(pipeline).parameters()
    assert found
    assert all(name.startswith("up_blocks") for name in found)
    # features of other parameters of the same network are not used again
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    how = {"store": tmp_path / "store", "timesteps": [100, 500], "proj_dim": 256, "progress": False}
    how["whiten"] = "none"
    one = dtrak.explain(pipeline, images, images, **how).scores
    assert torch.equal(one, dtrak.explain(pipeline, images, images, **how).scores)
    unet.mid_block.requires_grad_(True)
    with pytest.raises(ValueError, match="features made with other settings: parameters is"):
        dtrak.explain(pipeline, images, images, **how)
    unet.requires_grad_(False)
    with pytest.raises(ModelError, match="must have parameters that require gradients"):
        dtrak.models.wrap(pipeline)


def test_frozen_parameters_of_pipelines_are_not_attributed(tmp_path):
    base = build_pipeline(tmp_path / "base")
    pipeline = DiffusionPipeline.from_pretrained(base)
    for name, parameter in pipeline.unet.named_parameters():
        parameter.requires_grad_("attn2" in name)
    found = dtrak.models.wrap(pipeline).parameters()
    assert found
    assert all("attn2" in name for name in found)
    assert len(load(base).parameters()) == len(list(pipeline.unet.parameters()))
