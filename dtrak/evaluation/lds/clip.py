"""CLIP's embeddings of the images of an experiment, computed once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...data.samples import Samples
from ...methods.baselines import clip_embeddings, load_clip
from ...models.hashing import hash_model
from ...runs.files import write_atomically


class ClipEncoder:
    """A CLIP model whose embeddings are kept in files.

    Args:
        folder: as `baselines.load_clip` takes it; nothing is downloaded.
        device: where the model goes.

    Attributes:
        identity: SHA-256 of the weights and the preprocessing.

    Raises:
        FileNotFoundError: as `baselines.load_clip`.
        EncoderError: as `baselines.load_clip`.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        self.clip = load_clip(folder, device)
        preprocessing = (Path(folder) / "preprocessor_config.json").read_bytes()
        weights = hash_model(self.clip.model).encode()
        self.identity = hashlib.sha256(weights + preprocessing).hexdigest()

    def embed(
        self, file: Path, data: Samples, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """The embedding of every image; read from ``file`` where that is of this model and data.

        Args:
            file: where they are kept; written anew if it is of something else, or damaged.
            data: N images.
            progress: called with (images done, images) as they are computed.

        Returns:
            ``[N, D]`` float32, not normalised.

        Raises:
            ValueError: as `baselines.clip_embeddings`.
        """
        wanted = {"clip": self.identity, "data": data.fingerprint}
        try:
            with safe_open(file, "pt") as opened:
                if opened.metadata() == wanted:
                    kept: Tensor = opened.get_tensor("embeddings")
                    return kept
        except (OSError, SafetensorError):
            pass
        embeddings = clip_embeddings(data.images, self.clip, progress=progress)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"embeddings": embeddings}, metadata=wanted))
        return embeddings
