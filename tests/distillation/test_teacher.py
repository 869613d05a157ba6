"""Taught once: runs that read and fill a teacher cache."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastprune import TeacherCache, score
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError, RecipeError
from fastprune.beton.opening import open_beton
from fastprune.difficulty.fill_cache import fill_cache
from fastprune.distillation.trainer import distill
from fastprune.networks import save_weights
from fastprune.rows.subset import Subset
from tests.distillation import networks
from tests.distillation.test_processes import losses, torchrun

ROOT = Path(__file__).parents[2]
ROWS = np.arange(80)


@pytest.fixture(scope="session")
def counted_teacher(betons):
    """Weights of a teacher that notes how many images it sees."""
    torch.manual_seed(1)
    path = betons / "counted.safetensors"
    save_weights(networks.counted(num_classes=10), path)
    return path


@pytest.fixture
def cached(recipe, counted_teacher, tmp_path):
    """Make a recipe of four epochs over two recurring views, with a float32 cache."""
    networks.seen.clear()

    def make(name="run", **sections):
        settings = {
            "data": {"num_views": 2},
            "teacher": {
                "network": "tests.distillation.networks:counted",
                "checkpoint": counted_teacher,
                "cache": tmp_path / "cache",
                "cache_dtype": "float32",
            },
            "student": {"network": "tests.distillation.networks:small"},
            "schedule": {"epochs": 4},
            "run": {"out": tmp_path / name, "validate_every": 4},
        }
        for section, keys in sections.items():
            settings[section] = settings.get(section, {}) | keys
        return recipe(**settings)

    return make


def asked():
    """Images that went through the teacher since this was called last, but for the warm-up's."""
    count = sum(networks.seen)
    networks.seen.clear()
    return count


def weights(result):
    return load_file(result.student)


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_every_view_of_every_row_is_asked_for_once_and_then_never(cached, tmp_path):
    first = distill(cached("first"))
    assert asked() == first.teacher_forwards == 2 * 80
    assert first.teacher_forwards_saved == 2 * 80
    assert first.cache_bytes > 0
    assert first.cache_fill_seconds > 0
    second = distill(cached("second"))
    assert asked() == second.teacher_forwards == 0
    assert second.teacher_forwards_saved == 4 * 80
    assert_same_weights(first, second)
    shown = json.loads((tmp_path / "second" / "result.json").read_text())
    assert shown["teacher_forwards"] == 0
    assert shown["teacher_forwards_saved"] == 320
    assert shown["peak_host_bytes"] > 0
    assert list(TeacherCache.open(tmp_path / "cache").check()) == []


def test_a_float32_cache_trains_as_the_teacher_itself_does(cached, counted_teacher):
    plain = cached(
        "plain",
        teacher={"cache": None, "cache_dtype": None},
    )
    live = distill(plain)
    assert live.teacher_forwards == asked() == 4 * 80
    assert (live.teacher_forwards_saved, live.cache_bytes) == (0, 0)
    assert_same_weights(live, distill(cached("filling")))


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_replay_of_rounded_logits_is_the_filling_run_to_the_bit(cached, dtype):
    first = distill(cached("first", teacher={"cache_dtype": dtype}))
    second = distill(cached("second", teacher={"cache_dtype": dtype}))
    assert asked() == 160
    assert_same_weights(first, second)


@pytest.mark.parametrize(
    "loss",
    [
        {"distillation": "dkd"},
        {"reshaping": "zscore"},
        {"reshaping": "class_std"},
        {"distillation": "dkd", "reshaping": "class_std", "temperature": 2.0},
    ],
)
def test_every_loss_works_from_the_cache(cached, half, loss):
    first = distill(cached("first", loss=loss, data={"subset": half}))
    second = distill(cached("second", loss=loss, data={"subset": half}))
    assert asked() == 2 * 40
    assert second.teacher_forwards == 0
    assert_same_weights(first, second)


def test_other_students_orders_subsets_and_batches_share_a_cache(cached, half):
    distill(cached("first", data={"seed": 0}))
    assert asked() == 160
    distill(
        cached("net", data={"seed": 0}, student={"network": "tests.distillation.networks:frozen"})
    )
    distill(cached("seed", data={"seed": 0}, run={"seed": 5}))
    distill(cached("half", data={"seed": 0, "subset": half, "batch_size": 10}))
    assert asked() == 0


def test_holes_of_a_tail_that_was_dropped_are_filled_later(cached, tmp_path):
    data = {"batch_size": 30}
    first = distill(cached("first", data=data, schedule={"epochs": 2}))
    assert asked() == first.teacher_forwards == 2 * 60
    cache = TeacherCache.open(tmp_path / "cache")
    assert [len(cache.missing(slot)) for slot in range(2)] == [20, 20]
    third = distill(cached("third", data=data, schedule={"epochs": 12}))
    assert asked() == third.teacher_forwards == sum(20 - len(cache.missing(s)) for s in range(2))
    assert third.teacher_forwards_saved + third.teacher_forwards == 12 * 60
    assert_same_weights(third, distill(cached("again", data=data, schedule={"epochs": 12})))


def test_a_subset_that_grows_is_asked_for_what_it_lacks(cached, half, caplog):
    distill(cached("half", data={"subset": half}))
    assert asked() == 2 * 40
    grown = distill(cached("all"))
    # There is no room for the other half, which is asked for in every epoch.
    assert asked() == grown.teacher_forwards == 4 * 40
    assert "was made for 40 rows, and has no room for 40 of the rows" in caplog.text


def test_pruning_while_training_leaves_holes_that_are_known(cached):
    pruning = {"rule": "infobatch"}
    first = distill(cached("first", pruning=pruning, schedule={"epochs": 6}))
    assert asked() == first.teacher_forwards <= 160
    assert first.teacher_forwards_saved > 0
    second = distill(cached("second", pruning=pruning, schedule={"epochs": 6}))
    assert asked() == second.teacher_forwards == 0
    assert_same_weights(first, second)


def test_scoring_pays_for_the_first_epoch(cached, betons, counted_teacher, tmp_path):
    score(
        *(betons / "train.beton", "tests.distillation.networks:counted", tmp_path / "s.parquet"),
        checkpoint=counted_teacher,
        image_size=32,
        views=1,
        cache=tmp_path / "cache",
        num_views=2,
        cache_dtype="float32",
        batch_size=20,
    )
    assert asked() == 80
    one_epoch = distill(cached("one", schedule={"epochs": 1}))
    assert asked() == one_epoch.teacher_forwards == 0
    two = distill(cached("two", schedule={"epochs": 2}))
    assert asked() == two.teacher_forwards == 80


def test_a_cache_that_was_filled_beforehand_needs_no_teacher_on_the_device(
    cached, betons, counted_teacher, tmp_path, monkeypatch
):
    fill_cache(
        *(betons / "train.beton", "tests.distillation.networks:counted", tmp_path / "cache"),
        checkpoint=counted_teacher,
        image_size=32,
        num_views=2,
        batch_size=20,
    )
    asked()
    moved = []
    monkeypatch.setattr(networks.Counted, "_apply", lambda self, *_: moved.append(1) or self)
    distill(cached("run", teacher={"cache_dtype": None}))
    assert moved == []
    assert networks.seen == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"seed": 1}}, r"seed of the views: 0, and not 1.*data\.seed"),
        ({"data": {"num_views": 3}}, r"recurring views: 2, and not 3.*data\.num_views = 2"),
        ({"data": {"image_size": 33}}, "image size seen by the teacher: 32, and not 33"),
        ({"data": {"augment": "rrc"}}, r"crop policy \(kind\): pad_crop, and not rrc"),
        ({"data": {"mean": (0.5, 0.5, 0.5)}}, "another mean"),
        ({"data": {"std": (0.5, 0.5, 0.5)}}, "another std"),
        ({"run": {"precision": "bf16"}}, "teacher's precision: fp32, and not bf16"),
        ({"data": {"backend": "dali"}}, r"another decoder \((engine|version)\): "),
        ({"teacher": {"cache_dtype": "uint8"}}, "stores float32, but uint8"),
    ],
)
def test_a_run_that_the_cache_is_not_of_is_refused(cached, sections, message):
    if sections.get("data", {}).get("backend") == "dali":
        pytest.importorskip("nvidia.dali")
    distill(cached("first", schedule={"epochs": 1}))
    with pytest.raises(ArtifactMismatch, match=message):
        distill(cached("other", **sections))


def test_another_teacher_is_refused(cached, betons):
    distill(cached("first", schedule={"epochs": 1}))
    torch.manual_seed(2)
    save_weights(networks.counted(num_classes=10), betons / "other.safetensors")
    with pytest.raises(ArtifactMismatch, match=r"another teacher \(weights_digest\)"):
        distill(cached("other", teacher={"checkpoint": betons / "other.safetensors"}))


def test_damaged_and_truncated_logits_stop_the_run(cached, tmp_path):
    distill(cached("first"))
    data = np.load(tmp_path / "cache" / "slot-001.npy", mmap_mode="r+")
    data[3, 4] += 1
    data.flush()
    with pytest.raises(ArtifactError, match=r"slot-001\.npy is damaged: .*Remove slot-001"):
        distill(cached("second"))
    os.truncate(tmp_path / "cache" / "slot-000.npy", 1000)
    with pytest.raises(ArtifactError, match=r"slot-000\.npy is not a whole \.npy file"):
        distill(cached("third"))


def test_what_a_cache_cannot_hold_is_refused_by_name(cached):
    with pytest.raises(RecipeError, match=r"loss\.feature_weight compares .* teacher\.cache"):
        cached(loss={"feature_weight": 1.0})
    with pytest.raises(RecipeError, match=r"data\.num_views is missing"):
        cached(data={"num_views": None})
    with pytest.raises(RecipeError, match=r"pad_crop's shifts .*data\.first_image_size = 16"):
        distill(cached(data={"first_image_size": 16, "image_size_step": 16}))


def test_growing_images_share_a_cache_that_was_filled_at_the_full_size(
    cached, betons, counted_teacher, tmp_path
):
    data = {"augment": "rrc", "first_image_size": 16, "image_size_step": 16}
    with pytest.raises(RecipeError, match=r"epoch 1 shows images of 16 pixels.*cache fill"):
        distill(cached("early", data=data))
    fill_cache(
        *(betons / "train.beton", "tests.distillation.networks:counted", tmp_path / "cache"),
        checkpoint=counted_teacher,
        image_size=32,
        augment="rrc",
        num_views=2,
        batch_size=20,
    )
    asked()
    result = distill(cached("grown", data=data))
    assert asked() == result.teacher_forwards == 0
    assert result.teacher_forwards_saved == 4 * 80


def test_logits_beyond_float16_stop_the_run_with_the_cure(cached, betons):
    torch.manual_seed(1)
    network = networks.counted(num_classes=10)
    with torch.no_grad():
        network.fc.bias += 1e6
    save_weights(network, betons / "large.safetensors")
    settings = {"checkpoint": betons / "large.safetensors", "cache_dtype": "float16"}
    with pytest.raises(InvalidValueError, match=r'too large for float16 .*"float32"'):
        distill(cached("run", teacher=settings))


def test_a_full_disk_costs_the_cache_and_not_the_run(cached, monkeypatch, caplog, tmp_path):
    distill(cached("made", schedule={"epochs": 1}))
    asked()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real_put = TeacherCache.put

    def put_on_a_full_disk(cache, rows, slot, logits):
        real_put(cache, rows, slot, logits)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            cache.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(TeacherCache, "put", put_on_a_full_disk)
    try:
        result = distill(cached("run"))
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    # Slot 0 is there from before; slot 1 is asked for each time.
    assert asked() == result.teacher_forwards == 2 * 80
    warnings = [r for r in caplog.records if "teacher cache is not filled any further" in r.message]
    assert len(warnings) == 1
    monkeypatch.undo()
    assert list(TeacherCache.open(tmp_path / "cache").check()) == []
    assert_same_weights(result, distill(cached("whole")))


KILLED = {"student": {"network": "tests.distillation.networks:signalled"}}


def run_and_kill(settings, tmp_path, **environment):
    """Run a recipe in a process of its own, resuming where there is something to resume."""
    path = tmp_path / "recipe.json"
    path.write_text(settings.model_dump_json())
    code = (
        "import sys; from fastprune import distill; from fastprune.settings import Recipe;"
        f"distill(Recipe.model_validate_json(open({str(path)!r}).read()), resume=True)"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **environment,
    }
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode


def test_a_filling_run_that_is_killed_ends_as_the_uninterrupted_one(cached, tmp_path):
    elsewhere = {"cache": tmp_path / "other-cache"}
    run = {"checkpoint_every": 3, "log_every": 3}
    settings = cached("killed", **KILLED, run=run)
    for pass_number in (3, 6, 8):
        code = run_and_kill(settings, tmp_path, SMALL_SIGNAL=f"SIGKILL:{pass_number}")
        assert code == -signal.SIGKILL
        assert list(TeacherCache.open(tmp_path / "cache").check()) == []
    killed = distill(settings, resume=True)
    uninterrupted = distill(cached("whole", **KILLED, run=run, teacher=elsewhere))
    assert_same_weights(killed, uninterrupted)
    asked()
    assert_same_weights(killed, distill(cached("replay", **KILLED, run=run)))
    assert asked() == 0
    # What the kills undid was asked again only as far as it was not on the disk.
    assert killed.teacher_forwards <= uninterrupted.teacher_forwards == 160


@pytest.mark.full
def test_filling_runs_that_are_killed_at_random_moments_end_as_the_uninterrupted_one(
    cached, tmp_path
):
    run = {"checkpoint_every": 3, "log_every": 3}
    schedule = {"epochs": 6}
    whole = distill(
        cached("whole", run=run, schedule=schedule, teacher={"cache": tmp_path / "other-cache"})
    )
    rng = np.random.default_rng(0)
    settings = cached("killed", run=run, schedule=schedule)
    path = tmp_path / "recipe.json"
    path.write_text(settings.model_dump_json())
    code = (
        "import sys; from fastprune import distill; from fastprune.settings import Recipe;"
        f"distill(Recipe.model_validate_json(open({str(path)!r}).read()), resume=True)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for _ in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment)
        try:
            process.wait(timeout=rng.uniform(3, 12))
            break  # it was faster than the kill
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if (tmp_path / "cache" / "cache.json").exists():
            assert list(TeacherCache.open(tmp_path / "cache").check()) == []
    if not (tmp_path / "killed" / "result.json").exists():
        distill(settings, resume=True)
    killed = load_file(tmp_path / "killed" / "student.safetensors")
    assert all(np.array_equal(killed[name], value) for name, value in weights(whole).items())
    asked()
    assert_same_weights(whole, distill(cached("replay", run=run, schedule=schedule)))
    assert asked() == 0


def test_a_run_is_not_resumed_with_or_without_a_cache_that_it_had_not(cached, tmp_path):
    settings = cached("run", **KILLED)
    assert run_and_kill(settings, tmp_path, SMALL_SIGNAL="SIGKILL:6") == -signal.SIGKILL
    without = cached("run", **KILLED, teacher={"cache": None, "cache_dtype": None})
    with pytest.raises(RecipeError, match=r"teacher\.cache \(True there, False here\)"):
        distill(without, resume=True)


def test_two_ranks_fill_a_cache_and_train_from_it(cached, tmp_path):
    settings = cached("first", data={"batch_size": 10, "num_workers": 1})
    done = torchrun(settings, tmp_path)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "first" / "result.json").read_text())
    assert (first["teacher_forwards"], first["teacher_forwards_saved"]) == (160, 160)
    cache = TeacherCache.open(tmp_path / "cache")
    assert [len(cache.missing(slot)) for slot in range(2)] == [0, 0]
    assert list(cache.check()) == []
    done = torchrun(cached("second", data={"batch_size": 10, "num_workers": 1}), tmp_path)
    assert done.returncode == 0, done.stderr
    second = json.loads((tmp_path / "second" / "result.json").read_text())
    assert (second["teacher_forwards"], second["teacher_forwards_saved"]) == (0, 320)
    one, other = (
        load_file(tmp_path / name / "student.safetensors") for name in ("first", "second")
    )
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_two_ranks_learn_from_a_cache_what_one_with_twice_the_batch_does(cached, tmp_path):
    def settings(name, processes):
        return cached(
            name,
            data={"batch_size": 20 // processes, "num_workers": 1},
            student={"network": "tests.distillation.networks:frozen"},
        )

    one = distill(settings("one", 1))
    ran = torchrun(settings("two", 2), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    weights_of_two = load_file(tmp_path / "two" / "student.safetensors")
    for name, values in weights(one).items():
        assert weights_of_two[name] == pytest.approx(values, abs=1e-4), name


def test_one_process_reads_what_two_ranks_filled(cached, tmp_path):
    done = torchrun(cached("two", data={"batch_size": 10, "num_workers": 1}), tmp_path)
    assert done.returncode == 0, done.stderr
    result = distill(cached("one"))
    assert asked() == result.teacher_forwards == 0


def test_the_uint8_loss_is_near_that_of_float32(betons):
    """On logits that are shaped as a trained teacher's: one large, a tail, C = 1,000."""
    from fastprune.distillation.losses import distillation_loss

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.7, (256, 1000)).astype(np.float32)
    logits[np.arange(256), rng.integers(0, 1000, 256)] += rng.gamma(9, 1.4, 256)
    student = torch.from_numpy(logits + rng.normal(0, 1, logits.shape).astype(np.float32))
    from fastprune.rows.cache_format import decode, encode

    rounded = decode(encode(logits, np.arange(256), "uint8"))
    losses = [
        distillation_loss(student, torch.from_numpy(teacher), temperature=4.0).mean()
        for teacher in (logits, rounded)
    ]
    assert abs(losses[0] - losses[1]) < 1e-3


def test_a_subset_of_other_images_is_still_refused(cached, betons, tmp_path):
    distill(cached("first", schedule={"epochs": 1}))
    fingerprint = open_beton(betons / "val.beton").fingerprint
    Subset(np.arange(30), fingerprint).save(tmp_path / "subset.npy")
    with pytest.raises(ArtifactMismatch, match=r"subset\.npy was made from"):
        distill(cached("other", data={"subset": tmp_path / "subset.npy"}))
