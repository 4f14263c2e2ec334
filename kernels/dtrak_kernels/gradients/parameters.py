"""Which parameters of a model are chosen, and where in it they were found."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .hooks import Layer

ParameterChoice = Iterable[str] | Callable[[str, nn.Parameter], bool] | None
# (where it is registered, as what, the module or parameter, its name in the model)
Place = tuple[dict[str, Any], str, Any, str]


def choose_parameters(model: nn.Module, choice: ParameterChoice) -> dict[str, nn.Parameter]:
    """The chosen parameters by name, in ``named_parameters()`` order; without those of no element.

    Args:
        model: whose.
        choice: names, a predicate, or None for all that require a gradient.

    Raises:
        ValueError: a name is unknown, a parameter is not real, not initialised or sharded, or none
            is left.
    """
    if isinstance(choice, str):
        raise ValueError(f"parameters must be several names or a predicate, got {choice!r}")
    named = dict(model.named_parameters())
    if choice is None:
        chosen = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    elif callable(choice):
        chosen = {name: parameter for name, parameter in named.items() if choice(name, parameter)}
    else:
        names = set(choice)
        for name in sorted(names - named.keys()):
            close = difflib.get_close_matches(name, named, n=1)
            hint = f"; the closest is {close[0]!r}" if close else ""
            raise ValueError(f"parameters must name parameters of the model, got {name!r}{hint}")
        chosen = {name: parameter for name, parameter in named.items() if name in names}
    for name, parameter in chosen.items():
        if is_lazy(parameter):
            raise ValueError(
                f"parameters must be initialised, got {name!r} that waits for a first forward"
            )
        # a DTensor, as FSDP2 leaves them: whole only while its module runs
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"parameters must be whole in every process, got {name!r} that is sharded: give "
                "fully_shard those that are attributed as ignored_params, which shards the others"
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameters must be real floating numbers, got {name!r} of {parameter.dtype}"
            )
    chosen = {name: parameter for name, parameter in chosen.items() if parameter.numel()}
    if not chosen:
        raise ValueError("parameters must choose at least one parameter that requires a gradient")
    return chosen


def find_places(model: nn.Module, layers: Iterable[Layer]) -> list[Place]:
    """Where the layers, the modules that they are in, and their chosen parameters are registered.

    Args:
        model: whose.
        layers: of the model.
    """
    paths = {module: name for name, module in model.named_modules()}
    places: dict[str, Place] = {}
    for layer in layers:
        path, parent = paths[layer.module], model
        parts = path.split(".") if path else []
        for depth, part in enumerate(parts, start=1):
            name, child = ".".join(parts[:depth]), parent._modules[part]
            places[name] = parent._modules, part, child, name
            assert child is not None
            parent = child
        for attribute in layer.owned:
            name = f"{path}.{attribute}" if path else attribute
            registered, key = registered_at(layer.module, attribute)
            places[name] = registered, key, registered[key], name
    return list(places.values())


def registered_at(module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """The table that a parameter of a module, or of one inside it, is registered in, and as what.

    Args:
        module: where the path begins.
        path: of the parameter.
    """
    inside, _, key = path.rpartition(".")
    table: Any = module.get_submodule(inside)._parameters
    return table, key


def check_places(places: Iterable[Place]) -> None:
    """Refuse a model whose layers or parameters were replaced.

    Args:
        places: of `find_places`.

    Raises:
        RuntimeError: something else is registered at one of them.
    """
    for registered, key, value, name in places:
        if registered.get(key) is not value:
            raise RuntimeError(
                f"{name!r} of the model was replaced after the sketcher was made: make a new one"
            )
