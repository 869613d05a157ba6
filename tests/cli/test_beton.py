"""The commands around the beton: what they print, what they return."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from fastprune import ScoreTable, Subset, open_beton
from fastprune.base.provenance import Fingerprint
from fastprune.beton.manifest import manifest_path
from fastprune.cli import main
from tests.beton.damage import patch, write_plain_beton
from tests.images import jpeg_bytes, write_image_folder


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def images(tmp_path):
    return write_image_folder(tmp_path / "images")


@pytest.fixture
def beton(images, tmp_path):
    assert run("convert", images, tmp_path / "a.beton").exit_code == 0
    return tmp_path / "a.beton"


def test_convert_prints_one_line_of_what_it_did(images, tmp_path):
    result = run("convert", images, tmp_path / "a.beton", "--workers", 1)
    assert result.exit_code == 0
    assert result.stdout.startswith(
        "wrote 12 rows (12 copied, 0 rewritten, 0 transcoded, 0 skipped) in "
    )
    assert result.stdout.splitlines()[0].endswith(f"-> {tmp_path / 'a.beton'}")


def test_every_option_of_convert_reaches_the_writer(images, tmp_path):
    (images / "class_00" / "zz.jpg").write_bytes(b"bad")
    options = (
        "--on-error",
        "skip",
        "--quality",
        70,
        "--max-side",
        32,
        "--exif",
        "apply",
        "--verify",
        "--shuffle-rows",
        3,
        "--jpeg",
        "original",
        "--resume",
    )
    assert run("convert", images, tmp_path / "a.beton", *options).exit_code == 0
    settings = open_beton(tmp_path / "a.beton").manifest.settings
    assert settings == {
        "jpeg": "original",
        "quality": 70,
        "max_side": 32,
        "exif": "apply",
        "verify": True,
        "on_error": "skip",
        "shuffle_seed": 3,
    }


def test_a_flat_folder_is_converted_with_its_label_file(images, tmp_path):
    (tmp_path / "labels.txt").write_text("".join(f"{n:03d} cat\n" for n in range(4)))
    result = run(
        "convert", images / "class_00", tmp_path / "a.beton", "--labels", tmp_path / "labels.txt"
    )
    assert result.exit_code == 0
    assert open_beton(tmp_path / "a.beton").class_names == ("cat",)


def test_a_bad_image_ends_convert_with_one_message_and_no_file(images, tmp_path):
    (images / "class_01" / "bad.jpg").write_bytes(b"")
    result = run("convert", images, tmp_path / "a.beton")
    assert result.exit_code == 1
    assert result.stderr == (
        f"ConversionError: {images}/class_01/bad.jpg: it is empty (0 bytes).\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_keep_partial_leaves_what_resume_takes_up(images, tmp_path):
    bad = images / "class_02" / "bad.jpg"
    bad.write_bytes(b"")
    assert run("convert", images, tmp_path / "a.beton", "--keep-partial").exit_code == 1
    assert (tmp_path / "a.beton.partial").exists()
    bad.unlink()
    assert run("convert", images, tmp_path / "a.beton", "--resume").exit_code == 1
    assert run("convert", images, tmp_path / "a.beton").exit_code == 0
    assert not (tmp_path / "a.beton.partial").exists()


def test_check_of_a_whole_beton_says_so(beton):
    result = run("check", beton, "--deep")
    assert result.exit_code == 0
    assert result.stdout.startswith("no faults in ")


def test_check_lists_faults_and_returns_one(beton):
    patch(beton, int(open_beton(beton).offsets[5]), b"garbage")
    result = run("check", beton, "--deep")
    assert result.exit_code == 1
    fault, summary = result.stdout.splitlines()
    assert fault.startswith("crc: row 5: ")
    assert fault.endswith("(from class_01/001.jpg)")
    assert summary.startswith("1 fault in ")


def test_check_gives_json_to_machines(beton):
    patch(beton, 16, bytes(8))
    result = run("check", beton, "--json")
    assert result.exit_code == 1
    [fault] = json.loads(result.stdout)["faults"]
    assert (fault["kind"], fault["row"]) == ("unfinished", None)


def test_check_takes_a_subset(beton, tmp_path):
    np.save(tmp_path / "s.npy", np.array([99]))
    result = run("check", beton, "--subset", tmp_path / "s.npy")
    assert result.exit_code == 1
    assert "holds row 99" in result.stdout


def test_check_of_a_missing_file_is_an_error(tmp_path):
    result = run("check", tmp_path / "nowhere.beton")
    assert result.exit_code == 1
    assert "BetonError: " in result.stderr


def test_check_writes_a_manifest_for_a_beton_of_another_writer(tmp_path):
    plain = write_plain_beton(tmp_path / "plain.beton")
    result = run("check", plain, "--deep", "--write-manifest")
    assert result.exit_code == 0
    assert manifest_path(plain).exists()
    assert open_beton(plain).fingerprint.content is not None


def test_check_writes_no_manifest_for_a_damaged_beton(tmp_path):
    plain = write_plain_beton(tmp_path / "plain.beton")
    patch(plain, int(open_beton(plain).offsets[0]), b"garbage")
    assert run("check", plain, "--deep", "--write-manifest").exit_code == 1
    assert not manifest_path(plain).exists()


def test_check_replaces_a_manifest_of_another_beton(beton, tmp_path):
    plain = write_plain_beton(tmp_path / "plain.beton")
    manifest_path(beton).rename(manifest_path(plain))
    assert run("check", plain).exit_code == 1
    assert run("check", plain, "--deep", "--write-manifest").exit_code == 0
    assert run("check", plain, "--deep").exit_code == 0


def test_write_manifest_without_deep_is_wrong_usage(beton):
    result = run("check", beton, "--write-manifest")
    assert result.exit_code == 2
    assert "add --deep" in result.stderr


def test_compact_and_index_print_one_line_each(beton, tmp_path):
    np.save(tmp_path / "s.npy", np.array([0, 7]))
    result = run(
        "compact", beton, "--subset", tmp_path / "s.npy", "-o", tmp_path / "b.beton", "--row-field"
    )
    assert result.stdout.startswith("copied 2 rows in ")
    assert [field.name for field in open_beton(tmp_path / "b.beton").fields][-1] == "row"
    result = run("dali-index", beton, "--subset", tmp_path / "s.npy", "-o", tmp_path / "a.idx")
    assert result.stdout.startswith("indexed 2 rows in ")
    assert (tmp_path / "a.idx").read_text().startswith("v1.2 2\n")


def test_info_shows_a_beton(beton):
    shown = run("info", beton).stdout
    assert "rows                  12" in shown
    assert "smallest 4, median 4.0, largest 4, sum 12" in shown
    facts = json.loads(run("info", beton, "--json").stdout)
    assert facts["fields"] == {"image": "image", "label": "int"}
    assert facts["modes"] == {"jpg": 12, "raw": 0}
    assert facts["images"] == {"copied": 12, "rewritten": 0, "transcoded": 0, "skipped": 0}
    assert facts["fingerprint"] == open_beton(beton).fingerprint.to_dict()
    assert facts["pages"] == 1


def test_info_shows_a_beton_of_another_writer(tmp_path):
    facts = json.loads(run("info", write_plain_beton(tmp_path / "a.beton"), "--json").stdout)
    assert facts["modes"] == {"jpg": 4, "raw": 2}
    assert facts["images"] is None


def test_info_shows_a_subset(tmp_path):
    Subset(np.array([2, 7]), keep_ratio=0.5, metric="loss", class_counts=[1, 1]).save(
        tmp_path / "s.npy"
    )
    facts = json.loads(run("info", tmp_path / "s.npy", "--json").stdout)
    assert (facts["rows"], facts["last_row"], facts["metric"]) == (2, 7, "loss")
    assert "keep ratio            0.5" in run("info", tmp_path / "s.npy").stdout


def test_info_shows_a_score_table(tmp_path):
    table = ScoreTable(
        labels=np.array([0, 1]),
        metrics={"loss": np.array([0.5, 1.5], np.float32)},
        predictions=np.array([0, 0]),
        class_std=np.ones(2),
        class_counts=np.ones(2, np.int64),
        fingerprint=Fingerprint(2, "0" * 32),
    )
    table.save(tmp_path / "scores.parquet")
    facts = json.loads(run("info", tmp_path / "scores.parquet", "--json").stdout)
    assert facts["metrics"] == {"loss": "0.5 to 1.5, median 1"}
    assert facts["teacher_accuracy"] == 0.5


def test_the_command_stops_within_seconds_when_standard_output_is_a_pipe(tmp_path):
    root = write_image_folder(tmp_path / "images")
    (root / "class_00" / "x.jpg").write_bytes(jpeg_bytes(0)[:100])
    command = [sys.executable, "-m", "fastprune", "convert", str(root), str(tmp_path / "a.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "class_00/x.jpg: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_cost_nothing(images, beton, tmp_path, closed):
    out = tmp_path / "again.beton"
    command = f'"$0" -m fastprune convert "$1" "$2" --workers 2 {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, images, out], timeout=60)
    assert done.returncode == 0
    assert out.read_bytes() == beton.read_bytes()


def test_sharded_beton_is_made_checked_and_shown(images, tmp_path):
    first = run("convert", images, tmp_path / "train", "--shards", 2, "--shard", 1)
    assert first.exit_code == 0
    assert "other shards of" in first.stderr
    assert run("check", tmp_path / "train").exit_code == 1
    assert run("convert", images, tmp_path / "train", "--shards", 2, "--resume").exit_code == 0
    assert run("check", tmp_path / "train", "--deep").exit_code == 0
    assert "files                 2" in run("info", tmp_path / "train").stdout


def test_shard_without_the_number_of_shards_is_wrong_usage(images, tmp_path):
    result = run("convert", images, tmp_path / "train", "--shard", 1)
    assert result.exit_code == 2
    assert "add --shards" in result.stderr


def test_shards_go_to_a_url_and_rows_come_back(tmp_path):
    images = write_image_folder(tmp_path / "images", classes=2)
    url = f"file://{tmp_path}/store/train/"
    result = run("convert", images, url, "--shards", "2")
    assert result.exit_code == 0, result.output
    assert "wrote 8 rows (8 copied, 0 rewritten, 0 transcoded, 0 skipped)" in result.stdout
    np.save(tmp_path / "half.npy", np.array([1, 3, 6]))
    result = run("stage", url, tmp_path / "half.npy", tmp_path / "mirror")
    assert result.exit_code == 0, result.output
    assert "3 rows are in" in result.stdout
    assert "3 were missing" in result.stdout
    checked = run("check", tmp_path / "mirror", "--deep").stdout
    assert checked.startswith("no faults in the 3 rows that this mirror holds")
    assert json.loads(run("info", tmp_path / "mirror", "--json").stdout)["rows_present"] == 3
    shown = json.loads(run("stage", url, "all", tmp_path / "mirror", "--json").stdout)
    assert (shown["num_rows"], shown["num_fetched_rows"]) == (8, 5)


def test_stage_of_nothing_is_named_without_a_traceback(tmp_path):
    result = run("stage", f"file://{tmp_path}/nowhere", "all", tmp_path / "mirror")
    assert result.exit_code == 1
    assert "nowhere/manifest.json does not exist" in result.stderr
