"""Everything but model and data that decides features, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..runs.choices import WHITENINGS, check_choice
from .output_names import describe_output_function

if TYPE_CHECKING:
    from dtrak_kernels import Projection


# beside the features of whitened gradients
FILE = "whitening.safetensors"
# of ``--whiten``: the kind is chosen here
AUTO = "auto"
# A of whole patches, which a two-sided sketch never sees
_OF_PATCHES = ("lowrank", "kfac")


def check_whitening(asked: str, projection: str) -> None:
    """Refuse a whitening that is unknown, or that the projection cannot have.

    Raises:
        ValueError: so it is.
    """
    check_choice("--whiten", asked, (AUTO, *WHITENINGS))
    if projection == "kronecker" and asked in _OF_PATCHES:
        raise ValueError(
            "--whiten must be channels, diagonal, scale or none with --projection kronecker, got "
            f"{asked!r}"
        )


def choose_whitening(asked: str, projection: str) -> str:
    """The kind of whitening of a method with a damping.

    Args:
        asked: as `check_whitening`.
        projection: kind of the random matrix.
    """
    usual = "channels" if projection == "kronecker" else "lowrank"
    return usual if asked == AUTO else asked


@dataclass(frozen=True)
class WhiteningSettings:
    """How gradients are whitened before they are projected: `dtrak_kernels.Whitening`.

    Attributes:
        kind: one of `choices.WHITENINGS`, but ``"none"``.
        rank: r.
        damping: ρ.
        factor_images: training images that the factors see, at most, evenly spaced.
        factor_timesteps: of each image, drawn from those of the features.
        scale_images: training images whose features decide the scales, likewise.
    """

    kind: str
    rank: int = 64
    damping: float = 0.01
    factor_images: int = 200
    factor_timesteps: int = 1
    scale_images: int = 20

    @classmethod
    def of(cls, kind: str) -> WhiteningSettings | None:
        """The usual settings of a kind; None for ``"none"``."""
        return None if kind == "none" else cls(kind)


@dataclass(frozen=True)
class FeatureSettings:
    """Everything but model and data that decides the features.

    Attributes:
        output_function: as in `output_names.check_output_function`.
        timesteps: S timestep indices; gradients are averaged over them.
        noise_seed: see `noise.sample_noise`.
        projection: the random matrix.
        flips: features of an image are the mean of its own and its mirror image's, each with noise
            of its own: for training images of a model that was trained with flips.
        dtype: one of `choices.DTYPES`; 16-bit types run under autocast, features are float32
            (float64 for ``"float64"``).
        whitening: of the gradients; None leaves them as they are.
        halves: whether half the difference of two interleaved halves of the timesteps stands behind
            each feature: ``[N, 2K]``.
    """

    output_function: str
    timesteps: tuple[int, ...]
    noise_seed: int
    projection: Projection
    dtype: str = "float32"
    flips: bool = False
    whitening: WhiteningSettings | None = None
    halves: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return {
            **describe_output_function(self.output_function),
            "timesteps": list(self.timesteps),
            "noise_seed": self.noise_seed,
            "projection": self.projection.to_dict(),
            "dtype": self.dtype,
            **({"flips": True} if self.flips else {}),
            **({"halves": True} if self.halves else {}),
            **({} if self.whitening is None else {"whitening": asdict(self.whitening)}),
        }
