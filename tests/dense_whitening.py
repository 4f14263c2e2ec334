"""Whitening as its definition says, densely and slowly: a judge that shares no code with ours.

Gradients come from a loop of backwards, inputs and output gradients from module hooks, patches from
convolutions with one-hot filters, and the map of a parameter is one square matrix.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def what_layers_saw(model, f, rows):
    """Per module: its inputs and output gradients, one pair per call."""
    seen = {}

    def watch(module, inputs, output):
        pair = [inputs[0].detach(), None]
        seen.setdefault(module, []).append(pair)
        output.register_hook(lambda grad: pair.__setitem__(1, grad.detach().clone()))

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    f(model, *rows).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return seen


def patches(image, conv, positions):
    """``[N, taps · c]`` of one group's channels ``[R, c, *spatial]``, taps first."""
    channels, kernel = image.shape[1], conv.kernel_size
    ends = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    image = F.pad(image, ends, mode=mode)
    count = channels * int(np.prod(kernel))
    # one filter per (tap, channel)
    filters = torch.eye(count, dtype=image.dtype).reshape(count, *kernel, channels)
    found = CONVOLVE[len(kernel)](
        image, filters.movedim(-1, 1), stride=conv.stride, dilation=conv.dilation
    )
    found = found[(slice(None), slice(None), *(slice(0, n) for n in positions))]
    return found.flatten(2).transpose(1, 2).flatten(0, 1)


def vectors(module, x, d, channels_only):
    """Per group: what rows and what columns of the weight are multiplied with, ``[N, n]``."""
    if isinstance(module, nn.Linear):
        return [(d.reshape(-1, d.shape[-1]), x.reshape(-1, x.shape[-1]))]
    source, seen = (d, x) if isinstance(module, TRANSPOSED) else (x, d)
    result = []
    for s, o in zip(source.chunk(module.groups, 1), seen.chunk(module.groups, 1), strict=True):
        columns = (
            s.movedim(1, -1).reshape(-1, s.shape[1])
            if channels_only
            else patches(s, module, o.shape[2:])
        )
        result.append((o.movedim(1, -1).reshape(-1, o.shape[1]), columns))
    return result


def second_moments(model, f, rows, channels_only):
    """Per weight (by identity), per group: the moments of what rows and columns meet."""
    found = {}
    for module, pairs in what_layers_saw(model, f, rows).items():
        parts = found.setdefault(id(module.weight), [([], []) for _ in range(10**3)])
        for x, d in pairs:
            for group, (left, right) in enumerate(vectors(module, x, d, channels_only)):
                parts[group][0].append(left.double().numpy())
                parts[group][1].append(right.double().numpy())
    result = {}
    for key, parts in found.items():
        stacked = [[np.concatenate(side) for side in sides] for sides in parts if sides[0]]
        result[key] = [[v.T @ v / len(v) for v in sides] for sides in stacked]
    return result


def inverse_root(moment, damping, rank=None):
    values, vectors = np.linalg.eigh(moment)
    ridge = damping * np.trace(moment) / len(moment)
    values = np.maximum(values, 0)
    if rank is not None and rank < len(values):
        values[:-rank] = values[:-rank].mean()
    if np.trace(moment) == 0:
        return np.eye(len(moment))
    return vectors @ np.diag((values + ridge) ** -0.5) @ vectors.T


def block_diagonal(blocks):
    size = sum(len(block) for block in blocks)
    result, at = np.zeros((size, size)), 0
    for block in blocks:
        result[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return result


def rotation(shape, lefts, rights):
    """``[P, P]``: of every group, ``left ⊗ right`` on its rows, in the parameter's order."""
    blocks = []
    for left, right in zip(lefts, rights, strict=True):
        if right.shape[0] == shape[1]:
            # channels alone: the same for every tap
            right = np.kron(np.eye(int(np.prod(shape[2:]))), right)
        blocks.append(np.kron(left, right))
    matrix = block_diagonal(blocks)
    # from (row, tap, channel) to the parameter's (row, channel, tap)
    taps = int(np.prod(shape[2:]))
    order = np.arange(len(matrix)).reshape(shape[0], taps, shape[1]).transpose(0, 2, 1).ravel()
    return matrix[np.ix_(order, order)]


def dense_map(model, f, rows, grads, kind, rank=64, damping=0.01, floor=1e-6):
    """Per parameter a matrix ``W`` and whether it was floored; gradients are multiplied by W.

    Args:
        grads: ``[B, P]`` of the samples that scales are fitted to.
    """
    moments = (
        second_moments(model, f, rows, kind == "channels")
        if kind in ("channels", "lowrank", "kfac")
        else {}
    )
    owners = {}
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and bias is not None:
            owners[id(bias)] = None if isinstance(module, TRANSPOSED) else module.weight
    maps, at, sizes = [], 0, []
    for parameter in model.parameters():
        shape, n = tuple(parameter.shape), parameter.numel()
        g = grads[:, at : at + n].double().numpy()
        at += n
        matrix = np.eye(n)
        if id(parameter) in moments:
            groups = moments[id(parameter)]
            r = rank if kind == "lowrank" else None
            lefts = [
                np.eye(len(left)) if kind == "lowrank" else inverse_root(left, damping)
                for left, _ in groups
            ]
            matrix = rotation(
                shape, lefts, [inverse_root(right, damping, r) for _, right in groups]
            )
        elif owners.get(id(parameter)) is not None and kind in ("channels", "kfac"):
            groups = moments[id(owners[id(parameter)])]
            matrix = block_diagonal([inverse_root(left, damping) for left, _ in groups])
        sizes.append(np.sqrt((g**2).mean()))
        g = g @ matrix.T
        if kind == "diagonal":
            squares = (g**2).mean(0)
            scale = (squares + 0.1 * squares.mean()) ** -0.5 if squares.any() else 0 * squares
            matrix = (np.sqrt(squares), scale)
        elif kind != "none":
            mean = (g**2).mean()
            matrix = matrix * (mean**-0.5 if mean else 0)
        maps.append(matrix)
    if kind == "none":
        return maps, []
    some = sorted(size for size in sizes if size > 0)
    least = floor * some[(len(some) - 1) // 2]
    floored = [size <= least for size in sizes]
    for index, (matrix, is_floored) in enumerate(zip(maps, floored, strict=True)):
        if kind == "diagonal":
            rms, scale = matrix
            scale = np.where((rms > least) & (not is_floored), scale, 0)
            matrix = np.diag(torch.tensor(scale).bfloat16().double().numpy())
        maps[index] = matrix * (not is_floored)
    return maps, floored


def dense_whitened(grads, maps):
    """``W g`` of ``[B, P]``."""
    parts = grads.split([len(m) for m in maps], dim=1)
    return torch.cat([p @ torch.tensor(m).T for p, m in zip(parts, maps, strict=True)], dim=1)
