import os

import pytest

from fastprune.base import cpus
from fastprune.base.cpus import cpu_quota, cpus_per_rank, usable_cpus
from fastprune.beton.convert.writer import convert
from tests.images import write_image_folder


@pytest.fixture
def cgroups(tmp_path):
    """Writes cgroup files below a mount, and the process's own list of cgroups."""

    def write(listing, **files):
        (tmp_path / "cgroup").write_text(listing)
        for name, content in files.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return {"process": tmp_path / "cgroup", "mount": tmp_path / "mount"}

    return write


def test_quota_of_a_version_2_cgroup(cgroups):
    assert cpu_quota(**cgroups("0::/\n", **{"cpu.max": "250000 100000\n"})) == 2.5


def test_unlimited_cgroup_has_no_quota(cgroups):
    assert cpu_quota(**cgroups("0::/\n", **{"cpu.max": "max 100000\n"})) is None


def test_least_quota_of_the_chain_holds(cgroups):
    files = {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "400000 100000\n"}
    assert cpu_quota(**cgroups("0::/a/b\n", **files)) == 1.5


def test_quota_of_a_version_1_cgroup(cgroups):
    files = {
        "cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
        "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
    }
    listing = "5:memory:/job\n4:cpu,cpuacct:/job\n"
    assert cpu_quota(**cgroups(listing, **files)) == 3


def test_version_1_without_limit_has_no_quota(cgroups):
    files = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(**cgroups("4:cpu:/\n", **files)) is None


def test_host_path_inside_a_container_falls_back_to_the_mount(cgroups):
    files = {"cpu.max": "100000 100000\n"}
    assert cpu_quota(**cgroups("0::/kubepods/pod1/x\n", **files)) == 1


def test_machine_without_cgroups_has_no_quota(tmp_path):
    assert cpu_quota(process=tmp_path / "none", mount=tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (2.5, 3), (0.3, 1), (64.0, 8)])
def test_usable_cpus_are_those_of_affinity_and_quota(monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(cpus, "cpu_quota", lambda: quota)
    assert usable_cpus() == expected


@pytest.mark.parametrize(("ranks", "expected"), [(None, 6), ("4", 1), ("2", 3), ("8", 1), ("x", 6)])
def test_ranks_of_one_machine_share_its_cpus(monkeypatch, ranks, expected):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 6)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert cpus_per_rank() == expected


@pytest.mark.parametrize(
    ("variables", "process_group", "expected"),
    [
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, {"world": 4}, 12),
        ({"MPI_LOCALNRANKS": "3"}, {}, 8),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "8"}, {"world": 8, "gpus": 4}, 6),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NTASKS": "8"}, {}, 6),
        ({"SLURM_NTASKS_PER_NODE": "1", "SLURM_NTASKS": "1"}, {"world": 8, "gpus": 8}, 3),
        ({"LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS_PER_NODE": "1"}, {"world": 4}, 12),
        ({}, {"world": 8, "gpus": 8}, 3),
        ({}, {"world": 16, "gpus": 8}, 3),
        ({}, {"world": 2}, 12),
        ({}, {"gpus": 8}, 24),
    ],
)
def test_ranks_that_others_started_share_the_cpus_too(
    monkeypatch, variables, process_group, expected
):
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 24)
    names = (*cpus._LOCAL_RANKS, "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cpus_per_rank(**process_group) == expected


def test_conversion_takes_as_many_threads_as_the_quota_allows(monkeypatch, tmp_path):
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(
        "fastprune.beton.convert.writer.build_beton", lambda job, *_: job.num_threads
    )
    assert convert(write_image_folder(tmp_path / "images"), tmp_path / "a.beton") == 1
