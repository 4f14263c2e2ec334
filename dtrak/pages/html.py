"""Self-contained HTML: the style sheet of a report, its skeleton and its images."""

from __future__ import annotations

import base64
import hashlib
import html
import io
from importlib.resources import files
from typing import Any

from PIL import Image
from torch import Tensor

from ..data.images import encode_png

STYLE, SCRIPT = (
    files(__package__).joinpath(name).read_text(encoding="utf-8")
    for name in ("page.css", "explorer.js")
)
# pixels of a side up to which an image is enlarged in squares
SHARP = 64
# and up to which it is embedded as it is
_EXACT = 96


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
    """An image ``[C, H, W]`` uint8, C 1 or 3, inside the page.

    Small ones are exact; large ones are compressed, and shrunk to ``largest`` pixels a side.
    """
    height, width = pixels.shape[1:]
    format, content = "png", b""
    if max(height, width) > _EXACT:
        image = to_image(pixels)
        image.thumbnail((largest, largest))
        (width, height), format, content = image.size, "webp", encode_webp(image)
    # enlarged, small images must stay sharp; shrunk, large ones must stay smooth
    sharp = ' class="pixelated"' if max(height, width) <= SHARP else ""
    encoded = base64.b64encode(content or encode_png(pixels)).decode()
    return (
        f'<img{sharp} width="{width}" height="{height}" alt="{html.escape(alt)}" '
        f'src="data:image/{format};base64,{encoded}">'
    )


def to_image(pixels: Tensor) -> Image.Image:
    """``[C, H, W]`` uint8, C 1 or 3, as Pillow has it."""
    return Image.fromarray(pixels.expand(3, -1, -1).movedim(0, -1).numpy())


def encode_webp(image: Image.Image, *, is_exact: bool = False) -> bytes:
    """An image as WebP: exact, or with losses that are hardly seen."""
    # more effort takes five times as long and saves nothing on small images
    how: dict[str, Any] = {"lossless": True, "quality": 20, "method": 1}
    buffer = io.BytesIO()
    image.save(buffer, format="webp", **(how if is_exact else {"quality": 90}))
    return buffer.getvalue()
