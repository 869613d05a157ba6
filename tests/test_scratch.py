from fastprune.scratch import scratch_folders


def test_the_named_temporary_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert next(scratch_folders()) == tmp_path


def test_a_temporary_folder_that_cannot_be_written_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert tmp_path / "missing" not in list(scratch_folders())
