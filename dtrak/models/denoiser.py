"""What is explained: a network that predicts noise, its process, and what goes with a sample."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ..runs.choices import DRAWN_TOGETHER, NUM_INFERENCE_STEPS
from .hashing import hash_model
from .process import Process

# parameters of a network whose activations are not kept
_LARGE = 2e9

Progress = Callable[[int, int], None]
# tensors by name, one row for each sample
Condition = dict[str, Tensor]


class ModelError(ValueError):
    """A model that cannot be used; the message says why and what was expected."""


class Drawn(NamedTuple):
    """A batch of pictures that a model drew.

    Attributes:
        seeds: B seeds.
        images: ``[B, C, H, W]`` float32 in [-1, 1], on the CPU.
        trajectories: ``[B, S, ...]`` float32 on the CPU: what the model is given, as it predicted
            it without noise at each of the S steps, the noisiest first; or None.
    """

    seeds: list[int]
    images: Tensor
    trajectories: Tensor | None


class Denoiser:
    """A diffusion model as everything else sees it: a kind of model is one subclass in one file.

    Letters: B samples, R rows of a batch, several timesteps of one sample after the other.

    Args:
        module: what is differentiated, in evaluation mode.
        process: how samples become noise.

    Attributes:
        module: as above.
        process: as above.
        reads: what goes with a sample beside its pixels: ``"captions"``, ``"labels"``, or None.
        channels: of a picture; None for samples that are no pictures.
        size: of the pictures it was made for, in pixels: a side, (height, width), or unknown.
        num_classes: that it can tell apart, where it reads labels.
        vae: the autoencoder that pictures go through, where there is one.
        guidance_scale: of classifier-free guidance that pictures are drawn with where nothing else
            is said; None where the model has none.
        num_inference_steps: of drawing, likewise.
        drawn_together: pictures of a batch, likewise.
        adapters: formats of the adapters that it reads, in words; None where it takes none.
        checkpointing: whether the network's activations are made again in the backward, which saves
            memory; None leaves that to its size (above two billion parameters).
        noised_by: its processes, in words.
    """

    reads: str | None = None
    vae: Any = None
    guidance_scale: float | None = None
    num_inference_steps: int = NUM_INFERENCE_STEPS
    drawn_together: int = DRAWN_TOGETHER
    adapters: str | None = None
    noised_by: str = "discrete, flow matching"
    checkpointing: bool | None = None

    def __init__(self, module: nn.Module, process: Process) -> None:
        self.module, self.process = module, process

    @staticmethod
    def of(
        module: nn.Module,
        process: Process,
        predict: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor],
        condition: Callable[[Sequence[Any], torch.device], Condition] | None = None,
    ) -> Denoiser:
        """A model of your own, of which nothing is known but what is given here.

        Args:
            module: what is differentiated; its parameters that require gradients count.
            process: how samples become noise, for instance a `DiscreteProcess`.
            predict: called with (module, noisy ``[R, ...]``, timesteps ``[R]`` int64, condition),
                returns what the process calls the target, shaped like the noisy samples. The module
                may be another one with the same parameters.
            condition: called with (what goes with each of B samples, device), returns tensors
                ``[B, ...]`` by name; None for a model that sees samples and timesteps alone.

        The source of both functions is part of `identity`: features made with another one are not
        used again. What they refer to is not.
        """
        return _Own(module, process, predict, condition)

    @property
    def num_classes(self) -> int | None:
        """See the class."""
        return None

    @property
    def channels(self) -> int | None:
        """See the class."""
        return None

    @property
    def size(self) -> int | tuple[int, int] | None:
        """See the class."""
        return None

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in the model, whose parameters are the only ones that count."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def parameters(self) -> list[str]:
        """Names of the parameters a feature is the gradient of, in ``named_parameters()`` order."""
        return [name for name, p in self.module.named_parameters() if p.requires_grad]

    def inputs(self, pixels: Tensor, device: torch.device) -> Tensor:
        """What noise is added to, ``[B, ...]``, on the device: the pictures ``[B, C, H, W]``."""
        return pixels.to(device)

    def posterior(self, pixels: Tensor, device: torch.device) -> Tensor:
        """Mean and standard deviation of what the model is given, ``[B, 2, ...]``.

        Raises:
            ModelError: the model has no encoder.
        """
        raise ModelError(f"a {type(self.module).__name__} is given pictures as they are")

    def input_shape(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Shape of one sample of `inputs`, for pictures of shape ``(C, H, W)``.

        Raises:
            ValueError: the model takes no pictures of that shape.
        """
        return tuple(pixels)

    @property
    def encoding(self) -> dict[str, Any] | None:
        """What decides `inputs`, JSON-serialisable; None where they are the pictures themselves."""
        return None

    def condition(self, items: Sequence[Any] | None, device: torch.device) -> Condition:
        """What `predict` reads beside the noisy samples, for what goes with each of B samples.

        Args:
            items: B captions or labels, as ``reads`` says.
            device: where the result goes.

        Raises:
            ValueError: they are none, or cannot be read; the message says which.
        """
        return {}

    def prepare(self, items: Sequence[Any] | None, device: torch.device) -> None:
        """Make room for features: `condition` of all items ahead, what made it off the device.

        Args:
            items: those that features will be made of, or None.
            device: of the features.
        """

    def identify_items(self, items: Sequence[Any]) -> str | None:
        """Hash of what the model makes of captions or labels, for manifests; None for nothing."""
        return None

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        """What the module returns for noisy samples ``[R, ...]``, shaped like them.

        Args:
            noisy: R rows, on the module's device.
            timesteps: ``[R]`` indices below ``process.num_timesteps``.
            condition: of `condition`, with a row for each of the R.
            module: what is called in the place of its own, for instance with other weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how its module is called")

    def draw(
        self,
        seeds: Sequence[int],
        items: Sequence[Any] | None = None,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        trajectories: bool = False,
        progress: Progress | None = None,
    ) -> Iterator[Drawn]:
        """Draw one picture per seed, batch by batch, each when it is asked for.

        Every picture starts from noise of a CPU generator of its own, so it does not depend on
        which others are drawn with it (up to rounding: a batch of another size may be multiplied
        otherwise), nor on the device or the dtype of the model.

        Args:
            seeds: M seeds in ``[0, 2**32)``.
            items: M captions or labels, for a model that reads them.
            num_inference_steps: DDIM steps (η = 0) or a flow's Euler steps, in ``[1, T]``; None is
                the model's own.
            guidance_scale: of classifier-free guidance, where the model has any; None is its own.
            size: of the pictures in pixels; None is the model's own.
            batch_size: pictures drawn at a time; None is what suits the model.
            trajectories: keep the clean samples predicted at every step, too.
            progress: called with (steps done, steps), summed over batches, after every step.

        Raises:
            ValueError: a number is out of range, items are missing or too many, or a picture is not
                finite (from which seed).
            ModelError: this kind of model cannot draw.
        """
        raise ModelError(
            f"the model must know how to draw pictures, got a {type(self.module).__name__} that "
            "does not: give the pictures to explain as a folder"
        )

    def drawing_timesteps(self, num_inference_steps: int) -> list[int]:
        """The timesteps of `draw`, the noisiest first."""
        raise ModelError(f"a {type(self.module).__name__} does not draw pictures here")

    def identity(self) -> dict[str, str]:
        """Hashes of all weights that decide features, for manifests."""
        return {"model": hash_model(self.module)}

    def with_module(self, module: nn.Module) -> Self:
        """The same model round another network of the same kind."""
        other = copy.copy(self)
        other.module = module
        return other

    def to(self, device: torch.device, dtype: str | None = None) -> None:
        """Put the module on its device, its weights in float64 for ``"float64"``.

        Args:
            device: of the weights.
            dtype: that features are made in, one of `choices.DTYPES`; None leaves the weights.

        Raises:
            ModelError: ``checkpointing`` is asked for, and the network cannot do it.
        """
        self._choose_checkpointing()
        self.module.to(device)
        if dtype == "float64":
            self.module.double()

    def _choose_checkpointing(self) -> None:
        """Let the network keep its activations or not, where that is asked for or it is large."""
        module: Any = self.module
        is_large = sum(parameter.numel() for parameter in module.parameters()) > _LARGE
        can = getattr(module, "_supports_gradient_checkpointing", False)
        if self.checkpointing and not can:
            raise ModelError(
                "--checkpointing must go with a network of Diffusers that can make its activations "
                f"again, got a {type(module).__name__}"
            )
        if can and (is_large if self.checkpointing is None else self.checkpointing):
            module.enable_gradient_checkpointing()
        elif can and self.checkpointing is False:
            module.disable_gradient_checkpointing()

    def put_adapter(self, rank: int, *, seed: int = 0, targets: Sequence[str] = ()) -> Self:
        """Put a fresh adapter into the model, in the place of the one there is, if any.

        Args:
            rank: of the adapter.
            seed: of its weights.
            targets: ends of the names of the layers that get one; the kind's own by default.

        Raises:
            ModelError: this kind of model takes none.
        """
        raise ModelError(f"a {type(self.module).__name__} takes no adapter here")

    def load_adapter(self, folder: str | Path) -> Self:
        """Put an adapter from a folder or file into the model, likewise; raises as above."""
        raise ModelError(f"a {type(self.module).__name__} takes no adapter here")

    def adapter(self) -> dict[str, Any]:
        """``rank`` and ``targets`` of the adapter that is there, as `put_adapter` takes them.

        Raises:
            ModelError: there is none, or one that `put_adapter` does not make.
        """
        raise ModelError(f"a {type(self.module).__name__} has no adapter here")

    def base_identity(self) -> dict[str, str]:
        """`identity` without an adapter."""
        return self.identity()

    def fresh(self, seed: int) -> Denoiser:
        """An untrained model of the same kind, to be trained on part of the data.

        Raises:
            ModelError: this kind of model is not trained here.
        """
        raise ModelError(f"a {type(self.module).__name__} is not trained here")

    def save(self, folder: str | Path) -> None:
        """Write what was trained, so that `load` reads it.

        Raises:
            ModelError: this kind of model is not trained here.
        """
        raise ModelError(f"a {type(self.module).__name__} is not written here")


class _Own(Denoiser):
    """See `Denoiser.of`."""

    def __init__(
        self,
        module: nn.Module,
        process: Process,
        predict: Callable[[nn.Module, Tensor, Tensor, Condition], Tensor],
        condition: Callable[[Sequence[Any], torch.device], Condition] | None,
    ) -> None:
        super().__init__(module, process)
        self._predict, self._condition = predict, condition
        self.reads = None if condition is None else "conditions"

    def identity(self) -> dict[str, str]:
        functions = [f for f in (self._predict, self._condition) if f is not None]
        text = "\n".join(_source(function) for function in functions)
        return super().identity() | {"functions": hashlib.sha256(text.encode()).hexdigest()}

    def condition(self, items: Sequence[Any] | None, device: torch.device) -> Condition:
        if self._condition is None:
            return {}
        if items is None:
            raise ValueError("items must be given for a model with a condition, got none")
        return self._condition(items, device)

    def predict(
        self, noisy: Tensor, timesteps: Tensor, condition: Condition, module: Any = None
    ) -> Tensor:
        return self._predict(self.module if module is None else module, noisy, timesteps, condition)


def _source(function: Callable[..., Any]) -> str:
    """Text of a function, or its name where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return f"{type(function).__qualname__} {getattr(function, '__qualname__', '')}"


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse what is no seed.

    Raises:
        ValueError: one is out of range.
    """
    for seed in seeds:
        # torch's CPU generator ignores higher bits: two seeds would draw one image
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must be in [0, 2**32), got {seed}")


def check_size(size: int | tuple[int, int], step: int = 1) -> tuple[int, int]:
    """Height and width of pictures in pixels, of which ``size`` may be one side for both.

    Raises:
        ValueError: a side is no positive multiple of ``step``.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1 or height % step or width % step:
        what = f"positive multiples of {step} pixels" if step > 1 else "at least 1 pixel"
        raise ValueError(f"size must be {what}, got {width}x{height}")
    return height, width


def check_labels(labels: Sequence[Any] | None, count: int, device: torch.device) -> Tensor:
    """Labels as a tensor ``[B]`` int64 on the device.

    Raises:
        ValueError: there are none, or one is no class number in ``[0, count)``.
    """
    if labels is None:
        raise ValueError("labels must be given for a model that reads classes, got none")
    for label in labels:
        is_whole = isinstance(label, Integral) and not isinstance(label, bool)
        if not is_whole or not 0 <= int(label) < count:
            raise ValueError(f"labels must be whole numbers in [0, {count}), got {label!r}")
    return torch.tensor([int(label) for label in labels], dtype=torch.int64, device=device)


def check_steps(num_inference_steps: int, num_timesteps: int, batch_size: int) -> None:
    """Refuse numbers that no drawing has.

    Raises:
        ValueError: one is out of range.
    """
    if not 1 <= num_inference_steps <= num_timesteps:
        raise ValueError(
            f"num_inference_steps must be in [1, {num_timesteps}], got {num_inference_steps}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
