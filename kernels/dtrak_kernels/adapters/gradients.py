"""What the projector classes for other libraries share: gradients as those libraries pass them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..gradients.whitening.definition import Whitening
from ..ops import project, project_
from ..projection import Projection

# columns put together before they are projected: a copy of no more than this, whatever P is
_COLUMNS = 2**22


def kind_of(proj_type: Any, kinds: tuple[str, ...]) -> str:
    """The kind a library's ``proj_type`` names, a string or an enumeration of strings.

    Raises:
        ValueError: it is none of ``kinds``.
    """
    kind = str(getattr(proj_type, "value", proj_type))
    if kind not in kinds:
        raise ValueError(f"proj_type must be one of {', '.join(kinds)}, got {kind!r}")
    return kind


def keyed_seed(seed: int, key: int, name: str) -> int:
    """A Philox seed whose low word is ``seed`` and whose high word is ``key``.

    Two words, so that no seed of one checkpoint is a seed of another, as sums of the two would be.

    Raises:
        ValueError: ``seed`` is not in ``[0, 2**32)``, or ``key`` not in ``[0, 2**31)``.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if not 0 <= key < 2**31:
        raise ValueError(f"{name} must be in [0, 2**31), got {key}")
    return (key << 32) + seed


Whitenings = Mapping[int, Whitening] | None


def whitening_of(whitenings: Whitenings, key: int, name: str) -> Whitening | None:
    """The whitening of a checkpoint, None if there are none at all.

    Raises:
        ValueError: there are others, but none for ``key``.
    """
    if whitenings is None:
        return None
    if key not in whitenings:
        raise ValueError(
            f"whitenings must have one for {name} {key}, got those of {sorted(whitenings)}"
        )
    return whitenings[key]


def whiten_any(
    grads: Mapping[str, Tensor] | Tensor, whitening: Whitening
) -> Mapping[str, Tensor] | Tensor:
    """Gradients as `project_any` takes them, whitened; in their dtype and on their device.

    Raises:
        ValueError: they are of other parameters than the whitening, by name, shape or number.
    """
    if isinstance(grads, Tensor):
        return whitening.apply(grads)
    if tuple(grads) != whitening.names:
        raise ValueError(
            f"grads must be of the whitening's parameters {list(whitening.names)}, got "
            f"{list(grads)}"
        )
    result = {}
    for (name, part), parameter in zip(grads.items(), whitening.parameters, strict=True):
        if tuple(part.shape[1:]) != parameter.shape:
            raise ValueError(
                f"grads must have {name!r} {list(parameter.shape)}, got {list(part.shape[1:])}"
            )
        moved = parameter.to(part.device, part.dtype)
        flat = part if part.ndim > 2 else part.reshape(len(part), -1)
        result[name] = moved.whiten(flat).reshape(part.shape)
    return result


def project_any(
    grads: Mapping[str, Tensor] | Tensor,
    projection: Projection,
    grad_dim: int,
    device: torch.device | str,
    *,
    scale: float | None,
    implementation: str | None,
) -> Tensor:
    """Project per-sample gradients given as one tensor or parameter by parameter.

    A dictionary is never flattened as a whole.

    Args:
        grads: ``[B, P]``, or ``{name: [B, *shape]}`` in the order of the flattened gradient; a
            ``[B]`` value is one scalar parameter.
        projection: of a kind other than ``"none"``; ``"sjlt"`` needs the dictionary.
        grad_dim: ``P``.
        device: where to project.
        scale: see `project`; of dense kinds only.
        implementation: see `project`.

    Returns:
        ``[B, K]``, a tensor of its own.

    Raises:
        TypeError: see `project`.
        ValueError: the columns are not ``grad_dim``, the batches differ, or see `project`.
    """
    parts = list(grads.values()) if isinstance(grads, Mapping) else [grads]
    if not parts:
        raise ValueError("grads must hold at least one parameter, got an empty dict")
    B = len(parts[0])
    if any(len(part) != B for part in parts):
        raise ValueError(
            f"grads must have one batch size, got {sorted({len(part) for part in parts})}"
        )
    shapes = [tuple(part.shape[1:]) for part in parts]
    columns = sum(math.prod(shape) for shape in shapes)
    if columns != grad_dim:
        raise ValueError(f"grads must have grad_dim = {grad_dim} columns, got {columns}")
    is_wide = any(part.dtype == torch.float64 for part in parts)
    flat = (
        part.detach().reshape(B, math.prod(shape)).to(device, torch.float64 if is_wide else None)
        for part, shape in zip(parts, shapes, strict=True)
    )
    if projection.kind == "sjlt":
        if isinstance(grads, Tensor):
            raise ValueError(
                "grads must be a dict of parameters for kind 'sjlt', got a tensor: it sketches "
                "parameter by parameter"
            )
        return project(torch.cat(list(flat), dim=1), projection, shapes=shapes)
    dtype = torch.float64 if is_wide else torch.float32
    out = torch.zeros(B, projection.proj_dim, dtype=dtype, device=device)
    offset = 0
    for block in _blocks(flat):
        project_(
            block,
            projection,
            offset=offset,
            out=out,
            grad_dim=grad_dim,
            scale=scale,
            implementation=implementation,
        )
        offset += block.shape[1]
    return out


def _blocks(flat: Iterator[Tensor]) -> Iterator[Tensor]:
    """Neighbouring small parameters together, so that each call of the kernel has work to do."""
    waiting: list[Tensor] = []
    for part in flat:
        if waiting and sum(x.shape[1] for x in waiting) + part.shape[1] > _COLUMNS:
            yield torch.cat(waiting, dim=1)
            waiting = []
        waiting.append(part)
    yield waiting[0] if len(waiting) == 1 else torch.cat(waiting, dim=1)
