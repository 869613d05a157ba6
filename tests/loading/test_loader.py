"""The loader's contract, on the CPU engine."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fastprune.base.errors import (
    ArtifactMismatch,
    ContentNotComparedWarning,
    InvalidValueError,
    LoadingError,
    MissingDependencyError,
)
from fastprune.base.provenance import Fingerprint
from fastprune.beton.opening import open_beton
from fastprune.loading.loader import Loader
from fastprune.rows.subset import Subset
from tests.conftest import require_library


def _loader(path, subset=None, **settings):
    defaults = {
        "batch_size": 8,
        "image_size": 32,
        "augment": "rrc",
        "fields": ("images", "labels", "rows"),
    }
    return Loader(path, subset, **{**defaults, **settings})


def _rows(loader):
    return np.concatenate([rows.numpy() for _, _, rows in loader])


def test_batches_are_normalized_channels_last_and_carry_global_rows(bare_beton):
    images, labels, rows = next(iter(_loader(bare_beton, np.arange(1, 30, 2))))
    assert images.shape == (8, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == rows.dtype == torch.int64
    assert (rows % 2 == 1).all()
    assert (labels == rows % 3).all()


def test_two_column_batches_leave_the_rows_out(bare_beton):
    assert len(next(iter(_loader(bare_beton, fields=("images", "labels"))))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalization_is_by_mean_and_std_of_values_up_to_one(bare_beton, dtype):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    settings = {"order": "sequential"}
    images, _, _ = next(iter(_loader(bare_beton, mean=mean, std=std, dtype=dtype, **settings)))
    pixels, _, _ = next(iter(_loader(bare_beton, dtype=torch.uint8, **settings)))
    assert pixels.dtype == torch.uint8
    expected = (pixels / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert images.dtype == dtype
    tolerance = torch.finfo(dtype).eps * 8
    torch.testing.assert_close(images.float(), expected, rtol=tolerance, atol=tolerance)


def test_a_training_epoch_visits_rows_once_and_the_next_one_differs(bare_beton):
    loader = _loader(bare_beton)
    first, second = _rows(loader), _rows(loader)
    assert len(first) == len(np.unique(first)) == 24 == 8 * len(loader)
    assert first.tolist() != second.tolist()


def test_evaluation_visits_every_row_once_in_order(bare_beton):
    loader = _loader(bare_beton, train=False, augment=None)
    assert _rows(loader).tolist() == list(range(30))
    assert len(loader) == 4


def test_a_padded_epoch_says_how_many_rows_it_repeats(bare_beton, caplog):
    with caplog.at_level("INFO", "fastprune"):
        loader = _loader(bare_beton, tail="pad")
    assert "each epoch repeats 2 rows" in caplog.text
    assert len(_rows(loader)) == 32
    assert loader.num_repeated == 2


def test_an_epoch_that_was_named_is_repeated_to_the_bit(bare_beton):
    loader = _loader(bare_beton)
    loader.set_epoch(3)
    first = next(iter(loader))
    loader.set_epoch(3)
    for one, other in zip(first, next(iter(loader)), strict=True):
        assert torch.equal(one, other)


def test_views_depend_on_neither_batch_size_nor_workers_nor_subset(bare_beton):
    def images_by_row(subset=None, **settings):
        batches = _loader(bare_beton, subset, tail="exact", dtype=torch.uint8, seed=4, **settings)
        return {int(rows[i]): images[i] for images, _, rows in batches for i in range(len(rows))}

    plain = images_by_row(num_workers=2)
    other = images_by_row(np.arange(0, 30, 3), batch_size=3, num_workers=1)
    assert sorted(other) == list(range(0, 30, 3))
    assert all(torch.equal(plain[row], image) for row, image in other.items())


def test_views_come_again_after_as_many_epochs_as_there_are_views_but_the_order_does_not(
    bare_beton,
):
    loader = _loader(
        bare_beton, num_views=3, tail="exact", dtype=torch.uint8, transform=v2.RandAugment()
    )
    free = _loader(bare_beton, tail="exact", dtype=torch.uint8, transform=v2.RandAugment())
    epochs, rows = [], []
    for _ in range(5):
        batches = list(loader)
        rows.append(torch.cat([part for _, _, part in batches]))
        epochs.append(torch.cat([images for images, _, _ in batches])[rows[-1].argsort()])
    assert all(torch.equal(epochs[i], epochs[i % 3]) for i in range(5))
    assert not torch.equal(epochs[0], epochs[1])
    assert len({tuple(order.tolist()) for order in rows}) == 5
    for slot in range(3):
        batches = list(free)
        order = torch.cat([part for _, _, part in batches]).argsort()
        assert torch.equal(torch.cat([images for images, _, _ in batches])[order], epochs[slot])
    assert [loader.slot_of(epoch) for epoch in range(5)] == [0, 1, 2, 0, 1]
    assert [free.slot_of(epoch) for epoch in range(5)] == list(range(5))


def test_views_are_asked_for_by_slot(bare_beton):
    loader, rows = _loader(bare_beton, num_views=2), np.arange(30)
    assert not (loader.views(rows, slot=0) == loader.views(rows, slot=1)).all()
    assert (loader.views(rows, slot=5) == _loader(bare_beton).views(rows, slot=5)).all()


def test_held_batches_are_not_overwritten(bare_beton):
    loader = _loader(bare_beton, batch_size=2)
    held = list(loader)
    loader.set_epoch(0)
    for kept, fresh in zip(held, loader, strict=True):
        assert torch.equal(kept[0], fresh[0])


def test_two_live_iterators_have_their_own_epochs(bare_beton):
    loader = _loader(bare_beton)
    rows = [(first[2], second[2]) for first, second in zip(loader, loader, strict=True)]
    first, second = (torch.cat(column).tolist() for column in zip(*rows, strict=True))
    loader.set_epoch(0)
    assert [first, second] == [_rows(loader).tolist(), _rows(loader).tolist()]


def test_an_iterator_that_is_never_advanced_takes_no_epoch(bare_beton):
    loader = _loader(bare_beton)
    iter(loader)
    assert _rows(loader).tolist() == _rows(_loader(bare_beton)).tolist()


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_leaving_early_fifty_times_leaves_nothing_behind(bare_beton, backend):
    if backend == "dali":
        require_library("dali")
    loader = _loader(bare_beton, batch_size=2, image_size=224, backend=backend)

    def leave(times):
        for _ in range(times):
            for _ in loader:
                break
        gc.collect()
        num_files = len(list(Path("/proc/self/fd").iterdir()))
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
        return threading.active_count(), num_files, resident_pages * 4096 / 2**20

    threads, files, resident_mib = leave(10)
    threads_after, files_after, resident_mib_after = leave(50)
    assert (threads_after, files_after) == (threads, files)
    # Fifty abandoned batches with those decoded ahead would be 50 x 5 x 0.3 MiB.
    assert resident_mib_after - resident_mib < 30


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_a_rank_without_rows_has_no_batches(bare_beton, backend):
    if backend == "dali":
        require_library("dali")
    settings = {"tail": "exact", "backend": backend}
    ranks = [_loader(bare_beton, [3, 4], distributed=(rank, 3), **settings) for rank in range(3)]
    assert [len(rank) for rank in ranks] == [1, 1, 0]
    assert [[rows.tolist() for _, _, rows in rank] for rank in ranks] == [[[4]], [[3]], []]


def test_warming_up_takes_no_batch_and_no_epoch_away(bare_beton):
    loader = _loader(bare_beton)
    loader.warm_up()
    fresh = _loader(bare_beton)
    assert _rows(loader).tolist() == _rows(fresh).tolist()


def test_a_single_row_is_a_batch_of_an_exact_tail(bare_beton):
    assert _rows(_loader(bare_beton, [7], tail="exact")).tolist() == [7]


@pytest.mark.parametrize("world", [1, 4])
def test_too_few_rows_for_a_batch_are_refused_rather_than_dropped(bare_beton, world):
    with pytest.raises(InvalidValueError, match=r'7 kept rows .* no batch of 8.*tail="pad"'):
        _loader(bare_beton, np.arange(7), distributed=(0, world))


def test_two_ranks_share_an_exact_epoch(bare_beton):
    ranks = [_rows(_loader(bare_beton, tail="exact", distributed=(rank, 2))) for rank in (0, 1)]
    assert sorted(np.concatenate(ranks)) == list(range(30))


def test_the_rows_of_a_rank_are_contiguous(bare_beton):
    _, _, rows = next(iter(_loader(bare_beton, distributed=(0, 2))))
    assert rows.is_contiguous()


def test_the_working_folder_may_change_after_the_loader_is_made(bare_beton, monkeypatch, tmp_path):
    monkeypatch.chdir(bare_beton.parent)
    loader = _loader(bare_beton.name)
    monkeypatch.chdir(tmp_path)
    assert len(_rows(loader)) == 24


def test_the_dataset_tells_labels_and_classes_of_the_kept_rows(bare_beton):
    loader = _loader(bare_beton, np.arange(0, 30, 2))
    assert len(loader.dataset) == len(loader.rows) == 15
    assert (loader.dataset.targets == loader.rows % 3).all()
    assert loader.dataset.classes == ("0", "1", "2")
    assert loader.num_classes == 3


def test_a_subset_file_of_other_images_is_refused(bare_beton, tmp_path):
    Subset(np.arange(20), Fingerprint(30, "0" * 32)).save(tmp_path / "half.npy")
    with pytest.raises(ArtifactMismatch, match=r"half\.npy was made from .*\n.*fastprune score"):
        _loader(bare_beton, tmp_path / "half.npy")


def test_a_subset_file_of_these_images_is_used(bare_beton, tmp_path):
    subset = Subset(np.arange(20), open_beton(bare_beton).fingerprint)
    subset.save(tmp_path / "half.npy")
    with pytest.warns(ContentNotComparedWarning, match="agree in rows"):
        assert len(_loader(bare_beton, tmp_path / "half.npy").rows) == 20
    with pytest.warns(ContentNotComparedWarning, match="agree in rows"):
        assert len(_loader(bare_beton, subset).rows) == 20


def test_a_bare_index_file_works_with_a_warning(bare_beton, tmp_path):
    np.save(tmp_path / "bare.npy", np.arange(20))
    with pytest.warns(
        ContentNotComparedWarning, match=r"bare\.npy does not name the images .* Keep the \.json"
    ):
        assert len(_loader(bare_beton, tmp_path / "bare.npy").rows) == 20


@pytest.mark.parametrize(
    "rows", [np.arange(20.0), np.ones(30, bool), [3, 2], [1, 1], [29, 30], [-1, 0], []]
)
def test_rows_that_cannot_index_the_beton_are_refused(bare_beton, rows):
    with pytest.raises(InvalidValueError, match="subset"):
        _loader(bare_beton, rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "magic"}, "backend must be one of 'auto', 'cpu', 'dali', not"),
        ({"augment": "cutmix"}, "augment must be one of 'rrc'"),
        ({"order": "chaos"}, "order must be one of 'random'"),
        ({"tail": "wag"}, "tail must be one of 'drop'"),
        ({"fields": ()}, r"fields must be a list of names among 'images', 'labels',.* not \(\)"),
        ({"fields": ("pixels",)}, "fields must be a list of names among 'images', 'labels'"),
        ({"fields": "images"}, "fields must be a list of names among .* not 'images'"),
        ({"dtype": torch.int8}, "dtype must be one of 'float32'"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, not 0"),
        ({"image_size": 1.5}, "image_size must be an integer from 1 to 8,192, not 1.5"),
        ({"num_views": 0}, "num_views must be an integer >= 1, not 0"),
        ({"num_workers": 0}, "num_workers must be an integer from 1 to 1,024, not 0"),
        ({"num_workers": 100_000}, "num_workers must be an integer from 1 to 1,024, not 100000"),
        ({"image_size": 100_000}, "image_size must be an integer from 1 to 8,192, not 100000"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean must be three finite numbers"),
        ({"seed": -1}, "seed must be an integer >= 0, not -1"),
        ({"seed": 2**63}, r"seed must be below 2\*\*63, not 9223372036854775808"),
        ({"mean": (0.5, 0.5)}, r"mean must be three finite numbers.* not \(0.5, 0.5\)"),
        ({"std": [1, 0, 1]}, r"std must be three float32 numbers > 0, not \[1, 0, 1\]"),
        ({"open_pages": 0}, "open_pages must be an integer >= 1, not 0"),
        ({"num_negatives": 0}, "num_negatives must be an integer >= 1, not 0"),
        ({"on_error": "cry"}, "on_error must be one of 'raise', 'skip', not 'cry'"),
        ({"distributed": (2, 2)}, r"distributed must be .* not \(2, 2\)"),
        ({"distributed": "ddp"}, "distributed must be .* not 'ddp'"),
    ],
)
def test_an_argument_outside_its_domain_is_refused(bare_beton, settings, message):
    with pytest.raises(InvalidValueError, match=message):
        _loader(bare_beton, **settings)


def test_a_bare_index_file_may_be_in_any_order(bare_beton, tmp_path):
    np.save(tmp_path / "by_class.npy", np.array([9, 3, 7, 1, 20, 4, 2, 5, 6]))
    with pytest.warns(ContentNotComparedWarning, match="by_class"):
        rows = _loader(bare_beton, tmp_path / "by_class.npy").rows
    assert rows.tolist() == [1, 2, 3, 4, 5, 6, 7, 9, 20]
    np.save(tmp_path / "twice.npy", np.array([9, 3, 9, 1]))
    with pytest.raises(InvalidValueError, match="sorted and unique"):
        _loader(bare_beton, tmp_path / "twice.npy")


@pytest.mark.parametrize("copied", [pickle.loads, copy.deepcopy])
def test_a_copied_loader_gives_the_epochs_that_follow_and_no_copy_of_the_file(bare_beton, copied):
    loader = _loader(bare_beton, np.arange(20), seed=3)
    list(loader)
    loader.set_rows(np.arange(3, 25))
    if copied is pickle.loads:
        other = pickle.loads(pickle.dumps(loader))
        assert len(pickle.dumps(loader)) < 4096
    else:
        other = copied(loader)
    for one, two in zip(loader, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert other.state_dict()["rows"].tolist() == list(range(3, 25))


def test_a_batch_without_a_usable_row_is_an_error_where_other_ranks_would_wait(
    beton_copy, damage_row
):
    for row in (0, 2, 4, 6):
        damage_row(beton_copy, row, b"\0\0\0\0")
    settings = {"batch_size": 4, "order": "sequential", "on_error": "skip"}
    assert len(_rows(_loader(beton_copy, distributed=None, **settings))) == 24
    with pytest.raises(LoadingError, match=r"no row of a batch .* other ranks would wait"):
        list(_loader(beton_copy, distributed=(0, 2), **settings))
    assert len(_rows(_loader(beton_copy, distributed=(1, 2), **settings))) == 12


def test_a_negative_epoch_is_refused(bare_beton):
    with pytest.raises(InvalidValueError, match="epoch must be an integer >= 0, not -1"):
        _loader(bare_beton).set_epoch(-1)


def test_batches_come_where_neither_ffcv_nor_dali_can_be_imported(bare_beton):
    script = f"""
import sys
sys.modules.update(dict.fromkeys(("ffcv", "nvidia", "nvidia.dali")))
from fastprune import Loader
loader = Loader({str(bare_beton)!r}, batch_size=8, image_size=32, device="cpu", fields=("rows",))
print(loader.backend, sum(len(rows) for rows, in loader))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cpu 24\n", "")


@pytest.mark.parametrize(
    ("backend", "modules", "missing", "cure"),
    [
        (
            "dali",
            ["decoding.dali", "decoding.dali_pipeline"],
            "nvidia.dali.fn",
            r"pip install nvidia-dali-cuda130",
        ),
    ],
)
def test_a_missing_engine_is_named_with_its_cure(
    bare_beton, monkeypatch, backend, modules, missing, cure
):
    for module in modules:
        monkeypatch.delitem(sys.modules, f"fastprune.{module}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=cure):
        _loader(bare_beton, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_the_loader_says_which_engine_works(bare_beton, backend):
    if backend != "cpu":
        require_library(backend)
    assert _loader(bare_beton, backend=backend).backend == backend


def test_a_damaged_row_reaches_the_caller(beton_copy, damage_row):
    damage_row(beton_copy, 13, b"\0\0\0\0")
    with pytest.raises(LoadingError, match="row 13 of"):
        list(_loader(beton_copy, tail="exact"))
