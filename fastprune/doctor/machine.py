"""What this machine, or this container, allows: CPUs, memory, files, folders to write."""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastprune.compile_cache import writable_folder
from fastprune.cpus import cgroup_folders, cpu_quota, cpus_per_rank, usable_cpus
from fastprune.doctor.findings import Finding

_GB = 1e9
_ENOUGH_FILES = 1024
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, not written


def check_cpus() -> Finding:
    """The CPUs that may be used, against the threads that libraries would start."""
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
            f"{found}; torch does not look at quotas and starts {affinity} threads",
            f"Set OMP_NUM_THREADS={usable}.",
        )
    return Finding("CPUs", "good", found)


def check_page_cache(betons: Sequence[Path]) -> Finding:
    """Whether the betons fit into the memory that may cache them."""
    from fastprune.beton.reader import open_beton

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
    """Free memory and page cache, as far as the cgroup's limit leaves it to this process."""
    with Path("/proc/meminfo").open(encoding="utf-8") as lines:
        sizes = dict(line.split(":") for line in lines)
    available = 1024 * int(sizes["MemAvailable"].split()[0])
    limits = [
        int(text)
        for folder in cgroup_folders("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (folder / name).is_file() and (text := (folder / name).read_text().strip()).isdigit()
    ]
    return min([available, *limits])


def check_shared_memory() -> Finding:
    """The size of /dev/shm, which only other people's loaders need."""
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
    """How many files this process may open."""
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
    """Where compiled code is kept, so that it need not be compiled again."""
    folder = writable_folder()
    if folder is None:
        return Finding(
            "caches",
            "note",
            "compiled code cannot be kept: each process compiles for some seconds",
            "Name a folder in NUMBA_CACHE_DIR that you own and that nobody else can write to; in a "
            "container, mount one.",
        )
    return Finding("caches", "good", f"compiled code is kept in {folder}")
