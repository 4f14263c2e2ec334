"""Model output functions f: what a feature is the gradient of, one scalar per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .output_names import check_output_function, import_function

# (prediction, target, weight) -> [R]; prediction and target are flattened, [R, D] float, the weight
# of the variational bound is [R]
OutputFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def _loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return (prediction - target).square().mean(1)


def _weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return weight * _loss(prediction, target, weight)


# formulas: arXiv:2311.00500, table 1; definitions as in D-TRAK's grad_unconditional.py at e2a0c2e
OUTPUT_FUNCTIONS: dict[str, OutputFunction] = {
    "loss": _loss,
    "mean_squared_l2_norm": lambda u, target, weight: u.square().mean(1),
    "mean": lambda u, target, weight: u.mean(1),
    "l1_norm": lambda u, target, weight: u.abs().sum(1),
    # not sqrt of a sum: its gradient at an output of zero is zero, not NaN
    "l2_norm": lambda u, target, weight: torch.linalg.vector_norm(u, dim=1),
    "linf_norm": lambda u, target, weight: u.abs().amax(1),
    "weighted_mse": _weighted_mse,
}


def evaluate_output(name: str, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The output function ``name``, one scalar per row.

    Args:
        name: as in `check_output_function`.
        prediction: ``[R, ...]`` what the model returned.
        target: ``[R, ...]`` what it was trained to return.
        weight: ``[R]`` of the rows in the variational bound, as `Process.weight`.

    Returns:
        ``[R]``, float32 (float64 for a float64 model).

    Raises:
        ValueError: the name is unknown (it does not quietly become ``loss``), or a function of
            one's own does not return ``[R]`` floating numbers, each of its own row alone.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    arguments = prediction.to(dtype).flatten(1), target.to(dtype).flatten(1), weight.to(dtype)
    name = check_output_function(name)
    if name in OUTPUT_FUNCTIONS:
        return OUTPUT_FUNCTIONS[name](*arguments)
    return _evaluate_own(name, *arguments)


def _evaluate_own(name: str, prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """A user's function, its result checked."""
    function: OutputFunction = import_function(name)
    values = function(prediction, target, weight)
    rows = len(prediction)
    if not isinstance(values, Tensor) or values.shape != (rows,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"output function {name!r} must return one scalar per row, [{rows}], got {got}"
        )
    if not values.is_floating_point():
        raise ValueError(
            f"output function {name!r} must return floating numbers, got {values.dtype}"
        )
    if prediction.requires_grad and not values.requires_grad:
        raise ValueError(
            f"output function {name!r} must be a differentiable function of the prediction, got "
            "values without a gradient"
        )
    if rows > 1:
        with torch.no_grad():
            alone = float(function(prediction[:1], target[:1], weight[:1]))
            among, scale = float(values[0]), float(values.abs().max())
        # one row among many may be reduced in another order
        if alone != among and not abs(alone - among) <= 1e-3 * scale:
            raise ValueError(
                f"output function {name!r} must treat every row by itself, got {alone:.6g} for a "
                f"row alone and {among:.6g} among {rows}"
            )
    return values
