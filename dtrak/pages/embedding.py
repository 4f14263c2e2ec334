"""Pictures inside a page, each once, within so many bytes: rules of its style sheet."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..data.images import to_uint8
from .html import SHARP, encode_webp, to_image

if TYPE_CHECKING:
    from ..data.samples import Samples

# how pictures are kept, the best first: whether exactly, and their longest side in pixels
_KINDS = ((True, None), (False, None), (False, 256), (False, 128), (False, 64))
# encoded to see how many bytes all will take, and read at a time
_PROBED, _BATCH = 24, 64


@dataclass(frozen=True)
class Embedded:
    """Pictures of one shape, as rules of a style sheet.

    Attributes:
        style: one rule per picture; picture k is the background of the class ``<letter>k``.
        count: how many, the first of those asked for.
        note: how they differ from the originals, in words; empty for not at all.
    """

    style: str
    count: int
    note: str


def embed(samples: Samples, rows: Sequence[int], letter: str, budget: int) -> Embedded:
    """Put pictures into rules of a style sheet, as good as ``budget`` allows.

    Exact where all fit; else compressed, else smaller; where even those are too many, the first.

    Args:
        samples: pictures ``[C, H, W]``, C 1 or 3.
        rows: which of them, the foremost first.
        letter: of the classes.
        budget: bytes at most.

    Raises:
        ValueError: these are no grey or RGB pictures.
    """
    shape = samples.shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"pictures must be [1 or 3, H, W], got {list(shape)}")
    longest = max(shape[1:])
    kinds = [kind for kind in _KINDS if kind[1] is None or kind[1] < longest]
    probed = to_uint8(samples.pictures(list(rows[:: max(1, len(rows) // _PROBED)])))
    for is_exact, side in kinds:
        sizes = [len(_rule(letter, 0, pixels, is_exact, side)) for pixels in probed]
        # a little more than the mean, for those that were not looked at
        if sum(sizes) * 1.03 / max(1, len(sizes)) * len(rows) <= budget:
            break
    rules: list[str] = [_common(letter, shape)]
    left, count = budget, 0
    for first in range(0, len(rows), _BATCH):
        for pixels in to_uint8(samples.pictures(list(rows[first : first + _BATCH]))):
            rule = _rule(letter, count, pixels, is_exact, side)
            left -= len(rule) + 1
            if left < 0:
                return Embedded("\n".join(rules), count, _note(is_exact, side))
            rules.append(rule)
            count += 1
    return Embedded("\n".join(rules), count, _note(is_exact, side) if rows else "")


def _note(is_exact: bool, side: int | None) -> str:
    if is_exact:
        return ""
    return "compressed" if side is None else f"compressed, at most {side} pixels a side"


def _common(letter: str, shape: Sequence[int]) -> str:
    rendering = "pixelated" if max(shape[1:]) <= SHARP else "auto"
    return f".{letter}{{aspect-ratio:{shape[2]}/{shape[1]};image-rendering:{rendering}}}"


def _rule(letter: str, number: int, pixels: Tensor, is_exact: bool, side: int | None) -> str:
    image = to_image(pixels)
    if side is not None:
        image.thumbnail((side, side))
    encoded = base64.b64encode(encode_webp(image, is_exact=is_exact)).decode()
    return f".{letter}{number}{{background-image:url(data:image/webp;base64,{encoded})}}"


def render_embedded(letter: str, number: int, alt: str) -> str:
    """An embedded picture, as often as it is wanted."""
    label = html.escape(alt)
    return f'<span class="im {letter} {letter}{number}" role="img" aria-label="{label}"></span>'
