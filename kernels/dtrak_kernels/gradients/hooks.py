"""What a layer's forward leaves for its backward, and the fallback that runs the layer again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .rules import Rule
from .weight import WEIGHT_MODULES, WeightModule

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


class Watched(partial[Any]):
    """What takes the place of a module's forward inside a batch, with the forward's signature."""

    __wrapped__: Callable[..., Any]

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError(
            "a model must not be copied inside a batch of its sketcher: the copy would run the "
            "forwards of the original"
        )


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


def is_discrete(output: Any) -> bool:
    """Whether it is a tensor that has no gradient."""
    return isinstance(output, Tensor) and not (output.is_floating_point() or output.is_complex())


def versions_of(layer: Layer, inputs: list[Tensor]) -> list[int]:
    """Numbers that change with the inputs of a layer.

    Raises:
        RuntimeError: one has none.
    """
    try:
        return [x._version for x in inputs]
    except RuntimeError as error:
        raise RuntimeError(
            f"an input of {layer.title} was made in inference mode, so autograd cannot use it: "
            "pass a clone"
        ) from error


def check_forward(
    layer: Layer, rows: int, inputs: list[Tensor], versions: list[int], output: Any
) -> None:
    """Refuse what has no per-sample gradient, or none that can be had from its inputs.

    Args:
        layer: whose forward ran.
        rows: of the batch, samples x rows_per_sample.
        inputs: all tensors that it was given.
        versions: of the inputs, before.
        output: what it gave.

    Raises:
        RuntimeError: naming the layer.
    """
    if not isinstance(output, Tensor):
        raise RuntimeError(
            f"{layer.title} must return one tensor for its parameters "
            f"{', '.join(layer.owned)} to be attributed, got {type(output).__name__}"
        )
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{layer.title} ran inside forward-mode differentiation: what its parameters do to "
            "tangents cannot be seen"
        )
    if rows == 0:
        return
    if [x._version for x in inputs] != versions:
        raise RuntimeError(
            f"{layer.title} changes its input in place: its gradient cannot be recomputed"
        )
    seen = output.shape[0] if output.ndim else 0
    if not inputs or seen != rows or not any(has_rows(x, rows) for x in inputs):
        raise RuntimeError(
            f"{layer.title} must see and return {rows} rows (samples x "
            f"rows_per_sample), got output {list(output.shape)} from inputs "
            f"{[list(x.shape) for x in inputs]}: work shared between samples has no "
            "per-sample gradient"
        )


class _Forward(nn.Module):
    """Runs a module without the hooks on it: it is given, and gives, what is between them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


class Call:
    """What one forward of a layer saw.

    Args:
        layer: whose.
        rule: the one of `rules` that applies, if any does.
        leaves: of its arguments, see `flatten_call`.
        structure: of its arguments.
        kept: what stands for the tensors among the leaves, in their order.
        output: of the layer, which a layer without a rule is compared with when it runs again.
        anchor: a scalar that requires a gradient, of the batch that the forward ran in.
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
        self.layer, self.rule, self.anchor, self._structure = layer, rule, anchor, structure
        self._leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        if rule is None:
            kept = [*kept, output.detach().clone()]
            device_type = output.device.type
            self._autocast = (
                device_type,
                torch.get_autocast_dtype(device_type),
                torch.is_autocast_enabled(device_type),
            )
            self._eps = _coarsest_eps([*kept, *layer.module.parameters()])
            if torch.is_autocast_enabled(device_type):
                self._eps = max(self._eps, torch.finfo(self._autocast[1]).eps)
        self._kept: _Saved | _Held | None = _keep(anchor, kept)

    def get(self) -> list[Tensor]:
        """What was kept; a checkpoint may run its forward again for it.

        Raises:
            RuntimeError: it was changed in place meanwhile, or released.
        """
        if self._kept is None:
            raise RuntimeError(
                f"a second backward went through {self.layer.title}: the first one needs "
                "retain_graph=True"
            )
        try:
            return self._kept.get()
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise RuntimeError(
                f"an input of {self.layer.title} was changed in place after its forward: its "
                "gradient would be wrong"
            ) from error

    def release(self) -> None:
        """Let go of what was kept: its graph may live on."""
        self._kept = None

    def recomputed_grads(
        self, kept: list[Tensor], output_grads: Tensor, rows_per_sample: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The fallback: differentiate the layer again, one sample at a time.

        Args:
            kept: what `get` gave.
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
        *tensors, original = kept
        leaves = [tensors.pop(0) if leaf is None else leaf[0] for leaf in self._leaves]
        parameters = {attribute: getattr(module, attribute) for attribute in layer.owned}
        device_type, dtype, enabled = self._autocast
        bare = _Forward(module)
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
                output = torch.func.functional_call(
                    bare,
                    {f"module.{attribute}": value for attribute, value in values.items()},
                    args,
                    kwargs,
                    tie_weights=False,
                )
                _check_recomputed(layer, output, original[rows], self._eps)
                # a forward that did not use its parameters
                if not output.requires_grad:
                    continue
                grads = torch.autograd.grad(
                    output, list(values.values()), output_grads[rows], allow_unused=True
                )
            for index, grad in zip(layer.owned.values(), grads, strict=True):
                if grad is not None:
                    yield index, sample, grad


def _coarsest_eps(tensors: list[Tensor]) -> float:
    """Of the tensors' dtypes: what computes with them is no more exact than that."""
    dtypes = {x.dtype for x in tensors if x.is_floating_point() or x.is_complex()}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _check_recomputed(layer: Layer, output: Tensor, original: Tensor, eps: float) -> None:
    """Refuse a module that does not give the same output twice, or alone as in its batch."""
    difference = (output.detach() - original).norm()
    if not difference <= eps**0.5 * original.norm():
        raise RuntimeError(
            f"{layer.title} gives another output when it is recomputed for one sample: it is "
            "random, has a state, or mixes samples"
        )
