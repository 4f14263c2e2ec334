"""Self-contained HTML: the style sheet of a report, its skeleton and its images."""

from __future__ import annotations

import base64
import html

from torch import Tensor

from ..data.images import encode_png

STYLE = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #fff; --ink: #1d1f23; --soft: #5d6168;
  --line: #dfddd7; --plus: #0d7268; --minus: #b34f0b; --series-0: #0d7268; --series-1: #b34f0b;
  --series-2: #35589c; --series-3: #7d3f98; --series-4: #8a6d00; --series-5: #a3265e; }
@media (prefers-color-scheme: dark) { :root { --page: #141619; --card: #1c1f23; --ink: #e9e7e2;
  --soft: #a3a8b0; --line: #343940; --plus: #53cdb8; --minus: #f2a45f;
  --series-0: #53cdb8; --series-1: #f2a45f; --series-2: #93b4f5; --series-3: #d0a2e6;
  --series-4: #d9be5a; --series-5: #f08bb6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.125rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 48rem; }
sup { line-height: 0; }
header { margin-bottom: 1.5rem; }
.lead { font-size: 1.125rem; }
.plus { color: var(--plus); }
.minus { color: var(--minus); }
.soft { color: var(--soft); }
.query, .table, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1rem; }
.query { margin: 0 0 1rem; display: grid; gap: 1rem; break-inside: avoid; }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--line); }
.pixelated { image-rendering: pixelated; }
.subject { display: grid; grid-template-columns: 8rem 1fr; gap: .25rem 1rem; align-items: center; }
.subject h2 { font-size: .9375rem; margin: 0; }
.side h3 { font-size: .8125rem; line-height: 1.3; margin: 0 0 .5rem; }
.side h3 span { font-weight: 400; color: var(--soft); }
.side + .side { border-top: 1px solid var(--line); padding-top: 1rem; }
.strip { display: grid; gap: .75rem .5rem; margin: 0; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(4.5rem, 1fr)); }
.bar { display: block; height: 4px; margin-top: 5px; border-radius: 2px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 2px; background: currentColor; }
figcaption { font-size: .75rem; line-height: 1.35; }
figcaption data { display: block; font-size: .9375rem; font-weight: 600; margin-top: 2px;
  font-variant-numeric: tabular-nums; }
.name { display: flex; color: var(--soft); white-space: nowrap; overflow: hidden; }
.name span { flex: none; }
.name span:first-child:not(:last-child) { flex: 0 1 auto; overflow: hidden;
  text-overflow: ellipsis; }
.tables { display: grid; gap: 1rem; align-items: start; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
table { width: 100%; border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 0;
  border-top: 1px solid var(--line); }
th { font-weight: 400; color: var(--soft); padding-right: 1rem; width: 45%; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr:first-child > * { border-top: 0; }
tr.total > * { color: var(--ink); font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0 0 1rem; }
nav a { color: var(--plus); }
.part { margin: 2.5rem 0; scroll-margin-top: 1rem; }
.part > h2 { font-size: 1.375rem; }
.part > h3 { font-size: 1.0625rem; margin: 1.75rem 0 .75rem; }
.part > .table { margin-bottom: 1rem; }
.pair, .plots { display: grid; gap: 1rem; align-items: start; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.plot { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.columns td, .columns th { width: auto; padding-right: 0; padding-left: 1rem;
  overflow-wrap: normal; }
.columns th:first-child { padding-left: 0; }
.columns tbody th { color: var(--ink); }
.columns th.number { text-align: right; }
.columns thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
.columns tbody tr:first-child > * { border-top: 0; }
.note { font-size: .8125rem; color: var(--soft); margin: .75rem 0 0; }
.changes { display: grid; gap: 1rem .75rem; margin: 0 0 1rem; break-inside: avoid;
  grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
.changes figure:first-child img { outline: 2px solid var(--ink); outline-offset: 1px; }
.changes figcaption { margin-top: 5px; color: var(--soft); }
.changes b { color: var(--ink); }
@media (min-width: 44rem), print {
  .query { grid-template-columns: minmax(0, 1.5fr) minmax(0, 5fr) minmax(0, 3fr); gap: 1.75rem; }
  .subject { display: block; }
  .subject h2 { margin-top: .375rem; }
  .proponents .strip { grid-template-columns: repeat(5, minmax(0, 1fr)); }
  .opponents .strip { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .side + .side { border-top: 0; padding-top: 0; position: relative; }
  .side + .side::before { content: ""; position: absolute; inset: 0 auto 0 -.875rem;
    border-left: 1px solid var(--line); }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --plus: #0d7268;
    --minus: #b34f0b; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 13px; }
  h1 { font-size: 1.375rem; }
  .lead { font-size: 1rem; }
  main { max-width: none; padding: 0; }
  .subject h2, .side h3 { font-size: .6875rem; }
  .query { padding: .625rem; gap: .75rem; }
  .strip { gap: .5rem; }
  .side + .side::before { left: -.375rem; }
  figcaption data { font-size: .75rem; }
  .table { break-inside: avoid; }
}
"""


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
