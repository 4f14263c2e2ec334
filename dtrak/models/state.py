"""A file of weights that another program wrote: which of its tensors are a network's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.choices import EMA
from .denoiser import ModelError
from .weights import refuse_misfits

# what names of a moving average hold, in the libraries that write one
_AVERAGES = ("ema", "shadow", "averaged")
_ONLINE = "online_model."
# of Diffusers' and torch_ema's averages: the parameters in order, without names
_SHADOWS = "shadow_params"
# of CompVis's own U-Nets
_COMPVIS = "model.diffusion_model."


def load_state(module: nn.Module, file: Path, weights: str | None = None) -> None:
    """Give a network the weights in a file; no code in the file is run.

    Args:
        module: the network.
        file: ``.safetensors``, or what ``torch.save`` wrote: the state of the network, alone or
            anywhere in a checkpoint, with any prefix before its names.
        weights: ``"trained"``, or ``"ema"`` for the moving average that the file holds too; None
            takes the trained ones where there are both, which is said.

    Raises:
        ModelError: the file is unreadable, holds code, no weights of the network, none of those
            asked for, or several.
    """
    tensors = _read(file)
    expected = module.state_dict()
    found = _states(tensors, expected, [name for name, _ in module.named_parameters()])
    if not found:
        _refuse(tensors, expected, file)
    averages = {prefix: state for prefix, state in found.items() if _is_average(prefix)}
    plain = {prefix: state for prefix, state in found.items() if prefix not in averages}
    is_average = weights == EMA or (weights is None and not plain)
    chosen = _distinct(averages if is_average else plain)
    if len(chosen) != 1:
        names = ", ".join(repr(prefix or "the file itself") for prefix in found)
        what = "a moving average" if is_average else "trained weights"
        raise ModelError(
            f"{file} must hold {what} of the network once, got {len(chosen)} among the weights it "
            f"holds ({names})"
        )
    if weights is None and averages:
        told = (
            "its moving average is taken, the only weights it holds"
            if is_average
            else "it holds a moving average too, which --weights ema takes"
        )
        warnings.warn(f"{file}: {told}", stacklevel=2)
    ((prefix, state),) = chosen.items()
    stems = {name.split(".")[0] for name in expected}
    unknown = [
        name.removeprefix(prefix)
        for name in tensors
        if name.startswith(prefix)
        and name.removeprefix(prefix) not in expected
        # beside a network there may be a step, or an optimiser
        and name.removeprefix(prefix).split(".")[0] in stems
    ]
    refuse_misfits({"missing_keys": [], "unexpected_keys": unknown, "mismatched_keys": []}, file)
    module.load_state_dict(state)


def _read(file: Path) -> dict[str, Any]:
    """Everything in a file by dotted names: tensors, and lists of them."""
    try:
        if file.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        content = torch.load(file, map_location="cpu", weights_only=True)
    # a damaged file raises whatever its bytes happen to ask for
    except Exception as error:
        reason = " ".join(str(error).split())
        if "Unsupported global" in reason or "allowed global" in reason:
            # torch's own message recommends to run the code
            raise ModelError(
                f"{file} holds Python objects beside weights, which could run code and are not "
                "read: write the weights alone with safetensors.torch.save_file, where you trust it"
            ) from error
        if "weights_only" in reason:
            reason = "it is not what torch.save writes"
        raise ModelError(f"{file} must hold weights, got an unreadable file: {reason}") from error
    flat: dict[str, Any] = {}
    _flatten(content, "", flat)
    return flat


def _flatten(content: Any, prefix: str, flat: dict[str, Any]) -> None:
    if isinstance(content, Mapping):
        for name, value in content.items():
            is_leaf = isinstance(value, Tensor) or name == _SHADOWS
            if is_leaf:
                flat[f"{prefix}{name}"] = value
            else:
                _flatten(value, f"{prefix}{name}.", flat)


def _states(
    tensors: Mapping[str, Any], expected: Mapping[str, Tensor], parameters: list[str]
) -> dict[str, dict[str, Tensor]]:
    """The states that fit a network, by what stands before their names."""
    first = next(iter(expected))
    prefixes = [name.removesuffix(first) for name in tensors if _ends(name, first)]
    found: dict[str, dict[str, Any]] = {}
    for prefix in prefixes:
        state = {name: tensors.get(prefix + name) for name in expected}
        if all(
            isinstance(value, Tensor) and value.shape == expected[name].shape
            for name, value in state.items()
        ):
            found[prefix] = state
    for name, shadows in tensors.items():
        if not name.endswith(_SHADOWS) or not isinstance(shadows, list | tuple):
            continue
        shapes = [expected[parameter].shape for parameter in parameters]
        if [getattr(shadow, "shape", None) for shadow in shadows] == shapes:
            found[name] = {**expected, **dict(zip(parameters, shadows, strict=True))}
    return found


def _ends(name: str, last: str) -> bool:
    return name == last or name.endswith(f".{last}")


def _is_average(prefix: str) -> bool:
    # ema-pytorch keeps what it averages inside of what it calls ema
    return _ONLINE not in prefix and any(word in prefix.lower() for word in _AVERAGES)


def _distinct(states: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Of states that are equal, the first."""
    found: dict[str, dict[str, Tensor]] = {}
    for prefix, state in states.items():
        if not any(_equal(state, other) for other in found.values()):
            found[prefix] = state
    return found


def _equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


def _refuse(tensors: Mapping[str, Any], expected: Mapping[str, Tensor], file: Path) -> None:
    """Say what a file holds in the place of a network's weights."""
    if any(name.startswith(_COMPVIS) for name in tensors):
        raise ModelError(
            f"{file} holds a model of CompVis's own format: convert it with from_single_file and "
            "save_pretrained of its pipeline in Diffusers"
        )
    first = next(iter(expected))
    prefix = next((name.removesuffix(first) for name in tensors if _ends(name, first)), None)
    if prefix is None:
        some = ", ".join(list(tensors)[:4]) or "nothing"
        raise ModelError(f"{file} must hold the weights of the network, got {some}")
    there = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }
    info = {
        "missing_keys": [name for name in expected if name not in there],
        "unexpected_keys": [],
        "mismatched_keys": [
            (name, there[name].shape, value.shape)
            for name, value in expected.items()
            if name in there and there[name].shape != value.shape
        ],
    }
    refuse_misfits(info, file)
