"""Low-rank adapters of a network: fresh ones, and those that Diffusers, PEFT and others write.

A module M computes ``M(x) + (alpha / r) · B A x`` with ``A [r, in]`` and ``B [out, r]``; only A and
B are trained, and only they are attributed. DoRA trains a magnitude of every output, too, which is
attributed with them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..runs.choices import LORA_TARGETS
from .hashing import hash_tensors
from .weights import quiet, read_json

ADAPTER = "dtrak"
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
# as PEFT writes one, with its configuration beside it
PEFT_CONFIG = "adapter_config.json"
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# what an adapter's weights are called in a pipeline, and what of Diffusers reads them
_READERS = {
    "UNet2DConditionModel": ("unet", "StableDiffusionLoraLoaderMixin"),
    "UNet2DConditionModel of SDXL": ("unet", "StableDiffusionXLLoraLoaderMixin"),
    "SD3Transformer2DModel": ("transformer", "SD3LoraLoaderMixin"),
    "FluxTransformer2DModel": ("transformer", "FluxLoraLoaderMixin"),
}
# beginnings in LoRA files of what is trained beside the denoiser
_TEXT = ("text_encoder", "lora_te", "te.", "te1.", "te2.", "clip_l.", "t5xxl.", "conditioner.")
# ways to begin an adapter that change the weights of its base
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SHOWN = 3


class LoraError(ValueError):
    """LoRA weights that cannot be used; the message says why and what was expected."""


class _Adapter(NamedTuple):
    """What a file holds.

    Attributes:
        weights: by PEFT's names, without prefix and adapter.
        alphas: by layer with its prefix, as Diffusers has them.
        metadata: what a file says of its adapter, as Diffusers has it.
        config: of PEFT, in the place of both.
    """

    weights: dict[str, Tensor]
    alphas: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    config: Any = None


def add_lora(
    module: nn.Module, rank: int, *, seed: int = 0, targets: Sequence[str] = LORA_TARGETS
) -> None:
    """Put a fresh adapter into a network, which computes what it did until the adapter is trained.

    ``A`` is drawn from N(0, 1/r²), ``B`` is zero, alpha is r, so the product is not scaled. Every
    other parameter is frozen.

    Args:
        module: a network of Diffusers without an adapter.
        rank: r.
        seed: of ``A``; the global random state is left as it was.
        targets: ends of the names of the linear layers that get one.

    Raises:
        LoraError: the rank is not positive, the network has an adapter already or no such layer.

    Source:
        D-TRAK's train_text_to_image_lora.py at e2a0c2e, with the processors of Diffusers 0.16.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise LoraError(f"rank must be at least 1, got {rank}")
    if lora_names(module):
        raise LoraError("the model must have no adapter yet, got one")
    if not any(name.endswith(tuple(targets)) for name, _ in module.named_modules()):
        raise LoraError(f"the model must have layers {', '.join(targets)}, got none")
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)
    )
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would reseed CUDA devices too
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    _finish(module)


def load_lora(module: nn.Module, path: str | Path) -> None:
    """Put the adapter that lies in ``path`` into a network; every other parameter is frozen.

    Args:
        module: a network of Diffusers without an adapter.
        path: a folder with ``pytorch_lora_weights.safetensors`` or one other ``.safetensors`` file,
            or the file itself, in any of the formats that Diffusers reads for this network (its
            own, PEFT's, kohya's, XLabs', that of the attention processors before Diffusers 0.20
            with or without ``unet.`` before each name, …); or a folder that PEFT wrote, with
            ``adapter_config.json``, or one with such a folder ``unet`` or ``transformer`` in it.
            ``.bin`` files are read without running code from them.

    Raises:
        FileNotFoundError: nothing is there.
        LoraError: the file is unreadable or holds no LoRA weights, or some of a text encoder or
            something else that was trained beside them; the weights do not fit the network (which,
            and how), are incomplete or not finite.
    """
    folder = _peft_folder(module, Path(path))
    file = folder / PEFT_CONFIG if folder is not None else _find_file(Path(path))
    found = _read_peft(folder) if folder is not None else _read(file, module)
    _check_fit(module, found.weights, file)
    try:
        with quiet("diffusers.loaders.peft", "diffusers.utils.peft_utils", "peft"):
            _inject(module, found)
    # whatever a combination that neither library foresaw makes them raise
    except Exception as error:
        remove_lora(module)
        reason = " ".join(str(error).split())
        raise LoraError(f"the LoRA in {file} could not be loaded: {reason}") from error
    loaded = lora_weights(module)
    missed = sorted(found.weights.keys() ^ loaded.keys())
    if missed or any(not torch.equal(loaded[n], w.float()) for n, w in found.weights.items()):
        remove_lora(module)
        raise LoraError(
            f"the LoRA in {file} could not be loaded: {', '.join(missed[:_SHOWN]) or 'its values'} "
            "did not reach the model"
        )
    if not (found.alphas or found.metadata or found.config):
        # Diffusers before 0.41 takes one rank for all where a file says no alpha
        for layer in module.modules():
            scaling: Any = getattr(layer, "scaling", {})
            if ADAPTER in scaling:
                scaling[ADAPTER] = 1.0
    _finish(module)


def _inject(module: nn.Module, found: _Adapter) -> None:
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    if found.config is not None:
        inject_adapter_in_model(found.config, module, adapter_name=ADAPTER)
        set_peft_model_state_dict(module, dict(found.weights), ADAPTER)
        return
    prefix, _ = _reader(module)
    loader: Any = module
    loader.load_lora_adapter(
        {f"{prefix}.{name}": tensor for name, tensor in found.weights.items()},
        prefix=prefix,
        network_alphas=found.alphas,
        metadata=None if found.alphas else found.metadata,
        adapter_name=ADAPTER,
    )


def adopt_lora(module: nn.Module) -> None:
    """Take the adapter that is in a network, if any, as one that `load_lora` put there.

    Raises:
        LoraError: there are several, or it is merged into the weights.
    """
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    names = sorted({name for layer in layers for name in layer.scaling})
    if len(names) > 1:
        raise LoraError(f"the model must have one adapter, got {', '.join(names)}")
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise LoraError("the adapter must be at work, got one that is merged or disabled")
    if layers:
        _finish(module)


def _name_of(module: nn.Module) -> str:
    """What PEFT calls the adapter in a network."""
    layers: Any = module.modules()
    found = {name for layer in layers for name in getattr(layer, "scaling", ())}
    return str(next(iter(found), ADAPTER))


def remove_lora(module: nn.Module) -> None:
    """Take the adapter out of a network, if it has one: it is the base then, all of it trained."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    if lora_names(module):
        recurse_remove_peft_layers(module)
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(module).pop(name, None)
        module.requires_grad_(True)


def save_lora(module: nn.Module, folder: str | Path) -> None:
    """Write the adapter as a folder that `load_lora` and Diffusers' ``load_lora_weights`` read.

    That of a network for which Diffusers has no such method is written as PEFT does.
    """
    import diffusers.loaders
    from diffusers.utils import convert_state_dict_to_diffusers

    scales = _scales(module)
    weights = {}
    for name, tensor in lora_weights(module).items():
        scale = scales[name.partition(".lora_")[0]]
        # alpha is not written: it is r where B holds the scale
        is_scaled = ".lora_B." in name and scale != 1
        weights[name] = (tensor * scale if is_scaled else tensor).contiguous()
    if type(module).__name__ not in _READERS:
        _save_peft(module, weights, Path(folder))
        return
    prefix, reader = _reader(module)
    if prefix == "unet":
        older = convert_state_dict_to_diffusers(weights)
        # names of other layers than attention's have no older form, and a mixture is not read
        weights = weights if any(".lora_A." in name for name in older) else older
    getattr(diffusers.loaders, reader).save_lora_weights(
        folder, **{f"{prefix}_lora_layers": weights}
    )


def _save_peft(module: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    layers = {name.partition(".lora_")[0] for name in weights}
    ranks = {n.partition(".lora_")[0]: len(w) for n, w in weights.items() if ".lora_A." in n}
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=sorted(layers),
        use_dora=any("magnitude" in name for name in weights),
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    file = folder / PEFT_FILES[0]
    save_file({f"base_model.model.{name}": weight for name, weight in weights.items()}, file)


def lora_names(module: nn.Module) -> list[str]:
    """Names of the adapter's parameters in a network, in ``named_parameters()`` order."""
    return [name for name, _ in module.named_parameters() if ".lora_" in name]


def lora_weights(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's parameters by PEFT's names, which name no adapter; float32, on the CPU."""
    weights, adapter = {}, _name_of(module)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            short = name.replace(f".{adapter}.", ".").replace("_vector.weight", "_vector")
            weights[short] = parameter.detach().float().cpu()
    return weights


def _scales(module: nn.Module) -> dict[str, float]:
    """The factor alpha / r by layer."""
    adapter = _name_of(module)
    return {
        name: float(layer.scaling[adapter])
        for name, layer in module.named_modules()
        if adapter in getattr(layer, "scaling", {})
    }


def hash_lora(module: nn.Module) -> str:
    """SHA-256 of the adapter: its weights, and the factor alpha / r of every layer."""
    scales = {
        f"{name}.scale": torch.tensor(scale, dtype=torch.float64)
        for name, scale in _scales(module).items()
    }
    return hash_tensors(lora_weights(module) | scales)


def hash_base(module: nn.Module) -> str:
    """SHA-256 of a network without its adapter, with or without one, whatever its dtype now."""
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }
    return hash_tensors(base, torch.float32)


def _finish(module: nn.Module) -> None:
    """Freeze all but the adapter, and make DoRA's layers such that samples are told apart."""
    from peft.tuners.lora.dora import DoraLinearLayer

    for name, parameter in module.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    for layer in module.modules():
        if type(layer) is DoraLinearLayer:
            # theirs sends an identity through the layers of A and B, whose rows are no samples
            layer.get_lora_weight = _product
    module.eval()


def _product(lora_A: nn.Linear, lora_B: nn.Linear, adapter_name: str | None = None) -> Tensor:
    """What DoRA's norm is of, in which PEFT takes no gradient."""
    return lora_B.weight.detach() @ lora_A.weight.detach()


def _reader(module: nn.Module) -> tuple[str, str]:
    """The prefix of a network's weights in a file, and the class of Diffusers that reads it."""
    kind = type(module).__name__
    config: Any = module.config
    if kind == "UNet2DConditionModel" and config.get("addition_embed_type"):
        kind = f"{kind} of SDXL"
    if kind not in _READERS:
        raise LoraError(
            f"the LoRA of a {kind} must be a folder that PEFT wrote, with {PEFT_CONFIG}, got none"
        )
    return _READERS[kind]


def _peft_folder(module: nn.Module, path: Path) -> Path | None:
    """The folder that PEFT wrote an adapter of the network into, if it is that."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name not in (*PEFT_FILES, PEFT_CONFIG):
        return None
    if (folder / PEFT_CONFIG).is_file():
        return folder
    # one folder for each part of a pipeline
    parts = sorted(file.parent.name for file in folder.glob(f"*/{PEFT_CONFIG}"))
    if not parts:
        return None
    others = [part for part in parts if part not in ("unet", "transformer")]
    if others:
        raise LoraError(
            f"{path} must hold an adapter of the denoiser alone, got one of "
            f"{', '.join(others)} too: attribution would miss what it learnt"
        )
    return folder / parts[0]


def _read_peft(folder: Path) -> _Adapter:
    """What PEFT's ``save_pretrained`` wrote."""
    from peft import LoraConfig

    said = read_json(folder / PEFT_CONFIG)
    if said.get("peft_type") != "LORA":
        raise LoraError(
            f"{folder / PEFT_CONFIG} must describe a LORA, got {said.get('peft_type')!r}"
        )
    beginning = said.get("init_lora_weights", True)
    if isinstance(beginning, str) and beginning.lower().startswith(_CHANGES_BASE):
        raise LoraError(
            f"{folder / PEFT_CONFIG} must describe an adapter of the base as it is, got one that "
            f"began with {beginning!r}, which changes the base: save it with "
            "path_initial_model_for_weight_conversion"
        )
    file = next((folder / name for name in PEFT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise LoraError(f"{folder} must hold {PEFT_FILES[0]}, got {PEFT_CONFIG} alone")
    weights = {
        name.removeprefix("base_model.model."): weight for name, weight in _tensors(file).items()
    }
    if any(name.startswith("text_model.") for name in weights):
        raise LoraError(
            f"{file} must hold LoRA weights of the denoiser, got those of a text encoder"
        )
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LoraError(f"{folder / PEFT_CONFIG} could not be used: {reason}") from error
    config.inference_mode, config.init_lora_weights = False, True
    return _Adapter(weights, config=config)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, read without running code from it."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return loaded
    # a damaged file raises whatever its bytes happen to ask for
    except Exception as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> LoraError:
    reason = " ".join(str(error).split())
    return LoraError(f"{file} must hold LoRA weights, got an unreadable file: {reason}")


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"lora must be an existing file or folder, got {path}")
    for name in LORA_FILES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise LoraError(
            f"lora must be a folder with {LORA_FILES[0]}, got {path} with "
            f"{', '.join(file.name for file in files) or 'no .safetensors file'}"
        )
    return files[0]


def _read(file: Path, module: nn.Module) -> _Adapter:
    """What Diffusers reads from a file for a network."""
    import diffusers.loaders
    from diffusers.utils import convert_unet_state_dict_to_peft

    prefix, reader = _reader(module)
    names = list(_tensors(file)) if file.suffix == ".safetensors" else []
    _refuse_unread(names, file)
    options: dict[str, Any] = {}
    if "XL" in reader:
        # kohya counts the blocks of SDXL otherwise
        options["unet_config"] = module.config
    if "Flux" in reader:
        options["return_alphas"] = True
    try:
        with quiet("diffusers.loaders.lora_conversion_utils", "diffusers.loaders.lora_pipeline"):
            read = getattr(diffusers.loaders, reader).lora_state_dict(
                str(file.parent),
                weight_name=file.name,
                local_files_only=True,
                use_safetensors=file.suffix == ".safetensors",
                return_lora_metadata=True,
                **options,
            )
    except Exception as error:
        raise _unreadable(file, error) from error
    found, metadata = read[0], read[-1]
    alphas = read[1] if len(read) == 3 else None
    _refuse_unread(list(found), file)
    weights = {name.removeprefix(f"{prefix}."): tensor for name, tensor in found.items()}
    others = [name for name in weights if "lora" not in name and not name.endswith(".alpha")]
    if not weights or others:
        raise LoraError(
            f"{file} must hold LoRA weights, got {others[0] if others else 'no tensors'}"
        )
    if not any("lora_A" in name for name in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    weights = {re.sub(r"(_vector)\.weight$", r"\1", name): w for name, w in weights.items()}
    return _Adapter(weights, alphas, metadata)


def _refuse_unread(names: Sequence[str], file: Path) -> None:
    """Refuse what Diffusers leaves out without a word, and what is of another network."""
    text = sorted(name for name in names if name.startswith(_TEXT))
    if text:
        raise LoraError(
            f"{file} must hold LoRA weights of the denoiser alone, got {len(text)} of a text "
            f"encoder, such as {text[0]}: attribution would miss what they learnt"
        )
    for part, what in (("dora_scale", "kohya's DoRA"), ("lokr_", "a LoKr"), ("hada_", "a LoHa")):
        found = next((name for name in names if part in name), None)
        if found is not None:
            raise LoraError(
                f"{file} must hold LoRA weights, got {what} with {found}, which is not served"
            )


def _check_fit(module: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Refuse what does not fit, before the libraries drop or misplace it."""
    modules = dict(module.named_modules())
    ranks: dict[str, dict[str, int]] = {}
    for name in sorted(weights):
        tensor = weights[name]
        layer_name, _, part = name.partition(".lora_")
        layer = modules.get(layer_name)
        what = f"the LoRA in {file} must fit the base model:"
        if not part:
            raise LoraError(
                f"{file} must hold LoRA weights alone, got {name} {list(tensor.shape)}, which was "
                "trained beside them"
            )
        known = ("A.weight", "B.weight", "B.bias", "magnitude_vector")
        if part not in known or not isinstance(layer, nn.Linear | nn.Conv2d):
            raise LoraError(
                f"{what} it has {name} {list(tensor.shape)}, the model no such linear layer or "
                "convolution"
            )
        if not torch.isfinite(tensor).all():
            raise LoraError(f"the LoRA in {file} must be finite, got NaN or infinity in {name}")
        outputs, inputs = layer.weight.shape[:2]
        if part in known[2:]:
            if tensor.numel() != outputs:
                raise LoraError(
                    f"{what} {name} is {list(tensor.shape)} and should have {outputs} entries"
                )
            continue
        axis, size = (1, inputs) if part[0] == "A" else (0, outputs)
        if tensor.ndim != layer.weight.ndim or tensor.shape[axis] != size:
            raise LoraError(
                f"{what} {name} is {list(tensor.shape)} and should have {size} "
                f"{'columns' if axis else 'rows'}"
            )
        ranks.setdefault(layer_name, {})[part[0]] = tensor.shape[1 - axis]
    if not ranks:
        raise LoraError(f"{file} must hold LoRA weights, got no tensors of one")
    for layer_name, pair in ranks.items():
        if len(pair) != 2 or len(set(pair.values())) != 1:
            raise LoraError(
                f"the LoRA in {file} must hold two factors of one rank for every layer, got "
                f"{pair} for {layer_name}"
            )
