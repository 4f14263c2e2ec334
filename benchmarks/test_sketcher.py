"""The price of a backward: features of a batch over a training step of it, model by model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peers
import pytest
import torch
from prices import STEP, STORED, TRAK, make_contest, projection_name, projections
from protocol import Roofs
from races import Contest, Races
from workloads import MODELS

from dtrak_kernels import Projection


@dataclass(frozen=True)
class Case:
    """A model, a batch, a precision, and the widths of the features."""

    model: str
    samples: int
    rows_per_sample: int
    dtype: str
    sparse: tuple[int, ...]
    dense: tuple[int, ...]
    peers: int

    @property
    def wanted(self) -> list[Projection]:
        """Our projections."""
        return projections(self.sparse, self.dense)

    @property
    def peer_projection(self) -> Projection:
        """What peers project with: the published choice."""
        return Projection("normal", self.peers)

    @property
    def providers(self) -> list[str]:
        """Their names."""
        ours = [projection_name(projection) for projection in self.wanted]
        return [STEP, *ours, *peers.GRADIENTS, STORED, TRAK]

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}"


def make_cases(smoke: bool) -> list[Case]:
    """Real models on a GPU."""
    if smoke:
        return [Case(model, 2, 2, "float32", (256,), (32,), 32) for model in MODELS]
    if not torch.cuda.is_available():
        return [
            Case("digits", 8, 10, "float32", (8192,), (256,), 256),
            Case("cifar", 8, 1, "float32", (8192,), (128,), 128),
            Case("lora", 8, 1, "float32", (8192,), (512,), 512),
        ]
    wide, dense = (32768, 65536), (32768,)
    return [
        Case("digits", 32, 10, "float32", (8192, 32768), (4096,), 4096),
        *(Case("cifar", 16, 10, dtype, wide, dense, 4096) for dtype in ("float32", "bfloat16")),
        *(Case("lora", 8, 4, dtype, wide, dense, 4096) for dtype in ("float32", "bfloat16")),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = make_cases(metafunc.config.getoption("--smoke"))
    params = [
        pytest.param(case, name, id=f"{case}-{name}") for case in cases for name in case.providers
    ]
    metafunc.parametrize("case, name", params)


def test_price(
    benchmark: Any,
    case: Case,
    name: str,
    races: Races,
    roofs: Callable[[str], Roofs],
    device: torch.device,
    smoke: bool,
) -> None:
    def build() -> Contest:
        workload = MODELS[case.model](
            device, case.samples, case.rows_per_sample, case.dtype, smoke=smoke
        )
        return make_contest(
            workload,
            "sketcher",
            case.wanted,
            gradients=list(peers.GRADIENTS),
            peer_projection=case.peer_projection,
        )

    races.present(benchmark, case, name, build, roofs)
