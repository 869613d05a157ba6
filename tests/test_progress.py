import sys

from fastprune import progress
from fastprune.progress import track


def test_items_pass_through_unchanged(capsys):
    assert list(track("abc", description="letters", total=3, unit="letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_lines_tell_rate_and_remaining_time_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    list(track(range(3), description="score", total=5, unit="images", step=2))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images")[0] for line in lines] == [
        "score: 2/5",
        "score: 4/5",
        "score: 5/5",
    ]
    assert all("/s, " in line and line.endswith("s left") for line in lines)


def test_bar_counts_units_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BEFORE_BAR", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(track(range(3), description="score", total=5, unit="images", step=2))
    assert "score" in capsys.readouterr().err
