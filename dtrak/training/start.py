"""What a training begins with: fresh weights, a model it goes on from, or a base and an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .presets import get_preset

if TYPE_CHECKING:
    from ..models.denoiser import Denoiser


@dataclass(frozen=True)
class Start:
    """One of four: a preset's own model, a configuration, a model, or a model and a rank.

    Attributes:
        preset: whose model is freshly initialised.
        config: of a network that is freshly initialised, ``{"network": …, "scheduler": …}`` as
            `dtrak.models.read_config` gives it.
        model: folder or hub name of a model that training goes on from.
        weights: which of it, as `dtrak.models.load` takes them.
        is_fresh: whether the weights of that model are drawn anew instead.
        rank: of a fresh adapter in that model, which alone is trained; None trains all of it.
        targets: ends of the names of the layers that get an adapter; the kind's own by default.
    """

    preset: str | None = None
    config: dict[str, Any] | None = field(default=None, hash=False)
    model: str | None = None
    weights: str | None = None
    is_fresh: bool = False
    rank: int | None = None
    targets: tuple[str, ...] = ()

    def make(self, seed: int, base: Denoiser | None = None) -> Denoiser:
        """A model to train, on the CPU.

        Args:
            seed: of whatever is drawn.
            base: the model that ``model`` names, where it is loaded already and only its adapter is
                replaced.

        Raises:
            FileNotFoundError, ModelError: as `dtrak.models.load`, or the kind of model is not
                trained so.
        """
        from ..models import make

        if self.preset is not None:
            return get_preset(self.preset).make_model(seed)
        if self.config is not None:
            return make(self.config, seed)
        model = self.base() if base is None else base
        if self.rank is not None:
            return model.put_adapter(self.rank, seed=seed, targets=self.targets)
        return model.fresh(seed) if self.is_fresh else model

    def load(self, folder: Path, base: Denoiser | None = None) -> Denoiser:
        """The model that was trained and written into ``folder``; ``base`` as in `make`.

        Raises:
            FileNotFoundError, ValueError: as `dtrak.models.load`.
        """
        from ..models import load

        if self.rank is None:
            return load(folder)
        return (self.base() if base is None else base).load_adapter(folder)

    def base(self) -> Denoiser:
        """The model that ``model`` names; raises as `dtrak.models.load`."""
        from ..models import load

        return load(str(self.model), weights=self.weights)

    def to_dict(self) -> dict[str, Any]:
        """What decides it, JSON-serialisable, without defaults; where a model lies does not."""
        values = asdict(self) | {"targets": list(self.targets)}
        return {k: v for k, v in values.items() if v and k != "model"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Start:
        """What `to_dict` gave, and ``model``.

        Raises:
            TypeError: a field is unknown.
        """
        return cls(**{**values, "targets": tuple(values.get("targets", ()))})
