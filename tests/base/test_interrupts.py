"""Signals end a command whenever they come."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

DROPPED_IN_A_CALLBACK = """
import ctypes, os, signal, time
from fastprune.base import interrupts
interrupts.listen()
callback = ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGTERM))
try:
    callback()
    time.sleep(60)
except interrupts.Interrupted as stop:
    print("arrived", stop.number)
"""

EATEN_BY_A_LIBRARY = """
import os, signal
from fastprune.base import interrupts
from fastprune.base.progress import track
interrupts.listen()
try:
    os.kill(os.getpid(), signal.SIGINT)
except:
    pass
done = []
try:
    for item in track(range(1000), description="work", total=1000, unit="items"):
        done.append(item)
except interrupts.Interrupted as stop:
    print("arrived", stop.number, len(done))
"""

REPEATED = """
import os, signal, time
from fastprune.base import interrupts
interrupts.listen()
try:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("cleaned up")
except interrupts.Interrupted as stop:
    print("arrived", stop.number)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def interruptible() -> None:
    """A shell starts what runs in its background with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def said(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=interruptible,
        timeout=50,
    ).stdout


def test_signal_that_a_callback_from_c_dropped_is_raised_again():
    assert said(DROPPED_IN_A_CALLBACK) == "arrived 15\n"


def test_signal_that_a_library_swallowed_ends_the_work_at_its_next_item():
    assert said(EATEN_BY_A_LIBRARY) == "arrived 2 1\n"


def test_signal_that_is_passed_on_twice_does_not_break_the_cleaning_up():
    assert said(REPEATED) == "cleaned up\narrived 15\n"


def interrupted_after(arguments: list[str], seconds: float, number: int) -> tuple[int, str]:
    """Run the command, send it a signal after some seconds; its exit code and messages."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastprune", *arguments],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=interruptible,
    )
    time.sleep(seconds)
    process.send_signal(number)
    _, messages = process.communicate(timeout=60)
    return process.returncode, messages


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_command_that_waits_for_its_input_ends_with_the_code_of_the_signal(number, exit_code):
    script = (
        "import click, sys, time; from fastprune import cli, __main__;"
        "cli.main.add_command(click.command('wait')(lambda: (print('up', flush=True),"
        " time.sleep(60))));"
        "sys.argv = ['fastprune', 'wait']; __main__.run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == exit_code
    assert messages == f"{number.name} ended the command.\n"


@pytest.fixture
def endless(tmp_path):
    """Arguments of a training that does not end by itself."""
    from fastprune.beton.convert.writer import convert
    from tests.images import write_image_folder

    write_image_folder(tmp_path / "images", classes=2, per_class=8)
    convert(tmp_path / "images", tmp_path / "train.beton", workers=1)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [data]
        train = "{tmp_path}/train.beton"
        val = "{tmp_path}/train.beton"
        image_size = 32
        batch_size = 8
        num_workers = 1
        [student]
        network = "resnet8"
        [schedule]
        epochs = 100000
        [run]
        out = "{tmp_path}/run"
        device = "cpu"
        """
    )
    return ["train", str(recipe), "--resume"]


def test_training_hears_a_signal_at_any_moment_of_its_start_up(endless):
    draw = random.Random(3)
    for _ in range(4):
        after = draw.uniform(0, 6)
        code, messages = interrupted_after(endless, after, signal.SIGINT)
        # Before our first line, Python itself ends: by the signal, or with 1 and a traceback.
        is_early = after < 0.5 and code in (-signal.SIGINT, 1)
        assert code == 130 or is_early, (after, messages)
        assert "Traceback" not in messages or is_early, (after, messages)


@pytest.mark.full
def test_training_hears_every_signal_while_it_compiles_anew(endless, tmp_path, monkeypatch):
    draw = random.Random(4)
    for number in range(40):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / f"cache-{number}"))
        after = draw.uniform(0, 20)
        code, messages = interrupted_after(endless, after, signal.SIGINT)
        assert code == 130 or (after < 0.5 and code in (-signal.SIGINT, 1)), (after, messages)
