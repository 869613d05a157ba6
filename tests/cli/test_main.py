import errno
import re
import subprocess
import sys
import warnings

import click
import pytest
from click.testing import CliRunner

from fastprune.base.errors import FastpruneError
from fastprune.cli import main

HEAVY = ("torch", "torchvision", "ffcv", "nvidia.dali", "numba", "matplotlib", "pyarrow")


@pytest.mark.parametrize("code", ["import fastprune", "from fastprune.cli import main; main()"])
def test_start_loads_no_heavy_library(code):
    script = (
        "import sys\n"
        "sys.argv = ['fastprune', '--help']\n"
        f"try:\n    exec({code!r})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastprune", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("fastprune, version ")


def test_every_command_explains_itself():
    for name, command in main.commands.items():
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, name
        assert command.help, name


def test_wrong_usage_exits_with_two():
    result = CliRunner().invoke(main, ["convert"])
    assert result.exit_code == 2
    assert "Missing argument" in result.output


@pytest.fixture
def failing_command(monkeypatch):
    @click.command()
    def fail() -> None:
        raise FastpruneError("train.beton is damaged. Convert it again.")

    monkeypatch.setitem(main.commands, "fail", fail)


def test_fault_of_the_users_data_is_one_message_and_exit_one(failing_command):
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == 1
    assert result.stderr == "FastpruneError: train.beton is damaged. Convert it again.\n"


def test_debug_messages_are_those_of_fastprune_alone():
    script = (
        "import logging, sys\n"
        "from fastprune.cli import main\n"
        "sys.argv = ['fastprune', '--debug', 'check', '/nowhere']\n"
        "try:\n    main()\nexcept BaseException:\n    pass\n"
        "logging.getLogger('fastprune.cli').debug('ours')\n"
        "logging.getLogger('numba.core').debug('theirs')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"[-\d]+ [:\d]+ DEBUG fastprune.cli: ours\n", done.stderr)


def test_debug_shows_the_traceback(failing_command):
    result = CliRunner().invoke(main, ["--debug", "fail"])
    assert isinstance(result.exception, FastpruneError)


def test_refusal_of_the_operating_system_is_one_message_and_exit_one(monkeypatch):
    @click.command()
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")

    monkeypatch.setitem(main.commands, "fail", fail)
    result = CliRunner().invoke(main, ["fail"])
    assert result.exit_code == 1
    assert "No space left on device: 'run/metrics.jsonl'" in result.stderr


def test_warning_is_one_plain_line(monkeypatch):
    @click.command()
    def warn() -> None:
        warnings.warn("contents were not compared", stacklevel=1)

    monkeypatch.setitem(main.commands, "warn", warn)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = CliRunner().invoke(main, ["warn"])
    assert result.stderr == "warning: contents were not compared\n"
