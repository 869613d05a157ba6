"""Shards made by tasks of a Ray cluster of two nodes are those that one process makes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastprune import Subset, check_beton, convert, open_beton
from fastprune.base.errors import (
    ArtifactError,
    ClusterError,
    ConversionError,
    InvalidValueError,
    MissingDependencyError,
)
from fastprune.beton.remote.stage import stage
from fastprune.beton.shards import SET_NAME
from tests.conftest import require_library
from tests.images import jpeg_bytes, write_image_folder

require_library("ray")


@pytest.fixture(scope="module")
def nodes():
    """Two nodes with a CPU each, on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        from ray.cluster_utils import Cluster

        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        nodes.add_node(num_cpus=1)
        yield nodes
        nodes.shutdown()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("source") / "images", classes=5)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_is_that_of_a_conversion_without_a_cluster(nodes, images, tmp_path):
    (tmp_path / "images").symlink_to(images)
    bad = tmp_path / "images" / "class_01" / "bad.jpg"
    bad.write_bytes(b"no image")
    settings = {"shards": 4, "shuffle_seed": 7, "on_error": "skip"}
    try:
        made = convert(tmp_path / "images", tmp_path / "here", **settings)
        by_tasks = convert(tmp_path / "images", tmp_path / "there", **settings, ray=nodes.address)
    finally:
        bad.unlink()
    assert by_tasks.fingerprint == made.fingerprint
    assert by_tasks.fingerprint.num_rows == 20
    assert files_in(tmp_path / "there") == files_in(tmp_path / "here")


def test_shards_go_to_object_storage_from_their_tasks(nodes, images, tmp_path):
    convert(images, tmp_path / "here", shards=3)
    url = f"file://{tmp_path}/there"
    convert(images, url, shards=3, shard=1)
    before = (tmp_path / "there" / "shard-00001.beton").stat().st_ino
    convert(images, url, shards=3, ray=nodes.address, resume=True)
    assert (tmp_path / "there" / "shard-00001.beton").stat().st_ino == before, "it was whole"
    assert files_in(tmp_path / "there") == files_in(tmp_path / "here")


def test_images_of_object_storage_are_fetched_by_the_tasks(nodes, images, tmp_path):
    convert(images, tmp_path / "here", shards=3)
    convert(f"file://{images}", tmp_path / "there", shards=3, ray=nodes.address)
    for path in (tmp_path / "here").glob("*.beton"):
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes()


def test_error_of_a_task_is_ours_and_names_the_shard(nodes, images, tmp_path):
    write_image_folder(tmp_path / "images", classes=5)
    (tmp_path / "images" / "class_04" / "003.jpg").write_bytes(b"no image")
    with pytest.raises(ConversionError, match=r"^shard-00003\.beton: .*/class_04/003\.jpg: it is"):
        convert(tmp_path / "images", tmp_path / "train", shards=4, ray=nodes.address)
    assert not (tmp_path / "train" / SET_NAME).exists()
    assert list((tmp_path / "train").glob("*.partial*")) == []


class Gated:
    """A dataset whose images past the first ten wait for a file; it notes which tasks read."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 40

    def __getitem__(self, index):
        (self.folder / f"task-{os.getpid()}").touch()
        while index >= 10 and not (self.folder / "open").exists():
            time.sleep(0.01)
        return jpeg_bytes(index), index % 3


@pytest.fixture
def gated(tmp_path):
    (tmp_path / "gate").mkdir()
    return Gated(tmp_path / "gate")


def tasks_at_work(gated, count):
    """Wait until so many tasks are reading; returns their processes."""
    deadline = time.monotonic() + 60
    while len(found := sorted(gated.folder.glob("task-*"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(path.name.removeprefix("task-")) for path in found]


def convert_while(gated, folder, address, disturb):
    """Convert by tasks, and disturb the cluster when two of them are at work."""

    def wait_and_disturb():
        disturb(tasks_at_work(gated, 2))
        (gated.folder / "open").touch()

    disturber = threading.Thread(target=wait_and_disturb)
    disturber.start()
    convert(gated, folder, shards=4, ray=address)
    disturber.join()


def require_equal_to_one_made_here(gated, folder):
    convert(gated, folder.with_name("here"), shards=4)
    assert files_in(folder) == files_in(folder.with_name("here"))
    assert check_beton(folder, deep=True) == []


def test_worker_that_is_killed_loses_nothing(nodes, gated, tmp_path):
    killed = []

    def kill(tasks):
        os.kill(tasks[0], signal.SIGKILL)
        killed.append(tasks[0])

    convert_while(gated, tmp_path / "there", nodes.address, kill)
    assert len(tasks_at_work(gated, 2)) > 2, f"the task of process {killed[0]} began again"
    require_equal_to_one_made_here(gated, tmp_path / "there")


def test_ctrl_c_leaves_whole_shards_and_says_how_to_continue(nodes, gated, images, tmp_path):
    convert(images, tmp_path / "here", shards=20)
    arguments = [str(images), str(tmp_path / "there"), "--shards", "20"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastprune", "convert", *arguments, "--ray", nodes.address],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "there").glob("*.manifest.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    count, _ = map(
        int, re.search(r"(\d+) of (\d+) shards are whole .* with --resume", errors).groups()
    )
    # One more may have got its name while it was counted.
    found = len(list((tmp_path / "there").glob("*.manifest.parquet")))
    assert 1 <= count <= found < 20
    convert(images, tmp_path / "there", shards=20, resume=True)
    assert files_in(tmp_path / "there") == files_in(tmp_path / "here")


def test_rows_are_staged_on_each_node(nodes, images, tmp_path):
    convert(images, tmp_path / "train", shards=3)
    Subset(np.array([1, 8, 19])).save(tmp_path / "subset.npy")
    url = f"file://{tmp_path}/train"
    staged = stage(url, tmp_path / "subset.npy", tmp_path / "mirror", ray=nodes.address)
    assert staged.num_nodes == 2
    assert staged.num_rows == 3
    assert np.flatnonzero(open_beton(tmp_path / "mirror").present).tolist() == [1, 8, 19]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(
        ArtifactError, match=r"^node .*:\d+: .*/other holds files, but not a mirror"
    ):
        stage(url, None, tmp_path / "other", ray=nodes.address)


def test_node_that_is_killed_loses_nothing(nodes, gated, tmp_path):
    # The last test with the cluster, which takes a while to call the node dead.
    doomed = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()

    def kill(tasks):
        tasks_at_work(gated, 3)
        nodes.remove_node(doomed, allow_graceful=False)

    convert_while(gated, tmp_path / "there", nodes.address, kill)
    require_equal_to_one_made_here(gated, tmp_path / "there")


@pytest.mark.full
def test_cluster_on_this_machine_is_the_default(images, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    convert(images, tmp_path / "here", shards=3)
    convert(images, tmp_path / "there", shards=3, ray=True, workers=2)
    assert files_in(tmp_path / "there") == files_in(tmp_path / "here")


def test_address_without_a_cluster_is_named(images, tmp_path):
    with pytest.raises(
        ClusterError, match=r"no Ray cluster at 127\.0\.0\.1:1 that .*refused.*`ray start"
    ):
        convert(images, tmp_path / "train", shards=2, ray="127.0.0.1:1")


def test_cluster_makes_nothing_but_shards(images, tmp_path):
    with pytest.raises(InvalidValueError, match=r"ray needs shards.* Add --shards"):
        convert(images, tmp_path / "train.beton", ray=True)


def test_missing_package_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fastprune\[ray\]'"):
        convert(images, tmp_path / "train", shards=2, ray=True)
