import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastprune.base.errors import ArtifactError
from fastprune.base.files import atomic_path, lock, write_all, write_text


def test_file_appears_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "artifact"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failed_block_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "artifact"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError("half-way")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named_with_the_cure(tmp_path):
    with pytest.raises(ArtifactError, match=r"folder .*nowhere does not exist\. Create it"):
        write_text(tmp_path / "nowhere" / "artifact", "text")


def test_full_disk_is_named_and_nothing_is_left_behind(tmp_path):
    # A file size limit stands in for a full disk; it must not outlive this process.
    script = (
        "import sys\n"
        "from fastprune.base.files import write_text\n"
        "from fastprune.base.errors import ArtifactError\n"
        "try:\n"
        "    write_text(sys.argv[1], 'x' * 100_000)\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )

    def limit_files_to_one_kilobyte() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    path = tmp_path / "artifact"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit_files_to_one_kilobyte,
    )
    assert f"cannot write {path}: File too large" in done.stdout
    assert "Nothing was left behind" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_place_that_refuses_the_file_is_named(tmp_path):
    (tmp_path / "artifact").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*artifact: Is a directory"):
        write_text(tmp_path / "artifact", "text")
    assert [path.name for path in Path(tmp_path).iterdir()] == ["artifact"]


def test_folder_that_another_process_writes_into_is_refused(tmp_path):
    path = tmp_path / ".lock"
    script = (
        "import sys, time\n"
        "from fastprune.base.files import lock\n"
        "with lock(sys.argv[1], wait=False):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(ArtifactError, match="another process is writing into"),
            lock(path, wait=False),
        ):
            pass
    finally:
        other.kill()
        other.communicate()
    with lock(path, wait=False):
        assert path.exists()


def test_named_error_survives_where_the_temporary_file_cannot_be_removed(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ArtifactError, match=r"cannot write .*artifact: Not a directory"):
        write_text(tmp_path / "file" / "artifact", "text")


def test_fifo_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(
        ArtifactError, match=r"cannot write .*fifo: it is a FIFO, which a file would"
    ):
        write_text(tmp_path / "fifo", "text")
    assert (tmp_path / "fifo").is_fifo()


def test_socket_is_not_replaced_by_a_file(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        (tmp_path / "link").symlink_to(tmp_path / "socket")
        for name in ("socket", "link"):
            with pytest.raises(ArtifactError, match=rf"cannot write .*{name}: it is a socket"):
                write_text(tmp_path / name, "text")
        assert (tmp_path / "socket").is_socket()


def test_link_is_followed_so_that_the_data_lands_on_its_disk(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "file")
    for text in ("first", "second"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "other" / "file").read_text() == text
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "other"]


def test_current_folder_is_no_artifact(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match=r"cannot write \."):
        write_text(".", "text")
    assert list(tmp_path.iterdir()) == []


def test_refusal_without_a_number_is_named(tmp_path):
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*: 9 requested and 1 written"),
        atomic_path(tmp_path / "artifact"),
    ):
        raise OSError("9 requested and 1 written")


@pytest.mark.parametrize("wait", [True, False])
def test_folder_that_refuses_the_lock_file_is_named(tmp_path, wait):
    with (
        pytest.raises(ArtifactError, match=r"folder .*nowhere does not exist"),
        lock(tmp_path / "nowhere" / ".lock", wait=wait),
    ):
        pass


def test_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock(tmp_path / ".lock", wait=False):
        write_text(tmp_path / "artifact", "text")
    assert (tmp_path / "artifact").read_text() == "text"


def test_a_lock_that_is_missing_is_made_or_done_without(tmp_path):
    with lock(tmp_path / "lock", shared=True):
        assert (tmp_path / "lock").exists()
    with lock(tmp_path / "gone" / "lock", shared=True):
        pass  # where nobody can make it, nobody writes
    with pytest.raises(ArtifactError, match="does not exist"), lock(tmp_path / "gone" / "lock"):
        pass


def test_a_shared_lock_is_held_together_and_keeps_writers_out(tmp_path):
    path = tmp_path / "lock"
    with (
        lock(path, shared=True),
        lock(path, shared=True, wait=False),
        pytest.raises(ArtifactError, match="another process"),
        lock(path, wait=False),
    ):
        pass
    with lock(path, wait=False):
        pass


@pytest.mark.parametrize("data", [b"12345678", [b"123", b"", bytearray(b"456"), b"78"]])
@pytest.mark.parametrize("most", [1, 4, 7, 100])
def test_all_is_written_where_the_kernel_writes_a_part(tmp_path, monkeypatch, data, most):
    pwrite = os.pwrite

    def write_a_part(descriptor, buffers, offset):
        whole = b"".join(buffers) if isinstance(buffers, list) else bytes(buffers)
        return pwrite(descriptor, whole[:most], offset)

    monkeypatch.setattr(os, "pwrite", write_a_part)
    monkeypatch.setattr(os, "pwritev", write_a_part)
    with (tmp_path / "file").open("w+b") as file:
        write_all(file.fileno(), data, 3)
        assert file.read() == b"\0\0\x0012345678"
