"""Self-contained HTML: the style sheet of a report, its skeleton and its images."""

from __future__ import annotations

import base64
import html
from importlib.resources import files

from torch import Tensor

from ..data.images import encode_png

STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")


def render_page(title: str, header: str, body: str) -> str:
    """A whole page, which needs no network and no script.

    Args:
        title: plain text.
        header: HTML below the title.
        body: HTML below the header.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{html.escape(title)}</h1>
{header}
</header>
{body}
</main>
</body>
</html>
"""


def render_name(name: str) -> str:
    """Split an id so that its head, not its telling tail, is cut off where room is short."""
    cut = max(name.rfind("/"), len(name) - 10, 0)
    parts = (name[:cut], name[cut:])
    return "".join(f"<span>{html.escape(part)}</span>" for part in parts if part)


def render_image(pixels: Tensor, alt: str) -> str:
    """An image ``[C, H, W]`` uint8, C 1 or 3, inside the page."""
    encoded = base64.b64encode(encode_png(pixels)).decode()
    height, width = pixels.shape[1:]
    # enlarged, small images must stay sharp; shrunk, large ones must stay smooth
    sharp = ' class="pixelated"' if max(height, width) <= 64 else ""
    return (
        f'<img{sharp} width="{width}" height="{height}" alt="{html.escape(alt)}" '
        f'src="data:image/png;base64,{encoded}">'
    )
