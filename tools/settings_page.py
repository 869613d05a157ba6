"""Write the tables of settings into the docs, from the records.

    python tools/settings_page.py

They stand between `<!-- settings: RECORD -->` and `<!-- end -->`; a test holds them equal to the
records.
"""

import re
from pathlib import Path

from fastprune import settings
from fastprune.settings.domains import domain_of

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs" / "settings.md", ROOT / "docs" / "training.md")
BLOCK = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write both pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


def filled(text: str) -> str:
    """Replace the tables in a page."""
    return BLOCK.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)


def table(record: str) -> str:
    """Write a record as a table of Markdown."""
    lines = ["| setting | default | |", "|---|---|---|"]
    for name, field in getattr(settings, record).model_fields.items():
        default = "required" if field.is_required() else _shown(field.default)
        # A bar would end the cell.
        text = f"{field.description} {_domain(str(domain_of(field)))}".replace("|", "\\|").strip()
        lines.append(f"| `{name}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def _shown(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def _domain(text: str) -> str:
    """Bounds and choices in italics; a plain kind of value needs no words."""
    return "" if text in ("a path", "a text", "a boolean", "an integer") else f"*{text}*"


if __name__ == "__main__":
    main()
