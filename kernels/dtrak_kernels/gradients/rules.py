"""Exact per-sample gradients of the parameters of common layers, from a forward and a backward.

A rule gives the small parameters (biases, norm weights) whole; the weight of a `WeightModule` is
streamed by `weight.weight_grads` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weight import CONVOLUTIONS, Convolution, is_conv1d

# (module, input, output gradient in the features' dtype, rows per sample, *statistics)
#     -> (attribute, [B, n])
Rule = Callable[..., Iterator[tuple[str, Tensor]]]


def _over_positions(rows: Tensor, rows_per_sample: int) -> Tensor:
    """``[R, O, ...]`` summed over all but samples and channels."""
    sums = _over_leading(rows, rows.shape[1:], rows_per_sample) if rows_per_sample > 1 else rows
    return sums.flatten(2).sum(2) if rows.ndim > 2 else sums


def _over_leading(grads: Tensor, normalized_shape: tuple[int, ...], rows_per_sample: int) -> Tensor:
    """``[R, ..., *normalized_shape]`` summed over all that is not a sample or normalised."""
    return grads.reshape(grads.shape[0] // rows_per_sample, -1, *normalized_shape).sum(1)


def _affine_grads(
    module: nn.Linear | Convolution, x: Tensor, output_grads: Tensor, rows_per_sample: int
) -> Iterator[tuple[str, Tensor]]:
    bias = module.bias
    if bias is None:
        return
    if isinstance(module, CONVOLUTIONS):
        yield "bias", _over_positions(output_grads, rows_per_sample)
    else:
        yield "bias", _over_leading(output_grads, bias.shape, rows_per_sample)


def _embedding_grads(
    module: nn.Embedding, x: Tensor, output_grads: Tensor, rows_per_sample: int
) -> Iterator[tuple[str, Tensor]]:
    return iter(())


def _group_norm_grads(
    module: nn.GroupNorm,
    x: Tensor,
    output_grads: Tensor,
    rows_per_sample: int,
    *statistics: Tensor,
) -> Iterator[tuple[str, Tensor]]:
    if not module.affine:
        return
    # one row, whose channels are those of all rows: what is summed over rows stays apart
    rows = x.shape[0]
    channels, groups = rows * module.num_channels, rows * module.num_groups
    if x.dtype != output_grads.dtype:
        x, statistics = x.to(output_grads.dtype), ()
    x, d = (t.contiguous().view(1, channels, -1) for t in (x, output_grads))
    size = 1, channels, x.shape[2], groups
    if not statistics:
        _, *made = torch.native_group_norm(x, None, None, *size, module.eps)
        statistics = tuple(made)
    statistics = tuple(t.view(1, groups) for t in statistics)
    # of this weight only the shape counts
    weight = x.new_empty(channels)
    _, *sums = torch.ops.aten.native_group_norm_backward(
        d, x, *statistics, weight, *size, [False, True, True]
    )
    for attribute, grads in zip(("weight", "bias"), sums, strict=True):
        yield attribute, grads.view(-1, rows_per_sample, module.num_channels).sum(1)


def kept_statistics(output: Tensor) -> list[Tensor]:
    """Means and inverse deviations of a group normalisation's groups, ``[R, G]`` each.

    They cost a pass over the input, and autograd has them already.

    Args:
        output: of any layer, whose forward ran without hooks on saved tensors: such a hook may run
            the forward again.

    Returns:
        Nothing where autograd does not have them.
    """
    node: Any = output.grad_fn
    if type(node).__name__ != "NativeGroupNormBackward0":
        return []
    # they know the node that made them, which would be kept by what it keeps
    return [node._saved_result1.detach(), node._saved_result2.detach()]


def _layer_norm_grads(
    module: nn.LayerNorm, x: Tensor, output_grads: Tensor, rows_per_sample: int
) -> Iterator[tuple[str, Tensor]]:
    shape = tuple(module.normalized_shape)
    if module.weight is None:
        return
    normalised = F.layer_norm(x.to(output_grads.dtype), shape, eps=module.eps)
    yield "weight", _over_leading(output_grads * normalised, shape, rows_per_sample)
    if module.bias is not None:
        yield "bias", _over_leading(output_grads, shape, rows_per_sample)


def _rms_norm_grads(
    module: nn.RMSNorm, x: Tensor, output_grads: Tensor, rows_per_sample: int
) -> Iterator[tuple[str, Tensor]]:
    if module.weight is None:
        return
    shape = tuple(module.normalized_shape)
    # the default is that of the dtype the module computed in: never less than float32
    wide = torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(wide).eps if module.eps is None else module.eps
    normalised = F.rms_norm(x.to(output_grads.dtype), list(shape), eps=eps)
    yield "weight", _over_leading(output_grads * normalised, shape, rows_per_sample)


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _affine_grads,
    nn.Embedding: _embedding_grads,
    nn.GroupNorm: _group_norm_grads,
    nn.LayerNorm: _layer_norm_grads,
    nn.RMSNorm: _rms_norm_grads,
    **dict.fromkeys(CONVOLUTIONS, _affine_grads),
}


def own_rule(module: nn.Module) -> Rule | None:
    """The rule of a module whose forward is the one that a rule was written for."""
    if is_conv1d(module):
        return None if "forward" in vars(module) else _affine_grads
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            return None if any(_is_own(module, kind, name) for name in _METHODS) else rule
    return None


# a convolution's forward calls the other one, which patches for tiled images replace
_METHODS = ("forward", "_conv_forward")


def _is_own(module: nn.Module, kind: type[nn.Module], method: str) -> bool:
    """Whether a module's method is another one than that of its kind."""
    of_type, of_kind = (getattr(t, method, None) for t in (type(module), kind))
    return of_type is not of_kind or method in vars(module)


def rule_applies(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the module's options and input are what its rule was written for."""
    if len(args) != 1 or kwargs:
        return False
    # unbatched images, whose first dimension is not the batch
    if isinstance(module, CONVOLUTIONS):
        return args[0].ndim == len(module.kernel_size) + 2
    return not (
        isinstance(module, nn.Embedding)
        and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse)
    )


def find_rule(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule | None:
    """The module's own rule, if its forward and its input are what the rule was written for."""
    return own_rule(module) if rule_applies(module, args, kwargs) else None
