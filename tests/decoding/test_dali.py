"""The DALI engine on the CPU: the same promise as our own engine's, kept by another decoder."""

import gc
import io
import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastprune.base.errors import BetonError, LoadingError, MissingDependencyError
from fastprune.beton.opening import open_beton
from fastprune.loading.loader import Loader
from tests.conftest import require_library

require_library("dali")


def _loader(path, subset=None, **settings):
    defaults = {
        "batch_size": 4,
        "image_size": 32,
        "augment": "rrc",
        "fields": ("images", "labels", "rows"),
    }
    return Loader(path, subset, **{"backend": "dali", **defaults, **settings})


def _images_by_row(path, subset=None, **settings):
    batches = _loader(path, subset, tail="exact", dtype=torch.uint8, **settings)
    return {
        int(rows[i]): images[i].permute(1, 2, 0).numpy()
        for images, _, rows in batches
        for i in range(len(rows))
    }


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"subset": np.arange(0, 30, 3)},
        {"order": "pages"},
        {"distributed": (1, 2)},
        {"tail": "pad"},
        {"train": False},
    ],
)
def test_both_engines_give_the_same_rows_and_labels_in_the_same_order(bare_beton, settings):
    def epoch(backend):
        loader = _loader(bare_beton, backend=backend, **settings)
        loader.set_epoch(1)
        return [(labels.tolist(), rows.tolist()) for _, labels, rows in loader]

    assert epoch("dali") == epoch("cpu")


@pytest.mark.parametrize("augment", ["rrc", "pad_crop", "center", "none"])
def test_both_engines_show_the_same_part_of_every_image(bare_beton, augment):
    ours = _images_by_row(bare_beton, augment=augment)
    theirs = _images_by_row(bare_beton, augment=augment, backend="cpu")
    differences = [np.abs(ours[row].astype(int) - theirs[row]).mean() for row in range(30)]
    # The decoders differ in how they enlarge chroma. Noise shows it most.
    assert max(differences) < 6
    mirrored = [np.abs(ours[row][:, ::-1].astype(int) - theirs[row]).mean() for row in range(30)]
    assert np.median(mirrored) > 2 * np.median(differences)


def test_pixels_are_those_of_cropping_and_resizing_with_pil(bare_beton):
    beton = open_beton(bare_beton)
    loader = _loader(bare_beton, dtype=torch.uint8, tail="exact")
    for images, _, rows in loader:
        views = loader.views(rows.numpy(), slot=0)
        for image, row, (top, left, height, width, _, _, flip) in zip(
            images, rows, views, strict=True
        ):
            whole = Image.open(io.BytesIO(beton.image_bytes(int(row))))
            box = whole.crop((left, top, left + width, top + height))
            expected = np.asarray(box.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
            expected = expected[:, ::-1] if flip else expected
            assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 1


def test_batches_after_a_resume_are_those_of_the_uninterrupted_run_to_the_bit(bare_beton):
    uninterrupted = _loader(bare_beton, batch_size=2)
    batches = iter(uninterrupted)
    for _ in range(7):
        next(batches)
    resumed = _loader(bare_beton, batch_size=2)
    resumed.load_state_dict(uninterrupted.state_dict())
    rest = list(batches)
    assert len(rest) == 8
    for one, other in zip(rest, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_held_batches_are_not_overwritten(bare_beton):
    loader = _loader(bare_beton, batch_size=2)
    held = list(loader)
    loader.set_epoch(0)
    for kept, fresh in zip(held, loader, strict=True):
        assert torch.equal(kept[0], fresh[0])


def test_two_live_iterators_have_their_own_epochs(bare_beton):
    loader = _loader(bare_beton)
    pairs = [
        (first[2].tolist(), second[2].tolist())
        for first, second in zip(loader, loader, strict=True)
    ]
    loader.set_epoch(0)
    for position in (0, 1):
        assert [pair[position] for pair in pairs] == [rows.tolist() for _, _, rows in loader]


def test_an_undecodable_row_is_named(beton_copy, damage_row):
    damage_row(beton_copy, 13, b"\0\0\0\0")
    batches = iter(_loader(beton_copy, tail="exact", order="sequential"))
    next(batches)
    with pytest.raises(LoadingError, match=r"row 13 of .*copy\.beton .*on_error"):
        list(batches)


@pytest.mark.parametrize(
    ("data", "start", "reason"),
    [
        (b"\0\0\0\0", 0, "does not start with a JPEG's marker"),
        (b"\0" * 700, 2, "cannot be used"),
    ],
)
def test_a_broken_header_never_reaches_dali(
    beton_copy, damage_row, monkeypatch, data, start, reason
):
    """DALI may crash the process on it, when the images are large."""
    from fastprune.decoding.dali import DaliDecoder

    damage_row(beton_copy, 13, data, start)
    monkeypatch.setattr(DaliDecoder, "_examine", None)
    with pytest.raises(LoadingError, match=f"row 13 of .*{reason}"):
        list(_loader(beton_copy, tail="exact"))


@pytest.fixture
def break_tables(damage_row):
    """A function that gives a row Huffman tables that only decoding finds out about."""

    def damage(path, row):
        tables = open_beton(path).image_bytes(row).tobytes().rindex(b"\xff\xc4")
        damage_row(path, row, b"\xff" * 16, tables + 5)

    return damage


def test_a_row_that_only_decoding_finds_broken_is_named(beton_copy, break_tables):
    break_tables(beton_copy, 13)
    batches = iter(_loader(beton_copy, tail="exact", order="sequential"))
    assert [next(batches)[2].tolist() for _ in range(3)][-1] == [8, 9, 10, 11]
    with pytest.raises(LoadingError, match=r"row 13 of .*copy\.beton .*Failed to decode"):
        next(batches)


@pytest.mark.parametrize("damage", ["size", "tables", "header"])
def test_every_epoch_leaves_out_the_same_rows(beton_copy, damage_row, break_tables, damage):
    if damage == "size":
        frame = open_beton(beton_copy).image_bytes(2).tobytes().rindex(b"\xff\xc0")
        damage_row(beton_copy, 2, (160).to_bytes(2), frame + 5)
    elif damage == "tables":
        break_tables(beton_copy, 2)
    else:
        damage_row(beton_copy, 2, b"\0\0\0\0")
    loader = _loader(beton_copy, tail="exact", order="sequential", on_error="skip")
    epochs = [[row for _, _, rows in loader for row in rows.tolist()] for _ in range(3)]
    assert epochs == [[row for row in range(30) if row != 2]] * 3
    assert loader.num_skipped == 3


def test_a_broken_row_is_refused_again_after_its_error(beton_copy, damage_row):
    frame = open_beton(beton_copy).image_bytes(2).tobytes().rindex(b"\xff\xc0")
    damage_row(beton_copy, 2, (160).to_bytes(2), frame + 5)
    loader = _loader(beton_copy, tail="exact")
    for _ in range(2):
        with pytest.raises(LoadingError, match=r"row 2 of .*is not of the size"):
            list(loader)


def test_a_broken_row_that_makes_a_batch_alone_is_left_out(beton_copy, break_tables):
    break_tables(beton_copy, 2)
    loader = _loader(beton_copy, np.array([2]), tail="exact", on_error="skip")
    assert list(loader) == []
    assert loader.num_skipped == 1


def test_a_batch_in_which_every_row_fails_is_no_batch_of_broken_rows(beton_copy, break_tables):
    for row in range(4, 8):
        break_tables(beton_copy, row)
    loader = _loader(beton_copy, tail="exact", order="sequential", on_error="skip")
    with pytest.raises(LoadingError, match=r"DALI failed on .*copy\.beton.*Start the epoch again"):
        list(loader)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory",
        "std::bad_alloc",
        "nvImageCodec failure: '#8'",
        "out of patience",
    ],
)
def test_a_fault_of_the_machine_is_an_error_and_costs_no_row(beton_copy, monkeypatch, text):
    from nvidia.dali.pipeline import Pipeline

    def fail(self, stream=None):
        raise RuntimeError(f"Critical error in pipeline:\nencountered:\n{text}")

    monkeypatch.setattr(Pipeline, "run", fail)
    loader = _loader(beton_copy, tail="exact", on_error="skip")
    with pytest.raises(LoadingError, match=f"DALI failed on .*{text[:8]}.*Start the epoch again"):
        list(loader)
    assert loader.num_skipped == 0
    monkeypatch.undo()
    assert sum(len(rows) for _, _, rows in loader) == 30


def test_a_pipeline_serves_all_epochs_also_after_one_that_was_left(bare_beton, monkeypatch):
    from nvidia.dali.pipeline import Pipeline

    built = []
    build = Pipeline.build
    monkeypatch.setattr(Pipeline, "build", lambda self: (built.append(id(self)), build(self))[1])
    loader = _loader(bare_beton)
    loader.warm_up()
    whole = list(loader)
    next(iter(loader))
    loader.set_epoch(0)
    for one, other in zip(whole, loader, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(set(built)) == 1


def test_undecodable_rows_are_left_out_and_counted_where_asked(beton_copy, damage_row):
    for row in (4, 5, 6, 7, 13):
        damage_row(beton_copy, row, b"\0\0\0\0")
    loader = _loader(beton_copy, order="sequential", tail="exact", on_error="skip")
    assert [rows.tolist() for _, _, rows in loader][:3] == [
        [0, 1, 2, 3],
        [8, 9, 10, 11],
        [12, 14, 15],
    ]
    assert loader.num_skipped == 5


def test_a_changed_row_is_left_out_and_counted_once(tmp_path, damage_row):
    from fastprune.beton.convert.writer import convert
    from tests.images import write_image_folder

    path = tmp_path / "a.beton"
    convert(write_image_folder(tmp_path / "images"), path, workers=1)
    damage_row(path, 9, b"\x01", int(open_beton(path).sizes[9]) // 2)
    damage_row(path, 2, b"\0\0\0\0")
    settings = {"on_error": "skip", "verify_crc": True, "train": False}
    loader = _loader(path, **settings)
    rows = [rows.tolist() for _, _, rows in loader]
    assert rows == [[0, 1, 3], [4, 5, 6, 7], [8, 10, 11]]
    assert loader.num_skipped == 2


def test_a_file_cut_while_it_is_read_is_noticed(beton_copy):
    batches = iter(_loader(beton_copy, batch_size=2))
    next(batches)
    with beton_copy.open("r+b") as file:
        file.truncate(beton_copy.stat().st_size - 8)
    with pytest.raises(LoadingError, match=r"copy\.beton was cut from .* Get a whole copy"):
        list(batches)


def test_raw_rows_are_refused(tmp_path):
    require_library("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "raw.beton"
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    writer = DatasetWriter(str(path), fields, num_workers=1)
    writer.from_indexed_dataset([(np.zeros((8, 8, 3), np.uint8), 0)])
    with pytest.raises(BetonError, match=r'row 0 of .*raw\.beton .*Use backend="cpu"'):
        _loader(path, batch_size=1)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_may_collect_what_its_parent_left(bare_beton):
    """FFCV's writer forks; DALI's threads, which its pipelines wait for, are not in the child."""
    gc.disable()
    try:
        cycle = [_loader(bare_beton)]
        cycle.append(cycle)
        list(cycle[0])
        del cycle
        child = os.fork()
        if child == 0:
            gc.collect()
            os._exit(0)
    finally:
        gc.enable()
    deadline = time.monotonic() + 20
    while not (has_ended := os.waitpid(child, os.WNOHANG)[0] == child):
        time.sleep(0.01)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
    assert has_ended


def test_buffers_are_made_for_an_image_and_not_for_two_outliers(tmp_path):
    from fastprune.beton.convert.writer import convert
    from fastprune.decoding.dali import _large_size
    from tests.images import jpeg_bytes

    sizes = [(20, 20)] * 118 + [(400, 10), (10, 400), (30, 28)]
    images = [(jpeg_bytes(number, width=w, height=h), 0) for number, (w, h) in enumerate(sizes)]
    convert(images, tmp_path / "a.beton", workers=1)
    assert _large_size(open_beton(tmp_path / "a.beton")) == (30, 28)


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ({}, 'nvJPEG, which is not installed.*or use backend="cpu"'),
        ({"nvidia-nvjpeg": "13.2.1", "nvidia-nvimgcodec-cu13": "0.9.0"}, "0.9.0 crashes on JPEG"),
    ],
)
def test_libraries_that_decode_nothing_on_a_gpu_are_refused(monkeypatch, packages, message):
    with pytest.raises(MissingDependencyError, match=message):
        _require_gpu_decoding(monkeypatch, packages)


@pytest.mark.parametrize(("version", "warns"), [("13.1.0", True), ("13.2.0.84", False)])
def test_an_nvjpeg_that_decodes_regions_on_the_cpu_is_reported(monkeypatch, caplog, version, warns):
    packages = {"nvidia-nvjpeg": version, "nvidia-nvimgcodec-cu13": "0.8.0.22"}
    _require_gpu_decoding(monkeypatch, packages)
    assert ("13.2 and newer decode" in caplog.text) == warns


def _require_gpu_decoding(monkeypatch, packages):
    from fastprune.decoding import dali

    found = [SimpleNamespace(name=name, version=version) for name, version in packages.items()]
    monkeypatch.setattr(dali, "distributions", lambda: found)
    monkeypatch.setattr(dali, "find_library", lambda name: None)
    dali._require_gpu_decoding()


def test_a_cuda_device_without_a_number_is_the_current_one(monkeypatch):
    from fastprune.decoding.dali_pipeline import cuda_index

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert cuda_index(torch.device("cuda")) == 3
    assert cuda_index(torch.device("cuda:1")) == 1
    assert cuda_index(torch.device("cpu")) is None


def test_a_copy_does_not_share_memory():
    from fastprune.decoding.dali_pipeline import Copies

    lent = torch.zeros(3)
    owned = Copies().of(lent)
    lent.fill_(1)
    assert not owned.any()
