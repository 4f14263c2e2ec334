"""Model output functions f: what a feature is the gradient of, one scalar per row."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch
from diffusers import DDPMScheduler
from torch import Tensor

# (prediction, target, weight) -> [R]; prediction and target are flattened, [R, D] float
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

TIMESTEP_STRATEGIES = ("uniform", "cumulative")


def check_choice(option: str, value: str, valid: Iterable[str]) -> str:
    """``value`` if it is one of ``valid``.

    Raises:
        ValueError: it is not; the message names the closest valid value.
    """
    valid = list(valid)
    if value in valid:
        return value
    close = difflib.get_close_matches(value.lower().replace("-", "_"), valid, n=1, cutoff=0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{option} must be one of {', '.join(valid)}, got {value!r}{hint}")


def select_timesteps(
    num_timesteps: int, strategy: str, num_train_timesteps: int = 1000
) -> list[int]:
    """The S timestep indices a feature averages over.

    Args:
        num_timesteps: ``S``, in ``[1, num_train_timesteps]``.
        strategy: ``"uniform"``: 0, ⌊T/S⌋, 2⌊T/S⌋, …; ``"cumulative"``: 0 to S - 1, the least noisy.
        num_train_timesteps: ``T``.

    Raises:
        ValueError: the strategy is unknown or S is out of range.

    Source:
        D-TRAK's grad_unconditional.py at e2a0c2e.
    """
    check_choice("timestep strategy", strategy, TIMESTEP_STRATEGIES)
    if not 1 <= num_timesteps <= num_train_timesteps:
        raise ValueError(
            f"timesteps must be in [1, {num_train_timesteps}], the model's number of training "
            f"timesteps, got {num_timesteps}"
        )
    stride = num_train_timesteps // num_timesteps if strategy == "uniform" else 1
    return [step * stride for step in range(num_timesteps)]


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
        name: a key of `OUTPUT_FUNCTIONS`.
        prediction: ``[R, C, H, W]`` what the model returned.
        target: ``[R, C, H, W]`` what it was trained to return.
        scheduler: gives the weights of ``weighted_mse``.
        timesteps: ``[R]`` timestep indices.

    Returns:
        ``[R]``, float32 (float64 for a float64 model).

    Raises:
        ValueError: the name is unknown (it does not quietly become ``loss``).
    """
    check_choice("output function", name, OUTPUT_FUNCTIONS)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return OUTPUT_FUNCTIONS[name](
        prediction.to(dtype).flatten(1),
        target.to(dtype).flatten(1),
        elbo_weights(scheduler, timesteps).to(dtype),
    )
