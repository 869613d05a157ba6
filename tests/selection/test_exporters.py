import numpy as np
import pytest

from fastprune import convert, open_beton
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.rows.subset import Subset
from fastprune.selection.exporters import export_subset
from fastprune.selection.importers import import_subset
from fastprune.selection.subsets import make_subset
from tests.images import write_image_folder
from tests.selection.tables import score_table


def test_mdslr_folder_loads_as_the_reference_loads_it(tmp_path):
    table = score_table()
    subset = make_subset(table, keep_ratio=0.5, compat="mdslr")
    written = export_subset(subset, tmp_path / "mdslr", "mdslr")
    assert [path.name for path in written] == ["ratio_50.npy", "std.npy"]
    index, std = (np.load(path) for path in written)
    assert (index.dtype, std.dtype, std.shape) == (np.int64, np.float64, (4,))
    assert np.array_equal(index, subset.rows)
    assert np.array_equal(std, table.class_std)


def test_mdslr_folder_that_is_a_file_is_refused(tmp_path):
    subset = make_subset(score_table(), keep_ratio=0.5, compat="mdslr")
    (tmp_path / "mdslr").write_text("")
    with pytest.raises(ArtifactError, match=r"mdslr: File exists\. Name one that can be made"):
        export_subset(subset, tmp_path / "mdslr", "mdslr")


def test_rows_and_dropped_rows_are_all_rows(tmp_path):
    subset = make_subset(score_table(), keep_ratio=0.3)
    export_subset(subset, tmp_path / "kept.txt", "rows")
    export_subset(subset, tmp_path / "dropped.txt", "dropped")
    kept, dropped = (np.loadtxt(tmp_path / f"{n}.txt", dtype=int) for n in ("kept", "dropped"))
    assert np.array_equal(kept, subset.rows)
    assert np.array_equal(np.sort(np.concatenate([kept, dropped])), np.arange(200))


def test_exported_names_are_imported_as_the_same_rows(tmp_path):
    write_image_folder(tmp_path / "images", classes=2, per_class=3)
    convert(tmp_path / "images", tmp_path / "train.beton")
    beton = open_beton(tmp_path / "train.beton")
    export_subset(Subset(np.array([1, 5])), tmp_path / "names.txt", "names", beton=beton)
    assert (tmp_path / "names.txt").read_text() == "class_00/001.jpg\nclass_01/002.jpg\n"
    assert import_subset(tmp_path / "names.txt", beton).rows.tolist() == [1, 5]


def test_names_of_other_images_are_refused(tmp_path):
    subset = make_subset(score_table(), keep_ratio=0.5)
    write_image_folder(tmp_path / "images", classes=2, per_class=3)
    convert(tmp_path / "images", tmp_path / "train.beton")
    beton = open_beton(tmp_path / "train.beton")
    with pytest.raises(ArtifactMismatch, match=r"the subset was made.*train\.beton is.*\nGive the"):
        export_subset(subset, tmp_path / "names.txt", "names", beton=beton)
    with pytest.raises(InvalidValueError, match="holds row 6"):
        export_subset(Subset(np.array([1, 6])), tmp_path / "names.txt", "names", beton=beton)


@pytest.mark.parametrize(
    ("file_format", "message"),
    [
        ("mdsl", "'mdsl' is not known. Did you mean 'mdslr'"),
        ("mdslr", "needs the keep ratio and the class std"),
        ("dropped", "needs the number of rows"),
        ("names", r"needs a beton with a manifest.*--beton"),
    ],
)
def test_format_that_needs_more_than_the_subset_knows_is_refused(tmp_path, file_format, message):
    with pytest.raises(InvalidValueError, match=message):
        export_subset(Subset(np.array([1, 5])), tmp_path / "out", file_format)
