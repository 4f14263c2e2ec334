"""Drop-in parts for the TRAK library: a projector, a fused gradient computer, and ``fast_jl``.

    projector = TritonProjector(grad_dim=P, proj_dim=2048, seed=0, proj_type="rademacher",
                                device="cuda", max_batch_size=32)
    TRAKer(..., projector=projector)                                  # gradients as TRAK makes them
    TRAKer(..., projector=projector, gradient_computer=FusedGradientComputer)     # never stored

or ``dtrak_kernels.trak.install()``, after which ``import fast_jl`` finds `dtrak_kernels.fast_jl`,
and code written for TRAK's CUDA extension runs as it is. `dtrak_kernels.adapters.trak_scores` has a
score computer. ``TritonProjector(..., whitenings={model_id: whitening})`` whitens either way.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import fast_jl
from ..gradients.sketcher import GradientSketcher
from ..gradients.whitening.definition import Whitening
from ..ops import check_features
from ..projection import Projection
from .gradients import (
    Whitenings,
    keyed_seed,
    kind_of,
    project_any,
    whiten_any,
    whitening_of,
)

# what TRAK's CudaProjector adds to the seed per checkpoint
_MODEL_SEED = 10_000
# where a tensor was among the arguments of a model
_TENSOR = object()


def install() -> ModuleType:
    """Make ``import fast_jl`` give `dtrak_kernels.fast_jl`, in this process.

    Call it before anything has imported the extension: names already bound stay bound. Its
    functions take tensors on any device; TRAK's own ``CudaProjector`` refuses a CPU before it calls
    them, where `TritonProjector` with generator ``"fast_jl"`` takes its place.

    Returns:
        The module.
    """
    sys.modules["fast_jl"] = fast_jl
    return fast_jl


class ProjectionType(StrEnum):
    """Kinds, in the shape of TRAK's enumeration: members are strings, and survive JSON."""

    rademacher = "rademacher"
    normal = "normal"
    sjlt = "sjlt"


class TritonProjector:
    """TRAK's ``AbstractProjector``, on any device, for any batch size and any ``proj_dim``.

    Dense features have TRAK's scale: entries are ±1 or N(0, 1), not divided by √K. Checkpoints
    have matrices of their own. With generator ``"philox"`` the key of the random stream is two
    words, ``seed`` and ``model_id``; with ``"fast_jl"`` the seed is ``seed + 10⁴·model_id`` as in
    TRAK, whose features that continues.

    Args:
        grad_dim: ``P``.
        proj_dim: ``K``.
        seed: in ``[0, 2**32)``.
        proj_type: ``"rademacher"``, ``"normal"`` (or a member of TRAK's enumeration), or
            ``"sjlt"``, the sparse sketch: it needs gradients parameter by parameter, costs next to
            nothing with `FusedGradientComputer`, and keeps inner products without a factor.
        device: where to project; gradients are moved there.
        max_batch_size: accepted for TRAK's sake; there is no limit.
        dtype: accepted for TRAK's sake; features are float32 (float64 for float64 gradients).
        generator: see `Projection`.
        num_sms: see `Projection`.
        half_inputs: see `Projection`.
        implementation: see `project`.
        whitenings: by ``model_id``, what gradients are multiplied with before: every checkpoint
            has its own, fitted to it.

    Attributes:
        proj_type: a `ProjectionType`, equal to its JSON round trip.

    Raises:
        ValueError: ``proj_type`` is none of the above, or see `Projection`.

    Source:
        ``trak/projectors.py`` of traker 0.3.2, ``AbstractProjector`` and ``CudaProjector``.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: torch.device | str,
        max_batch_size: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        generator: str = "philox",
        num_sms: int | str | None = None,
        half_inputs: bool = False,
        implementation: str | None = None,
        whitenings: Whitenings = None,
    ) -> None:
        self.grad_dim = operator.index(grad_dim)
        self.proj_dim = operator.index(proj_dim)
        self.seed = operator.index(seed)
        self.proj_type = ProjectionType(kind_of(proj_type, tuple(ProjectionType)))
        self.device = device
        self.max_batch_size = max_batch_size
        self.generator, self.num_sms, self.half_inputs = generator, num_sms, half_inputs
        self.implementation, self.whitenings = implementation, whitenings
        # a wrong value is an error here, not after the first gradients
        self.projection(0)

    def projection(self, model_id: int) -> Projection:
        """The random matrix of a checkpoint.

        Raises:
            ValueError: ``model_id`` is not in ``[0, 2**31)``.
        """
        seed = keyed_seed(self.seed, operator.index(model_id), "model_id")
        if self.generator == "fast_jl":
            seed = (self.seed + _MODEL_SEED * operator.index(model_id)) % 2**32
        return Projection(
            str(self.proj_type),
            self.proj_dim,
            seed,
            self.generator,
            self.num_sms,
            self.half_inputs,
        )

    def project(
        self, grads: Mapping[str, Tensor] | Tensor | DeferredGradients, model_id: int
    ) -> Tensor:
        """Features of a batch of gradients.

        Args:
            grads: ``{name: [B, *shape]}`` in the order of the model's parameters, ``[B, P]``, or
                what `FusedGradientComputer` returns.
            model_id: the checkpoint.

        Returns:
            ``[B, K]`` float32 (float64 for float64 gradients), a tensor of its own.

        Raises:
            TypeError: the gradients are not floating.
            ValueError: they do not have ``grad_dim`` columns, there are whitenings but none for
                this checkpoint's parameters and weights, or a sample's features are all zero or
                not finite: the message names the row.
        """
        projection = self.projection(model_id)
        whitening = whitening_of(self.whitenings, model_id, "model_id")
        if isinstance(grads, DeferredGradients):
            if grads.grad_dim != self.grad_dim:
                raise ValueError(
                    f"grads must have grad_dim = {self.grad_dim} columns, got {grads.grad_dim}"
                )
            features = grads.project(projection, self.implementation, whitening)
            if self.proj_type != ProjectionType.sjlt:
                features *= self.proj_dim**0.5
        else:
            features = project_any(
                grads if whitening is None else whiten_any(grads, whitening),
                projection,
                self.grad_dim,
                self.device,
                scale=None if self.proj_type == ProjectionType.sjlt else 1.0,
                implementation=self.implementation,
            )
        return check_features(features, "projected gradients")

    def free_memory(self) -> None:
        """Nothing to free: the matrix is never stored."""


class FusedGradientComputer:
    """A gradient computer for ``TRAKer`` that leaves the gradients to the projector.

    ``TRAKer`` hands what `compute_per_sample_grad` returns to ``projector.project``, unseen. Here
    it is the batch itself, and a `TritonProjector` runs one batched forward and backward whose
    per-sample gradients are projected as they are produced, never stored.

    Tasks are TRAK's, as they are: ``task.get_output`` must call the model once per sample, on
    tensors with a leading dimension of 1, reach the weights through that call only, and draw no
    random numbers before it. A task that does not fit may define
    ``get_batch_output(model, *batch)``, which returns ``[B]`` and is then used instead. Models are
    subject to `GradientSketcher`.

    Args:
        model: the model.
        task: an ``AbstractModelOutput`` of TRAK.
        grad_dim: ``P``, not needed.
        dtype: accepted for TRAK's sake.
        device: accepted for TRAK's sake; the model is where it is.
        grad_wrt: names of the parameters to differentiate; all of them if ``None``.

    Source:
        ``trak/gradient_computers.py`` of traker 0.3.2, ``AbstractGradientComputer``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_wrt: Iterable[str] | None = None,
    ) -> None:
        self.task, self.grad_dim, self.dtype, self.device = task, grad_dim, dtype, device
        self.grad_wrt = None if grad_wrt is None else list(grad_wrt)
        self._sketcher: GradientSketcher | None = None
        self.load_model_params(model)

    def load_model_params(self, model: nn.Module) -> None:
        """Take the current weights of ``model`` from here on."""
        self.model = model
        self._sketcher = None

    def compute_per_sample_grad(self, batch: Iterable[Tensor]) -> DeferredGradients:
        """The batch, to be differentiated by `TritonProjector.project`."""
        return DeferredGradients(self, tuple(batch))

    def compute_loss_grad(self, batch: Iterable[Tensor]) -> Tensor:
        """``[B, 1]``, the gradient of the loss by the model output, as the task defines it."""
        weights, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        return self.task.get_out_to_loss_grad(self.model, weights, buffers, batch)

    def sketcher(
        self,
        projection: Projection,
        implementation: str | None,
        whitening: Whitening | None = None,
    ) -> GradientSketcher:
        """The sketcher of the current model, kept while nothing changes."""
        last = self._sketcher
        if last is None or last.projection != projection or last.whitening is not whitening:
            chosen = None if self.grad_wrt is None else frozenset(self.grad_wrt)
            last = self._sketcher = GradientSketcher(
                self.model,
                projection,
                parameters=lambda name, _: chosen is None or name in chosen,
                implementation=implementation,
                whitening=whitening,
            )
        return last


class DeferredGradients:
    """Per-sample gradients of a batch that exist only as a way to project them.

    Attributes:
        grad_dim: ``P``.
    """

    def __init__(self, computer: FusedGradientComputer, batch: tuple[Tensor, ...]) -> None:
        self.computer, self.batch = computer, batch
        self.grad_dim = sum(
            parameter.numel()
            for name, parameter in computer.model.named_parameters()
            if computer.grad_wrt is None or name in computer.grad_wrt
        )

    def __len__(self) -> int:
        return len(self.batch[0])

    def project(
        self,
        projection: Projection,
        implementation: str | None = None,
        whitening: Whitening | None = None,
    ) -> Tensor:
        """Features ``[B, K]``, scaled as `Projection` says.

        Raises:
            RuntimeError: the task's ``get_output`` does not call the model once, on a batch of
                one; or see `GradientSketcher.batch`.
            ValueError: see `GradientSketcher`.
        """
        computer = self.computer
        sketcher = computer.sketcher(projection, implementation, whitening)
        model, task = computer.model, computer.task
        with torch.enable_grad():
            return sketcher.sketch(lambda: _batch_outputs(model, task, self.batch), len(self))


class _Called(Exception):
    """Carries what a model was called with out of the function that called it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = (args, kwargs)


class _Stub(nn.Module):
    """Stands in for the model: it has no parameters, and ``answer`` for a forward."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)


def _batch_outputs(model: nn.Module, task: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """Outputs ``[B]`` by one forward of the model, from a task written for single samples.

    The task runs twice under vmap: up to its call of the model, to learn what it is called with,
    and, after the model has run on the whole batch, with the answer.
    """
    if hasattr(task, "get_batch_output"):
        return task.get_batch_output(model, *batch)
    learned: list[tuple[list[Any], Any]] = []

    def raise_call(*args: Any, **kwargs: Any) -> None:
        raise _Called(args, kwargs)

    def call_of(*sample: Tensor) -> tuple[Tensor, ...]:
        try:
            task.get_output(_Stub(raise_call), {}, {}, *sample)
        except _Called as called:
            leaves, spec = tree_flatten(called.call)
            learned.append(([_TENSOR if isinstance(x, Tensor) else x for x in leaves], spec))
            return tuple(x for x in leaves if isinstance(x, Tensor))
        raise RuntimeError(f"{type(task).__name__}.get_output must call the model, it did not")

    tensors = vmap(call_of, randomness="different")(*batch)
    if not tensors or any(x.ndim < 2 or x.shape[1] != 1 for x in tensors):
        raise RuntimeError(
            f"{type(task).__name__}.get_output must call the model on tensors with a leading "
            f"dimension of 1, got {[tuple(x.shape[1:]) for x in tensors]}: define "
            "get_batch_output(model, *batch)"
        )
    leaves, spec = learned[0]
    args, kwargs = _refilled(leaves, [x.flatten(0, 1) for x in tensors], spec)
    answers, answer_spec = tree_flatten(model(*args, **kwargs))
    constants = [_TENSOR if isinstance(x, Tensor) else x for x in answers]

    def output_of(answers: list[Tensor], *sample: Tensor) -> Tensor:
        given = [_refilled(constants, [answer[None] for answer in answers], answer_spec)]

        def answer(*args: Any, **kwargs: Any) -> Any:
            if not given:
                raise RuntimeError(
                    f"{type(task).__name__}.get_output must call the model once, it calls it "
                    "twice: define get_batch_output(model, *batch)"
                )
            return given.pop()

        return task.get_output(_Stub(answer), {}, {}, *sample)

    rows = [x for x in answers if isinstance(x, Tensor)]
    return vmap(output_of, randomness="different")(rows, *batch)


def _refilled(leaves: list[Any], tensors: list[Tensor], spec: Any) -> Any:
    """The structure again, with ``tensors`` in order where ``leaves`` has `_TENSOR`."""
    rest = iter(tensors)
    return tree_unflatten([next(rest) if leaf is _TENSOR else leaf for leaf in leaves], spec)


try:
    from trak.gradient_computers import AbstractGradientComputer
    from trak.projectors import AbstractProjector
except ImportError:
    pass
else:
    AbstractProjector.register(TritonProjector)
    AbstractGradientComputer.register(FusedGradientComputer)
