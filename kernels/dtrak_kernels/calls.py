"""What a layer's forward leaves for its backward, and the fallback that runs the layer again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .layer_rules import Rule
from .weight_gradient import WEIGHT_MODULES, WeightModule

_ONE_TENSOR = tree_flatten(((torch.zeros(0),), {}))[1]


@dataclass
class Layer:
    """A module that owns chosen parameters.

    Attributes:
        name: in the model.
        module: the module.
        owned: index of the parameter, by attribute.
        depth: of its forwards that are running, one inside another.
    """

    name: str
    module: nn.Module
    owned: dict[str, int]
    depth: int = 0

    @property
    def title(self) -> str:
        """Its name and kind, for messages."""
        return f"module {self.name!r} ({type(self.module).__name__})"

    @cached_property
    def weighing(self) -> WeightModule | None:
        """The module, if its weight is chosen and one that is streamed."""
        known = "weight" in self.owned and isinstance(self.module, WEIGHT_MODULES)
        return cast("WeightModule", self.module) if known else None


class _Keep(torch.autograd.Function):
    """A node that saves tensors and does nothing else.

    Autograd saves them as it saves any activation: under checkpointing they are dropped, and made
    again in the backward; changed in place meanwhile, they are refused.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None,) * len(ctx.needs_input_grad)


@dataclass
class _Saved:
    """Tensors that a node keeps, under the hooks that checkpointing puts on it."""

    # before torch 2.13 a node lives no longer than the tensor it made
    keeper: Tensor

    def get(self) -> list[Tensor]:
        node: Any = self.keeper.grad_fn
        return list(node.saved_tensors)


@dataclass
class _Held:
    """Tensors kept without a node, which would cost as much as a small layer."""

    tensors: list[Tensor]
    versions: list[int]

    def get(self) -> list[Tensor]:
        if [x._version for x in self.tensors] != self.versions:
            raise RuntimeError("a kept tensor was changed by an inplace operation")
        return list(self.tensors)


def saving_is_hooked() -> bool:
    """Whether hooks on saved tensors are active here, as checkpointing puts them on."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(False) is not None


def _keep(anchor: Tensor, tensors: list[Tensor]) -> _Saved | _Held:
    if saving_is_hooked():
        return _Saved(_Keep.apply(anchor, *tensors))
    return _Held(tensors, [x._version for x in tensors])


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """The leaves of a call's arguments, and how they were put together."""
    # nearly every layer is called like this, and flattening in Python is slow
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return [args[0]], _ONE_TENSOR
    return tree_flatten((args, kwargs))


def has_rows(leaf: Any, rows: int) -> bool:
    """Whether a leaf is a tensor with a row for every row of the batch."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows


class Call:
    """What one forward of a layer saw.

    Args:
        layer: whose.
        rule: the one of `layer_rules` that applies, if any does.
        leaves: of its arguments, see `flatten_call`.
        structure: of its arguments.
        kept: what stands for the tensors among the leaves, in their order.
        output: of the layer, which a layer without a rule is compared with when it runs again.
        anchor: a scalar that requires a gradient.
    """

    def __init__(
        self,
        layer: Layer,
        rule: Rule | None,
        leaves: list[Any],
        structure: TreeSpec,
        kept: list[Tensor],
        output: Tensor,
        anchor: Tensor,
    ) -> None:
        self.layer, self.rule, self._structure = layer, rule, structure
        self._leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        if rule is None:
            kept = [*kept, output.detach().clone()]
            device_type = output.device.type
            self._autocast = (
                device_type,
                torch.get_autocast_dtype(device_type),
                torch.is_autocast_enabled(device_type),
            )
        self._kept = _keep(anchor, kept)

    def _get(self) -> list[Tensor]:
        try:
            return self._kept.get()
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"an input of {self.layer.title} was changed in place after its forward: its "
                "gradient would be wrong"
            ) from error

    def seen(self) -> tuple[Tensor, list[Tensor]]:
        """What stands for the only argument of a layer with a rule, and what its rule is given."""
        x, *statistics = self._get()
        return x, statistics

    def recomputed_grads(
        self, output_grads: Tensor, rows_per_sample: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The fallback: differentiate the layer again, one sample at a time.

        Args:
            output_grads: gradient with respect to its output.
            rows_per_sample: consecutive rows of the batch that make up one sample.

        Yields:
            Index of a parameter, the sample, and its gradient.

        Raises:
            RuntimeError: the layer does not give the same output again.
        """
        layer, module = self.layer, self.layer.module
        for name, child in module.named_modules():
            if isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
                raise RuntimeError(
                    f"{layer.title} has active dropout in {name or 'itself'!r} and would be "
                    "recomputed with other masks: use eval mode"
                )
        saved = self._get()
        original = saved.pop()
        leaves = [saved.pop(0) if leaf is None else leaf[0] for leaf in self._leaves]
        parameters = {attribute: getattr(module, attribute) for attribute in layer.owned}
        device_type, dtype, enabled = self._autocast
        for sample in range(len(output_grads) // rows_per_sample):
            rows = slice(sample * rows_per_sample, (sample + 1) * rows_per_sample)
            args, kwargs = tree_unflatten(
                [leaf[rows] if has_rows(leaf, len(output_grads)) else leaf for leaf in leaves],
                self._structure,
            )
            with torch.enable_grad(), torch.autocast(device_type, dtype, enabled=enabled):
                values = {
                    attribute: parameter.detach().requires_grad_()
                    for attribute, parameter in parameters.items()
                }
                output = torch.func.functional_call(module, values, args, kwargs, tie_weights=False)
                _check_recomputed(layer, output, original[rows])
                # a forward that did not use its parameters
                if not output.requires_grad:
                    continue
                grads = torch.autograd.grad(
                    output, list(values.values()), output_grads[rows], allow_unused=True
                )
            for index, grad in zip(layer.owned.values(), grads, strict=True):
                if grad is not None:
                    yield index, sample, grad


def _check_recomputed(layer: Layer, output: Tensor, original: Tensor) -> None:
    """Refuse a module that does not give the same output twice, or alone as in its batch."""
    difference = (output.detach() - original).norm()
    if not difference <= torch.finfo(original.dtype).eps ** 0.5 * original.norm():
        raise RuntimeError(
            f"{layer.title} gives another output when it is recomputed for one sample: it is "
            "random, has a state, or mixes samples"
        )
