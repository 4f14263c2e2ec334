"""The published way, to compare with: `vmap(grad)`, gradients in memory, TRAK's projector."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.func import functional_call, grad, vmap

from dtrak_kernels import Projection, Whitening, project

from ..data.samples import Samples
from ..models.denoiser import Condition, Denoiser
from ..runs.measure import TensorMeter
from .extraction import (
    Extractor,
    FusedExtractor,
    check_prediction,
    condition_rows,
    extract_rows,
    given,
    noisy_rows,
)
from .outputs import evaluate_output
from .settings import FeatureSettings

# samples per batch of the published CIFAR scripts
PUBLISHED_BATCH_SIZE = 52


def _plain_attention(model: Denoiser) -> Denoiser:
    """A copy whose attention is written out: the fused one has no batching rule under vmap."""
    module = copy.deepcopy(model.module)
    parts: Any = module.modules()
    for part in parts:
        if hasattr(part, "set_processor"):
            part.set_processor(AttnProcessor())
    return model.with_module(module)


def make_trak_projector(grad_dim: int, projection: Projection, device: torch.device) -> Any:
    """TRAK's own projector: CUDA where its extension is installed, blockwise otherwise.

    TRAK has no sparse kind: ``"sjlt"`` is compared with the published choice, a normal matrix.

    Raises:
        ValueError: the ``trak`` package is not installed, or the kind has no counterpart there.
    """
    try:
        from trak.projectors import BasicProjector, CudaProjector, ProjectionType
    except ImportError as error:
        raise ValueError(
            "--no-fused and --compare need TRAK's projector: pip install 'dtrak[trak]'"
        ) from error
    if projection.kind == "none":
        raise ValueError(
            "projection must be rademacher, normal or sjlt for TRAK's projector, got 'none'"
        )
    kind = ProjectionType.rademacher if projection.kind == "rademacher" else ProjectionType.normal
    common = {
        "grad_dim": grad_dim,
        "proj_dim": projection.proj_dim,
        "seed": projection.seed,
        "proj_type": kind,
        "device": device,
    }
    if device.type == "cuda" and projection.proj_dim % 512 == 0:
        try:
            return CudaProjector(max_batch_size=32, **common)
        except (ImportError, ModuleNotFoundError):
            pass
    return BasicProjector(**common)


class PublishedExtractor(Extractor):
    """Features as D-TRAK's scripts compute them; the noise is ours, so the same gradients result.

    The model is copied, and a whitening applied to gradients in memory.

    Raises:
        ValueError: as `Extractor` and `make_trak_projector`; or a 16-bit dtype is asked for.

    Source:
        D-TRAK's grad_unconditional.py at e2a0c2e.
    """

    method = "published"

    def __init__(
        self,
        model: Denoiser,
        settings: FeatureSettings,
        device: torch.device,
        whitening: Whitening | None = None,
    ) -> None:
        if settings.dtype not in ("float32", "float64"):
            raise ValueError(
                f"dtype must be float32 or float64 for --no-fused, got {settings.dtype!r}"
            )
        self.dtype = torch.float64 if settings.dtype == "float64" else torch.float32
        super().__init__(_plain_attention(model), settings, device, whitening)
        chosen = set(model.parameters())
        self.parameters = {
            name: parameter.detach()
            for name, parameter in self.model.module.named_parameters()
            if name in chosen
        }
        self.grad_dim = sum(p.numel() for p in self.parameters.values())
        self.proj_dim = settings.projection.proj_dim
        self.projector = make_trak_projector(self.grad_dim, settings.projection, device)

    def gradients(
        self, inputs: Tensor, ids: Sequence[str], items: Sequence[Any] | None = None
    ) -> Tensor:
        """Gradients averaged over timesteps, ``[B, P]``, and whitened: never stored when fused."""
        samples, steps = len(inputs), len(self.settings.timesteps)
        inputs = inputs.to(self.device, self.dtype)
        noisy, target, timesteps = noisy_rows(self.model, self.settings, inputs, ids)
        condition = condition_rows(self.model, items, steps, inputs)

        def output(
            parameters: dict[str, Tensor],
            noisy: Tensor,
            target: Tensor,
            timestep: Tensor,
            condition: Condition,
        ) -> tuple[Tensor, Tensor]:
            def module(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.model.module, parameters, args, kwargs)

            one = {name: values[None] for name, values in condition.items()}
            prediction = self.model.predict(noisy[None], timestep[None], one, module)
            weight = self.model.process.weight(timestep[None], noisy.shape)
            f = evaluate_output(self.settings.output_function, prediction, target[None], weight)
            return f.sum(), prediction

        per_sample = vmap(grad(output, has_aux=True), in_dims=(None, 0, 0, 0, 0))
        total = inputs.new_zeros(samples, self.grad_dim)
        for step in range(steps):
            rows = slice(step, None, steps)
            grads, prediction = per_sample(
                self.parameters,
                noisy[rows],
                target[rows],
                timesteps[rows],
                {name: values[rows] for name, values in condition.items()},
            )
            check_prediction(prediction.flatten(1), ids, timesteps[rows])
            total += torch.cat([part.flatten(1) for part in grads.values()], dim=1)
        grads = total / steps
        return grads if self.whitening is None else self.whitening.apply(grads)

    def extract(
        self, inputs: Tensor, ids: Sequence[str], items: Sequence[Any] | None = None
    ) -> Tensor:
        """Features ``[B, K]``; TRAK leaves out the 1/√K, which is applied here."""
        return self.project(self.gradients(inputs, ids, items))

    def project(self, grads: Tensor) -> Tensor:
        """TRAK's projection of ``[B, P]``, with our scale."""
        features: Tensor = self.projector.project(grads, model_id=0)
        return features * self.settings.projection.proj_dim**-0.5


@dataclass(frozen=True)
class Comparison:
    """Fused against published on the same samples.

    Attributes:
        samples: how many.
        fused_seconds: of the fused way, all samples.
        gradient_seconds: of `vmap(grad)`.
        projection_seconds: of TRAK's projector.
        fused_peak_bytes: peak of live tensors of the fused way, in bytes.
        published_peak_bytes: of the published way.
        fused_largest_bytes: largest tensor of the fused way.
        gradient_error: relative error of the fused features against the same projection applied to
            the gradients of `vmap(grad)`.
        gram_correlation: Pearson correlation of the inner products ``⟨φ_i, φ_j⟩``, i < j, of the
            two.
    """

    samples: int
    fused_seconds: float
    gradient_seconds: float
    projection_seconds: float
    fused_peak_bytes: int
    published_peak_bytes: int
    fused_largest_bytes: int
    gradient_error: float
    gram_correlation: float

    @property
    def published_seconds(self) -> float:
        """Of the published way, all samples."""
        return self.gradient_seconds + self.projection_seconds


def compare(
    fused: FusedExtractor, published: PublishedExtractor, data: Samples, fused_batch_size: int
) -> Comparison:
    """Run both ways on all of ``data``.

    The published one takes it as one batch, the fused one in its own batches. Times are taken after
    a warm-up on one sample; memory is counted in a run of its own.
    """
    batches = [
        slice(first, min(first + fused_batch_size, len(data)))
        for first in range(0, len(data), fused_batch_size)
    ]

    def run_fused() -> Tensor:
        return torch.cat([extract_rows(fused, data, rows) for rows in batches])

    def published_gradients(rows: slice) -> Tensor:
        inputs = given(published.model, data, rows, published.device)
        return published.gradients(inputs, data.ids[rows], data.conditions_of(rows))

    whole, first = slice(0, len(data)), slice(0, 1)
    extract_rows(fused, data, first)
    published_gradients(first)
    synchronise = torch.cuda.synchronize if fused.device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    features = run_fused()
    synchronise()
    fused_seconds = time.perf_counter() - start
    start = time.perf_counter()
    grads = published_gradients(whole)
    synchronise()
    gradient_seconds = time.perf_counter() - start
    start = time.perf_counter()
    theirs = published.project(grads)
    synchronise()
    projection_seconds = time.perf_counter() - start
    ours = project(grads, fused.settings.projection, shapes=fused.sketcher.shapes)
    gradient_error = float((features - ours).double().norm() / ours.double().norm())
    upper = torch.triu_indices(len(data), len(data), offset=1)
    grams = torch.stack([(f @ f.T)[upper[0], upper[1]].double() for f in (features, theirs)])
    correlation = float(torch.corrcoef(grams)[0, 1]) if len(data) > 2 else float("nan")
    del grads, ours, theirs, features, grams
    with TensorMeter(known=fused.model.module.state_dict().values()) as fused_meter:
        run_fused()
    # the projector holds a block of its matrix from the start, so that block counts as live
    projector = published.projector
    matrix = getattr(projector, "proj_matrix", None)
    known = [*published.model.module.state_dict().values(), *([] if matrix is None else [matrix])]
    with TensorMeter(known=known) as published_meter:
        published_gradients(whole)
    return Comparison(
        samples=len(data),
        fused_seconds=fused_seconds,
        gradient_seconds=gradient_seconds,
        projection_seconds=projection_seconds,
        fused_peak_bytes=fused_meter.peak_bytes,
        published_peak_bytes=published_meter.peak_bytes + (0 if matrix is None else matrix.nbytes),
        fused_largest_bytes=fused_meter.largest_bytes,
        gradient_error=gradient_error,
        gram_correlation=correlation,
    )
