"""Projection of gradients that exist: ours beside TRAK's, dattri's and bergson's projectors.

Every provider maps the same ``[B, P]`` to ``[B, K]`` with a matrix of its own from the same
distribution, so what all must agree with are the inner products of the gradients. Ours, whose
matrix is specified, and TRAK's CUDA kernel, whose matrix we reproduce, are also compared entry by
entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import pytest
import torch
from protocol import Absent, Check, Provider, Roofs, Work, gram_error, relative_error
from races import Contest, Races
from torch import Tensor
from workloads import parameter_shapes

from dtrak_kernels import Projection, project, project_
from dtrak_kernels.dense import reference
from dtrak_kernels.projection import DENSE_KINDS

# a card's multiprocessors decide fast_jl's matrix
NUM_SMS = 132
# columns that are compared with the specification entry by entry
COLUMNS = 4
# inner products may err as in theory, times this: fast_jl's generator is poorer than independent
# entries for small P, see docs/projection.md
GRAM_ALLOWED = 1.6
GRAM_ALLOWED_FAST_JL = 3.0
# entries of the matrix above which projectors would take minutes: those that make it in blocks,
# and our fast_jl generator, whose streams are sequential
SLOW, SLOW_FAST_JL = 2e11, 1e10
# a larger gradient is compared with the specification in its last columns only
WINDOW = 2**18


@dataclass(frozen=True)
class Case:
    """Gradients ``[B, P]`` of a model in a dtype, to K columns."""

    kind: str
    model: str
    B: int
    proj_dim: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.kind}-{self.model}-K{self.proj_dim}-{self.dtype}"


def make_cases(*, cuda: bool) -> list[Case]:
    """Real sizes on a GPU, the most telling first; at K = 512 a stored matrix fits, too."""
    if not cuda:
        dense = [Case(kind, "digits", 32, 512) for kind in DENSE_KINDS]
        return [*dense, Case("sjlt", "digits", 32, 8192)]
    return [
        Case("rademacher", "cifar", 32, 512, "bfloat16"),
        Case("rademacher", "cifar", 32, 32768, "bfloat16"),
        Case("rademacher", "cifar", 32, 65536, "bfloat16"),
        *(Case("sjlt", "cifar", 32, proj_dim) for proj_dim in (32768, 65536)),
        Case("rademacher", "cifar", 32, 32768),
        Case("normal", "cifar", 32, 512, "bfloat16"),
        # what D-TRAK's scripts do
        Case("normal", "cifar", 32, 4096),
        *(Case(kind, "digits", 32, 4096) for kind in DENSE_KINDS),
        *(Case("normal", "cifar", 32, proj_dim, "bfloat16") for proj_dim in (32768, 65536)),
    ]


DENSE = (
    "stored matrix",
    "philox",
    "fast_jl generator",
    "fast_jl CUDA",
    "trak",
    "dattri",
    "bergson",
)
SPARSE = ("index_add_", "sjlt", "dattri")
BASELINES = ("stored matrix", "fast_jl CUDA", "trak", "bergson")
CASES = [
    pytest.param(case, name, id=f"{case}-{name}")
    for case in make_cases(cuda=torch.cuda.is_available())
    for name in (DENSE if case.kind in DENSE_KINDS else SPARSE)
]


def make_gradients(
    case: Case, device: torch.device, smoke: bool
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Gradients of unequal parameters, ``[B, P]``, and the parameters' shapes."""
    if smoke:
        shapes: list[tuple[int, ...]] = [(16, 8, 3, 3), (16,), (40, 30), (30,)]
    else:
        shapes = parameter_shapes(case.model)
    generator = torch.Generator().manual_seed(0)
    # every parameter has a scale of its own, as in a real gradient
    scale = torch.cat(
        [
            torch.full((math.prod(shape),), 10 ** float(torch.randn((), generator=generator) / 4))
            for shape in shapes
        ]
    )
    seeded = torch.Generator(device).manual_seed(0)
    rows = torch.randn(case.B, len(scale), generator=seeded, device=device)
    return (rows * scale.to(device)).to(getattr(torch, case.dtype)), shapes


def columns_error(projection: Projection, grads: Tensor, features: Tensor) -> float:
    """Error of some columns of ours against the specification."""
    P, K = grads.shape[1], projection.proj_dim
    first = max(P - WINDOW, 0)
    if first:
        # a part of the features is nowhere to be seen: the same call for the last parameters
        features = torch.zeros_like(features)
        project_(grads[:, first:], projection, offset=first, out=features)
    make = getattr(reference, f"{projection.kind}_matrix")
    matrix = make(P - first, COLUMNS, projection.seed, offset=first).double().to(grads.device)
    oracle = grads[:, first:].double() @ matrix * K**-0.5
    return relative_error(features[:, :COLUMNS], oracle)


def inner_products(grads: Tensor, allowed: float) -> Check:
    """The check that fits every unbiased projection."""
    what = "the gradients' inner products, in units of theory"
    return Check(what, partial(gram_error, grads=grads), allowed)


def apply_to(grads: Tensor, make: Callable[[], peers.Project]) -> Callable[[], Any]:
    """`Provider.prepare` of a projector."""

    def prepare() -> Callable[[], Tensor]:
        return partial(make(), grads)

    return prepare


def unless_slow(
    grads: Tensor, proj_dim: int, make: Callable[[], Any], limit: float = SLOW
) -> Callable[[], Any]:
    """``make``, unless its matrix is too large to be made again for every call."""

    def checked() -> Any:
        if grads.shape[1] * proj_dim > limit:
            raise Absent(f"would take minutes at P = {grads.shape[1]:,}, K = {proj_dim:,}")
        return make()

    return checked


def dense_providers(case: Case, grads: Tensor, shapes: list[tuple[int, ...]]) -> list[Provider]:
    """Ours and the peers."""
    (B, P), K, device, kind = grads.shape, case.proj_dim, grads.device, case.kind
    work = Work(2.0 * B * P * K, grads.nbytes + 4.0 * B * K, case.dtype)
    cuda = device.type == "cuda"
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if cuda else NUM_SMS
    philox = Projection(kind, K, 1)
    # gradients rounded to float16 where the CUDA kernel, which does so, may be beside it
    fast_jl = Projection(kind, K, 0, "fast_jl", num_sms, half_inputs=cuda)
    gram = inner_products(grads, GRAM_ALLOWED)
    poorer = inner_products(grads, GRAM_ALLOWED_FAST_JL)
    # float32 sums of 16 products each, one after the other
    rounding = torch.finfo(torch.float32).eps * (P / 16) ** 0.5
    entries = Check("the specified matrix", partial(columns_error, philox, grads), rounding)
    same = Check(
        "our fast_jl generator, entry by entry",
        lambda features: relative_error(features, project(grads.float(), fast_jl)),
        1e-3,
    )
    slow = partial(unless_slow, grads, K)
    own: Callable[[], Any] = lambda: lambda grads: project(grads, fast_jl)
    stored = partial(peers.stored_matrix, kind, P, K, device, grads.dtype)
    makers: dict[str, tuple[Callable[[], peers.Project], tuple[Check, ...]]] = {
        "stored matrix": (stored, (gram,)),
        "philox": (lambda: lambda grads: project(grads, philox), (gram, entries)),
        "fast_jl generator": (slow(own, SLOW_FAST_JL), (poorer,)),
        "fast_jl CUDA": (
            partial(peers.fast_jl_extension_projector, kind, P, K, device),
            (poorer, same) if P * K <= SLOW_FAST_JL else (poorer,),
        ),
        "trak": (slow(partial(peers.trak_basic, kind, P, K, device)), (gram,)),
        "dattri": (slow(partial(peers.dattri_projector, kind, shapes, K, device)), (gram,)),
        "bergson": (slow(partial(peers.bergson_projector, kind, P, K, device)), (gram,)),
    }
    return [
        Provider(name, apply_to(grads, make), checks, work)
        for name, (make, checks) in makers.items()
    ]


def sparse_providers(case: Case, grads: Tensor, shapes: list[tuple[int, ...]]) -> list[Provider]:
    """Ours, dattri's CUDA extension, and what one would write in torch."""
    (B, P), K, device = grads.shape, case.proj_dim, grads.device
    work = Work(float(B * P), grads.nbytes + 4.0 * B * K)
    gram = inner_products(grads, GRAM_ALLOWED)
    sjlt = Projection("sjlt", K, 1)
    makers: dict[str, Callable[[], peers.Project]] = {
        "index_add_": partial(peers.count_sketch, P, K, device),
        "sjlt": lambda: lambda grads: project(grads, sjlt, shapes=shapes),
        "dattri": partial(peers.dattri_projector, "sjlt", shapes, K, device),
    }
    return [Provider(name, apply_to(grads, make), (gram,), work) for name, make in makers.items()]


@pytest.mark.parametrize("case, name", CASES)
def test_projection(
    benchmark: Any,
    case: Case,
    name: str,
    races: Races,
    roofs: Callable[[str], Roofs],
    device: torch.device,
    smoke: bool,
) -> None:
    def build() -> Contest:
        grads, shapes = make_gradients(case, device, smoke)
        dense = case.kind in DENSE_KINDS
        return Contest(
            suite="projection",
            group=f"{case.kind}, {case.model}, K = {case.proj_dim:,}, {case.dtype}",
            sizes={"B": case.B, "P": grads.shape[1], "K": case.proj_dim},
            baselines=BASELINES if dense else SPARSE[:1],
            providers=(dense_providers if dense else sparse_providers)(case, grads, shapes),
        )

    races.present(benchmark, case, name, build, roofs)
