"""Adapters as people have them: PEFT's folders, kohya's, XLabs' and Diffusers' files, DoRA.

The oracles are PEFT's own models, and plain networks whose weights are the sums.
"""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from numerics import relative_error
from peft import LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_pipelines import build
from tiny_stable_diffusion import shake_lora

from dtrak.features.extraction import FusedExtractor
from dtrak.features.noise import sample_noise
from dtrak.features.settings import FeatureSettings
from dtrak.models import load
from dtrak.models.lora import LoraError, load_lora, lora_names, save_lora
from dtrak_kernels import Projection

FILE = "pytorch_lora_weights.safetensors"
PEFT_KINDS = ("sd", "sdxl", "dit", "sd3", "flux")


@pytest.fixture(scope="module")
def folders(shared):
    def build_all(folder):
        for kind in PEFT_KINDS:
            build(kind, folder / kind / "pipeline")

    return {kind: shared("adapters", build_all) / kind / "pipeline" for kind in PEFT_KINDS}


def network_of(folders, kind):
    pipeline = DiffusionPipeline.from_pretrained(folders[kind], local_files_only=True)
    return (pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer).eval()


def arguments(model, kind):
    """What a network of a kind is called with, by what its model says of one sample."""
    items = [2] if kind == "dit" else ["fog"]
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 4, 8, 8, generator=generator), torch.tensor([600])
    seen = {}

    def spy(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return model.module(*args, **kwargs)

    with torch.no_grad():
        model.predict(x, t, model.condition(items, torch.device("cpu")), spy)
    return seen["args"], seen["kwargs"]


def outputs(network, given):
    with torch.no_grad():
        return network(*given[0], **given[1]).sample


def agrees(folders, kind, path, expected):
    """What is loaded from ``path`` computes what ``expected`` does, and not what the base does."""
    model = load(folders[kind], path)
    given = arguments(model, kind)
    found = outputs(model.module, given)
    assert relative_error(found, outputs(expected, given)) < 1e-5
    assert relative_error(found, outputs(network_of(folders, kind), given)) > 1e-3
    trainable = [name for name, p in model.module.named_parameters() if p.requires_grad]
    assert trainable == model.parameters() == lora_names(model.module)
    return model


def shaken(network, **options):
    """A network wrapped by PEFT, with an adapter that matters."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        options = {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "to_v"]} | options
        wrapped = get_peft_model(network, LoraConfig(init_lora_weights=False, **options))
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.data.normal_(std=0.4)
            if "magnitude" in name:
                parameter.data.mul_(1.3)
    return wrapped.eval()


VARIANTS = {
    "plain": {},
    "alpha": {"lora_alpha": 5},
    "rslora": {"lora_alpha": 5, "use_rslora": True},
    "ranks": {"rank_pattern": {"to_v": 3}, "lora_alpha": 4},
    "alphas": {"alpha_pattern": {"to_q": 7}},
    "dora": {"use_dora": True, "lora_alpha": 3},
    "regex": {"target_modules": r".*\.to_[qk]"},
    "all": {"target_modules": "all-linear"},
}


@pytest.mark.sweep
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["sd", "flux", "sdxl", "sd3", "dit"])
def test_reads_what_peft_writes(kind, variant, folders, tmp_path):
    wrapped = shaken(network_of(folders, kind), **VARIANTS[variant])
    wrapped.save_pretrained(tmp_path / "lora")
    model = agrees(folders, kind, tmp_path / "lora", wrapped)
    expected = {n: p for n, p in wrapped.named_parameters() if "lora_" in n}
    assert len(model.parameters()) == len(expected)
    # written again, alpha and all, it is the same model
    again = tmp_path / "again"
    model.save(again)
    agrees(folders, kind, again, wrapped)


@pytest.mark.parametrize("form", ["file", "pickle", "folder of a part", "convolutions"])
def test_reads_other_forms_of_peft(form, folders, tmp_path):
    options = {"target_modules": ["conv1", "to_q"]} if form == "convolutions" else {}
    wrapped = shaken(network_of(folders, "sd"), **options)
    path = tmp_path / "lora"
    wrapped.save_pretrained(path, safe_serialization=form != "pickle")
    if form == "file":
        path = path / "adapter_model.safetensors"
    if form == "folder of a part":
        shutil.move(path, tmp_path / "whole" / "unet")
        path = tmp_path / "whole"
    agrees(folders, "sd", path, wrapped)
    if form == "folder of a part":
        shutil.copytree(path / "unet", path / "text_encoder")
        with pytest.raises(LoraError, match="of the denoiser alone, got one of text_encoder too"):
            load(folders["sd"], path)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_features_of_a_dora_are_its_gradients(kind, folders, tmp_path):
    """Against PEFT's own layers, one sample at a time, in float64."""
    options = {"use_dora": True, "lora_alpha": 3, "target_modules": ["to_q", "to_k"]}
    if kind == "sd":
        options["target_modules"] = ["to_q", "conv1"]
    wrapped = shaken(network_of(folders, kind), **options)
    wrapped.save_pretrained(tmp_path)
    model, x = load(folders[kind], tmp_path), torch.randn(3, 4, 8, 8)
    settings = FeatureSettings("loss", (600,), 0, Projection("none"), "float64")
    extractor = FusedExtractor(model, settings, torch.device("cpu"))
    names = extractor.sketcher.parameter_names
    assert sum("magnitude" in name for name in names) == len(names) / 3
    features = extractor.extract(x, ["0", "1", "2"], ["fog", "", "a"])
    wrapped.double()
    parameters = [
        wrapped.get_parameter("base_model.model." + name.replace("dtrak", "default"))
        for name in names
    ]
    for row, caption in enumerate(("fog", "", "a")):
        noise = sample_noise([f"{row}"], [600], (4, 8, 8), seed=0, dtype=torch.float64)[0]
        t = torch.tensor([600])
        noisy = model.process.add(x[row : row + 1].double(), noise, t)
        condition = model.condition([caption], torch.device("cpu"))
        condition = {name: value.double() for name, value in condition.items()}
        u = model.predict(noisy, t, condition, wrapped)
        target = model.process.target(x[row : row + 1].double(), noise, t)
        grads = torch.autograd.grad((u - target).square().mean(), parameters)
        expected = torch.cat([grad.flatten() for grad in grads])
        assert relative_error(features[row], expected) < 1e-6


def merged(folders, kind, sums):
    """A plain network with something added to its weights, by layer."""
    network = network_of(folders, kind)
    with torch.no_grad():
        for name, value in sums.items():
            network.get_submodule(name).weight += value
    return network


def factors(rank, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, columns, generator=generator) * 0.4
    return down, torch.randn(rows, rank, generator=generator) * 0.4


def test_reads_kohyas_names_of_sdxl(folders, tmp_path):
    """Which counts blocks through, as the model's first code did."""
    down, up = factors(4, 16, 16)
    stem = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    weights = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(weights | {f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / FILE)
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    expected = merged(folders, "sdxl", {layer: up @ down * 2 / 4})
    agrees(folders, "sdxl", tmp_path, expected)
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    more = {f"{text}.lora_down.weight": down + 1, f"{text}.lora_up.weight": up + 1}
    save_file(weights | more, tmp_path / FILE)
    with pytest.raises(LoraError, match=r"denoiser alone, got 2 of a text encoder, .*lora_te1"):
        load(folders["sdxl"], tmp_path)


BLOCK = "transformer_blocks.0.attn"


def flux_weights(form):
    """One LoRA of FLUX in the names of kohya or XLabs, and what it adds to which layer."""
    qkv_down, qkv_up = factors(4, 48, 16, 1)
    proj_down, proj_up = factors(4, 16, 16, 2)
    scale = 2 / 4 if form == "kohya" else 1.0
    sums = {f"{BLOCK}.to_out.0": proj_up @ proj_down * scale}
    for part, rows in zip("qkv", qkv_up.split(16), strict=True):
        sums[f"{BLOCK}.to_{part}"] = rows @ qkv_down * scale
    if form == "kohya":
        stem = "lora_unet_double_blocks_0_img_attn"
        weights = {
            f"{stem}_qkv.lora_down.weight": qkv_down,
            f"{stem}_qkv.lora_up.weight": qkv_up,
            f"{stem}_qkv.alpha": torch.tensor(2.0),
            f"{stem}_proj.lora_down.weight": proj_down,
            f"{stem}_proj.lora_up.weight": proj_up,
            f"{stem}_proj.alpha": torch.tensor(2.0),
        }
    else:
        stem = "double_blocks.0.processor"
        weights = {
            f"{stem}.qkv_lora1.down.weight": qkv_down,
            f"{stem}.qkv_lora1.up.weight": qkv_up,
            f"{stem}.proj_lora1.down.weight": proj_down,
            f"{stem}.proj_lora1.up.weight": proj_up,
        }
    return weights, sums


@pytest.mark.parametrize("form", ["kohya", "xlabs"])
def test_reads_what_others_write_for_flux(form, folders, tmp_path):
    weights, sums = flux_weights(form)
    save_file(weights, tmp_path / FILE)
    model = agrees(folders, "flux", tmp_path, merged(folders, "flux", sums))
    assert len(model.parameters()) == 8


@pytest.mark.parametrize("kind", ["flux", pytest.param("sd", marks=pytest.mark.full)])
def test_mixed_ranks_without_alpha_are_not_scaled(kind, folders, tmp_path, monkeypatch):
    prefix = "unet" if kind == "sd" else "transformer"
    layers = [
        name
        for name, module in network_of(folders, kind).named_modules()
        if name.endswith(("to_q", "to_out.0"))
    ]
    weights, sums = {}, {}
    for rank, layer in enumerate(layers, start=1):
        shape = network_of(folders, kind).get_submodule(layer).weight.shape
        down, up = factors(rank, *shape, seed=rank)
        weights[f"{prefix}.{layer}.lora_A.weight"] = down
        weights[f"{prefix}.{layer}.lora_B.weight"] = up
        sums[layer] = up @ down
    save_file(weights, tmp_path / FILE)
    expected = merged(folders, kind, sums)
    agrees(folders, kind, tmp_path, expected)
    # as Diffusers 0.35 to 0.40 did: one alpha for all ranks
    made = type(network_of(folders, kind))
    loads = made.load_lora_adapter

    def old(self, *args, **kwargs):
        loads(self, *args, **kwargs)
        for module in self.modules():
            if hasattr(module, "scaling"):
                module.scaling["dtrak"] = 0.36

    monkeypatch.setattr(made, "load_lora_adapter", old)
    agrees(folders, kind, tmp_path, expected)


def refused(folders, kind, path, message):
    with pytest.raises(LoraError, match=message) as caught:
        load(folders[kind], path)
    assert "\n" not in str(caught.value)


def test_what_is_trained_beside_a_lora_is_refused_by_name(folders, tmp_path):
    for number, (options, message) in enumerate(
        [
            ({"bias": "lora_only"}, r"LoRA weights alone, got \S+bias \[16\], which"),
            ({"modules_to_save": ["proj_out"]}, r"alone, got proj_out\.bias \[16\], which was"),
        ]
    ):
        wrapped = shaken(network_of(folders, "flux"), **options)
        wrapped.save_pretrained(tmp_path / str(number))
        refused(folders, "flux", tmp_path / str(number), message)
    wrapped = get_peft_model(network_of(folders, "flux"), LoHaConfig(target_modules=["to_q"]))
    wrapped.save_pretrained(tmp_path / "loha")
    refused(folders, "flux", tmp_path / "loha", "must describe a LORA, got 'LOHA'")


def test_a_folder_of_peft_that_cannot_be_used(folders, tmp_path):
    shaken(network_of(folders, "sd")).save_pretrained(tmp_path)
    file, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"init_lora_weights": "pissa_niter_4"}))
    refused(folders, "sd", tmp_path, "began with 'pissa_niter_4', which changes the base: save it")
    file.write_text(json.dumps(said | {"r": "x"}))
    refused(folders, "sd", tmp_path, "could not be (used|loaded)")
    file.write_text(json.dumps(said | {"target_modules": ["to_k"]}))
    refused(folders, "sd", tmp_path, "could not be loaded: .*to_k.* did not reach the model")
    file.write_text(json.dumps(said))
    kept = load_file(weights)
    save_file({f"base_model.model.text_model.{n}": w for n, w in kept.items()}, weights)
    refused(folders, "sd", tmp_path, "of the denoiser, got those of a text encoder")
    weights.write_bytes(b"junk")
    refused(folders, "sd", tmp_path, "must hold LoRA weights, got an unreadable file")
    weights.unlink()
    refused(folders, "sd", tmp_path, r"must hold adapter_model\.safetensors, got adapter_config")
    module = network_of(folders, "dit")
    (tmp_path / "other").mkdir()
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "other" / FILE)
    with pytest.raises(
        LoraError, match="LoRA of a DiTTransformer2DModel must be a folder that PEFT"
    ):
        load_lora(module, tmp_path / "other")


@pytest.mark.parametrize(
    "name, what",
    [("dora_scale", "kohya's DoRA"), ("lokr_w1", "a LoKr"), ("hada_w1_a", "a LoHa")],
)
def test_what_diffusers_leaves_out_is_refused(name, what, folders, tmp_path):
    down, up = factors(2, 8, 8)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    weights = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(weights | {f"{stem}.{name}": torch.ones(8, 1)}, tmp_path / FILE)
    refused(folders, "sd", tmp_path, f"got {what} with {stem}.{name}, which is not served")


def test_an_adapter_of_another_base_is_named(folders, tmp_path):
    for kind in ("sd3", "flux"):
        model = shake_lora(load(folders[kind]).put_adapter(2))
        save_lora(model.module, tmp_path / kind)
    refused(
        folders,
        "sd3",
        tmp_path / "flux",
        r"must fit the base model: it has \S+transformer_blocks\S+ \[",
    )
    refused(folders, "flux", tmp_path / "sd3", r"should have 16 (rows|columns)|the model no such")
    refused(folders, "sd", tmp_path / "flux", "must fit the base model|must hold LoRA weights")
    file = tmp_path / "flux" / FILE
    weights = load_file(file)
    name = next(n for n in weights if "lora_A" in n)
    save_file(weights | {name: torch.ones(2, 5)}, file)
    refused(
        folders, "flux", tmp_path / "flux", r"lora_A\.weight is \[2, 5\] and should have 16 columns"
    )


def test_an_adapter_of_a_hub_is_downloaded_and_read(folders, tmp_path, monkeypatch):
    shake_lora(load(folders["sd"]).put_adapter(2)).save(tmp_path / "lora")
    names = []

    def download(name, allow_patterns):
        names.append(name)
        if name == "no/body":
            raise OSError("no such\nname")
        return str(tmp_path / "lora")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load(folders["sd"], "owner/name").has_adapter
    with pytest.raises(FileNotFoundError, match=r"got 'no/body', which cannot be .* no such name"):
        load(folders["sd"], "no/body")
    assert names == ["owner/name", "no/body"]
    # what can only be a path is none
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("here/nothing", tmp_path / "no", "./no", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="lora must be an existing file or folder, got"):
            load(folders["sd"], path)
    assert len(names) == 2
