import hashlib
import json
import logging
import struct
import warnings

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from numerics import relative_error
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_unet
from torch import nn

from dtrak.models import load
from dtrak.models.denoiser import ModelError
from dtrak.models.hashing import hash_model, hash_tensors
from dtrak.models.process import DiscreteProcess
from dtrak.models.unet import UNet, digits_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def remarks():
    """What Diffusers logs; any Python warning fails the test."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield records
    logger.removeHandler(handler)


@pytest.fixture
def bare(tmp_path):
    """The folder of a bare U-Net."""
    tiny_unet().save_pretrained(tmp_path / "unet only")
    DDPMScheduler().save_pretrained(tmp_path / "unet only")
    return tmp_path / "unet only"


def edit_json(file, **changes):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))


def edit_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def same_model(a, b):
    return hash_model(a.module) == hash_model(b.module) and torch.equal(
        a.process.scheduler.betas, b.process.scheduler.betas
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_saved_model_comes_back(tmp_path, remarks, capfd, prediction_type):
    scheduler = DDPMScheduler(
        num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )
    model = tiny_model(3, scheduler, in_channels=2, out_channels=2, sample_size=(4, 8))
    model.save(tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    assert same_model(loaded, model)
    assert loaded.process.scheduler.config["prediction_type"] == prediction_type
    assert (loaded.channels, loaded.size, loaded.process.num_timesteps) == (2, (4, 8), 40)
    assert not loaded.module.training
    images, timesteps = torch.randn(3, 2, 4, 8), torch.tensor([0, 7, 39])
    with torch.no_grad():
        ours = loaded.module(images, timesteps).sample
        assert torch.equal(ours, model.module(images, timesteps).sample)
    assert remarks == []
    assert capfd.readouterr() == ("", "")


def test_diffusers_reads_what_is_saved(tmp_path):
    model = tiny_model()
    model.save(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert hash_model(pipeline.unet) == hash_model(model.module)


def test_bare_unet_gets_the_linear_schedule(bare, remarks):
    (bare / "scheduler_config.json").unlink()
    with pytest.warns(UserWarning, match="DDPM is a guess"):
        model = load(bare)
    assert hash_model(model.module) == hash_model(tiny_unet())
    oracle = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert relative_error(model.process.scheduler.betas, oracle) < 1e-6
    assert model.process.scheduler.config["prediction_type"] == "epsilon"
    assert (model.channels, model.size, model.process.num_timesteps) == (1, 8, 1000)
    assert remarks == []


def test_schedule_beside_a_bare_unet_is_used(bare, remarks):
    DDPMScheduler(num_train_timesteps=30).save_pretrained(bare)
    assert load(bare).process.num_timesteps == 30
    assert remarks == []


def test_older_pipeline_with_all_files_in_one_folder(bare):
    DDPMScheduler(num_train_timesteps=30).save_pretrained(bare)
    (bare / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    assert load(bare).process.num_timesteps == 30


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_training_schedule_is_taken_from_any_scheduler(tmp_path, remarks, name):
    tiny_model().save(tmp_path)
    options = {"num_train_timesteps": 20, "beta_start": 0.01, "prediction_type": "v_prediction"}
    getattr(diffusers, name)(**options).save_pretrained(tmp_path / "scheduler")
    scheduler = load(tmp_path).process.scheduler
    assert type(scheduler) is DDPMScheduler
    assert torch.equal(scheduler.betas, DDIMScheduler(**options).betas)
    assert scheduler.config["prediction_type"] == "v_prediction"
    assert remarks == []


def test_half_precision_checkpoint_is_loaded_as_float32(bare):
    edit_weights(bare, lambda state: state.update({k: v.half() for k, v in state.items()}))
    model = load(bare)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    expected = {k: v.half().float() for k, v in tiny_unet().state_dict().items()}
    assert hash_model(model.module) == hash_tensors(expected)


def test_pickled_weights_are_loaded_without_a_word(bare, remarks):
    torch.save(load_file(bare / WEIGHTS), bare / "diffusion_pytorch_model.bin")
    (bare / WEIGHTS).unlink()
    assert hash_model(load(bare).module) == hash_model(tiny_unet())
    assert remarks == []


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder that Diffusers wrote.*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"must be a folder that Diffusers wrote.*file"):
        load(tmp_path / "file")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"must be a folder with config.json of a UNet2DModel"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"model_index.json must describe a pipeline .* DDPM.*, got None"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DModel, got 'UNet2DConditionModel'"),
        ({"_class_name": "absent"}, "must describe a UNet2DModel, got None"),
        ({"num_class_embeds": 10}, "class_embedding.weight is missing"),
        (
            {"class_embed_type": "timestep"},
            "not at all, got class_embed_type 'timestep'",
        ),
        ({"out_channels": 2}, "as many out_channels as in_channels, got 2 and 1"),
        ({"down_block_types": ["Nope"]}, "could not be loaded: Nope does not exist"),
        ({"block_out_channels": "x"}, "could not be loaded: "),
    ],
)
def test_unsuitable_configuration(bare, changes, message):
    edit_json(bare / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load(bare)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{not json", r"config.json must be JSON, got Expecting property name"),
        ("[1]", r"config.json must be a JSON object, got a list"),
        (b"\xff\xfe", r"config.json must be JSON, got 'utf-8' codec"),
    ],
)
def test_configuration_that_is_not_json(bare, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (bare / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(bare)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("conv_in.bias"), "conv_in.bias is missing$"),
        (lambda s: s.update({"extra.bias": torch.zeros(2)}), "extra.bias is unknown$"),
        (
            lambda s: s.update({"conv_in.bias": torch.zeros(3)}),
            r"conv_in.bias is \[3\] and should be \[8\]$",
        ),
        (
            lambda s: s.update({"conv_inn.bias": s.pop("conv_in.bias")}),
            "conv_in.bias is missing; conv_inn.bias is unknown$",
        ),
        (
            lambda s: (
                [s.pop(f"conv_{x}.{y}") for x in ("in", "out") for y in ("bias", "weight")]
                + [s.update({"z": torch.zeros(1), "conv_norm_out.bias": torch.zeros(3, 2)})]
            ),
            "conv_in.bias is missing; conv_in.weight is missing; conv_out.bias is missing; "
            "conv_out.weight is missing; and 2 more$",
        ),
    ],
)
def test_every_misfit_of_a_checkpoint_is_named(bare, remarks, change, message):
    edit_weights(bare, change)
    with pytest.raises(ModelError, match="does not match its configuration: " + message):
        load(bare)
    # the error says it all; "you should probably TRAIN this model" would only frighten
    assert remarks == []


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1000], lambda b: b[:50], lambda b: b"", lambda b: b"no weights"]
)
def test_damaged_weights(bare, remarks, damage):
    file = bare / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelError, match=f"could not be loaded: .*{WEIGHTS}"):
        load(bare)
    assert remarks == []


def test_missing_weights(bare, remarks):
    (bare / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"could not be loaded: Error no file named"):
        load(bare)
    assert remarks == []


def test_weights_that_are_not_floating_point(bare):
    edit_weights(bare, lambda s: s.update({"conv_in.bias": torch.zeros(8, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=r"could not be loaded: .*conv_in.bias"):
        load(bare)


def test_pipeline_without_its_schedule(tmp_path):
    tiny_model().save(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"must hold scheduler.scheduler_config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "must be JSON"),
        ('{"_class_name": "EDMEulerScheduler"}', "got 'EDMEulerScheduler'"),
        ('{"beta_start": 0.1, "beta_schedule": "steep"}', "could not be used: steep is not"),
    ],
)
def test_unsuitable_schedule(tmp_path, content, message):
    tiny_model().save(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_loader_remarks_are_heard_again_afterwards(bare):
    logger = logging.getLogger("diffusers.models.modeling_utils")
    before = logger.level
    load(bare)
    (bare / WEIGHTS).unlink()
    with pytest.raises(ModelError):
        load(bare)
    assert logger.level == before


def test_digits_model():
    model = digits_model()
    assert sum(p.numel() for p in model.module.parameters()) == 186_081
    attention = [b.attentions for b in model.module.down_blocks if hasattr(b, "attentions")]
    assert len(attention) == 1
    assert len([b for b in model.module.up_blocks if hasattr(b, "attentions")]) == 1
    assert model.module.mid_block.attentions[0] is None
    assert (model.channels, model.size, model.process.num_timesteps) == (1, 8, 1000)
    with torch.no_grad():
        assert model.module(torch.zeros(2, 1, 8, 8), 5).sample.shape == (2, 1, 8, 8)


def test_attention_of_the_digits_model_is_at_one_resolution():
    sizes = set()

    def note(module, args, kwargs, output):
        sizes.add(tuple(output.shape[-2:]))

    model = digits_model()
    attentions = [m for m in model.module.modules() if type(m).__name__ == "Attention"]
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in attentions]
    with torch.no_grad():
        model.module(torch.zeros(1, 1, 8, 8), 5)
    for handle in handles:
        handle.remove()
    assert len(attentions) == 3
    assert sizes == {(4, 4)}


def test_digits_model_is_a_function_of_its_seed():
    torch.manual_seed(1)
    first, state = digits_model(), torch.get_rng_state()
    torch.manual_seed(2)
    assert hash_model(digits_model().module) == hash_model(first.module)
    assert hash_model(digits_model(1).module) != hash_model(first.module)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0, 4))
        self.register_buffer("narrow", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))


def flip_bit(module, name, element, bit):
    tensor = module.state_dict()[name]
    raw = tensor.reshape(-1).view(torch.uint8)
    raw[element * tensor.element_size() + bit // 8] ^= 1 << (bit % 8)


def rename(module):
    module.register_buffer("flagz", module.flags)
    del module.flags


@pytest.mark.parametrize(
    "change",
    [
        lambda m: flip_bit(m, "weight", 0, 0),
        lambda m: flip_bit(m, "weight", 5, 31),
        lambda m: flip_bit(m, "count", 0, 63),
        lambda m: flip_bit(m, "narrow", 1, 0),
        lambda m: m.flags.logical_not_(),
        rename,
        lambda m: m.register_buffer("more", torch.zeros(0)),
        lambda m: m.register_buffer("count", m.count.int()),
        lambda m: m.register_buffer("nothing", torch.zeros(4, 0)),
        lambda m: m.register_buffer("nothing", torch.zeros(0, 4, dtype=torch.int8)),
        lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().reshape(3, 2))),
        # the same bytes under another dtype
        lambda m: m.register_buffer("narrow", m.narrow.view(torch.int16)),
    ],
)
def test_hash_changes_with(change):
    module = Parts()
    before = hash_model(module)
    change(module)
    assert hash_model(module) != before


def test_hash_does_not_change_with_strides_order_or_training_mode():
    module, other = Parts(), Parts()
    other.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).T.contiguous().T)
    flags = other.flags
    del other.flags
    other.register_buffer("flags", flags)
    other.eval()
    assert other.weight.stride() != module.weight.stride()
    assert hash_model(other) == hash_model(module)


def test_hash_is_what_stored_features_carry():
    digest = hashlib.sha256()
    for line, content in [
        (b"count torch.int64 []", struct.pack("<q", 3)),
        (b"flags torch.bool [2]", b"\x01\x00"),
        (b"narrow torch.bfloat16 [2]", struct.pack("<HH", 0x3F80, 0x4000)),
        (b"nothing torch.float32 [0, 4]", b""),
        (b"weight torch.float32 [2, 3]", struct.pack("<6f", *range(6))),
    ]:
        digest.update(line + b"\n" + content)
    assert hash_model(Parts()) == digest.hexdigest()


@pytest.mark.gpu
def test_hash_does_not_depend_on_the_device():
    assert hash_model(Parts().cuda()) == hash_model(Parts())


def test_sizes_in_every_spelling():
    assert tiny_model(sample_size=[4, 8]).size == (4, 8)
    assert tiny_model(sample_size=None).size is None
    assert (
        UNet(
            tiny_unet(), DiscreteProcess(DDPMScheduler(num_train_timesteps=7))
        ).process.num_timesteps
        == 7
    )
