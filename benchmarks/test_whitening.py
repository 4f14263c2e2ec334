"""The price of whitening: features of a batch, whitened, over those of the same batch as they are.

Whitenings are fitted to the batch itself, which changes nothing about their cost. ``cpu`` holds the
median processor time of every provider beside the clock's: on a machine that others use, only that
tells one kind from another.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest
import torch
from prices import in_double
from protocol import Check, Provider, Roofs, Work, relative_error
from races import Contest, Races
from workloads import MODELS, Workload, whole_cifar

from dtrak_kernels import GradientSketcher, Projection, Whitening, project

KINDS = ("none", "scale", "diagonal", "channels", "lowrank", "kfac")
# rounding of float32 through two more products
_ALLOWED = 1e-4


@dataclass(frozen=True)
class Case:
    """A model, a batch and the features' width."""

    model: str
    samples: int
    rows_per_sample: int
    proj_dim: int

    def __str__(self) -> str:
        return self.model


def make_cases(*, smoke: bool, cuda: bool, large: bool) -> list[Case]:
    """S = 10, as the published features."""
    if smoke:
        return [Case("digits", 2, 2, 256)]
    if cuda:
        return [Case("digits", 32, 10, 8192), Case("whole cifar", 16, 10, 32768)]
    cases = [Case("digits", 8, 10, 8192), Case("lora", 4, 10, 8192), Case("cifar", 2, 10, 8192)]
    return cases + ([Case("whole cifar", 1, 10, 8192)] if large else [])


def make_contest(workload: Workload, proj_dim: int) -> Contest:
    """A provider per kind, each checked against its map of the exact gradients."""
    B, S = workload.samples, workload.rows_per_sample
    projection = Projection("sjlt", proj_dim, 1)
    exact = GradientSketcher(workload.model, Projection("none"), rows_per_sample=S)
    eager = exact.sketch(workload.outputs, B)
    with in_double(workload) as wide:
        sketcher = GradientSketcher(wide.model, Projection("none"), rows_per_sample=S)
        grads = sketcher.sketch(wide.outputs, B)
    facts: dict[str, Any] = {"cpu": {}, "fit_cpu": {}, "factor_bytes": {}}

    def provider(kind: str) -> Provider:
        begin = time.process_time()
        whitening = Whitening.fit(
            workload.model, [(workload.outputs, B)], kind=kind, rows_per_sample=S
        )
        facts["fit_cpu"][kind] = time.process_time() - begin
        facts["factor_bytes"][kind] = whitening.nbytes
        expected, rounded = (
            project(whitening.apply(exact_or_not), projection, shapes=exact.shapes)
            for exact_or_not in (grads, eager)
        )
        # rounding of float32 gradients, as large as this whitening makes it
        allowed = max(_ALLOWED, 2 * relative_error(rounded, expected))
        seconds: list[float] = []

        def prepare() -> Callable[[], torch.Tensor]:
            sketcher = GradientSketcher(
                workload.model, projection, rows_per_sample=S, whitening=whitening
            )

            def run() -> torch.Tensor:
                begin = time.process_time()
                features = sketcher.sketch(workload.outputs, B)
                seconds.append(time.process_time() - begin)
                facts["cpu"][kind] = median(seconds[1:] or seconds)
                return features

            return run

        check = Check(
            "the map of float64 gradients, projected",
            lambda features: relative_error(features, expected),
            allowed,
        )
        return Provider(kind, prepare, (check,), Work(1.0, 4.0 * grads.numel(), workload.dtype))

    return Contest(
        suite="whitening_price",
        group=f"{workload.name}, {workload.dtype}",
        sizes=workload.sizes | {"K": proj_dim},
        baselines=("none",),
        providers=[provider(kind) for kind in KINDS],
        facts=facts,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke, large = (metafunc.config.getoption(name) for name in ("--smoke", "--large"))
    cases = make_cases(smoke=smoke, cuda=torch.cuda.is_available(), large=large)
    params = [pytest.param(case, kind, id=f"{case}-{kind}") for case in cases for kind in KINDS]
    metafunc.parametrize("case, kind", params)


def test_price_of_whitening(
    benchmark: Any,
    case: Case,
    kind: str,
    races: Races,
    roofs: Callable[[str], Roofs],
    device: torch.device,
    smoke: bool,
) -> None:
    def build() -> Contest:
        make = (MODELS | {"whole cifar": whole_cifar})[case.model]
        workload = make(device, case.samples, case.rows_per_sample, "float32", smoke=smoke)
        return make_contest(workload, case.proj_dim)

    races.present(benchmark, case, kind, build, roofs)
