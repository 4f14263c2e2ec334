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
from workloads import MODELS, whole_cifar

from dtrak_kernels import Projection


@dataclass(frozen=True)
class Case:
    """A model, a batch, a precision, and the widths of the features.

    Attributes:
        peers: K of the peers; 0 for none of them, where their matrix or gradients are too much.
    """

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
        found = projections(self.sparse, self.dense)
        return found if self.peers else [p for p in found if p.kind != "none"]

    @property
    def peer_gradients(self) -> list[str]:
        """Peers that stop at ``[B, P]``."""
        return list(peers.GRADIENTS) if self.peers else []

    @property
    def peer_projection(self) -> Projection | None:
        """What peers project with: the published choice."""
        return Projection("normal", self.peers) if self.peers else None

    @property
    def providers(self) -> list[str]:
        """Their names."""
        ours = [projection_name(projection) for projection in self.wanted]
        return [STEP, *ours, *self.peer_gradients, *((STORED, TRAK) if self.peers else ())]

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}"


def make_cases(*, smoke: bool, cuda: bool, large: bool = False) -> list[Case]:
    """Real models on a GPU, the most telling first; peers at a width whose matrix can be stored."""
    if smoke:
        # 16 bits, too: a GPU's cases have no other rehearsal
        rehearsed = [(model, "float32") for model in MODELS] + [("digits", "bfloat16")]
        return [Case(model, 2, 2, dtype, (256,), (32,), 32) for model, dtype in rehearsed]
    if not cuda:
        return [
            Case("digits", 8, 10, "float32", (8192,), (256,), 256),
            Case("cifar", 8, 1, "float32", (8192,), (128,), 128),
            Case("lora", 8, 1, "float32", (8192,), (512,), 512),
            *([Case("whole cifar", 2, 2, "float32", (8192,), (), 0)] if large else []),
        ]
    return [
        Case("cifar", 16, 10, "bfloat16", (32768, 65536), (128, 32768), 128),
        # nobody runs Stable Diffusion in float32
        Case("lora", 8, 4, "bfloat16", (32768, 65536), (128, 32768), 128),
        Case("cifar", 16, 10, "float32", (32768, 65536), (128,), 128),
        Case("digits", 32, 10, "float32", (8192, 32768), (4096,), 4096),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke, large = (metafunc.config.getoption(name) for name in ("--smoke", "--large"))
    cases = make_cases(smoke=smoke, cuda=torch.cuda.is_available(), large=large)
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
        workload = (MODELS | {"whole cifar": whole_cifar})[case.model](
            device, case.samples, case.rows_per_sample, case.dtype, smoke=smoke
        )
        return make_contest(
            workload,
            "sketcher",
            case.wanted,
            gradients=case.peer_gradients,
            peer_projection=case.peer_projection,
        )

    races.present(benchmark, case, name, build, roofs)
