import pytest
import torch

from fastprune.base.errors import ArtifactError, DamagedCheckpointWarning
from fastprune.distillation.checkpoint import Checkpoints


def names(folder):
    return sorted(path.name[:14] for path in folder.iterdir())


def test_newest_ones_are_kept_and_the_newest_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() is None
    for step in (5, 10, 15):
        assert checkpoints.save({"weights": torch.full((2,), step), "step": step}, step=step)
    assert names(tmp_path / "checkpoints") == ["step-000000010", "step-000000015"]
    newest = checkpoints.newest()
    assert newest["step"] == 15
    assert newest["weights"].tolist() == [15, 15]


def test_file_is_what_torch_reads_without_pickles(tmp_path):
    Checkpoints(tmp_path, keep=1).save({"step": 1}, step=1)
    (path,) = tmp_path.iterdir()
    assert torch.load(path, weights_only=True) == {"step": 1}


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x"])
def test_damaged_one_is_passed_over_with_a_warning(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save({"step": step}, step=step)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(DamagedCheckpointWarning, match="step-000000002-.* is damaged"):
        assert checkpoints.newest() == {"step": 1}


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    Checkpoints(tmp_path, keep=1).save({"code": Code()}, step=1)
    with pytest.raises(ArtifactError, match="Weights only load failed"):
        Checkpoints(tmp_path, keep=1).newest()


def test_no_whole_one_is_an_error_and_no_new_beginning(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.save({"step": step}, step=step)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"x")
    message = r"none of the 2 checkpoints in .* step-000000001-.* Remove .*checkpoints to start"
    with (
        pytest.warns(DamagedCheckpointWarning, match="step-000000002-.*the one before it is tried"),
        pytest.raises(ArtifactError, match=message),
    ):
        checkpoints.newest()


def test_leftovers_of_a_kill_are_swept_away(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save({}, step=1)
    left = tmp_path / "checkpoints" / ".step-000000002-0123456789abcdef.pt.89abcdef.tmp"
    left.write_bytes(b"half")
    checkpoints.save({}, step=3)
    assert names(tmp_path / "checkpoints") == ["step-000000003"]
    left.write_bytes(b"half")
    checkpoints.remove()
    assert not (tmp_path / "checkpoints").exists()


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").touch()
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({}, step=1)
    checkpoints.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
