import ast
import re
from pathlib import Path

from fastprune.base import errors

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.FastpruneError)
}
RAISED = ERRORS | {"error"}  # a class that the caller of a reader has named
GAP = "…"  # stands for a value
_FEWEST_LETTERS = 10


def _text(node):
    """The fixed parts of a message, with a gap for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return GAP


def _messages():
    """(where, text) of every error that fastprune raises with a text of its own."""
    for path in sorted((ROOT / "fastprune").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in RAISED:
                text = _text(node.args[0])
                # With next to no text of its own, it passes on that of another error.
                if len(re.findall(r"[A-Za-z]", text)) > _FEWEST_LETTERS:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _phrases():
    """The parts of messages that the page quotes."""
    quotes = re.findall(r"^> (.*)$", PAGE.read_text(), re.MULTILINE)
    return re.findall(r"`([^`]+)`", "\n".join(quotes))


def test_every_error_text_leads_to_an_entry():
    phrases = _phrases()
    lost = [
        f"{where}: {text}"
        for where, text in _messages()
        if not any(phrase in text for phrase in phrases)
    ]
    assert not lost, "add a part of each to docs/troubleshooting.md:\n" + "\n".join(lost)


def test_every_quoted_phrase_is_part_of_a_message():
    texts = [text for _, text in _messages()]
    assert [phrase for phrase in _phrases() if not any(phrase in text for text in texts)] == []
