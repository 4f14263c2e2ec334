"""How a clean sample becomes noise, and what a model is trained to predict of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor

from .hashing import hash_tensors


class Process(ABC):
    """A noise process, indexed by timesteps ``0 <= t < num_timesteps``, which key the noise.

    Letters: R rows of a batch. Samples ``[R, ...]`` may have any dimensions.
    """

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """``T``."""

    @abstractmethod
    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples with noise ``[R, ...]``, of clean ones and standard normal noise of one shape."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model is trained to return for `add` of the same arguments, ``[R, ...]``."""

    @abstractmethod
    def weight(self, timesteps: Tensor) -> Tensor:
        """Weights ``[R]`` float32 of the squared error in the variational bound."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything about it that decides numbers, JSON-serialisable."""


class DiscreteProcess(Process):
    """``√ᾱ_t x + √(1 - ᾱ_t) ε`` with the betas of a schedule of Diffusers.

    Attributes:
        scheduler: the training schedule; its ``prediction_type`` says what the model returns.

    Source:
        Ho et al. 2020 (arXiv:2006.11239).
    """

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler

    @property
    def num_timesteps(self) -> int:
        """``T``."""
        return int(self.scheduler.config["num_train_timesteps"])

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Process.add`."""
        noisy: Tensor = self.scheduler.add_noise(clean, noise, timesteps)
        return noisy

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The noise ε, the sample x, or the velocity ``√ᾱ_t ε - √(1 - ᾱ_t) x``.

        Raises:
            ValueError: the prediction type is not epsilon, sample or v_prediction.
        """
        kind = self.scheduler.config["prediction_type"]
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        if kind == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
            return velocity
        raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {kind!r}")

    def weight(self, timesteps: Tensor) -> Tensor:
        """Weights of the variational bound, ``w_t = β_t / (2 α_t (1 - ᾱ_t))``.

        At t = 0 the factor ``β_0 / (1 - ᾱ_0)`` is 1 whatever β_0, so the weight is ``1 / (2 α_0)``
        even for a schedule that starts at β_0 = 0. Infinite where α_t = 0 (the last timestep of a
        schedule with zero terminal SNR).
        """
        # in float32, 1 - ᾱ_t keeps only three digits at the least noisy steps
        betas = self.scheduler.betas.double().cpu()
        alphas = 1 - betas
        ratio = betas / (1 - alphas.cumprod(0))
        ratio[0] = 1
        table = (ratio / (2 * alphas)).float()
        return table.to(timesteps.device)[timesteps]

    def describe(self) -> dict[str, Any]:
        """The configuration of the schedule, and a hash of its betas."""
        config = {
            key: value
            for key, value in sorted(dict(self.scheduler.config).items())
            if not key.startswith("_") and key != "trained_betas"
        }
        return config | {"betas": hash_tensors({"betas": self.scheduler.betas})}


def linear_process() -> DiscreteProcess:
    """The DDPM schedule: β from 1e-4 to 0.02 in T = 1000 equal steps.

    Source:
        Ho et al. 2020 (arXiv:2006.11239), section 4.
    """
    return DiscreteProcess(
        DDPMScheduler(
            num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
        )
    )
