"""How a clean sample becomes noise, and what a model is trained to predict of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

from ..runs.choices import DENSITIES, SHIFTS, check_choice
from .hashing import hash_tensors

PREDICTIONS = ("epsilon", "sample", "v_prediction")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
# of the mode density, as in Diffusers' training scripts
_MODE_SCALE = 1.29


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
    def weight(self, timesteps: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Weights ``[R]`` float32 of the squared error in the variational bound; as `time`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything about it that decides numbers, JSON-serialisable."""

    def time(self, timesteps: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """What a model is told of the timesteps ``[R]``: the indices, where nothing else is said.

        Args:
            timesteps: indices below ``num_timesteps``.
            shape: of one sample, for a process that depends on the resolution.
        """
        return timesteps

    def levels(self, timesteps: Sequence[int], shape: Sequence[int]) -> list[float] | None:
        """Noise levels σ of timesteps for samples of a shape, for manifests; None for no σ."""
        return None

    def spread(self, count: int) -> list[int]:
        """``count`` distinct timesteps, spread evenly over the density that training draws from.

        Args:
            count: in ``[1, num_timesteps]``.
        """
        stride = self.num_timesteps // count
        return [step * stride for step in range(count)]

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps ``[count]`` int64 of a training batch, on the CPU."""
        return torch.randint(self.num_timesteps, (count,), generator=generator)

    def sampler(self, **changes: Any) -> Any:
        """A fresh scheduler of Diffusers that draws without chance.

        Args:
            changes: of its configuration.

        Raises:
            ValueError: this process has none.
        """
        raise ValueError(f"a {type(self).__name__} must have a sampler to draw with, got none")

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """What training descends, a scalar, of `target` and what the model returned for it."""
        return F.mse_loss(prediction.float(), target)


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

    def weight(self, timesteps: Tensor, shape: Sequence[int] | None = None) -> Tensor:
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

    def sampler(self, **changes: Any) -> DDIMScheduler:
        """DDIM (η = 0).

        Source:
            Song et al. 2021 (arXiv:2010.02502).
        """
        return DDIMScheduler.from_config(self.scheduler.config, **changes)

    def describe(self) -> dict[str, Any]:
        """The configuration of the schedule, and a hash of its betas."""
        config = _config(self.scheduler)
        config.pop("trained_betas", None)
        return config | {"betas": hash_tensors({"betas": self.scheduler.betas})}


class FlowMatching(Process):
    """``(1 - σ) x + σ ε``, of which a model is trained to return the velocity ``ε - x``.

    Timestep 0 is the least noisy one, as everywhere here; σ is ``scheduler.sigmas`` from the end.

    Args:
        scheduler: the schedule, with its shift.
        density: of the timesteps that training draws, one of `choices.DENSITIES`; logit-normal with
            mean 0 and deviation 1.
        weighting: of the squared error in training, one of `WEIGHTINGS`.
        shift: one of `choices.SHIFTS`. ``"scheduler"`` takes the σ that the scheduler is made with,
            as Diffusers' training scripts do: unshifted where its shift depends on the resolution.
            ``"resolution"`` shifts those by the number of tokens of a sample.
        patch: latent pixels along one side of a token, for ``"resolution"``.

    Attributes:
        scheduler: as above.
        sigmas: ``[T]`` float32, rising, as the scheduler has them.

    Raises:
        ValueError: an option is unknown, or the schedule does not shift by resolution although
            that is asked for.

    Source:
        Lipman et al. 2023 (arXiv:2210.02747); Esser et al. 2024 (arXiv:2403.03206), sections 3.1
        and 5.3.2; Diffusers' train_dreambooth_lora_sd3.py and train_dreambooth_lora_flux.py.
    """

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        density: str = "uniform",
        weighting: str = "none",
        shift: str = "scheduler",
        patch: int = 1,
    ) -> None:
        check_choice("density", density, DENSITIES)
        check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("shift", shift, SHIFTS)
        if shift == "resolution" and not scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(
                "shift must be 'scheduler' for a schedule without use_dynamic_shifting, got "
                "'resolution'"
            )
        # a fresh one: drawing replaces the sigmas of a scheduler by those of its steps
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        self.sigmas: Tensor = self.scheduler.sigmas.flip(0).float()
        self.density, self.weighting, self.shift = density, weighting, shift
        self.patch = patch

    @property
    def num_timesteps(self) -> int:
        """``T``."""
        return len(self.sigmas)

    def sigma(self, timesteps: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Noise levels ``[R]`` float32 of timesteps, for samples of a shape ``(C, h, w)``."""
        table = self.sigmas
        if self.shift == "resolution":
            if shape is None:
                raise ValueError("shape must be given for a shift that depends on it, got none")
            mu = shift_of(self.scheduler, self.tokens(shape))
            table = self.scheduler.time_shift(mu, 1.0, table)
        return table.to(timesteps.device)[timesteps]

    def tokens(self, shape: Sequence[int]) -> int:
        """Tokens of a sample of shape ``(C, h, w)``."""
        return math.prod(side // self.patch for side in shape[1:])

    def _sigma_like(self, samples: Tensor, timesteps: Tensor) -> Tensor:
        sigma = self.sigma(timesteps, samples.shape[1:]).to(samples.dtype)
        return sigma.view(-1, *[1] * (samples.ndim - 1))

    def add(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `Process.add`."""
        sigma = self._sigma_like(clean, timesteps)
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity ``ε - x``."""
        return noise - clean

    def time(self, timesteps: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """``T σ``, float32."""
        return self.sigma(timesteps, shape) * self.num_timesteps

    def levels(self, timesteps: Sequence[int], shape: Sequence[int]) -> list[float]:
        """See `Process.levels`."""
        levels: list[float] = self.sigma(torch.tensor(list(timesteps)), shape).tolist()
        return levels

    def weight(self, timesteps: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Weights of the variational bound per unit of σ, ``(1 - σ) / σ``.

        Source:
            Kingma and Gao 2023 (arXiv:2303.00848), equation 7: half of -dλ/dσ times the squared
            error of ε, which is ``(1 - σ)²`` times the velocity's.
        """
        sigma = self.sigma(timesteps, shape)
        return (1 - sigma) / sigma

    def spread(self, count: int) -> list[int]:
        """The timesteps at the midpoints of ``count`` parts of equal probability, made distinct."""
        T = self.num_timesteps
        places = [self._quantile((step + 0.5) / count) for step in range(count)]
        chosen = [min(T - 1, int(place * T)) for place in places]
        # where the density is steep, neighbours may fall together
        for step in range(1, count):
            chosen[step] = max(chosen[step], chosen[step - 1] + 1)
        for step in reversed(range(count)):
            chosen[step] = min(chosen[step], T - count + step)
        return chosen

    def _quantile(self, probability: float) -> float:
        """Place u in [0, 1] of a noise level, below which training draws with a probability."""
        if self.density == "logit_normal":
            return 1 / (1 + math.exp(-NormalDist().inv_cdf(probability)))
        if self.density == "mode":
            # as drawn: a falling function of a uniform number
            v = 1 - probability
            return 1 - v - _MODE_SCALE * (math.cos(math.pi * v / 2) ** 2 - 1 + v)
        return probability

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Process.draw_timesteps`: of the density."""
        places = compute_density_for_timestep_sampling(
            "none" if self.density == "uniform" else self.density,
            count,
            logit_mean=0.0,
            logit_std=1.0,
            mode_scale=_MODE_SCALE,
            generator=generator,
        )
        return (places * self.num_timesteps).long().clamp(0, self.num_timesteps - 1)

    def sampler(self, **changes: Any) -> FlowMatchEulerDiscreteScheduler:
        """Euler's method."""
        changes["stochastic_sampling"] = False
        return FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config, **changes)

    def nearest(self, times: Tensor, shape: Sequence[int] | None = None) -> list[int]:
        """The timesteps whose `time` is nearest to each of ``times [S]``."""
        every = self.time(torch.arange(self.num_timesteps), shape)
        found: list[int] = (times.cpu()[:, None] - every).abs().argmin(1).tolist()
        return found

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """The squared error of the velocity, weighted as chosen."""
        sigma = self.sigma(timesteps, prediction.shape[1:])
        weight = compute_loss_weighting_for_sd3(self.weighting, sigmas=sigma)
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return (weight * errors).mean()

    def describe(self) -> dict[str, Any]:
        """The configuration of the schedule, a hash of its σ, and how timesteps are weighed."""
        return {
            **_config(self.scheduler),
            "process": "flow matching",
            "sigmas": hash_tensors({"sigmas": self.sigmas}),
            "density": self.density,
            "weighting": self.weighting,
            "shifted by": self.shift,
        }


def take_step(
    scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """One step of a sampler: the next sample, and the clean one that it predicts."""
    if isinstance(scheduler, DDIMScheduler):
        options["eta"] = 0.0
    result = scheduler.step(prediction, timestep, sample, **{**options, "return_dict": True})
    clean = getattr(result, "pred_original_sample", None)
    if clean is None:
        clean = sample - scheduler.sigmas[scheduler.step_index - 1] * prediction
    return result.prev_sample, clean


def shift_of(scheduler: Any, tokens: int) -> float:
    """``mu`` of a schedule that shifts by resolution, for samples of so many tokens.

    Source:
        ``calculate_shift`` of Diffusers' pipelines.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(low + (high - low) * (tokens - few) / (many - few))


def _config(scheduler: Any) -> dict[str, Any]:
    items = sorted(dict(scheduler.config).items())
    return {key: value for key, value in items if not key.startswith("_")}


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
