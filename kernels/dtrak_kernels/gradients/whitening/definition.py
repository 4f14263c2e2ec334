"""What a whitening is: a linear map of every parameter's gradient, fitted once and kept in a file.

    G  ->  s · B^(-1/2) G A^(-1/2)      the weight of a linear layer or a convolution
    b  ->  s · B^(-1/2) b               its bias
    g  ->  s · g                        everything else

A gradient is the sum of outer products ``Σ_t b_t a_tᵀ`` of what a layer's weight meets: a is its
input (a patch of it, in the order of `sjlt.as_matrix`), b the gradient with respect to its output.
``A`` and ``B`` are the means of ``a aᵀ`` and ``b bᵀ``, one for every group of a convolution. A
transposed convolution has patches of its output gradient for a and its input for b, and no B for
its bias. ``X^(-1/2)`` is ``(X + ρ · tr(X)/n · 1)^(-1/2)``; the scale s makes the mean squared entry
over the fitted samples 1.

The map is linear, so it commutes with the sum over the rows of a sample, and features of whitened
gradients are those of an ordinary projection of them.

Source:
    A and B: K-FAC, Martens and Grosse 2015 (arXiv:1503.05671); for convolutions, Grosse and Martens
    2016 (arXiv:1602.01407). Scales after the rotation: EK-FAC, George et al. 2018
    (arXiv:1806.03884). For influence: Grosse et al. 2023 (arXiv:2308.03296).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..parameters import ParameterChoice
from .roots import DenseRoot, LowRankRoot, Root

KINDS = ("none", "scale", "diagonal", "channels", "lowrank", "kfac")
TWO_SIDED_KINDS = ("channels", "lowrank", "kfac")
# entries of a parameter that stand for it in a model's fingerprint
_SAMPLED = 64

# runs a forward and returns one scalar per row; and the number of samples
Batch = tuple[Callable[[], Tensor], int]


@dataclass(frozen=True)
class ParameterWhitening:
    """The map of one parameter's gradient.

    Attributes:
        shape: of the parameter.
        scale: s, a scalar; or ``[*shape]``, one for every entry, values of bfloat16.
        rows: ``B^(-1/2)``, on the parameter's first dimension.
        columns: ``A^(-1/2)``, on the other dimensions as `sjlt.as_matrix` orders them, or on the
            second one alone, tap by tap.
    """

    shape: tuple[int, ...]
    scale: Tensor
    rows: Root | None = None
    columns: Root | None = None

    @property
    def has_entries(self) -> bool:
        """Whether every entry has a scale of its own."""
        return self.scale.ndim > 0

    @cached_property
    def factor(self) -> float:
        """s; 1 where every entry has its own."""
        return 1.0 if self.has_entries else float(self.scale)

    @cached_property
    def is_zero(self) -> bool:
        """Whether the gradient was found to be nothing but rounding."""
        return not bool(self.scale.any())

    @property
    def is_rotated(self) -> bool:
        """Whether there is more to it than scales."""
        return self.rows is not None or self.columns is not None

    @cached_property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return not (self.is_rotated or self.has_entries) and self.factor == 1

    @property
    def acts_on_patches(self) -> bool:
        """Whether A mixes the taps of a kernel."""
        return self.columns is not None and self.columns.size != self.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> ParameterWhitening:
        """The same map on a device, computing in a dtype."""
        moved = [root and root.to(device, dtype) for root in (self.rows, self.columns)]
        return ParameterWhitening(self.shape, self.scale.to(device, dtype), *moved)

    def whiten(self, grads: Tensor, first_row: int = 0) -> Tensor:
        """The map of per-sample gradients.

        Args:
            grads: ``[b, n]`` of a vector; otherwise ``[b, o, I, *kernel]``, rows of the parameter
                in any memory layout, the kernel's dimensions perhaps one. All rows if there is a B.
            first_row: the first of them.

        Returns:
            ``[b, n]`` or ``[b, o, I, taps]``; ``grads`` itself where nothing is changed.
        """
        if self.is_identity:
            return grads
        if grads.ndim == 2:
            if self.rows is not None:
                groups = grads.unflatten(1, (self.rows.groups, 1, -1))
                grads = self.rows.apply(groups).flatten(1)
            return grads * (self.scale.flatten() if self.has_entries else self.scale)
        block = grads.flatten(3) if grads.ndim > 3 else grads.unsqueeze(3)
        if self.is_rotated:
            block = self._rotated(block.transpose(2, 3), first_row).transpose(2, 3)
        if not self.has_entries:
            return block if self.factor == 1 else block * self.scale
        scale = self.scale[first_row : first_row + block.shape[1]]
        return block * scale.reshape(block.shape[1:])

    def _rotated(self, block: Tensor, first_row: int) -> Tensor:
        """Both sides of ``[b, o, taps, I]``."""
        shape = block.shape
        if self.rows is not None:
            groups = block.reshape(shape[0], self.rows.groups, self.rows.size, -1)
            block = self.rows.apply_left(groups).reshape(shape)
        if self.columns is None:
            return block
        if shape[1] == self.shape[0]:
            groups = block.reshape(shape[0], self.columns.groups, -1, self.columns.size)
            return self.columns.apply(groups).reshape(shape)
        per_group = self.shape[0] // self.columns.groups
        parts = []
        for group in range(first_row // per_group, (first_row + shape[1] - 1) // per_group + 1):
            low = max(group * per_group - first_row, 0)
            part = block[:, low : (group + 1) * per_group - first_row]
            vectors = part.reshape(shape[0], 1, -1, self.columns.size)
            parts.append(self.columns.of_group(group).apply(vectors).reshape(part.shape))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class Whitening:
    """A linear map of per-sample gradients, one `ParameterWhitening` after another.

    Made by `fit` or `load`, applied by ``GradientSketcher(model, projection, whitening=...)`` or,
    to gradients that exist, by `apply`.

    Attributes:
        kind: ``"none"``; ``"scale"``, one per parameter; ``"diagonal"``, one per entry;
            ``"channels"``, two-sided, A of a convolution's channels; ``"lowrank"``, A alone, of
            whole patches, exact on its largest eigenvectors; or ``"kfac"``, two-sided, A of whole
            patches.
        rank: r, of ``"lowrank"`` and of any factor wider than 1,024.
        damping: ``ρ``.
        function: what the caller called the output function whose gradients were fitted.
        model: fingerprint of the weights that they belong to.
        names: of the parameters, in the order of the flattened gradient.
        parameters: their maps.
        floored: names of those whose gradient was nothing but rounding: s = 0.
    """

    kind: str
    rank: int
    damping: float
    function: str
    model: str
    names: tuple[str, ...]
    parameters: tuple[ParameterWhitening, ...]
    floored: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        batches: Iterable[Batch],
        *,
        kind: str = "lowrank",
        rank: int = 64,
        damping: float = 0.01,
        parameters: ParameterChoice = None,
        rows_per_sample: int = 1,
        factor_batches: Iterable[Batch] | None = None,
        function: str = "",
    ) -> Whitening:
        """Fit to the gradients of a model, streamed: none is stored.

        Two passes over the batches: the first adds up A and B, where the kind has them, over at
        most 64 positions a row; the second the squares of the rotated gradients.

        Args:
            model: see `GradientSketcher`, whose call sites see what is fitted.
            batches: of a few hundred training samples, gone through twice: pairs of a function
                that runs a forward and returns one scalar a row, and the number of samples, as
                `GradientSketcher.sketch` takes them. Both passes must see the same numbers.
            kind: see `Whitening`.
            rank: see `Whitening`.
            damping: see `Whitening`.
            parameters: see `GradientSketcher`.
            rows_per_sample: S of ``batches``.
            factor_batches: other batches for A and B, one row a sample: these know nothing of
                samples, so that many samples with a row or two each are better than few with many.
            function: a name for what is differentiated, which `check` compares.

        Returns:
            The whitening, float32 (float64 for a float64 model), on the model's device.

        Raises:
            TypeError: ``batches`` can be gone through only once.
            ValueError: an argument is not as above, there is no sample, or a gradient is not
                finite; or see `GradientSketcher`.
        """
        from .fit import fit

        return fit(
            model,
            batches,
            kind=kind,
            rank=rank,
            damping=damping,
            parameters=parameters,
            rows_per_sample=rows_per_sample,
            factor_batches=factor_batches,
            function=function,
        )

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        return [parameter.shape for parameter in self.parameters]

    @property
    def nbytes(self) -> int:
        """Memory of all factors and scales."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @cached_property
    def identity(self) -> str:
        """Hash of everything it consists of. A second fit may differ in the last bits."""
        digest = hashlib.sha256(self._header.encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(name.encode())
            flat = tensor.detach().cpu().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def apply(self, grads: Tensor) -> Tensor:
        """The map of dense gradients ``[B, P]``, in the dtype of ``grads``, as a new tensor.

        Raises:
            ValueError: they have another number of columns.
        """
        sizes = [math.prod(shape) for shape in self.shapes]
        if grads.ndim != 2 or grads.shape[1] != sum(sizes):
            raise ValueError(
                f"grads must be [B, {sum(sizes)}], the parameters of this whitening, got "
                f"{list(grads.shape)}"
            )
        parts = []
        for part, parameter in zip(grads.split(sizes, dim=1), self.parameters, strict=True):
            shape = parameter.shape if len(parameter.shape) > 1 else (part.shape[1],)
            moved = parameter.to(grads.device, grads.dtype)
            parts.append(moved.whiten(part.unflatten(1, shape)).reshape(part.shape))
        return torch.cat(parts, dim=1)

    def check(self, **expected: Any) -> Whitening:
        """Refuse a whitening of other settings.

        Args:
            expected: values that ``kind``, ``rank``, ``damping`` or ``function`` must have.

        Returns:
            Itself.

        Raises:
            ValueError: naming what differs.
        """
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"whitening must be of {name} {value!r}, got {getattr(self, name)!r}"
                )
        return self

    def check_model(
        self, model: nn.Module, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
    ) -> None:
        """Refuse a model that this whitening was not fitted to.

        Args:
            model: what is differentiated.
            names: of the chosen parameters.
            shapes: of the chosen parameters.

        Raises:
            ValueError: naming what differs: parameters, their shapes, or the weights.
        """
        missing = next((n for n in names if n not in self.names), None)
        extra = next((n for n in self.names if n not in names), None)
        if missing is not None or extra is not None:
            raise ValueError(
                "whitening must be of the chosen parameters, got one "
                + (f"without {missing!r}" if missing is not None else f"that has {extra!r}, too")
            )
        for name, shape, mine in zip(names, shapes, self.shapes, strict=True):
            if tuple(shape) != mine:
                raise ValueError(
                    f"whitening must be of {name!r} {list(shape)}, got one of {list(mine)}"
                )
        if self.model != fingerprint(model):
            raise ValueError(
                "whitening must be of this model, got one fitted to other weights: fit it again"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whose header holds the settings."""
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """What `save` writes, for whoever writes files in another way."""
        from safetensors.torch import save

        # tensors of a file must not share memory
        tensors = {name: x.detach().cpu().contiguous() for name, x in self._tensors.items()}
        tensors = {name: x.clone() for name, x in tensors.items()}
        return save(tensors, metadata={"whitening": self._header})

    @classmethod
    def load(cls, path: str | Path, **expected: Any) -> Whitening:
        """Read what `save` wrote, on the CPU.

        Args:
            path: the file.
            expected: see `check`.

        Raises:
            ValueError: the file holds something else, or see `check`.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("whitening")
            if header is None:
                raise ValueError(f"{path} must hold a whitening, got other tensors")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return cls._from_parts(json.loads(header), tensors).check(**expected)

    @cached_property
    def _header(self) -> str:
        """Settings and structure, as JSON."""
        plain = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "parameters"
        }
        return json.dumps(
            plain | {"shapes": self.shapes, "sides": self._sides}, sort_keys=True, allow_nan=False
        )

    @cached_property
    def _sides(self) -> list[dict[str, int]]:
        """Per parameter, by side, the first parameter that has the same root (a bias shares B)."""
        first: dict[int, int] = {}
        return [
            {
                side: first.setdefault(id(root), index)
                for side in ("rows", "columns")
                if (root := getattr(parameter, side)) is not None
            }
            for index, parameter in enumerate(self.parameters)
        ]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """What a file holds, each root once."""
        result: dict[str, Tensor] = {}
        for index, parameter in enumerate(self.parameters):
            is_narrow = parameter.has_entries
            result[f"{index}.scale"] = (
                parameter.scale.to(torch.bfloat16) if is_narrow else parameter.scale
            )
            for side, owner in self._sides[index].items():
                root = getattr(parameter, side)
                if owner == index:
                    result |= {f"{index}.{side}.{f}": getattr(root, f) for f in root.fields}
        return result

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Whitening:
        roots: dict[tuple[int, str], Root] = {}

        def root_of(side: str, owner: int) -> Root:
            if (owner, side) not in roots:
                found = {
                    field: tensors[f"{owner}.{side}.{field}"]
                    for field in ("matrix", "constant", "basis", "gains")
                    if f"{owner}.{side}.{field}" in tensors
                }
                roots[owner, side] = DenseRoot(**found) if len(found) == 1 else LowRankRoot(**found)
            return roots[owner, side]

        shapes, sides = header.pop("shapes"), header.pop("sides")
        parameters = [
            ParameterWhitening(
                tuple(shape),
                tensors[f"{index}.scale"],
                **{side: root_of(side, owner) for side, owner in of_parameter.items()},
            )
            for index, (shape, of_parameter) in enumerate(zip(shapes, sides, strict=True))
        ]
        names, floored = tuple(header.pop("names")), tuple(header.pop("floored"))
        return cls(names=names, floored=floored, parameters=tuple(parameters), **header)

    def to(self, device: torch.device, dtype: torch.dtype) -> Whitening:
        """The same map on a device, computing in a dtype."""
        # a bias shares its layer's B
        moved: dict[int, Root] = {}

        def once(root: Root | None) -> Root | None:
            if root is None:
                return None
            if id(root) not in moved:
                moved[id(root)] = root.to(device, dtype)
            return moved[id(root)]

        parameters = tuple(
            ParameterWhitening(p.shape, p.scale.to(device, dtype), once(p.rows), once(p.columns))
            for p in self.parameters
        )
        return replace(self, parameters=parameters)


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights, from their names, shapes and some evenly spaced entries."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        chosen = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLED, len(flat))).long()
        values = flat[chosen.to(flat.device)].to("cpu", torch.float64)
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
