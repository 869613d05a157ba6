import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from fastprune.base import progress
from fastprune.base.progress import track


def test_items_pass_through_unchanged(capsys):
    assert list(track("abc", description="letters", total=3, unit="letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_lines_have_time_rate_and_remaining_time_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    list(track(range(3), description="score", total=5, unit="images", step=2))
    lines = capsys.readouterr().err.splitlines()
    assert [line[20:].split(" images")[0] for line in lines] == [
        "score: 2/5",
        "score: 4/5",
        "score: 5/5",
    ]
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d score", line) for line in lines)
    assert all("/s, " in line and line.endswith("s left") for line in lines[1:])


def test_time_left_does_not_count_the_wait_for_the_first_item(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = progress._Clock(100, 0, "images", None, None)
    now[0] = 40.0  # compilation
    clock.advance(10)
    assert clock.words() == ""
    now[0] = 41.0
    clock.advance(10)
    assert clock.words() == "10 images/s, 8 s left"


def test_a_part_of_a_longer_work_shows_the_time_left_of_all(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    clock = progress._Clock(100, 0, "images", lambda: "loss 2.31", lambda: 7200.0)
    clock.advance(50)
    now[0] = 1.0
    clock.advance(10)
    assert clock.words() == "10 images/s, 2.0 h left, loss 2.31"


def test_closed_stderr_is_no_reason_to_fail(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track("ab", description="letters", total=2, unit="letters")) == ["a", "b"]


@pytest.mark.parametrize("columns", [80, 200])
def test_bar_of_ten_characters_rate_time_and_note_fit_the_terminal(columns):
    script = (
        "import time\n"
        "from fastprune.base import progress\n"
        "progress._SECONDS_BEFORE_BAR = 0\n"
        "kept = dict(total=22, unit='images', note=lambda: 'loss 2.31, 12% waiting')\n"
        "for _ in progress.track(range(22), description='epoch 120/240', **kept):\n"
        "    time.sleep(0.11)\n"
    )
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen([sys.executable, "-c", script], stderr=stderr) as process:
        os.close(stderr)
        shown = b""
        with pytest.raises(OSError, match="Input/output error"):
            while True:  # ends when the process closes its side
                shown += os.read(terminal, 65536)
    os.close(terminal)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    drawn = [line for line in re.split(r"[\r\n]+", plain) if "left" in line]
    assert drawn
    assert all(len(line) <= columns for line in drawn)
    assert re.match(
        r"epoch 120/240 +\d+% .{10} [\d.]+ images/s, \d+ s left, loss 2.31, 12% waiting",
        drawn[-1],
    ), drawn[-1]
