"""Checks of the installation, the engines and the machine, each with its cure."""

from collections.abc import Sequence
from pathlib import Path

from fastprune.doctor.engines import check_engines
from fastprune.doctor.machine import (
    Finding,
    check_caches,
    check_cpus,
    check_cuda,
    check_open_files,
    check_packages,
    check_page_cache,
    check_shared_memory,
)

__all__ = ["Finding", "diagnose"]


def diagnose(betons: Sequence[str | Path] = ()) -> list[Finding]:
    """Check this machine, and decode an image with every engine.

    Args:
        betons: files to train on, whose size is compared with the page cache.

    Returns:
        The findings; a verdict "bad" is a fault that keeps fastprune from working.

    Raises:
        BetonError: one of the betons is missing or damaged.
    """
    return [
        check_packages(),
        check_cuda(),
        *check_engines(),
        check_cpus(),
        check_page_cache([Path(beton) for beton in betons]),
        check_shared_memory(),
        check_open_files(),
        check_caches(),
    ]
