"""The methods that are evaluated, by name; importing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from ...methods import CHECKPOINTS, CLIP, FEATURES, NOTHING, TRAJECTORY, Method, get_method
from ...methods import METHODS as REGISTERED
from ...runs.choices import check_choice

_LATENTS = "raw-latents-"
_ORDER = (FEATURES, TRAJECTORY, CHECKPOINTS, NOTHING)
# in the order of the table; those of latents take the place of those of pixels where there are any
METHODS = tuple(
    method
    for method in REGISTERED.values()
    if method.needs in _ORDER and not method.name.startswith(_LATENTS)
)
# where a CLIP model is at hand
CLIP_METHODS = tuple(method for method in REGISTERED.values() if method.needs == CLIP)


def parse_methods(text: str | None, *, with_clip: bool) -> list[Method]:
    """The methods of ``--methods``, in the order of the table; None is all there are.

    Raises:
        ValueError: one is unknown, or needs a CLIP model that is not given.
    """
    known = {method.name: method for method in (*METHODS, *CLIP_METHODS)}
    if text is None:
        return [*METHODS, *(CLIP_METHODS if with_clip else ())]
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    chosen = {check_choice("--methods", name, known) for name in wanted}
    if not chosen:
        raise ValueError(f"--methods must name methods, such as d-trak,trak, got {text!r}")
    if not with_clip and any(known[name].needs == CLIP for name in chosen):
        raise ValueError("--clip must name a folder with a CLIP model for CLIP's methods")
    return [method for name, method in known.items() if name in chosen]


def of_latents(method: Method) -> Method:
    """The method that compares latents in the place of pixels; others as they are."""
    pixels = "raw-pixels-"
    if not method.name.startswith(pixels):
        return method
    return get_method(method.name.replace(pixels, _LATENTS))


def names_of(methods: Sequence[Method]) -> str:
    """Names for a sentence."""
    return ", ".join(method.title for method in methods)
