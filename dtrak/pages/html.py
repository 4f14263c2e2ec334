"""Self-contained HTML: the style sheet of a report, its skeleton and its images."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import encode_png

STYLE, SCRIPT = (
    files(__package__).joinpath(name).read_text(encoding="utf-8")
    for name in ("page.css", "explorer.js")
)
# pixels of a side up to which an image is enlarged in squares
SHARP = 64


def render_page(
    title: str, header: str, body: str, *, style: str = "", data: str | None = None
) -> str:
    """A whole page, which needs no network, and no script to be read.

    Args:
        title: plain text.
        header: HTML below the title.
        body: HTML below the header.
        style: rules added to the style sheet.
        data: JSON for the script that lets a reader explore the page; None for a page without.
    """
    script, policy = "", ""
    if data is not None:
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        policy = f"; script-src 'sha256-{digest}'"
        script = (
            f'<script type="application/json" id="data">{data}</script>\n'
            f"<script>{SCRIPT}</script>\n"
        )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{policy}">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(title)}</h1>
{header}
</header>
{body}
</main>
{script}</body>
</html>
"""


def render_name(name: str) -> str:
    """Split an id so that its head, not its telling tail, is cut off where room is short."""
    cut = max(name.rfind("/"), len(name) - 10, 0)
    parts = (name[:cut], name[cut:])
    return "".join(f"<span>{html.escape(part)}</span>" for part in parts if part)


def render_image(pixels: Tensor, alt: str, largest: int = 256) -> str:
    """An image ``[C, H, W]`` uint8, C 1 or 3, inside the page, shrunk to ``largest`` a side."""
    if max(pixels.shape[1:]) > largest:
        pixels = _shrink(pixels, largest)
    encoded = base64.b64encode(encode_png(pixels)).decode()
    height, width = pixels.shape[1:]
    # enlarged, small images must stay sharp; shrunk, large ones must stay smooth
    sharp = ' class="pixelated"' if max(height, width) <= SHARP else ""
    return (
        f'<img{sharp} width="{width}" height="{height}" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{encoded}">'
    )


def _shrink(pixels: Tensor, largest: int) -> Tensor:
    image = Image.fromarray(pixels.expand(3, -1, -1).movedim(0, -1).numpy())
    image.thumbnail((largest, largest))
    return torch.from_numpy(np.array(image)).movedim(-1, 0)
