"""What identifies tensors and models in manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def hash_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and bytes, whatever their order or device.

    Args:
        tensors: by name.
        dtype: what each is made before, one after the other; None leaves them as they are.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().to(dtype).contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_model(model: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, dtypes, shapes and bytes."""
    return hash_tensors(model.state_dict())


def hash_captions(captions: Sequence[str], tokens: Sequence[Sequence[int]]) -> str:
    """SHA-256 of captions, in order, and of the tokens a model reads them as."""
    digest = hashlib.sha256()
    for caption, row in zip(captions, tokens, strict=True):
        digest.update(json.dumps([caption, list(row)]).encode())
    return digest.hexdigest()
