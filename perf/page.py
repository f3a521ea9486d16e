"""One HTML page with everything in it: tables as tables, images inside the text, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from .frames import pd

CSS = """
body { font: 16px/1.45 system-ui, sans-serif; color: #111; background: #fff; max-width: 75rem; margin: 0 auto;
  padding: 1rem 1.5rem 3rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.4rem; margin-top: 2.5rem; border-bottom: 1px solid #999; }
h3 { font-size: 1.1rem; margin-top: 2rem; }
p, li, figcaption { max-width: 50rem; }
.warning { border: 2px solid #111; padding: .5rem .8rem; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; margin: .8rem 0; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .15rem .55rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 1px solid #111; vertical-align: bottom; }
.dense td { white-space: nowrap; padding: .1rem .4rem; }
.number { text-align: right; } td.number { white-space: nowrap; }
figure { margin: 1rem 0 2rem; } img { max-width: 100%; height: auto; } figcaption { font-size: .9rem; }
@page { size: A4 landscape; margin: 12mm; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; }
  table { font-size: 6.5pt; } th, td, .dense td { padding: 1px 3px; white-space: normal; }
  tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; } img { max-height: 165mm; } }
"""


def document(title: str, body: Sequence[str]) -> str:
    """The whole page."""
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
    )
    return head + "\n".join([f"<h1>{escape(title)}</h1>", *body]) + "\n</main>\n</body>\n</html>\n"


def heading(level: int, text: str) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, warning: bool = False) -> str:
    return f'<p class="warning">{escape(text)}</p>' if warning else f"<p>{escape(text)}</p>"


def image(png: bytes, title: str, text: str) -> str:
    """A figure with its explanation; the title, drawn in the image, is also what a screen reader says."""
    data = base64.b64encode(png).decode()
    source = f'<img src="data:image/png;base64,{data}" alt="{escape(title)}">'
    return f"<figure>{source}<figcaption>{escape(text)}</figcaption></figure>"


def table(frame: pd.DataFrame, caption: str, formats: dict[str, str] | None = None, *, dense: bool = False) -> str:
    """A table of a frame: numbers at the right, in the format of their column; without columns that are all empty.

    `dense`: a line a row, however wide that makes it.
    """
    formats = formats or {}
    columns = [name for name in frame.columns if not frame[name].map(_missing).all()]
    numeric = {name: pd.api.types.is_numeric_dtype(frame[name]) for name in columns}
    look = {name: ' class="number"' if numeric[name] else "" for name in columns}
    head = "".join(f'<th scope="col"{look[name]}>{escape(name)}</th>' for name in columns)
    lines = []
    for values in frame[columns].itertuples(index=False):
        cells = (
            f"<td{look[name]}>{'' if _missing(value) else escape(format(value, formats.get(name, '')))}</td>"
            for name, value in zip(columns, values, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="dense"' if dense else ""
    top = f'<div class="wide" tabindex="0"><table{kind}><caption>{escape(caption)}</caption>'
    return "\n".join([top, f"<thead><tr>{head}</tr></thead>", "<tbody>", *lines, "</tbody></table></div>"])


def _missing(value: object) -> bool:
    return value == "" or (isinstance(value, float) and math.isnan(value))
