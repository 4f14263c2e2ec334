"""Model output functions f: what a feature is the gradient of. One scalar per sample and timestep."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

import torch
from diffusers import SchedulerMixin
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
    "l2_norm": lambda u, target, weight: u.square().sum(1).sqrt(),
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
    close = difflib.get_close_matches(value.replace("-", "_"), valid, n=1, cutoff=0.3)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"{option} must be one of {', '.join(valid)}, got {value!r}{hint}")


def select_timesteps(num_timesteps: int, strategy: str, num_train_timesteps: int = 1000) -> list[int]:
    """The S timestep indices a feature averages over.

    Args:
        num_timesteps: ``S``, in ``[1, num_train_timesteps]``.
        strategy: ``"uniform"``: 0, ⌊T/S⌋, 2⌊T/S⌋, …; ``"cumulative"``: 0 to S - 1, the least noisy ones.
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


def training_target(scheduler: SchedulerMixin, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the model was trained to predict, by the scheduler's ``prediction_type``.

    Raises:
        ValueError: the prediction type is not epsilon, sample or v_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return images
    if kind == "v_prediction":
        return scheduler.get_velocity(images, noise, timesteps)
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {kind!r}")


def elbo_weights(scheduler: SchedulerMixin, timesteps: Tensor) -> Tensor:
    """Weights of the variational bound, ``β_t / (2 α_t (1 - ᾱ_t))``, ``[R]``."""
    cumulative = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    betas = scheduler.betas.to(timesteps.device)[timesteps]
    return betas / (2 * (1 - betas) * (1 - cumulative))


def evaluate_output(
    name: str, prediction: Tensor, target: Tensor, scheduler: SchedulerMixin, timesteps: Tensor
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
