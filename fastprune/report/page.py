"""An HTML page in one file, its pictures in it; and tables, in HTML or as plain text."""

import base64
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light; }
body { font-family: system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222;
       background: #fff; padding: 0 1rem; line-height: 1.4; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.2rem; }
img { display: block; max-width: 100%; }
.scroll { overflow-x: auto; } .scroll img { min-width: 42rem; }
table { border-collapse: collapse; }
td, th { padding: 0.15rem 1rem 0.15rem 0; text-align: left; vertical-align: top; }
th { font-weight: normal; color: #666; }
.facts th { white-space: nowrap; }
.numbers { font-size: 0.9rem; } .numbers td, .numbers th { overflow-wrap: normal; }
.numbers td { border-top: 1px solid #eee; text-align: right; white-space: nowrap;
              font-variant-numeric: tabular-nums; }
.numbers th { text-align: right; vertical-align: bottom; white-space: nowrap; }
.numbers .text { text-align: left; }
.strip { display: flex; flex-wrap: wrap; gap: 0.5rem; }
figure { margin: 0; width: 134px; font-size: 0.75rem; line-height: 1.25; }
figure img { border: 3px solid transparent; } figure.framed img { border-color: #4c72b0; }
.wrong { color: #b02a30; }
p.note { color: #666; font-size: 0.9rem; }
ul.verdict { font-size: 1.05rem; padding-left: 1.2rem; }
p.warning { background: #fff4d6; border-left: 4px solid #e0a100; padding: 0.4rem 0.8rem; }
@media (max-width: 30rem) {
  body { margin: 1rem auto; } .facts th { white-space: normal; }
  .facts th, .facts td { display: block; padding-right: 0; } .facts td { margin-bottom: 0.5rem; }
}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Write a whole page that needs no other file, from a plain title and HTML of its sections."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def picture(png: bytes, description: str, *, may_scroll: bool = False) -> str:
    """Embed a PNG.

    Args:
        png: the file's bytes.
        description: content of the picture, plain text, for those who cannot see it.
        may_scroll: keep its size on a narrow screen, where its text would shrink to nothing.
    """
    data = base64.b64encode(png).decode("ascii")
    image = f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
    return f'<div class="scroll">{image}</div>' if may_scroll else image


@dataclass(frozen=True)
class Thumbnail:
    """A small picture with words under it.

    Attributes:
        png: the file's bytes.
        description: content of the picture, for those who cannot see it.
        lines: plain text under it.
        remark: a line in red, such as the teacher's wrong guess; empty for none.
        is_framed: whether it gets a blue frame.
    """

    png: bytes
    description: str
    lines: Sequence[str]
    remark: str = ""
    is_framed: bool = False


def strip(thumbnails: Iterable[Thumbnail]) -> str:
    """Lay out thumbnails side by side, in as many lines as the screen needs."""
    figures = []
    for thumbnail in thumbnails:
        lines = "<br>".join(map(escape, thumbnail.lines))
        remark = f'<br><span class="wrong">{escape(thumbnail.remark)}</span>'
        framed = ' class="framed"' if thumbnail.is_framed else ""
        figures.append(
            f"<figure{framed}>{picture(thumbnail.png, thumbnail.description)}"
            f"<figcaption>{lines}{remark if thumbnail.remark else ''}</figcaption></figure>"
        )
    return f'<div class="strip">{"".join(figures)}</div>'


def heading(text: str, *, level: int = 2) -> str:
    """Write a heading, plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def note(text: str) -> str:
    """Write a small gray paragraph, plain text."""
    return f'<p class="note">{escape(text)}</p>'


def warning(text: str) -> str:
    """Write a paragraph that must be read before the numbers, plain text."""
    return f'<p class="warning">{escape(text)}</p>'


def verdict_list(sentences: Iterable[str]) -> str:
    """Write the findings that the page begins with, plain text."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="verdict">{items}</ul>'


def link(path: str, text: str) -> str:
    """Link to a file beside the page."""
    return f'<p><a href="{escape(path)}">{escape(text)}</a></p>'


def facts(pairs: Mapping[str, str]) -> str:
    """Lay out names and values, plain text, as a table."""
    lines = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in pairs.items())
    return f'<table class="facts">{"".join(lines)}</table>'


def table(
    headings: Sequence[str], lines: Iterable[Sequence[str]], *, text: Collection[int] = (0,)
) -> str:
    """Lay out lines of plain text under headings; a wide table scrolls by itself.

    Args:
        headings: one per column.
        lines: cells of each line.
        text: columns of words, which begin at the left; numbers end at the right.
    """

    def cells(tag: str, line: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="text">{escape(cell)}</{tag}>'
            if column in text
            else f"<{tag}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(line)
        )

    rows = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    top = f"<tr>{cells('th', headings)}</tr>"
    return f'<div class="scroll"><table class="numbers">{top}{rows}</table></div>'


def text_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Lay out a table for a terminal: the first column at the left, numbers at the right."""
    rows = [list(headings), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
