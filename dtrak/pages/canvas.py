"""A picture laid out in whole pixels, so that every image pixel is a square of the same size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from ..runs.files import encode_text

INK, SOFT, LINE = "#1d1f23", "#5d6168", "#dfddd7"
PLUS, MINUS = "#0d7268", "#b34f0b"


@contextmanager
def default_style() -> Iterator[None]:
    """Matplotlib as it comes: a user's matplotlibrc must not change a picture."""
    import matplotlib.style

    with matplotlib.style.context("default"), warnings.catch_warnings():
        # a name may hold any script
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def fit(pixels: Tensor, room: int) -> int:
    """The longest side, in pixels, at which an image ``[C, H, W]`` fits: a multiple of its own."""
    longest = max(pixels.shape[1:])
    return room // longest * longest if longest <= room else room


@lru_cache(maxsize=4096)
def text_width(text: str, pixels: float, *, bold: bool = False) -> int:
    """How wide a line is on a `Canvas`, in pixels; call it within `default_style`."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    # at 72 dots per inch a point is a pixel
    font = FontProperties(size=pixels, weight="bold" if bold else "normal")
    text = encode_text(text).decode()
    width, _, _ = RendererAgg(1, 1, 72).get_text_width_height_descent(text, font, ismath=False)
    # where a line begins moves its end by a part of a pixel
    return math.ceil(width) + 2


def wrap(text: str, width: int, pixels: int, *, bold: bool = False, lines: int = 1) -> list[str]:
    """A text in so many lines at most, cut before its end where it is longer."""
    # fonts know no bytes of file names that are no text
    words = encode_text(text).decode().split()
    found: list[str] = []
    while words:
        kept = len(words) if len(found) == lines - 1 else 1
        while (
            kept < len(words)
            and text_width(" ".join(words[: kept + 1]), pixels, bold=bold) <= width
        ):
            kept += 1
        found.append(_shorten(" ".join(words[:kept]), width, pixels, bold))
        words = words[kept:]
    return found


def _shorten(text: str, width: int, pixels: int, bold: bool) -> str:
    """A line that fits."""
    if text_width(text, pixels, bold=bold) <= width:
        return text
    # what tells ids apart is their end
    tail = min(max(len(text) - text.rfind("/"), 1), 10)
    fits, too_long = tail, len(text)
    while too_long - fits > 1:
        kept = (fits + too_long) // 2
        short = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if text_width(short, pixels, bold=bold) <= width:
            fits = kept
        else:
            too_long = kept
    return f"{text[: fits - tail]}…{text[len(text) - tail :]}"


class Canvas:
    """A white page measured in pixels from its top left corner."""

    def __init__(self, width: int, height: int, dpi: int = 150) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height, self.dpi = width, height, dpi
        self.figure = Figure((width / dpi, height / dpi), dpi=dpi, facecolor="white")
        FigureCanvasAgg(self.figure)

    def write(
        self, x: float, y: float, text: str, *, pixels: float, colour: str = INK, bold: bool = False
    ) -> None:
        """Write one line with its top at ``y``."""
        self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            fontsize=pixels * 72 / self.dpi,
            color=colour,
            fontweight="bold" if bold else "normal",
            va="top",
            ha="left",
            # an id may hold a dollar sign
            parse_math=False,
        )

    def fill(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """Paint a rectangle."""
        from matplotlib.patches import Rectangle

        corner = (x / self.width, 1 - (y + height) / self.height)
        size = (width / self.width, height / self.height)
        self.figure.patches.append(
            Rectangle(corner, *size, color=colour, linewidth=0, transform=self.figure.transFigure)
        )

    def paste(self, x: int, y: int, pixels: Tensor, side: int) -> None:
        """Put an image [C, H, W] uint8 with its longest side ``side`` pixels long."""
        from matplotlib.image import BboxImage
        from matplotlib.transforms import Bbox, TransformedBbox

        array = pixels.expand(3, -1, -1).movedim(0, -1).numpy()
        longest = max(array.shape[:2])
        height, width = (max(1, round(n * side / longest)) for n in array.shape[:2])
        # squares are drawn here, or a viewer blurs them
        times = max(1, side // longest)
        box = Bbox.from_bounds(
            x / self.width,
            1 - (y + height) / self.height,
            width / self.width,
            height / self.height,
        )
        image = BboxImage(
            TransformedBbox(box, self.figure.transFigure),
            data=array.repeat(times, axis=0).repeat(times, axis=1),
            interpolation="nearest" if longest <= side else "antialiased",
            origin="upper",
        )
        self.figure.add_artist(image)

    def save(self, path: Path) -> None:
        """Write the page as PNG; the same page gives the same bytes."""
        # the default metadata name the version of matplotlib
        self.figure.savefig(path, format="png", dpi=self.dpi, metadata={"Software": None})
