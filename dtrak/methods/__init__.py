"""Attribution methods by name, with what each needs; a method is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ..runs.choices import check_choice

# what a method is given
FEATURES = "features"
CHECKPOINTS = "checkpoints"
TRAJECTORY = "trajectory"
MODELS = "models"
CLIP = "clip"
NOTHING = "nothing"

_RIDGE = "scores:trak"


@dataclass(frozen=True)
class Method:
    """An attribution method: how it is called, what it needs, and the function that scores.

    What the function is called with depends on what the method needs. Letters: M queries, N
    training samples, R retrained models. It returns scores ``[M, N]``, positive for proponents.

    * ``features``, damped: (`RidgeSolver` of the training features, query features ``[M, K]``, λ);
      not damped: (query features, training features ``[N, K]``, a tensor or a store).
    * ``trajectory``: as features, the query features averaged over the steps of their drawing.
    * ``checkpoints``: (query features, training features), two lists with one entry per checkpoint.
    * ``models``: (subsets ``[R, N]`` bool, losses ``[R, M]``).
    * ``clip``: (embeddings of the queries ``[M, D]``, of the training images ``[N, D]``).
    * ``nothing``: (queries, training samples), both `Samples`.

    Attributes:
        title: in tables.
        needs: one of the above.
        place: ``file:function`` in this package; or the function itself.
        output_function: whose gradients its features are, where nothing else is asked for.
        is_damped: whether it takes λ.
    """

    title: str
    needs: str
    place: str | Callable[..., Any]
    output_function: str | None = None
    is_damped: bool = False

    @property
    def name(self) -> str:
        """As it is typed: the title in lower case, without commas and blanks."""
        return self.title.lower().replace(",", "").replace(" ", "-")

    @property
    def is_ridge(self) -> bool:
        """Whether it is TRAK's formula on features of training images and queries alike."""
        return self.place == _RIDGE and self.needs == FEATURES

    @property
    def score(self) -> Callable[..., Any]:
        """The function; it is imported when it is asked for."""
        if callable(self.place):
            return self.place
        file, _, function = self.place.partition(":")
        found: Callable[..., Any] = getattr(import_module(f".{file}", __name__), function)
        return found


_TABLE = (
    Method("D-TRAK", FEATURES, _RIDGE, "mean_squared_l2_norm", is_damped=True),
    Method("D-TRAK, mean", FEATURES, _RIDGE, "mean", is_damped=True),
    Method("D-TRAK, l1_norm", FEATURES, _RIDGE, "l1_norm", is_damped=True),
    Method("D-TRAK, l2_norm", FEATURES, _RIDGE, "l2_norm", is_damped=True),
    Method("D-TRAK, linf_norm", FEATURES, _RIDGE, "linf_norm", is_damped=True),
    Method("TRAK", FEATURES, _RIDGE, "loss", is_damped=True),
    Method("TRAK, weighted_mse", FEATURES, _RIDGE, "weighted_mse", is_damped=True),
    Method("Relative influence", FEATURES, "scores:relative_influence", "loss", is_damped=True),
    Method(
        "Renormalised influence", FEATURES, "scores:renormalised_influence", "loss", is_damped=True
    ),
    Method("Journey-TRAK", TRAJECTORY, _RIDGE, "loss", is_damped=True),
    Method("Gradient dot", FEATURES, "scores:gradient_dot", "loss"),
    Method("Gradient cosine", FEATURES, "scores:gradient_cosine", "loss"),
    Method("TracInCP", CHECKPOINTS, "scores:tracin_cp", "loss"),
    Method("GAS", CHECKPOINTS, "scores:gas", "loss"),
    Method("Raw pixels, dot", NOTHING, "similarity:pixel_dot"),
    Method("Raw pixels, cosine", NOTHING, "similarity:pixel_cosine"),
    Method("Raw latents, dot", NOTHING, "similarity:latent_dot"),
    Method("Raw latents, cosine", NOTHING, "similarity:latent_cosine"),
    Method("CLIP, dot", CLIP, "scores:gradient_dot"),
    Method("CLIP, cosine", CLIP, "scores:gradient_cosine"),
    Method("Random", NOTHING, "similarity:chance"),
    Method("Empirical influence", MODELS, "baselines:empirical_influence"),
    Method("Datamodel", MODELS, "baselines:datamodel"),
)
METHODS = {method.name: method for method in _TABLE}
DEFAULT = "d-trak"


def get_method(name: str | Method, option: str = "--method") -> Method:
    """The method called ``name``; one of your own is taken as it is.

    Raises:
        ValueError: there is none; the message names the closest.
    """
    return name if isinstance(name, Method) else METHODS[check_choice(option, name, METHODS)]


def check_needs(
    method: Method,
    *,
    checkpoints: Any = None,
    drawing: Any = None,
    clip: Any = None,
    retrained: Any = None,
) -> None:
    """Refuse a method whose needs are not met.

    Args:
        method: that is asked for.
        checkpoints: what there is of them; nothing, or None, for none.
        drawing: how the queries were drawn, or whatever says that they will be.
        clip: a CLIP model, or where it lies.
        retrained: models trained on parts of the data.

    Raises:
        ValueError: what is missing, with what makes it.
    """
    missing = None
    if method.needs == CHECKPOINTS and not checkpoints:
        missing = (
            "the model at several points of its training, --checkpoints FOLDER: python -m "
            "dtrak.train --keep-checkpoints 5 … keeps them in its output folder"
        )
    elif method.needs == TRAJECTORY and not drawing:
        missing = "queries that the model draws itself, whose paths it follows: --queries generated"
    elif method.needs == CLIP and clip is None:
        missing = "a CLIP model: --clip FOLDER"
    elif method.needs == MODELS and retrained is None:
        missing = (
            "models that were retrained on parts of the data: python -m dtrak.lds prepare "
            f"--num-retrain 64 …, then python -m dtrak.lds evaluate --methods {method.name}"
        )
    if missing is not None:
        raise ValueError(f"--method {method.name} needs {missing}")


def check_held_out(method: Method) -> None:
    """Refuse a method whose scores of held-out images are not known.

    Raises:
        ValueError: so it is.
    """
    by_features = method.is_ridge or (method.needs == FEATURES and not method.is_damped)
    if not (by_features or method.needs == NOTHING):
        raise ValueError(
            "--held-out is for TRAK's formula, gradient and pixel similarity, such as "
            f"{DEFAULT}, got {method.name}"
        )
