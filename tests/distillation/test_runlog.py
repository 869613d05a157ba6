import json
import resource
import threading

from fastprune.distillation.runlog import RunLog


def write(folder, steps, **options):
    with RunLog(folder, **options) as log:
        for step in steps:
            log.write(step=step, epoch=0, loss=step / 10)
        return log.num_bytes


def test_log_is_cut_back_to_where_a_run_goes_on(tmp_path):
    kept = write(tmp_path, [1, 2])
    write(tmp_path, [3, 4], num_bytes=kept, step=2)
    write(tmp_path, [3, 5], num_bytes=kept, step=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 5]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3


def test_log_that_begins_anew_forgets_the_one_before(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [7])
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 7
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_log_that_lost_its_end_is_not_filled_up(tmp_path):
    kept = write(tmp_path, [1, 2])
    (tmp_path / "metrics.jsonl").write_text("")
    write(tmp_path, [3], num_bytes=kept, step=2)
    assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 3')


def test_disk_that_is_full_from_the_start_ends_the_log_and_not_the_run(tmp_path, caplog):
    hook = threading.excepthook
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert write(tmp_path, [1, 2]) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("the log of the run ends here")
    assert threading.excepthook is hook
