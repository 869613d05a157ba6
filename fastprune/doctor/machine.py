"""Checks of packages, GPUs, CPUs, memory, files and folders of this machine or container."""

import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastprune.base.compiled import writable_folder
from fastprune.base.cpus import cgroup_folders, cpu_quota, cpus_per_rank, usable_cpus
from fastprune.base.environment import describe_versions

_GB = 1e9
# The usual soft limit of Linux; some clusters set 256.
_ENOUGH_FILES = 1024
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written
_DEVICES = Path("/dev")
_PAIR = "Install torch and torchvision as a pair, such as the pair in constraints.txt."


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        topic: subject of the check, such as "engine dali, cpu".
        verdict: "good"; "note" for something that is absent or could be better; "bad" for a fault
            that keeps fastprune from working.
        found: the state, in words.
        advice: the cure; empty where nothing needs to change.
    """

    topic: str
    verdict: str
    found: str
    advice: str = ""


def check_packages() -> Finding:
    """List the versions of the packages that matter."""
    versions = describe_versions()
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("packages", "good", found)


def check_cuda(*, devices: Path = _DEVICES) -> Finding:
    """Check whether torch works, and which GPUs it sees; `devices` holds the device files."""
    topic = "torch and CUDA"
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(topic, "bad", f"torch cannot be imported: {error}", _PAIR)
    try:
        # Wheels of another build load, but fail at the first operator that both register.
        import torchvision  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            return Finding(topic, "bad", f"torchvision cannot be imported: {error}", _PAIR)
    except Exception as error:
        return Finding(topic, "bad", f"torchvision does not fit torch: {error!r}", _PAIR)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(topic, "good", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    if torch.version.cuda is None:
        return Finding(topic, "note", "torch was built without CUDA: training runs on the CPU")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Finding(topic, "note", "CUDA_VISIBLE_DEVICES is empty: training runs on the CPU")
    # Device files without a usable driver: the most common fault of a fresh GPU machine.
    if any(devices.glob("nvidia[0-9]*")):
        major = str(torch.version.cuda).partition(".")[0]
        return Finding(
            topic,
            "bad",
            f"there is an NVIDIA device, but torch, built for CUDA {torch.version.cuda}, cannot "
            "use it",
            f"Compare with the driver's CUDA version (nvidia-smi): it must be {major}.0 or newer.",
        )
    return Finding(
        topic,
        "note",
        "no NVIDIA device is visible here: training runs on the CPU",
        "If this machine has one, give it to the container: docker run --gpus all ...",
    )


def check_cpus() -> Finding:
    """Compare the usable CPUs with the threads that libraries would start."""
    host, affinity, quota = os.cpu_count(), len(os.sched_getaffinity(0)), cpu_quota()
    usable = usable_cpus()
    limit = "no cgroup quota" if quota is None else f"cgroup quota {quota:g}"
    found = (
        f"{usable} usable (host {host}, affinity {affinity}, {limit}); by default "
        f"{cpus_per_rank()} decoding threads per rank, {min(usable, 16)} converting processes"
    )
    too_many = [
        f"{name}={os.environ[name]}"
        for name in _THREAD_VARIABLES
        if os.environ.get(name, "").isdigit() and int(os.environ[name]) > usable
    ]
    if too_many:
        return Finding(
            "CPUs",
            "note",
            f"{found}; {', '.join(too_many)} is more",
            f"Threads beyond the quota only wait for each other. Set them to {usable} or less.",
        )
    if affinity > usable and "OMP_NUM_THREADS" not in os.environ:
        return Finding(
            "CPUs",
            "note",
            f"{found}; torch ignores quotas and starts {affinity} threads",
            f"Set OMP_NUM_THREADS={usable}.",
        )
    return Finding("CPUs", "good", found)


def check_page_cache(betons: Sequence[Path]) -> Finding:
    """Check whether the betons fit into the memory that may cache them."""
    from fastprune.beton.opening import open_beton

    memory = cacheable_bytes()
    found = f"{memory / _GB:.1f} GB of memory can cache files"
    num_bytes = sum(len(open_beton(path).content) for path in betons)
    if not betons:
        return Finding("page cache", "good", f"{found}; name betons to compare with their size")
    found += f"; the betons have {num_bytes / _GB:.1f} GB"
    if num_bytes <= memory:
        return Finding("page cache", "good", f"{found}: read from disk once, then from memory")
    return Finding(
        "page cache",
        "note",
        f"{found}: every epoch reads from disk",
        "Allow more memory; or copy the kept rows alone with fastprune compact; or read page by "
        'page, Loader(order="pages").',
    )


def cacheable_bytes() -> int:
    """Return free memory and page cache in bytes, within the cgroup's limit."""
    with Path("/proc/meminfo").open(encoding="utf-8") as lines:
        sizes = dict(line.split(":") for line in lines)
    available = 1024 * int(sizes["MemAvailable"].split()[0])
    # A cgroup's limit includes its page cache; the host's free memory does not show it.
    limits = [
        int(text)
        for folder in cgroup_folders("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (folder / name).is_file() and (text := (folder / name).read_text().strip()).isdigit()
    ]
    return min([available, *limits])


def check_shared_memory() -> Finding:
    """Report the size of /dev/shm, which torch's DataLoader needs and fastprune does not."""
    topic = "shared memory"
    if not _SHARED_MEMORY.is_dir():
        return Finding(topic, "good", "there is no /dev/shm; fastprune needs none")
    size = shutil.disk_usage(_SHARED_MEMORY).total
    return Finding(
        topic,
        "good",
        f"{_SHARED_MEMORY} has {size / _GB:.2f} GB; fastprune needs none (torch's DataLoader with "
        "workers does)",
    )


def check_open_files() -> Finding:
    """Check how many files this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        return Finding("open files", "good", f"limit {soft:,}")
    return Finding(
        "open files",
        "note",
        f"limit {soft:,} (hard limit {hard:,})",
        f"Raise it: ulimit -n {_ENOUGH_FILES}, or docker run --ulimit nofile={_ENOUGH_FILES}.",
    )


def check_caches() -> Finding:
    """Report where compiled code is kept between processes."""
    folder = writable_folder()
    if folder is None:
        return Finding(
            "caches",
            "note",
            "compiled code cannot be kept: each process compiles for some seconds",
            "Name a folder in NUMBA_CACHE_DIR that you own and others cannot write to; in a "
            "container, mount one.",
        )
    return Finding("caches", "good", f"compiled code is kept in {folder}")
