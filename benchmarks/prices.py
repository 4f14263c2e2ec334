"""The price of a backward: time of features over time of an ordinary training step.

The training step is the forward and backward of the same batch in the same precision, weight
gradients of the whole batch included. All providers are checked against gradients by one backward
per sample in float64: each may err twice as much as the same loop in the precision at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import peers
import torch
from protocol import Check, Provider, Work, relative_error
from races import Contest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from workloads import Workload

from dtrak_kernels import GradientSketcher, Projection, project
from dtrak_kernels.projection import DENSE_KINDS, KINDS

STEP = "training step"
STORED, TRAK = "vmap(grad) + stored matrix", "vmap(grad) + trak"
# float32 rounding of a deep network's gradients
_FLOOR = 1e-5


def projection_name(projection: Projection) -> str:
    """``sjlt, K = 8,192``."""
    if projection.kind == "none":
        return "features: none, K = P"
    return f"features: {projection.kind}, K = {projection.proj_dim:,}"


def projections(sparse: Sequence[int], dense: Sequence[int]) -> list[Projection]:
    """Every kind there is, each at its widths.

    Args:
        sparse: widths of the kinds that cost next to nothing.
        dense: widths of those whose cost is a product of P and K.
    """
    found = []
    for kind in KINDS:
        widths = (0,) if kind == "none" else dense if kind in DENSE_KINDS else sparse
        found += [Projection(kind, width, 1) for width in widths]
    return found


@contextmanager
def in_double(workload: Workload) -> Iterator[Workload]:
    """The workload in float64; the model is put back."""
    workload.model.double()
    inputs = [x.detach().double() if x.is_floating_point() else x for x in workload.inputs]
    try:
        yield replace(workload, inputs=tuple(inputs), dtype="float32")
    finally:
        workload.model.float()


def step_flops(workload: Workload) -> float:
    """Operations of a training step: its matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        workload.backward()
    return float(counter.get_total_flops())


def make_contest(
    workload: Workload,
    suite: str,
    wanted: Sequence[Projection],
    *,
    gradients: Sequence[str] = (),
    peer_projection: Projection | None = None,
) -> Contest:
    """Providers for a workload.

    Args:
        workload: the batch.
        suite: whose rows these are.
        wanted: our projections.
        gradients: peers that stop at ``[B, P]``, keys of `peers.GRADIENTS`.
        peer_projection: what the peers that project do, if any.
    """
    with in_double(workload) as wide:
        truth = peers.loop_gradients(wide)
    eager = peers.loop_gradients(workload).double() - truth
    allowed = max(_FLOOR, 2 * float(eager.norm() / truth.norm()))
    total = truth.sum(0)
    allowed_total = max(_FLOOR, 2 * float(eager.norm(dim=1).sum() / total.norm()))
    del eager
    grads = truth.float()
    del truth
    flops, B, P = step_flops(workload), workload.samples, workload.grad_dim
    read = sum(p.nbytes for p in workload.model.parameters())
    read += sum(x.nbytes for x in workload.inputs)
    shapes = [tuple(parameter.shape) for parameter in workload.parameters.values()]

    def work(extra: float, width: int) -> Work:
        return Work(flops + extra, read + 4.0 * B * width, workload.dtype)

    def against_sum(parts: list[Tensor]) -> float:
        return relative_error(torch.cat([part.flatten() for part in parts]), total)

    summed = Check("the sum of single backwards in float64", against_sum, allowed_total)
    exact = "single backwards in float64"
    single = Check(exact, partial(relative_error, oracle=grads), allowed)
    providers = [Provider(STEP, lambda: workload.backward, (summed,), Work(flops, read + 4.0 * P))]
    providers[0] = replace(providers[0], work=replace(providers[0].work, dtype=workload.dtype))

    def ours(projection: Projection) -> Provider:
        width = projection.num_features(P)
        extra = 2.0 * B * P * width if projection.kind in DENSE_KINDS else float(B * P)

        def error(features: Tensor) -> float:
            return relative_error(features, project(grads, projection, shapes=shapes))

        def prepare() -> Callable[[], Tensor]:
            sketcher = GradientSketcher(
                workload.model, projection, rows_per_sample=workload.rows_per_sample
            )
            return lambda: sketcher.sketch(workload.outputs, B)

        check = Check(f"{exact}, projected", error, allowed)
        return Provider(projection_name(projection), prepare, (check,), work(extra, width))

    providers += [ours(projection) for projection in wanted]
    for name in gradients:
        prepare = partial(partial, peers.GRADIENTS[name], workload)
        providers.append(Provider(name, prepare, (single,), work(0, P)))
    if peer_projection is not None:
        kind, K = peer_projection.kind, peer_projection.proj_dim
        makers = {
            STORED: partial(peers.stored_matrix, kind, P, K, workload.device, torch.float32),
            TRAK: partial(peers.trak_basic, kind, P, K, workload.device),
        }
        for name, make in makers.items():
            extra = 2.0 * B * P * K
            providers.append(_projected(name, workload, make, grads, allowed, work(extra, K)))
    return Contest(
        suite=suite,
        group=f"{workload.name}, {workload.dtype}",
        sizes=workload.sizes,
        baselines=(STEP,),
        providers=providers,
    )


def _projected(
    name: str,
    workload: Workload,
    make: Callable[[], peers.Project],
    grads: Tensor,
    allowed: float,
    work: Work,
) -> Provider:
    """``vmap(grad)``, then a projector, which must make the same of exact gradients."""
    kept: dict[str, Any] = {}

    def prepare() -> Callable[[], Tensor]:
        run = kept["run"] = make()
        return lambda: run(peers.vmap_gradients(workload))

    def error(features: Tensor) -> float:
        return relative_error(features, kept.pop("run")(grads))

    check = Check("single backwards in float64, projected by the same", error, allowed)
    return Provider(name, prepare, (check,), work)
