"""Low-rank adapters of a U-Net's attention: fresh ones, and those that Diffusers writes and reads.

A module M computes ``M(x) + (alpha / r) · B A x`` with ``A [r, in]`` and ``B [out, r]``; only A and
B are trained, and only they are attributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..runs.choices import LORA_TARGETS
from .hashing import hash_tensors
from .weights import quiet

ADAPTER = "dtrak"
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


class LoraError(ValueError):
    """LoRA weights that cannot be used; the message says why and what was expected."""


def add_lora(
    unet: UNet2DConditionModel, rank: int, *, seed: int = 0, targets: Sequence[str] = LORA_TARGETS
) -> None:
    """Put a fresh adapter into ``unet``, which computes what it did until the adapter is trained.

    ``A`` is drawn from N(0, 1/r²), ``B`` is zero, alpha is r, so the product is not scaled. Every
    other parameter is frozen.

    Args:
        unet: a U-Net of Diffusers without an adapter.
        rank: r.
        seed: of ``A``; the global random state is left as it was.
        targets: ends of the names of the linear layers that get one.

    Raises:
        LoraError: the rank is not positive, ``unet`` has an adapter already or no such layer.

    Source:
        D-TRAK's train_text_to_image_lora.py at e2a0c2e, with the processors of Diffusers 0.16.
    """
    from peft import LoraConfig

    if rank < 1:
        raise LoraError(f"rank must be at least 1, got {rank}")
    if lora_names(unet):
        raise LoraError("the U-Net must have no adapter yet, got one")
    if not any(name.endswith(tuple(targets)) for name, _ in unet.named_modules()):
        raise LoraError(f"the U-Net must have layers {', '.join(targets)}, got none")
    config = LoraConfig(
        r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets)
    )
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would reseed CUDA devices too
        torch.default_generator.manual_seed(seed)
        unet.add_adapter(config, adapter_name=ADAPTER)
    _freeze_the_rest(unet)


def load_lora(unet: UNet2DConditionModel, path: str | Path) -> None:
    """Put the adapter that lies in ``path`` into ``unet``; every other parameter is frozen.

    Args:
        unet: a U-Net of Diffusers without an adapter.
        path: a folder with ``pytorch_lora_weights.safetensors`` or one other ``.safetensors`` file,
            or the file itself, in any of the formats that Diffusers reads: its own, PEFT's, that of
            the attention processors before Diffusers 0.20 (with or without ``unet.`` before each
            name), or kohya's. ``.bin`` files are read without running code from them.

    Raises:
        FileNotFoundError: nothing is there.
        LoraError: the file is unreadable or holds no LoRA weights, or some of a text encoder; the
            weights do not fit ``unet`` (which, and how), are incomplete or not finite.
    """
    file = _find_file(Path(path))
    weights, alphas, metadata = _read(file)
    _check_fit(unet, weights, file)
    try:
        with quiet("diffusers.loaders.peft", "diffusers.utils.peft_utils"):
            unet.load_lora_adapter(
                {f"unet.{name}": tensor for name, tensor in weights.items()},
                prefix="unet",
                network_alphas=alphas,
                metadata=None if alphas else metadata,
                adapter_name=ADAPTER,
            )
    # whatever a combination that neither library foresaw makes them raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LoraError(f"the LoRA in {file} could not be loaded: {reason}") from error
    loaded = lora_weights(unet)
    missed = sorted(weights.keys() - loaded.keys())
    if missed or any(not torch.equal(loaded[n], weights[n].float()) for n in weights):
        raise LoraError(
            f"the LoRA in {file} could not be loaded: {', '.join(missed[:3]) or 'its values'} did "
            "not reach the model"
        )
    _freeze_the_rest(unet)


def remove_lora(unet: UNet2DConditionModel) -> None:
    """Take the adapter out of ``unet``, if it has one: it is the base then, ready for another."""
    if lora_names(unet):
        unet.unload_lora()


def save_lora(unet: UNet2DConditionModel, folder: str | Path) -> None:
    """Write the adapter as a folder that `load_lora` and Diffusers' ``load_lora_weights`` read."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_state_dict_to_diffusers

    weights = {name: tensor.contiguous() for name, tensor in lora_weights(unet).items()}
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        folder, unet_lora_layers=convert_state_dict_to_diffusers(weights)
    )


def lora_names(unet: UNet2DConditionModel) -> list[str]:
    """Names of the adapter's parameters in ``unet``, in ``named_parameters()`` order."""
    return [name for name, _ in unet.named_parameters() if ".lora_" in name]


def lora_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter's parameters by PEFT's names, which name no adapter; float32, on the CPU."""
    return {
        name.replace(f".{ADAPTER}.", "."): parameter.detach().float().cpu()
        for name, parameter in unet.named_parameters()
        if ".lora_" in name
    }


def hash_lora(unet: UNet2DConditionModel) -> str:
    """SHA-256 of the adapter: its weights, and the factor alpha / r of every layer."""
    scales = {
        f"{name}.scale": torch.tensor(float(module.scaling[ADAPTER]), dtype=torch.float64)
        for name, module in unet.named_modules()
        if ADAPTER in getattr(module, "scaling", {})
    }
    return hash_tensors(lora_weights(unet) | scales)


def hash_base(unet: UNet2DConditionModel) -> str:
    """SHA-256 of the U-Net without its adapter, with or without one, whatever its dtype now."""
    return hash_tensors(
        {
            name.replace(".base_layer.", "."): tensor.float()
            for name, tensor in unet.state_dict().items()
            if ".lora_" not in name
        }
    )


def _freeze_the_rest(unet: UNet2DConditionModel) -> None:
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)


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


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, Any] | None]:
    """Weights by PEFT's names, without prefix; and what Diffusers knows about their scale."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    try:
        found, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            local_files_only=True,
            use_safetensors=file.suffix == ".safetensors",
            return_lora_metadata=True,
        )
    # a damaged file raises whatever its bytes happen to ask for
    except Exception as error:
        reason = " ".join(str(error).split())
        raise LoraError(f"{file} must hold LoRA weights, got an unreadable file: {reason}") from (
            error
        )
    text = sorted(name for name in found if name.startswith("text_encoder"))
    if text:
        raise LoraError(
            f"{file} must hold LoRA weights of the U-Net alone, got {len(text)} of a text encoder: "
            "attribution would miss what they learnt"
        )
    weights = {name.removeprefix("unet."): tensor for name, tensor in found.items()}
    if not weights or not all("lora" in name for name in weights):
        others = [name for name in weights if "lora" not in name]
        raise LoraError(
            f"{file} must hold LoRA weights, got {others[0] if others else 'no tensors'}"
        )
    if not any("lora_A" in name for name in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    return weights, alphas, metadata


def _check_fit(unet: UNet2DConditionModel, weights: dict[str, Tensor], file: Path) -> None:
    """Refuse what does not fit, before the libraries drop or misplace it."""
    modules = dict(unet.named_modules())
    ranks: dict[str, dict[str, int]] = {}
    for name in sorted(weights):
        tensor = weights[name]
        module_name, _, part = name.partition(".lora_")
        module = modules.get(module_name)
        what = f"the LoRA in {file} must fit the base model:"
        if part not in ("A.weight", "B.weight") or not isinstance(module, nn.Linear | nn.Conv2d):
            raise LoraError(
                f"{what} it has {name} {list(tensor.shape)}, the model no such linear layer or "
                "convolution"
            )
        axis, size = (1, _inputs(module)) if part[0] == "A" else (0, module.weight.shape[0])
        if tensor.ndim != module.weight.ndim or tensor.shape[axis] != size:
            raise LoraError(
                f"{what} {name} is {list(tensor.shape)} and should have {size} "
                f"{'columns' if axis else 'rows'}"
            )
        if not torch.isfinite(tensor).all():
            raise LoraError(f"the LoRA in {file} must be finite, got NaN or infinity in {name}")
        ranks.setdefault(module_name, {})[part[0]] = tensor.shape[1 - axis]
    for module_name, pair in ranks.items():
        if len(pair) != 2 or len(set(pair.values())) != 1:
            raise LoraError(
                f"the LoRA in {file} must hold two factors of one rank for every layer, got "
                f"{pair} for {module_name}"
            )


def _inputs(module: nn.Linear | nn.Conv2d) -> int:
    return int(module.weight.shape[1])
