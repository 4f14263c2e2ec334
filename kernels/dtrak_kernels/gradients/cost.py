"""What a batch of features will cost, layer by layer, before any gradient is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..kronecker.torch import TwoSidedSketch
from .accumulator import Accumulator, KroneckerAccumulator
from .planned import BatchMemory
from .rules import find_rule
from .weight import (
    TRANSPOSED,
    WEIGHT_MODULES,
    Convolution,
    LayerGradient,
    as_convolution,
    is_conv1d,
    positions_last,
    workspace_bytes,
)

if TYPE_CHECKING:
    from .whitening.accumulator import WhiteningAccumulator
    from .whitening.definition import Whitening


@dataclass(frozen=True)
class LayerPlan:
    """One forward of one layer.

    Attributes:
        name: of the module.
        kind: class of the module.
        parameters: shapes of the parameters it is asked for, by attribute.
        positions: T, places of the output that one sample's gradient is summed over.
        flop: multiplications and additions from input and output gradients to features, whole
            batch.
        kept_bytes: its input, held from forward to backward.
        work_bytes: largest tensor of its backward, beside inputs, output gradients and features.
        kernel: what computes it.
    """

    name: str
    kind: str
    parameters: dict[str, tuple[int, ...]]
    positions: int
    flop: int
    kept_bytes: int
    work_bytes: int
    kernel: str


@dataclass(frozen=True)
class Plan:
    """What a batch will cost.

    Signs and places, which do not grow with a batch, are not counted: a byte for every entry of the
    parameters and, on a CPU, 12 or 24 for those of weights small enough for tables (see `sjlt`).

    Attributes:
        kind: of the projection, or the class of the accumulator that takes its place.
        proj_dim: ``K``, the width of the features.
        num_samples: ``B``.
        layers: in the order of the forward; a layer used twice comes twice.
        unused: names of parameters no module of the forward owned.
        feature_bytes: the ``[B, K]`` result.
        model_flop: forward and backward with respect to activations of the listed layers, whole
            batch; without weight gradients.
        budget_bytes: what everything has to fit in, or None.
        weight_bytes: of parameters and buffers, by dtype.
        memory: what the batch holds beside them; None if it could not be told.
        unknown: why it could not.
        whitening: its kind and what its factors take, or empty.
        whitening_flop: of ``flop``, what is whitening.
        floored: names of parameters whose gradient is taken for rounding, and left out.
    """

    kind: str
    proj_dim: int
    num_samples: int
    layers: tuple[LayerPlan, ...]
    unused: tuple[str, ...]
    feature_bytes: int
    model_flop: int
    budget_bytes: int | None
    weight_bytes: dict[str, int] = field(default_factory=dict)
    memory: BatchMemory | None = None
    unknown: str = ""
    whitening: str = ""
    whitening_bytes: int = 0
    whitening_flop: int = 0
    floored: tuple[str, ...] = ()

    @property
    def flop(self) -> int:
        """From inputs and output gradients to features, all layers."""
        return sum(layer.flop for layer in self.layers)

    @property
    def kept_bytes(self) -> int:
        """All layers' inputs; fewer are alive under gradient checkpointing."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def peak_bytes(self) -> int:
        """Most that is alive at once: weights, and what grows with the batch."""
        return self.fixed_bytes + self.batch_bytes

    @property
    def fixed_bytes(self) -> int:
        """Weights, and the factors of a whitening."""
        return sum(self.weight_bytes.values()) + self.whitening_bytes

    @property
    def batch_bytes(self) -> int:
        """Most that is alive at once beside them: activations, features, workspace.

        Where memory could not be told: inputs of all layers, the features, and the largest tensor
        of any backward.
        """
        if self.memory is not None:
            return self.memory.peak_bytes
        work = max((layer.work_bytes for layer in self.layers), default=0)
        return self.kept_bytes + self.feature_bytes + work

    @property
    def fitting_samples(self) -> int | None:
        """A batch that fits the budget, if there is one: all but weights taken to grow with it."""
        if self.budget_bytes is None:
            return None
        free = max(self.budget_bytes - self.fixed_bytes, 0)
        return free * self.num_samples // max(self.batch_bytes, 1)

    def misfits(self) -> list[str]:
        """A line for everything that does not fit the budget; none without a budget."""
        if self.budget_bytes is None:
            return []
        lines = [
            f"{layer.name}: needs {_bytes(layer.kept_bytes + layer.work_bytes)} alone"
            for layer in self.layers
            if layer.kept_bytes + layer.work_bytes > self.budget_bytes
        ]
        if self.fixed_bytes > self.budget_bytes:
            lines.append(f"weights: need {_bytes(self.fixed_bytes)} alone")
        if self.feature_bytes > self.budget_bytes:
            lines.append(f"features: need {_bytes(self.feature_bytes)} alone")
        if self.peak_bytes > self.budget_bytes:
            lines.append(
                f"batch of {self.num_samples}: needs {_bytes(self.peak_bytes)}; "
                f"{self.fitting_samples} samples fit"
            )
        return lines

    def __str__(self) -> str:
        header = ("layer", "kind", "parameters", "T", "GFLOP", "kept", "work", "kernel")
        rows = [
            (
                layer.name,
                layer.kind,
                " ".join(
                    f"{attribute}{list(shape)}" for attribute, shape in layer.parameters.items()
                ).replace(", ", "x"),
                str(layer.positions),
                f"{layer.flop / 1e9:.3g}",
                _bytes(layer.kept_bytes),
                _bytes(layer.work_bytes),
                layer.kernel,
            )
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if 3 <= column <= 6 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (header, *rows)
        ]
        ratio = f" ({self.flop / self.model_flop:.2f} of it)" if self.model_flop else ""
        lines += [
            f"{self.kind}, K = {self.proj_dim:,}, {self.num_samples} samples",
            f"forward and data gradient of these layers {self.model_flop / 1e9:.3g} GFLOP, "
            f"features {self.flop / 1e9:.3g} GFLOP{ratio}",
            self._memory_line(),
        ]
        if self.unknown:
            lines.append(f"activations that autograd keeps are not counted: {self.unknown}")
        if self.whitening:
            lines.append(
                f"whitening: {self.whitening}, {self.whitening_flop / 1e9:.3g} GFLOP of features'"
            )
        if self.floored:
            lines.append(f"rounding alone, so left out: {', '.join(self.floored)}")
        if self.unused:
            lines.append(f"not used, so zero: {', '.join(self.unused)}")
        if self.budget_bytes is not None:
            misfits = self.misfits()
            budget = _bytes(self.budget_bytes)
            lines += (
                [f"does not fit {budget}:", *(f"  {line}" for line in misfits)]
                if misfits
                else [f"fits {budget}, and so would {self.fitting_samples} samples"]
            )
        return "\n".join(lines)

    def _memory_line(self) -> str:
        sizes = [f"{_bytes(size)} {dtype}" for dtype, size in self.weight_bytes.items()]
        parts = [f"weights {' + '.join(sizes) or '0 B'}"]
        if self.memory is None:
            parts.append(f"kept inputs {_bytes(self.kept_bytes)}")
        else:
            activations = f"activations {_bytes(self.memory.activation_bytes)}"
            if count := self.memory.checkpointed:
                kind = " (re-entrant)" if self.memory.reentrant else ""
                calls = f"{count} of {len(self.layers)} layers"
                activations += f" with checkpointing{kind} of {calls}"
            parts.append(activations)
        parts += [f"features {_bytes(self.feature_bytes)}", f"peak {_bytes(self.peak_bytes)}"]
        return ", ".join(parts)


def _bytes(size: int) -> str:
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.3g} {unit}"
    return f"{size} B"


def make_plan(
    layers: Iterable[tuple[str, nn.Module, dict[str, int]]],
    names: list[str],
    accumulator: Accumulator,
    forward: Callable[[], Any],
    num_samples: int,
    rows_per_sample: int,
    feature_bytes: int,
    budget_bytes: int | None,
    keeps_inputs: bool = False,
    whitening: Whitening | None = None,
    whitened: WhiteningAccumulator | None = None,
) -> Plan:
    """Run one forward without gradients and write down what its backward would do.

    Args:
        layers: (name, module, {attribute: index of the parameter}) of every layer that counts.
        names: of the parameters.
        accumulator: what will receive the gradients.
        forward: runs the model.
        num_samples: ``B``.
        rows_per_sample: S.
        feature_bytes: of the result.
        budget_bytes: see `Plan`.
        keeps_inputs: whether inputs are kept as they are, for exact norms.
        whitening: what gradients are multiplied with, if anything.
        whitened: what does that on their way to ``accumulator``.
    """
    plans: list[LayerPlan] = []
    model_flop = whitening_flop = 0
    seen: set[int] = set()

    def record(name: str, owned: dict[str, int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal model_flop, whitening_flop
            seen.update(owned.values())
            inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
            if not isinstance(output, Tensor):
                return
            has_rule, kind = find_rule(module, args, kwargs) is not None, type(module).__name__
            if has_rule and is_conv1d(module) and "weight" in owned:
                inputs, output = [positions_last(inputs[0])], positions_last(output)
                module = as_convolution(module)
            planner = _Planner(
                module, owned, accumulator, num_samples, rows_per_sample, keeps_inputs
            )
            plan, flop = planner.plan(name, inputs, output, has_rule)
            plan = replace(plan, kind=kind)
            model_flop += flop
            if whitened is not None and has_rule and planner.streams:
                layer = LayerGradient(module, inputs[0], output, rows_per_sample)
                route = whitened.route(owned["weight"], layer)
                whitening_flop += route.flop
                plan = replace(
                    plan, flop=plan.flop + route.flop, kernel=f"{plan.kernel}; whitened: {route}"
                )
            plans.append(plan)

        return hook

    handles = [
        module.register_forward_hook(record(name, owned), with_kwargs=True)
        for name, module, owned in layers
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    unused = tuple(name for index, name in enumerate(names) if index not in seen)
    return Plan(
        accumulator.title or type(accumulator).__name__,
        accumulator.num_features,
        num_samples,
        tuple(plans),
        unused,
        feature_bytes,
        model_flop,
        budget_bytes,
        whitening=(
            f"{whitening.kind}, factors {_bytes(whitening.nbytes)}" if whitening is not None else ""
        ),
        whitening_bytes=whitening.nbytes if whitening is not None else 0,
        whitening_flop=whitening_flop,
        floored=whitening.floored if whitening is not None else (),
    )


@dataclass(frozen=True)
class _Planner:
    module: nn.Module
    owned: dict[str, int]
    accumulator: Accumulator
    num_samples: int
    rows_per_sample: int
    keeps_inputs: bool

    def plan(
        self, name: str, inputs: list[Tensor], output: Tensor, has_rule: bool
    ) -> tuple[LayerPlan, int]:
        """The layer's plan, and the FLOP of its forward and data gradient."""
        kept = sum(x.numel() * x.element_size() for x in inputs)
        shapes = {a: self.accumulator.shapes[index] for a, index in self.owned.items()}
        small = sum(math.prod(shape) for a, shape in shapes.items() if not self._is_weight(a))
        # a pass over the output gradient, and one multiplication by a sign per entry
        flop = 2 * output.numel() + 2 * self.num_samples * small
        model_flop, work, kernel, positions = 0, 4 * self.num_samples * small, "rule", 1
        if not has_rule:
            size = sum(math.prod(shape) for shape in shapes.values())
            kept += output.numel() * output.element_size()
            work, kernel = 4 * size, "recomputed one sample at a time"
        elif not isinstance(self.module, WEIGHT_MODULES):
            largest = max((math.prod(shape) for shape in shapes.values()), default=1)
            positions = output.numel() // max(self.num_samples * largest, 1)
        else:
            x = inputs[0]
            channels = shapes["weight"][0] if "weight" in shapes else 1
            seen = x if isinstance(self.module, TRANSPOSED) else output
            positions = seen.numel() // max(channels, 1) // max(self.num_samples, 1)
            if isinstance(self.module, nn.Embedding):
                positions = x.numel() // max(self.num_samples, 1)
            if "weight" in shapes:
                if not isinstance(self.module, nn.Embedding):
                    product = 2 * seen.numel() * math.prod(shapes["weight"][1:])
                    model_flop = 2 * product
                flop_weight, work_weight, kernel = self._weight(x, seen)
                flop, work = flop + flop_weight, max(work, work_weight)
                kept = self._kept(x, kept)
        plan = LayerPlan(
            name, type(self.module).__name__, shapes, positions, flop, kept, work, kernel
        )
        return plan, model_flop

    @property
    def streams(self) -> bool:
        """Whether it has a weight whose gradient is streamed."""
        return any(self._is_weight(attribute) for attribute in self.owned)

    def _is_weight(self, attribute: str) -> bool:
        return attribute == "weight" and isinstance(self.module, WEIGHT_MODULES)

    def _weight(self, x: Tensor, seen: Tensor) -> tuple[int, int, str]:
        """FLOP, largest tensor and kernel from input and output gradient of a weight."""
        index = self.owned["weight"]
        shape = self.accumulator.shapes[index]
        B, P = self.num_samples, math.prod(shape)
        product = 2 * seen.numel() * math.prod(shape[1:])
        # gradients of an embedding are sums of rows
        if isinstance(self.module, nn.Embedding):
            product = x.numel() * shape[1]
        workspace = workspace_bytes(x.device)
        if isinstance(self.accumulator, KroneckerAccumulator) and not self.accumulator.forms_slices(
            self.module, seen
        ):
            sketch = self.accumulator.sketches[index]
            assert isinstance(sketch, TwoSidedSketch)
            return self._two_sided(sketch, x, seen)
        if not self.accumulator.forms_slices(self.module, seen):
            # images of which the kernel takes copies, channels last
            is_image = isinstance(self.module, nn.Conv2d) and x.shape[1] > 1 and x.stride(1) != 1
            copies = max(t.numel() * t.element_size() for t in (x, seen)) if is_image else 0
            return product + 2 * B * P, copies, "gradient and sketch in one (Triton)"
        patches = 0
        if not isinstance(self.module, nn.Linear | nn.Embedding):
            patches = 4 * seen[0].numel() // shape[0] * math.prod(shape[1:])
            patches *= getattr(self.module, "groups", 1)
        slices = min(4 * B * P, max(workspace, 4 * math.prod(shape[1:])))
        work = max(slices, min(patches * len(x), max(workspace, patches)))
        added = self.accumulator.flop_per_entry * B * P
        return product + added, work, self.accumulator.kernel

    def _kept(self, x: Tensor, whole: int) -> int:
        """Bytes of what is kept of a weight's input; two-sided sketches keep it projected."""
        accumulator = self.accumulator
        if self.keeps_inputs or not isinstance(accumulator, KroneckerAccumulator):
            return whole
        if isinstance(self.module, nn.Embedding):
            return whole
        sketch = accumulator.sketches[self.owned["weight"]]
        assert isinstance(sketch, TwoSidedSketch)
        if isinstance(self.module, TRANSPOSED):
            factor, groups = sketch.output_factor, self.module.groups
        else:
            factor, groups = sketch.input_factor, 1
        return whole if factor.is_identity else whole // factor.extent * factor.size * groups

    def _two_sided(self, sketch: TwoSidedSketch, x: Tensor, seen: Tensor) -> tuple[int, int, str]:
        left, right = sketch.output_factor, sketch.input_factor
        groups = self.module.groups if isinstance(self.module, Convolution) else 1
        source_rows = x.numel() // max(right.extent, 1)
        flop = 0 if right.is_identity else 2 * x.numel() * right.size
        flop += 0 if left.is_identity else 2 * seen.numel() * left.size
        places = seen.numel() // max(left.extent, 1) * groups
        flop += 2 * places * left.size * right.size * sketch.taps
        flop += 2 * self.num_samples * sketch.thin_size
        work = 4 * max(
            source_rows * right.size, places * left.size, self.num_samples * sketch.thin_size
        )
        return flop, work, "thin products"
