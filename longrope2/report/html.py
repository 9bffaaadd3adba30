"""Pieces of the report's HTML: the empty page, tables, maps, images, how numbers are written."""

import html
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from longrope2.report.plots import svg_data_uri

_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
%HEAD%<title>%TITLE%</title>
<style>
:root { --ink: #222; --soft: #666; --line: #ddd; --accent: #0b6e69; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 1.2rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { margin: 0; color: var(--accent); font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .7rem; padding-top: .5rem; border-top: 2px solid var(--accent);
  font-size: 1.2rem; }
h3 { margin: 1.2rem 0 .3rem; font-size: 1rem; }
.lead { font-size: 1.08rem; max-width: 62rem; }
.note { color: var(--soft); font-size: .88rem; max-width: 62rem; }
.missing { padding: .7rem 1rem; background: #faf3df; border-left: 4px solid #b8952b; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85rem;
  overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 24rem; padding: .8rem; background: #f7f7f5; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers th, .numbers td { padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap; }
.numbers th { color: var(--soft); font-size: .82rem; font-weight: 600; vertical-align: bottom;
  white-space: normal; }
.numbers th:first-child, .numbers td:first-child { position: sticky; left: 0; background: #fff;
  text-align: left; }
@media (max-width: 600px) {
  .numbers th, .numbers td { padding: .3rem .35rem; font-size: .8rem; }
  .numbers td:first-child { white-space: normal; }
}
.facts td { padding: .15rem .8rem .15rem 0; vertical-align: top; font-size: .88rem;
  overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.2rem; }
.figures img { width: 100%; max-width: 40rem; height: auto; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  gap: 1.2rem; }
.map { margin: 0; }
.map figcaption { font-weight: 600; font-size: .92rem; }
.map table { width: 100%; table-layout: fixed; }
.map th { color: var(--soft); font-size: .75rem; font-weight: 500; padding: .1rem; }
.map td { padding: .35rem 0; text-align: center; font-size: .85rem; border: 1px solid #fff; }
li { margin: .35rem 0; max-width: 62rem; }
</style>
</head>
<body>%BODY%</body>
</html>
"""


def fill_page(**parts: str) -> str:
    """The page with ``head``, ``title`` and ``body``, HTML.

    Each in its place once: what is filled in may itself read like a place (a run called %BODY%).
    """
    return re.sub("%(HEAD|TITLE|BODY)%", lambda place: parts[place[1].lower()], _PAGE)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css_class: str = "numbers") -> str:
    """A table in a box that scrolls sideways where the page is narrow; cells are HTML."""
    header = _row("th", head) if head else ""
    lines = "".join(_row("td", row) for row in rows)
    return f"<div class=scroll><table class={css_class}>{header}{lines}</table></div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def bullets(items: Sequence[str]) -> str:
    """A bullet list of plain text."""
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"


def image(figure: Figure, alternative: str) -> str:
    """A figure, with the text that stands for it."""
    return f"<img src='{svg_data_uri(figure)}' alt='{html.escape(alternative)}'>"


def heat_map(
    name: str, lengths: Sequence[int], lines: Mapping[float, Sequence[tuple[float, str]]]
) -> str:
    """A needle map of plain ``name``: depth down, length across, share retrieved as colour.

    ``lines`` holds for each depth the share and the tooltip (HTML) at every length.
    """
    head = "".join(f"<th>{length:,}</th>" for length in lengths)
    body = ""
    for depth, places in lines.items():
        cells = "".join(_heat(share, title) for share, title in places)
        body += f"<tr><th>{100 * depth:.0f} %</th>{cells}</tr>"
    shown = f"<table><tr><th></th>{head}</tr>{body}</table>"
    return f"<figure class=map><figcaption>{html.escape(name)}</figcaption>{shown}</figure>"


def _heat(share: float, title: str) -> str:
    shade = f"background:color-mix(in srgb,#0b6e69 {100 * share:.0f}%,#f4f1ea)"
    style = f"{shade};color:{'#fff' if share > 0.55 else '#222'}"
    return f"<td style='{style}' title='{title}'>{100 * share:.0f}</td>"


def blind_note(lengths_of: Mapping[str, Sequence[int]], original_len: int) -> str:
    """Of models that retrieved no needle at all: that their maps say nothing of their windows.

    ``lengths_of`` names them (plain text), with the lengths at which they were asked. Empty for
    none.
    """
    blind = [name for name, lengths in lengths_of.items() if min(lengths) <= original_len]
    unknown = [name for name in lengths_of if name not in blind]
    sentences = []
    if blind:
        sentences.append(
            f"{', '.join(blind)}: this model cannot do needles. None was retrieved at any length, "
            f"inside the original window of {original_len:,} tokens either, so that the test says "
            "nothing of how far it reads; compare the perplexities."
        )
    if unknown:
        sentences.append(
            f"{', '.join(unknown)}: no needle was retrieved at any length. None was asked for "
            f"inside the original window of {original_len:,} tokens: whether the model can do "
            "needles at all is not known."
        )
    return "".join(f"<p class=missing>{html.escape(sentence)}</p>" for sentence in sentences)


def percent(share: float) -> str:
    """A share in percent, e.g. ``38 %``."""
    return f"{100 * share:.0f} %"


def interval(low: float, high: float) -> str:
    """An interval of a share in percent, e.g. ``26-51 %``."""
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def change(ratio: float) -> str:
    """A ratio as a change in percent, e.g. ``+0.4 %``."""
    return f"{100 * (ratio - 1):+.1f} %"
