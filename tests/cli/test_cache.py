import json

import numpy as np
import pytest
from click.testing import CliRunner

from fastprune import TeacherCache
from fastprune.cli import main
from tests.rows.cache_writer import ROWS, logits_of, make_cache


def fastprune(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def filled_cache(tmp_path):
    identity = {"view": {"seed": 3, "image_size": 32}}
    with make_cache(tmp_path / "cache", identity=identity) as cache:
        cache.put(ROWS, 0, logits_of(ROWS, 0))
        cache.put(ROWS[:7], 1, logits_of(ROWS[:7], 1))
        cache.commit(seal=True)
    return cache.path


def test_info_tells_what_is_in_a_cache(tmp_path):
    path = filled_cache(tmp_path)
    result = fastprune("cache", "info", path)
    assert result.exit_code == 0, result.output
    assert "10,008 of 30,003 (33.4%)" in result.stdout
    assert "3, of which 1 are whole" in result.stdout
    assert "view image size       32" in result.stdout
    shown = json.loads(fastprune("cache", "info", path, "--json").stdout)
    assert shown == TeacherCache.open(path).summary()


def test_check_finds_damage_and_ends_with_exit_code_1(tmp_path):
    path = filled_cache(tmp_path)
    result = fastprune("cache", "check", path)
    assert result.exit_code == 0, result.output
    assert "no faults in 0." in result.stdout
    data = np.load(path / "slot-000.npy", mmap_mode="r+")
    data[5000, 0] += 1
    data.flush()
    result = fastprune("cache", "check", path)
    assert result.exit_code == 1
    assert "entries 4,096 to 8,191 do not have the CRC-32C" in result.stdout
    assert "1 fault in" in result.stdout
    shown = json.loads(fastprune("cache", "check", path, "--json").stdout)
    assert len(shown["faults"]) == 1


def test_no_cache_is_one_message_and_exit_code_1(tmp_path):
    for command in ("info", "check"):
        result = fastprune("cache", command, tmp_path)
        assert result.exit_code == 1
        assert result.stderr.startswith("ArtifactError: ")
        assert "holds no teacher cache" in result.stderr


@pytest.mark.parametrize("slots", ["2-1", "0-99999999999", "1,x", "-3"])
def test_slots_that_are_none_are_refused_before_anything_is_opened(tmp_path, slots):
    result = fastprune(
        "cache", "fill", "x.beton", tmp_path, "--teacher", "resnet8", "--slots", slots
    )
    assert result.exit_code == 2
    assert "slots, such as 0-3" in result.stderr


def test_info_shows_an_identity_of_any_form(tmp_path):
    identity = {"teacher": "mine", "view": {"a name of more than twenty": 1}}
    path = make_cache(tmp_path / "cache", identity=identity).path
    result = fastprune("cache", "info", path)
    assert result.exit_code == 0, result.output
    assert "teacher               mine" in result.stdout
    assert "view a name of more than twenty 1" in result.stdout
