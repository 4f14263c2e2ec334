"""Everything but model and data that decides features, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .output_names import describe_output_function

if TYPE_CHECKING:
    from dtrak_kernels import Projection


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
    """

    output_function: str
    timesteps: tuple[int, ...]
    noise_seed: int
    projection: Projection
    dtype: str = "float32"
    flips: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable values."""
        return {
            **describe_output_function(self.output_function),
            "timesteps": list(self.timesteps),
            "noise_seed": self.noise_seed,
            "projection": self.projection.to_dict(),
            "dtype": self.dtype,
            **({"flips": True} if self.flips else {}),
        }
