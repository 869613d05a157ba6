"""Tasks of a Ray cluster, which Ray places and repeats; errors and signals stay ours."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastprune.base import interrupts
from fastprune.base.cpus import usable_cpus
from fastprune.base.errors import ClusterError, FastpruneError, MissingDependencyError

if TYPE_CHECKING:
    from types import ModuleType

_log = logging.getLogger(__name__)

# True: the cluster that RAY_ADDRESS names, or one on this machine; a text: an address.
RayAddress = str | bool | None

# Of a task whose worker or node died. Nodes that a cloud takes back die often, and a shard that is
# repeated costs minutes; an error of the images is never repeated.
_MOST_RETRIES = 10
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_CONNECT = 10.0
_QUIET = {
    # Read by Ray when it starts: nothing is sent anywhere, and no warning of GPUs that no task asks
    # for.
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class ClusterTask:
    """One call of a function.

    Attributes:
        name: of what it makes, for messages.
        arguments: of the call; picklable.
        node: the id of the node that it must run on; None for any.
    """

    name: str
    arguments: tuple[Any, ...]
    node: str | None = None


@contextmanager
def cluster(address: str | bool) -> Iterator[bool]:
    """Connect to a cluster, or start one on this machine; a connection of the caller's is used.

    Yields:
        Whether the connection ends with the context, and its tasks with it.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: there is no cluster at the address.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f"--ray needs the package ray ({error}). Install it with fastprune's extra `ray`: pip "
            "install 'fastprune[ray]'"
        ) from error
    if ray.is_initialized():
        yield False
        return
    named = address if isinstance(address, str) else os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": named}
    if named is None:
        # "local", because without an address Ray would take a cluster that happens to run here.
        options = {"address": "local", "num_cpus": usable_cpus(), "include_dashboard": False}
    # Ray takes SIGTERM over when it connects.
    at_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _require_listener(named)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"there is no Ray cluster at {named or 'this machine'} that takes tasks: "
            f"{str(error).strip()}. Start one with `ray start --head`, compare the address, or "
            "leave it out for a cluster on this machine."
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, at_sigterm)
        yield True
    finally:
        ray.shutdown()


def _require_listener(address: str | None) -> None:
    """Refuse an address at which nobody listens, for which Ray would wait for minutes.

    Raises:
        OSError: nobody does.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_CONNECT).close()


def nodes() -> dict[str, str]:
    """Return id and address of the nodes that are alive and take tasks."""
    return {
        node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        for node in _ray().nodes()
        # A head that only keeps the cluster together has no CPUs.
        if node["Alive"] and node["Resources"].get("CPU")
    }


def shared(value: object) -> list[Any]:
    """Put a value where tasks find it, once; `taken` returns it."""
    # In a list, because Ray replaces references among a task's own arguments before it begins.
    return [_ray().put(value)]


def taken(reference: list[Any]) -> Any:
    """Return a value that was `shared`, in a task."""
    return _ray().get(reference[0])


def run_tasks(
    function: Callable[..., Any],
    tasks: Sequence[ClusterTask],
    *,
    num_cpus: int,
    keep_going: bool = False,
) -> Generator[tuple[ClusterTask, Any]]:
    """Yield tasks and what their calls return, as they finish; repeat those whose worker died.

    When one fails, or the caller stops, the others end with the connection. None is canceled: Ray
    2.60 ends the whole process if a task is done at the moment in which it is.

    Args:
        function: what each of them calls; importable.
        tasks: the calls, which may be repeated.
        num_cpus: CPUs that each takes of its node.
        keep_going: whether the others are finished when one fails; its error is raised behind them.

    Raises:
        FastpruneError: a task raised it; its text names the task.
        ClusterError: a task's worker or node died too often.
    """
    ray = _ray()
    most_cpus = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
    if num_cpus > most_cpus:
        _log.warning(
            "a task takes %d CPUs, but no node has more than %d: it waits for one. Use fewer "
            "with --workers",
            *(num_cpus, most_cpus),
        )
    remote = ray.remote(num_cpus=num_cpus, max_retries=_MOST_RETRIES)(function)
    failed: FastpruneError | None = None
    running = {_placed(remote, task).remote(*task.arguments): task for task in tasks}
    while running:
        finished, _ = ray.wait(list(running), timeout=_SECONDS_BETWEEN_LOOKS)
        interrupts.check()
        for reference in finished:
            task = running.pop(reference)
            try:
                yield task, ray.get(reference)
            except ray.exceptions.RayError as error:
                failed = failed or _ours(ray, error, task)
                if not keep_going:
                    raise failed from None
    if failed is not None:
        raise failed


def _placed(remote: Any, task: ClusterTask) -> Any:
    if task.node is None:
        return remote.options(name=task.name)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(task.node, soft=False)
    return remote.options(name=task.name, scheduling_strategy=strategy)


def _ours(ray: "ModuleType", error: Exception, task: ClusterTask) -> FastpruneError:
    """Return the error of a task as the caller would see it without a cluster, with its name."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, FastpruneError):
            return type(cause)(f"{task.name}: {cause}")
        # A fault of ours: its text has the traceback of the task.
        raise error
    lines = str(error).strip().splitlines()
    return ClusterError(
        f"{task.name}: Ray gave it up ({type(error).__name__}: {lines[0] if lines else ''}) after "
        f"at most {_MOST_RETRIES} repetitions. What is whole stays: see that the nodes are well, "
        "and repeat the command; a conversion with --resume."
    )


def _ray() -> "ModuleType":
    import ray

    module: ModuleType = ray
    return module
