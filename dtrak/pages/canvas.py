"""A picture laid out in whole pixels, so that every image pixel is a square of the same size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
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


def text_width(text: str, pixels: float, *, bold: bool = False) -> int:
    """How wide a line is on a `Canvas`, in pixels; call it within `default_style`."""
    blank = Canvas(1, 1)
    artist = blank.figure.text(
        0,
        0,
        encode_text(text).decode(),
        fontsize=pixels * 72 / blank.dpi,
        fontweight="bold" if bold else "normal",
        parse_math=False,
    )
    # where a line begins moves its end by a part of a pixel
    return math.ceil(artist.get_window_extent(blank.renderer).width) + 2


class Canvas:
    """A white page measured in pixels from its top left corner."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.dpi = 150
        self.width, self.height = width, height
        self.figure = Figure((width / self.dpi, height / self.dpi), dpi=self.dpi, facecolor="white")
        self.renderer = FigureCanvasAgg(self.figure).get_renderer()

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        pixels: float,
        width: float,
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """Write one line with its top at ``y``, cut before its end where it is too wide."""
        # fonts know no bytes of file names that are no text
        text = encode_text(text).decode()
        artist = self.figure.text(
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
        if artist.get_window_extent(self.renderer).width <= width:
            return
        # what tells ids apart is their end
        tail = min(max(len(text) - text.rfind("/"), 1), 10)
        fits, too_long = tail, len(text)
        while too_long - fits > 1:
            kept = (fits + too_long) // 2
            artist.set_text(f"{text[: kept - tail]}…{text[len(text) - tail :]}")
            if artist.get_window_extent(self.renderer).width <= width:
                fits = kept
            else:
                too_long = kept
        artist.set_text(f"{text[: fits - tail]}…{text[len(text) - tail :]}")

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
        array = pixels.expand(3, -1, -1).movedim(0, -1).numpy()
        longest = max(array.shape[:2])
        if longest <= side:
            array = array.repeat(side // longest, axis=0).repeat(side // longest, axis=1)
        else:
            height, width = (max(1, round(n * side / longest)) for n in array.shape[:2])
            array = np.asarray(Image.fromarray(array).resize((width, height)))
        self.figure.figimage(array, xo=x, yo=self.height - y - array.shape[0], origin="upper")

    def save(self, path: Path) -> None:
        """Write the page as PNG; the same page gives the same bytes."""
        # the default metadata name the version of matplotlib
        self.figure.savefig(path, format="png", dpi=self.dpi, metadata={"Software": None})
