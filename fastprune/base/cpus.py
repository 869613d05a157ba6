"""How many CPUs this process may use: its affinity and its cgroup's quota, not the host's cores."""

import math
import os
from pathlib import Path

# Ranks on this machine: of torchrun, of Open MPI, of MPICH and Intel MPI.
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_PROCESS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """CPUs that this process can keep busy, at least one.

    A quota of 2.5 CPUs counts as three: two threads could not use all of it.
    """
    affinity = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpus_per_rank(*, world: int = 1, gpus: int = 0) -> int:
    """Return this process's share of the usable CPUs, where several share this machine.

    torchrun, Slurm, Open MPI and MPICH put their number into the environment. `mp.spawn` and
    Lightning do not: they start one rank per GPU, and without GPUs all ranks on this machine.
    `world` counts the ranks of the process group, `gpus` the CUDA devices of this machine.
    """
    local = next(filter(None, map(_number_in, _LOCAL_RANKS)), 0)
    # Slurm counts its own tasks, of which each may spawn ranks of its own.
    if not local and world in (1, _number_in("SLURM_NTASKS")):
        local = _number_in("SLURM_NTASKS_PER_NODE")
    return max(1, usable_cpus() // (local or (min(world, gpus) if gpus else world)))


def _number_in(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def cpu_quota(*, process: Path = _PROCESS, mount: Path = _MOUNT) -> float | None:
    """CPUs that the cgroups of this process allow it (`docker run --cpus`, a Kubernetes limit).

    None without a limit.
    """
    # A cgroup is bound by every cgroup above it, so the least quota counts.
    quotas = [
        quota for folder in cgroup_folders("cpu", process, mount) for quota in _quotas(folder)
    ]
    return min(quotas, default=None)


def cgroup_folders(controller: str, process: Path = _PROCESS, mount: Path = _MOUNT) -> list[Path]:
    """The folders of a controller's cgroup and of all above it, of version 2 and of version 1."""
    try:
        lines = process.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        # "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1.
        _, _, rest = line.partition(":")
        names, _, inner = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        root = mount / names if names else mount
        here = root / inner.lstrip("/")
        # In a container, the path may be the host's, while the mount is the container's own.
        chain = [here, *here.parents]
        folders += chain[: chain.index(root) + 1]
    return folders


def _quotas(folder: Path) -> list[float]:
    """The quota in a cgroup's own files, as a list of one or none."""
    try:
        # Version 2 has both numbers in one file, version 1 has one file each.
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError):
        return []
