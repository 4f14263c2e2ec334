"""Adapters: fresh, read from every format, refused where they do not fit."""

import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from numerics import relative_error
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import build_unet, load_tiny

from dtrak.models.lora import (
    LoraError,
    add_lora,
    hash_base,
    hash_lora,
    load_lora,
    lora_names,
    lora_weights,
    remove_lora,
    save_lora,
)

# unet/config.json of Stable Diffusion 1.x, as published
SD1_UNET = {
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "norm_num_groups": 32,
}
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture
def trained(folder):
    return load_tiny(folder)


@pytest.fixture
def saved(trained, tmp_path):
    save_lora(trained.module, tmp_path / "lora")
    return tmp_path / "lora"


def fresh_unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "unet").eval()


def arguments(count=2):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, 4, 8, 8, generator=generator),
        torch.tensor([7, 900][:count]),
        torch.randn(count, 16, 12, generator=generator),
    )


def run(unet):
    with torch.no_grad():
        return unet(*arguments()).sample


def test_published_count_from_the_configuration_alone():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD1_UNET)
    linear = sum(
        128 * (module.in_features + module.out_features)
        for name, module in unet.named_modules()
        if re.search(r"attn[12]\.(to_q|to_k|to_v|to_out\.0)$", name)
    )
    assert linear == 25_509_888
    with torch.device("meta"):
        add_lora(unet, 128)
    parameters = dict(unet.named_parameters())
    assert sum(parameters[name].numel() for name in lora_names(unet)) == 25_509_888
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 25_509_888
    # query, key, value and output of 32 attentions, two factors each
    assert len(lora_names(unet)) == 32 * 4 * 2
    assert {p.device.type for p in parameters.values()} == {"meta"}


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_its_seed(folder):
    unet = fresh_unet(folder)
    expected, state = run(unet), torch.get_rng_state()
    add_lora(unet, 64, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(run(unet), expected)
    weights = lora_weights(unet)
    a = torch.cat([w.flatten() for name, w in weights.items() if "lora_A" in name])
    assert all(not w.any() for name, w in weights.items() if "lora_B" in name)
    # N(0, 1/r²): of n draws the deviation is good to 1/sqrt(2n)
    assert abs(float(a.std()) * 64 - 1) < 4 * (2 * a.numel()) ** -0.5
    assert abs(float(a.mean())) * 64 < 4 * a.numel() ** -0.5
    again, other = fresh_unet(folder), fresh_unet(folder)
    add_lora(again, 64, seed=5)
    add_lora(other, 64, seed=6)
    assert hash_lora(again) == hash_lora(unet) != hash_lora(other)
    trainable = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trainable == lora_names(unet)


def test_computes_the_low_rank_product(trained, folder):
    """A plain U-Net whose weights are W + B A gives the same."""
    merged, weights = fresh_unet(folder), lora_weights(trained.module)
    for name, module in merged.named_modules():
        if f"{name}.lora_A.weight" in weights:
            a, b = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
            with torch.no_grad():
                module.weight += b @ a
    assert relative_error(run(trained.module), run(merged)) < 1e-6
    assert relative_error(run(trained.module), run(fresh_unet(folder))) > 1e-2


def test_diffusers_reads_what_is_saved(trained, saved, folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.load_lora_weights(saved)
    assert relative_error(run(pipeline.unet), run(trained.module)) < 1e-7


def rename(saved, change):
    """The same weights under other names."""
    weights = load_file(saved / FILE)
    save_file({change(name): tensor for name, tensor in weights.items()}, saved / FILE)


def processor_name(name):
    """Names of Diffusers before 0.20: of the attention processor, which owned the adapter."""
    name = re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?\.lora\.", r".processor.\1_lora.", name)
    assert ".processor." in name
    return name


FORMATS = {
    "diffusers": lambda name: name,
    "peft": lambda name: name.replace("lora.down", "lora_A").replace("lora.up", "lora_B"),
    "processors": processor_name,
    "published": lambda name: processor_name(name).removeprefix("unet."),
}


@pytest.mark.parametrize("form", FORMATS)
def test_reads_every_format(form, trained, saved, folder):
    rename(saved, FORMATS[form])
    for path in (saved, saved / FILE):
        unet = fresh_unet(folder)
        load_lora(unet, path)
        assert hash_lora(unet) == hash_lora(trained.module)
        assert torch.equal(run(unet), run(trained.module))
        trainable = [name for name, p in unet.named_parameters() if p.requires_grad]
        assert trainable == lora_names(unet) == lora_names(trained.module)


def test_reads_kohyas_scale(trained, saved, folder):
    """Kohya's files hold alpha: the product is scaled by alpha / r."""
    weights = load_file(saved / FILE)
    renamed = {}
    for name, tensor in weights.items():
        module, part = name.removeprefix("unet.").split(".lora.")
        stem = "lora_unet_" + module.replace(".", "_")
        renamed[f"{stem}.lora_{part}"] = tensor
        renamed[f"{stem}.alpha"] = torch.tensor(1.5)
    save_file(renamed, saved / FILE)
    unet = fresh_unet(folder)
    load_lora(unet, saved)
    assert hash_lora(unet) != hash_lora(trained.module)
    with torch.no_grad():
        for name, parameter in trained.module.named_parameters():
            if "lora_B" in name:
                parameter *= 1.5 / 3
    assert relative_error(run(unet), run(trained.module)) < 1e-6


def test_reads_a_pickle_without_running_it(trained, saved, folder):
    weights = {FORMATS["published"](name): t for name, t in load_file(saved / FILE).items()}
    (saved / FILE).unlink()
    torch.save(weights, saved / "pytorch_lora_weights.bin")
    unet = fresh_unet(folder)
    load_lora(unet, saved)
    assert hash_lora(unet) == hash_lora(trained.module)
    torch.save({"unet.lora": pytest.fail}, saved / "pytorch_lora_weights.bin")
    with pytest.raises(LoraError, match=r"\.bin must hold LoRA weights, got an unreadable file"):
        load_lora(fresh_unet(folder), saved)


def test_the_base_hash_does_not_see_the_adapter(trained, folder):
    unet = fresh_unet(folder)
    assert hash_base(unet) == hash_base(trained.module) == hash_base(trained.module.double())
    with torch.no_grad():
        unet.conv_in.bias[0] += 1e-3
    assert hash_base(unet) != hash_base(trained.module)


def refused(unet, path, message, error=LoraError):
    with pytest.raises(error, match=message) as caught:
        load_lora(unet, path)
    assert "\n" not in str(caught.value)
    # nothing half loaded
    assert not lora_names(unet)


def test_refuses_what_is_not_there(folder, tmp_path):
    unet = fresh_unet(folder)
    refused(unet, tmp_path / "no", "must be an existing file or folder", FileNotFoundError)
    refused(unet, tmp_path, f"must be a folder with {FILE}.*no .safetensors file")
    save_file({"a.lora": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"a.lora": torch.ones(1)}, tmp_path / "b.safetensors")
    refused(unet, tmp_path, r"with a\.safetensors, b\.safetensors")
    (tmp_path / FILE).write_bytes(b"junk")
    refused(unet, tmp_path, "must hold LoRA weights, got an unreadable file")
    save_file({"unet.conv_in.weight": torch.ones(1)}, tmp_path / FILE)
    refused(unet, tmp_path, "must hold LoRA weights, got conv_in.weight")


def test_refuses_an_adapter_of_another_base(saved):
    refused(
        build_unet(block_out_channels=(12, 16)), saved, r"must fit the base model:.*should have 12"
    )
    refused(build_unet(cross_attention_dim=20), saved, r"is \[3, 12\] and should have 20 columns")
    other = build_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    refused(other, saved, r"it has .*down_blocks\.0\..* the model no such linear layer")


def test_refuses_incomplete_or_broken_weights(saved, folder):
    weights = load_file(saved / FILE)
    name = next(name for name in weights if name.endswith("up.weight"))
    save_file({n: t for n, t in weights.items() if n != name}, saved / FILE)
    refused(fresh_unet(folder), saved, "two factors of one rank for every layer, got {'A': 3}")
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, saved / FILE)
    refused(fresh_unet(folder), saved, "must be finite, got NaN or infinity")
    save_file(weights | {name: weights[name][:, :2].contiguous()}, saved / FILE)
    refused(fresh_unet(folder), saved, "two factors of one rank")
    text = {"text_encoder.text_model.encoder.layers.0.q_proj.lora.up.weight": torch.ones(1, 1)}
    save_file(weights | text, saved / FILE)
    refused(fresh_unet(folder), saved, "of the denoiser alone, got 1 of a text encoder")


def test_refuses_a_second_adapter_a_rank_of_zero_and_a_model_without_attention(trained):
    with pytest.raises(LoraError, match="must have no adapter yet"):
        add_lora(trained.module, 4)
    with pytest.raises(LoraError, match="rank must be at least 1, got 0"):
        add_lora(build_unet(), 0)
    with pytest.raises(LoraError, match="must have layers to_x, got none"):
        add_lora(build_unet(), 4, targets=["to_x"])


def test_an_adapter_taken_out_leaves_the_base_for_another(folder, trained, saved):
    base, unet = fresh_unet(folder), trained.module
    swapped = hash_base(unet)
    remove_lora(unet)
    assert not lora_names(unet)
    assert [name for name, _ in unet.named_parameters()] == [
        name for name, _ in base.named_parameters()
    ]
    with torch.no_grad():
        assert torch.equal(unet(*arguments()).sample, base(*arguments()).sample)
    # nothing to take out
    remove_lora(unet)
    load_lora(unet, saved)
    assert (hash_lora(unet), hash_base(unet)) == (hash_lora(load_tiny(folder).module), swapped)
    remove_lora(unet)
    add_lora(unet, 5, seed=2)
    add_lora(base, 5, seed=2)
    assert hash_lora(unet) == hash_lora(base)
    assert not any(p.requires_grad for n, p in unet.named_parameters() if ".lora_" not in n)
