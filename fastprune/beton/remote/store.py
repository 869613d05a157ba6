"""Objects under a URL: their identity, ranges of their bytes, and writing them; with retries."""

import itertools
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs

from fastprune.base.errors import InvalidValueError, StorageError

Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "file")
RETRY_SECONDS = 60.0

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 8.0
_UPLOAD_BYTES = 8 << 20
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
# Faults that repetition cannot cure, as AWS's SDK and answers name them.
_DENIED = re.compile(
    r"ACCESS_DENIED|AccessDenied|INVALID_ACCESS_KEY|InvalidAccessKey|SIGNATURE_DOES_NOT_MATCH|"
    r"SignatureDoesNotMatch|EXPIRED_TOKEN|ExpiredToken|HTTP status 40[13]|\(403\)|Forbidden"
)
_MISSING = re.compile(r"NO_SUCH_|NoSuch|RESOURCE_NOT_FOUND|HTTP status 404|does not exist")
_ORDER = random.SystemRandom()


class BadBodyError(Exception):
    """An answer did not hold the bytes that were asked for; asking again may help."""


@dataclass(frozen=True)
class ObjectStatus:
    """One object as it is now.

    Attributes:
        size: in bytes.
        version: what changes with its content: the ETag, or the time of its last change.
    """

    size: int
    version: str


@dataclass(frozen=True)
class ListedObject:
    """One object in a listing; size and time are named as in an `os.stat_result`.

    Attributes:
        name: below the URL.
        st_size: in bytes.
        st_mtime_ns: time of its last change.
    """

    name: str
    st_size: int
    st_mtime_ns: int


class Store:
    """Objects of one bucket below one prefix, or files of one folder.

    Credentials come the way of each cloud's own tools: the environment, configuration files, or the
    role of the machine. `AWS_ENDPOINT_URL` names an S3-compatible server.

    Attributes:
        url: without a slash at its end.
    """

    def __init__(self, url: str, *, retry_seconds: float = RETRY_SECONDS):
        """Parse the URL; nothing is asked of the server.

        Args:
            url: s3://bucket/prefix, gs://bucket/prefix or file:///folder.
            retry_seconds: how long a request is repeated that fails or gives wrong bytes.

        Raises:
            InvalidValueError: it is not such a URL, or has credentials in it.
        """
        self.url = url.rstrip("/")
        self._scheme, self._root = _parsed(self.url)
        self._retry_seconds = retry_seconds
        self._opened: dict[str, tuple[pyarrow.NativeFile, ObjectStatus]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process connects by itself, with its own credentials."""
        return partial(Store, retry_seconds=self._retry_seconds), (self.url,)

    def status(self, name: str) -> ObjectStatus:
        """Ask for an object's size and version, once; later calls and `read` use this answer.

        Raises:
            StorageError: it is missing, access is denied, or the server does not answer.
        """
        return self._open(name)[1]

    def read(
        self,
        name: str,
        start: int,
        size: int,
        *,
        require: Callable[[bytes], Any] | None = None,
        stop: threading.Event | None = None,
    ) -> bytes:
        """Read a range of an object.

        Args:
            name: below the URL.
            start: in bytes.
            size: in bytes.
            require: raises a `BadBodyError` for bytes that cannot be right.
            stop: set by another thread to end the repetition.

        Raises:
            StorageError: as `status`, or the bytes are not right however often they are asked for.
        """

        def attempt() -> bytes:
            content: bytes = self._open(name)[0].read_at(size, start)
            if len(content) != size:
                raise BadBodyError(f"{len(content):,} bytes came instead of {size:,}")
            if require is not None:
                require(content)
            return content

        return self._repeated(name, attempt, stop)

    def read_whole(self, name: str, *, require: Callable[[bytes], Any] | None = None) -> bytes:
        """Read all of an object; see `read`."""
        return self.read(name, 0, self.status(name).size, require=require)

    def read_once(self, name: str, size: int, *, stop: threading.Event | None = None) -> bytes:
        """Read all of an object and keep no handle; `size` is its size in a listing.

        Raises:
            StorageError: as `status`, or it has another size.
        """
        system, path = self._system(), self._path(name)

        def attempt() -> bytes:
            with system.open_input_file(path) as file:
                if file.size() != size:
                    raise StorageError(
                        f"{self.url}/{name} changed since it was listed: it had {size:,} bytes, "
                        f"and has {file.size():,}. Repeat the command."
                    )
                content: bytes = file.read()
            if len(content) != size:
                raise BadBodyError(f"{len(content):,} bytes came instead of {size:,}")
            return content

        return self._repeated(name, attempt, stop)

    def listed(self, *, recursive: bool) -> list[ListedObject]:
        """List the objects directly below the URL, or all, in the order of their names.

        Raises:
            StorageError: there are none, access is denied, or the server does not answer.
        """
        system = self._system()
        selector = pyarrow.fs.FileSelector(self._root, recursive=recursive)
        found = self._repeated("", lambda: system.get_file_info(selector))
        start = len(self._root) + 1
        listed = [
            ListedObject(entry.path[start:], entry.size, entry.mtime_ns)
            for entry in found
            if entry.type == pyarrow.fs.FileType.File
        ]
        return sorted(listed, key=lambda entry: entry.name)

    def exists(self, name: str) -> bool:
        """Ask the server whether an object is there, or raise a `StorageError`."""
        system, path = self._system(), self._path(name)
        info = self._repeated(name, lambda: system.get_file_info(path))
        return bool(info.type == pyarrow.fs.FileType.File)

    def write(self, name: str, path: Path) -> None:
        """Write a local file as an object, which appears when it is whole.

        Raises:
            StorageError: access is denied, or the server does not answer.
        """
        system, final = self._system(), self._path(name)
        # An object appears when its stream is closed; a file needs a name for the time before.
        target = f"{final}.partial" if self._scheme == "file" else final

        def attempt() -> None:
            if self._scheme == "file":
                system.create_dir(self._root, recursive=True)
            with path.open("rb") as source, system.open_output_stream(target) as stream:
                while content := source.read(_UPLOAD_BYTES):
                    stream.write(content)
            if target != final:
                system.move(target, final)

        self._repeated(name, attempt)

    def _open(self, name: str) -> tuple[pyarrow.NativeFile, ObjectStatus]:
        """Open an object, once for all threads: its size and version take a request."""
        with self._lock:
            opened = self._opened.get(name)
        if opened is None:
            opened = self._repeated(name, lambda: self._opened_now(name))
            with self._lock:
                # Two threads may have opened it; all must use the same version.
                opened = self._opened.setdefault(name, opened)
        return opened

    def _opened_now(self, name: str) -> tuple[pyarrow.NativeFile, ObjectStatus]:
        system, path = self._system(), self._path(name)
        file = system.open_input_file(path)
        etags = [value for key, value in file.metadata().items() if key.lower() == "etag"]
        if etags:
            version = etags[0].decode()
        else:
            version = f"changed at {system.get_file_info(path).mtime_ns} ns"
        return file, ObjectStatus(file.size(), version)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _system(self) -> pyarrow.fs.FileSystem:
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        bucket = self._root.split("/")[0]
        try:
            return _file_system(self._scheme, bucket, endpoint, region)
        except OSError as error:
            raise StorageError(f"{self.url} cannot be reached: {error}") from None

    def _repeated(
        self, name: str, attempt: Callable[[], Result], stop: threading.Event | None = None
    ) -> Result:
        """Attempt something until it succeeds, cannot succeed, or took too long."""
        where = f"{self.url}/{name}" if name else self.url
        give_up = time.monotonic() + self._retry_seconds
        stop = stop or threading.Event()
        for number in itertools.count(1):
            try:
                return attempt()
            except (OSError, BadBodyError) as error:
                reason = str(error).strip()
                if isinstance(error, BadBodyError):
                    # The object may have been replaced since it was opened: look at it again.
                    with self._lock:
                        self._opened.pop(name, None)
                # Only faults that are known to be permanent end the attempts.
                if isinstance(error, FileNotFoundError) or _MISSING.search(reason):
                    raise StorageError(
                        f"{where} does not exist. Compare the URL with a listing of the bucket."
                    ) from None
                if isinstance(error, PermissionError) or _DENIED.search(reason):
                    raise StorageError(
                        f"access to {where} was denied ({reason}). Credentials come from the "
                        "environment (AWS_ACCESS_KEY_ID, AWS_PROFILE; "
                        "GOOGLE_APPLICATION_CREDENTIALS) or the role of the machine."
                    ) from None
                # Random, so that all processes that a server refused do not come back at once.
                longest = min(_FIRST_PAUSE_SECONDS * 2 ** (number - 1), _LONGEST_PAUSE_SECONDS)
                pause = longest * _ORDER.uniform(0.5, 1)
                if time.monotonic() + pause > give_up or stop.wait(pause):
                    raise StorageError(
                        f"{where} could not be read or written in {number} attempts: {reason}. "
                        "Repeat the command when the server works again: what is there stays."
                    ) from None
        raise AssertionError("unreachable")


def _parsed(url: str) -> tuple[str, str]:
    """Split a URL into its scheme and what pyarrow takes for a path."""
    match = _URL.match(url)
    scheme, rest = match.groups() if match else ("", "")
    if scheme not in SCHEMES:
        raise InvalidValueError(
            f"{url.split('@')[-1]} is not a URL of object storage. Name one such as "
            "s3://bucket/train/, gs://bucket/train/ or file:///data/train."
        )
    # Not shown: what stands before the @ is a secret.
    if "@" in rest.split("/")[0]:
        raise InvalidValueError(
            f"{scheme}://...@{rest.split('/')[0].split('@')[-1]} has credentials in it. Give them "
            "by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), where no log shows "
            "them."
        )
    if scheme == "file" and not rest.startswith("/"):
        raise InvalidValueError(f"{url} names no absolute path. Write three slashes: file:///data.")
    if not rest.strip("/"):
        raise InvalidValueError(f"{url} names no bucket. Write {scheme}://bucket/prefix/.")
    return scheme, rest.rstrip("/")


@lru_cache
def _file_system(
    scheme: str, bucket: str, endpoint: str | None, region: str | None
) -> pyarrow.fs.FileSystem:
    """Connect to a store; the environment is part of the key, which may change."""
    if scheme == "file":
        return pyarrow.fs.LocalFileSystem()
    if scheme == "gs":
        return pyarrow.fs.GcsFileSystem()
    options: dict[str, Any] = {"region": region}
    if endpoint:
        # pyarrow does not look at AWS_ENDPOINT_URL by itself.
        protocol, _, host = endpoint.rstrip("/").rpartition("://")
        options = {
            "endpoint_override": host,
            "scheme": protocol or "https",
            "region": region or "us-east-1",
        }
    elif region is None:
        options["region"] = pyarrow.fs.resolve_s3_region(bucket)
    # One attempt of the SDK's: `Store` repeats, within one budget for all kinds of faults.
    once = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1)
    return pyarrow.fs.S3FileSystem(retry_strategy=once, **options)
