"""An HTML page in one file: its pictures are in it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222;
       padding: 0 1rem; line-height: 1.4; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.2rem; }
img { max-width: 100%; display: block; }
table { border-collapse: collapse; } td, th { padding: 0.15rem 1rem 0.15rem 0; text-align: left; }
th { font-weight: normal; color: #777; white-space: nowrap; vertical-align: top; }
.wide { overflow-x: auto; } .wide td, .wide th { white-space: nowrap; font-size: 0.9rem; }
.numbers td:not(:first-child) { font-variant-numeric: tabular-nums; }
.numbers td { border-top: 1px solid #eee; }
p.note { color: #777; font-size: 0.9rem; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Write a whole page.

    Args:
        title: heading and window title, plain text.
        parts: HTML of the sections.

    Returns:
        HTML that needs no other file.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def picture(png: bytes, description: str) -> str:
    """Embed a PNG.

    Args:
        png: the file's bytes.
        description: what it shows, plain text, for those who cannot see it.
    """
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def heading(text: str, *, level: int = 2) -> str:
    """Write a heading, plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def note(text: str) -> str:
    """Write a small gray paragraph, plain text."""
    return f'<p class="note">{escape(text)}</p>'


def facts(pairs: Mapping[str, str]) -> str:
    """Lay out names and values, plain text, as a table."""
    lines = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in pairs.items())
    return f"<table>{''.join(lines)}</table>"


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay out lines of plain text under headings; a wide table scrolls by itself."""
    top = "".join(f"<th>{escape(text)}</th>" for text in headings)
    cells = ("".join(f"<td>{escape(text)}</td>" for text in line) for line in lines)
    rows = "".join(f"<tr>{line}</tr>" for line in cells)
    return f'<div class="wide"><table class="numbers"><tr>{top}</tr>{rows}</table></div>'
