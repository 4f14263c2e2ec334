"""Model output functions f: what a feature is the gradient of, one scalar per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .output_names import check_output_function, import_function

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

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


def training_target(
    scheduler: DDPMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the model was trained to predict, by the scheduler's ``prediction_type``.

    Args:
        scheduler: the training schedule.
        images: ``[R, C, H, W]`` clean.
        noise: ``[R, C, H, W]``.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R, C, H, W]``: the noise ε, the image x, or the velocity ``√ᾱ_t ε - √(1 - ᾱ_t) x``.

    Raises:
        ValueError: the prediction type is not epsilon, sample or v_prediction.
    """
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return images
    if kind == "v_prediction":
        velocity: Tensor = scheduler.get_velocity(images, noise, timesteps)
        return velocity
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {kind!r}")


def elbo_weights(scheduler: DDPMScheduler, timesteps: Tensor) -> Tensor:
    """Weights of the variational bound, ``w_t = β_t / (2 α_t (1 - ᾱ_t))``.

    At t = 0 the factor ``β_0 / (1 - ᾱ_0)`` is 1 whatever β_0, so the weight is ``1 / (2 α_0)`` even
    for a schedule that starts at β_0 = 0. Infinite where α_t = 0 (the last timestep of a schedule
    with zero terminal SNR).

    Args:
        scheduler: the training schedule.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R]`` float32.
    """
    # in float32, 1 - ᾱ_t keeps only three digits at the least noisy steps
    betas = scheduler.betas.double().cpu()
    alphas = 1 - betas
    ratio = betas / (1 - alphas.cumprod(0))
    ratio[0] = 1
    table = (ratio / (2 * alphas)).float()
    return table.to(timesteps.device)[timesteps]


def evaluate_output(
    name: str, prediction: Tensor, target: Tensor, scheduler: DDPMScheduler, timesteps: Tensor
) -> Tensor:
    """The output function ``name``, one scalar per row.

    Args:
        name: as in `check_output_function`.
        prediction: ``[R, C, H, W]`` what the model returned.
        target: ``[R, C, H, W]`` what it was trained to return.
        scheduler: gives the weights of ``weighted_mse``.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R]``, float32 (float64 for a float64 model).

    Raises:
        ValueError: the name is unknown (it does not quietly become ``loss``), or a function of
            one's own does not return ``[R]`` floating numbers, each of its own row alone.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    arguments = (
        prediction.to(dtype).flatten(1),
        target.to(dtype).flatten(1),
        elbo_weights(scheduler, timesteps).to(dtype),
    )
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
