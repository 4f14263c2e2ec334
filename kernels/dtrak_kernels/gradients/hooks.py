"""What a layer's forward leaves for its backward, and the fallback that runs the layer again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .rows import CallRows, Rows
from .rules import Rule
from .weight import WEIGHT_MODULES, WeightModule, as_convolution, is_conv1d

_ONE_TENSOR = tree_flatten(((torch.zeros(0),), {}))[1]


@dataclass
class Layer:
    """A module that owns chosen parameters.

    Attributes:
        name: in the model.
        module: the module.
        owned: index of the parameter, by attribute; of a child's that it uses itself, by path.
        sample_dim: in which dimension of its tensors the samples are.
        depth: of its forwards that are running, one inside another.
        shared: it was found to run once for the whole batch.
        finer: numbers of rows per sample that it was found to see beside the batch's.
    """

    name: str
    module: nn.Module
    owned: dict[str, int]
    sample_dim: int = 0
    depth: int = 0
    shared: bool = False
    finer: set[int] = field(default_factory=set)

    @property
    def title(self) -> str:
        """Its name and kind, for messages."""
        return f"module {self.name!r} ({type(self.module).__name__})"

    @cached_property
    def weighing(self) -> WeightModule | None:
        """The module, or one that does the same, if its weight is chosen and streamed."""
        if "weight" in self.owned and is_conv1d(self.module):
            return as_convolution(self.module)
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


# what a forward may return beside tensors
_PLAIN = (bool, int, float, str, type(None))


def tensors_of(layer: Layer, output: Any) -> tuple[list[Any], TreeSpec, list[int]]:
    """The leaves of what a layer returned, how they were put together, and which are its outputs.

    Raises:
        RuntimeError: there is none, or something that may hide one; naming the layer.
    """
    leaves, structure = tree_flatten(output)
    numbers = [
        number
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor) and not is_discrete(leaf)
    ]
    hidden = next((x for x in leaves if not isinstance(x, (Tensor, *_PLAIN))), None)
    if hidden is not None or not numbers:
        got = output if hidden is None else hidden
        raise RuntimeError(
            f"{layer.title} must return tensors, or tuples or dicts of them, for its parameters "
            f"{', '.join(layer.owned)} to be attributed, got {type(got).__name__}"
        )
    return leaves, structure, numbers


class Seen:
    """What a forward of a layer was given.

    Args:
        layer: the layer.
        args: of its forward.
        kwargs: of its forward.

    Attributes:
        leaves: of both, see `flatten_call`.
        structure: how they were put together.
        inputs: the tensors among the leaves.

    Raises:
        RuntimeError: an input was made in inference mode.
    """

    def __init__(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.leaves, self.structure = flatten_call(args, kwargs)
        self.inputs = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self._versions = versions_of(layer, self.inputs)

    def check(self) -> None:
        """Refuse a forward that ran and whose gradient cannot be had from its inputs.

        Raises:
            RuntimeError: naming the layer.
        """
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{self.layer.title} ran inside forward-mode differentiation: what its parameters "
                "do to tangents cannot be seen"
            )
        if [x._version for x in self.inputs] != self._versions:
            raise RuntimeError(
                f"{self.layer.title} changes its input in place: its gradient cannot be recomputed"
            )


def fresh(output: Tensor, anchor: Tensor) -> Tensor:
    """A layer's output, with a node of its own that its gradient passes."""
    if not output.requires_grad:
        # nothing upstream needs a gradient, yet this layer's output gradient must be seen
        return output + anchor.to(output.dtype)
    # changed in place, a view would take another history and leave the hook behind; an input that
    # is given back has none
    return output.clone() if output._is_view() or output.is_leaf else output


class _Gate(torch.autograd.Function):
    """A node that several outputs of a layer pass, so that their gradients come together."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (None, *grads)


def gate(anchor: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, made by one node, which receives their gradients together."""
    return list(_Gate.apply(anchor, *tensors))


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
        seen: what it was given.
        rule: the one of `rules` that applies, if any does.
        kept: what stands for the tensors among the leaves, in their order.
        outputs: of the layer, which a layer without a rule is compared with when it runs again.
        rows: where the tensors have the rows of the batch.
        anchor: a scalar that requires a gradient, of the batch that the forward ran in.
    """

    def __init__(
        self,
        seen: Seen,
        rule: Rule | None,
        kept: list[Tensor],
        outputs: Sequence[Tensor],
        rows: CallRows,
        anchor: Tensor,
    ) -> None:
        self.layer, self.rule, self.rows, self.anchor = seen.layer, rule, rows, anchor
        self._structure = seen.structure
        # without the tensors, which would be kept
        self._leaves = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in seen.leaves]
        if rule is None:
            kept = [*kept, *(output.detach().clone() for output in outputs)]
            device_type = autocast_type(outputs[0])
            self._autocast = (
                device_type,
                torch.get_autocast_dtype(device_type),
                torch.is_autocast_enabled(device_type),
            )
            self._eps = _coarsest_eps([*kept, *self.layer.module.parameters()])
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
        self,
        kept: list[Tensor],
        output_grads: list[Tensor | None],
        num_samples: int,
        planned: bool = False,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The fallback: differentiate the layer again, one sample at a time.

        Args:
            kept: what `get` gave.
            output_grads: gradients with respect to its outputs.
            num_samples: B.
            planned: of two samples alone (what is left of one is there while the next one runs),
                without a look at values, which are not there.

        Yields:
            Index of a parameter, the sample, and its gradient.

        Raises:
            RuntimeError: the layer does not give the same output again.
        """
        layer, module = self.layer, self.layer.module
        name = active_dropout(module)
        if name is not None:
            raise RuntimeError(
                f"{layer.title} has active dropout in {name or 'itself'!r} and would be "
                "recomputed with other masks: use eval mode"
            )
        tensors, originals = kept[: -len(output_grads)], kept[-len(output_grads) :]
        leaves = [tensors.pop(0) if leaf is None else leaf[0] for leaf in self._leaves]
        parameters = {path: module.get_parameter(path) for path in layer.owned}
        device_type, dtype, enabled = self._autocast
        bare = _Forward(module)
        for sample in range(min(num_samples, 2) if planned else num_samples):
            args, kwargs = tree_unflatten(
                [_part(x, rows, sample) for x, rows in zip(leaves, self.rows.leaves, strict=True)],
                self._structure,
            )
            with torch.enable_grad(), torch.autocast(device_type, dtype, enabled=enabled):
                values = {
                    path: parameter.detach().requires_grad_()
                    for path, parameter in parameters.items()
                }
                named = {f"module.{path}": value for path, value in values.items()}
                try:
                    output = torch.func.functional_call(
                        bare, named, args, kwargs, tie_weights=False
                    )
                except Exception as error:
                    first = str(error).partition("\n")[0]
                    raise RuntimeError(
                        f"{layer.title} fails when it is recomputed for one sample, of arguments "
                        f"with as many rows as the batch only those: {first}"
                    ) from error
                again, _, numbers = tensors_of(layer, output)
                made, received = [], []
                for number, rows, original, output_grad in zip(
                    numbers, self.rows.outputs, originals, output_grads, strict=True
                ):
                    if rows is None and num_samples > 1:
                        continue
                    part = _part(original, rows, sample)
                    if not planned:
                        _check_recomputed(layer, again[number], part, self._eps)
                    # a forward that did not use its parameters, an output that is not used
                    if again[number].requires_grad and output_grad is not None:
                        made.append(again[number])
                        received.append(_part(output_grad, rows, sample))
                if not made:
                    continue
                grads = torch.autograd.grad(
                    made, list(values.values()), received, allow_unused=True
                )
            for index, grad in zip(layer.owned.values(), grads, strict=True):
                if grad is not None:
                    yield index, sample, grad


def autocast_type(x: Tensor) -> str:
    """Type of the device whose autocast counts for a tensor."""
    # nothing runs on the meta device
    return "cpu" if x.is_meta else x.device.type


def active_dropout(module: nn.Module) -> str | None:
    """Name, in a module, of what drops at random now; None if nothing is known to."""
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            p = child.p
        elif isinstance(child, nn.MultiheadAttention | nn.RNNBase):
            p = child.dropout
        else:
            continue
        if child.training and p > 0:
            return name
    return None


def _part(x: Any, rows: Rows | None, sample: int) -> Any:
    return x if rows is None else rows.of_sample(x, sample)


def _coarsest_eps(tensors: list[Tensor]) -> float:
    """Of the tensors' dtypes: what computes with them is no more exact than that."""
    dtypes = {x.dtype for x in tensors if x.is_floating_point() or x.is_complex()}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _check_recomputed(layer: Layer, output: Tensor, original: Tensor, eps: float) -> None:
    """Refuse a module that does not give the same output twice, or alone as in its batch."""
    if output.shape != original.shape:
        raise RuntimeError(
            f"{layer.title} gives an output of another shape when it is recomputed for one sample: "
            f"{list(output.shape)}, not {list(original.shape)}"
        )
    difference = (output.detach() - original).norm()
    if not difference <= eps**0.5 * original.norm():
        raise RuntimeError(
            f"{layer.title} gives another output when it is recomputed for one sample: it is "
            "random, has a state, or mixes samples"
        )
