import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastprune import convert, open_beton
from fastprune.base.errors import ArtifactError, ArtifactMismatch, InvalidValueError
from fastprune.beton.check import write_missing_manifest
from fastprune.rows.score_table import ScoreTable
from fastprune.rows.subset import Subset
from fastprune.selection.exporters import export_subset
from fastprune.selection.importers import import_scores, import_subset
from fastprune.selection.subsets import make_subset
from tests.images import write_image_folder
from tests.selection.tables import score_table


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    """Two classes with four images each; the names of the images repeat between the classes."""
    folder = tmp_path_factory.mktemp("beton")
    write_image_folder(folder / "images", classes=2, per_class=4)
    (folder / "images/class_01/003.jpg").rename(folder / "images/class_01/only_here.jpg")
    convert(folder / "images", folder / "train.beton")
    return open_beton(folder / "train.beton")


def write(path, content):
    """The content in the format that the name says."""
    if path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("\n".join(map(str, content)) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ratio_50.npy", [6, 1, 2, 5]),
        ("rows.txt", [6, 1, 2, 5]),
        ("rows.json", [6, 1, 2, 5]),
        ("deepcore.json", {"indices": [6, 1, 2, 5], "scores": [0.1, 0.2, 0.3, 0.4]}),
        ("deepcore.npz", {"indices": [6, 1, 2, 5], "scores": [0.1, 0.2, 0.3, 0.4]}),
        ("names.txt", [f"class_0{c}/00{i}.jpg" for c, i in ((1, 2), (0, 1), (0, 2), (1, 1))]),
        ("names.json", [f"class_0{c}/00{i}.jpg" for c, i in ((1, 2), (0, 1), (0, 2), (1, 1))]),
    ],
)
def test_kept_rows_are_read_from_every_format_in_any_order(beton, tmp_path, name, content):
    subset = import_subset(write(tmp_path / name, content), beton, command="import")
    assert subset.rows.tolist() == [1, 2, 5, 6]
    assert subset.class_counts == [2, 2]
    assert subset.keep_ratio == 0.5
    assert subset.fingerprint == beton.fingerprint
    assert subset.parameters["imported_from"] == name


def test_unique_last_part_of_a_name_is_enough(beton, tmp_path):
    subset = import_subset(write(tmp_path / "names.txt", ["only_here.jpg"]), beton)
    assert subset.rows.tolist() == [7]


def test_drop_list_keeps_the_others(beton, tmp_path):
    subset = import_subset(write(tmp_path / "dropped.npy", [0, 7, 3]), beton, drop=True)
    assert subset.rows.tolist() == [1, 2, 4, 5, 6]


def test_class_std_of_mdslr_comes_along(beton, tmp_path):
    rows, std = write(tmp_path / "ratio_50.npy", [1, 5]), write(tmp_path / "std.npy", [0.5, 2.0])
    assert import_subset(rows, beton, class_std=std).class_std.tolist() == [0.5, 2.0]
    with pytest.raises(InvalidValueError, match=r"std\.npy must hold 2 numbers, one per class"):
        import_subset(rows, beton, class_std=write(tmp_path / "std.npy", [1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([0, 8], "lists row 8, but .* has rows 0 to 7.*other images"),
        ([0, -1], "lists row -1, but"),
        ([3, 1, 3], "lists row 3 more than once"),
        ([0.5], "must list rows or file names, but it lists float64"),
        ([[0, 1]], r"it lists int64 of shape \(1, 2\)"),
        ([], "leaves no rows"),
        (["class_00/000.jpg", "class_00/9.jpg"], "no image of .* called 'class_00/9.jpg'.*such as"),
        (["000.jpg"], "2 images are called '000.jpg'. Add their folder"),
    ],
)
def test_list_that_does_not_fit_the_beton_is_refused(beton, tmp_path, content, message):
    with pytest.raises(InvalidValueError, match=message):
        import_subset(write(tmp_path / "list.json", content), beton)


def test_names_need_a_manifest(tmp_path):
    write_image_folder(tmp_path / "images", classes=2, per_class=1)
    convert(tmp_path / "images", tmp_path / "train.beton")
    (tmp_path / "train.beton.manifest.parquet").unlink()
    with pytest.raises(InvalidValueError, match=r"without a manifest .*or list rows"):
        import_subset(write(tmp_path / "n.txt", ["a.jpg"]), open_beton(tmp_path / "train.beton"))


def test_names_need_a_manifest_that_tells_them(beton, tmp_path):
    shutil.copy(beton.path, tmp_path / "found.beton")
    write_missing_manifest(tmp_path / "found.beton")
    found = open_beton(tmp_path / "found.beton")
    with pytest.raises(InvalidValueError, match=r"manifest of .* has none.*List rows"):
        import_subset(write(tmp_path / "n.txt", ["a.jpg"]), found)
    with pytest.raises(InvalidValueError, match=r"has no file names.*--format rows"):
        export_subset(Subset(np.array([1])), tmp_path / "out.txt", "names", beton=found)


def test_damaged_lists_are_named(beton, tmp_path):
    write(tmp_path / "list.npz", {"indices": [1, 2]})
    (tmp_path / "list.npz").write_bytes((tmp_path / "list.npz").read_bytes()[:100])
    write(tmp_path / "archive.npz", {"indices": [1, 2]}).rename(tmp_path / "list.npy")
    (tmp_path / "list.json").write_text("[[1], [1, 2]]")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("list.npz", "list.npy", "list.json", "empty.npy"):
        with pytest.raises(ArtifactError, match=rf"{name} cannot be read as"):
            import_subset(tmp_path / name, beton)
    with pytest.raises(ArtifactError, match=r"empty\.npy cannot be read as a \.npy file"):
        import_scores(tmp_path / "empty.npy", beton)


def test_pickle_is_never_read(beton, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    (tmp_path / "dropped.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ArtifactError, match=r"pickles and PyTorch files are not.*np\.save"):
        import_subset(tmp_path / "dropped.bin", beton)
    np.save(tmp_path / "rows.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"rows\.npy cannot be read as a \.npy file"):
        import_subset(tmp_path / "rows.npy", beton)


@pytest.mark.parametrize("name", ["list.json", "list.npz", "list.txt"])
def test_list_that_is_not_there_is_named(beton, tmp_path, name):
    with pytest.raises(ArtifactError, match=f"{name} cannot be read as a list"):
        import_subset(tmp_path / name, beton)


def test_scores_in_npy_become_the_metric_of_the_files_name(beton, tmp_path):
    table = import_scores(write(tmp_path / "forgetting.npy", np.arange(8)), beton)
    assert table.metric("forgetting").tolist() == list(range(8))
    subset = make_subset(table, keep_ratio=0.5, strategy="hard")
    assert (subset.metric, subset.rows.tolist()) == ("forgetting", [2, 3, 6, 7])
    assert subset.class_std is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_scores_in_columns_are_put_in_row_order(beton, tmp_path, suffix):
    order = [3, 0, 2, 1, 7, 6, 5, 4]
    columns = {"row": order, "aum": [10.0 * row for row in order], "name": ["x"] * 8}
    path = tmp_path / f"scores{suffix}"
    if suffix == ".csv":
        lines = [",".join(map(str, line)) for line in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(["row,aum,name", *lines]))
    else:
        pq.write_table(pa.table(columns), path)
    table = import_scores(path, beton)
    assert list(table.metrics) == ["aum"]
    assert table.metric("aum").tolist() == [0, 10, 20, 30, 40, 50, 60, 70]


def test_scores_that_do_not_fit_the_beton_are_refused(beton, tmp_path):
    with pytest.raises(InvalidValueError, match=r"shape \(7,\) for 'aum'.*has 8 rows"):
        import_scores(write(tmp_path / "aum.npy", np.arange(7)), beton)
    (tmp_path / "twice.csv").write_text("row,aum\n0,1\n0,2\n")
    with pytest.raises(InvalidValueError, match="column row must hold 0 to 1, each once"):
        import_scores(tmp_path / "twice.csv", beton)
    (tmp_path / "texts.csv").write_text("row,name\n0,a\n")
    with pytest.raises(ArtifactError, match=r"no column of numbers.*found: row, name"):
        import_scores(tmp_path / "texts.csv", beton)
    with pytest.raises(ArtifactError, match=r"from \.npy, \.csv or \.parquet files alone"):
        import_scores(tmp_path / "scores.pkl", beton)
    (tmp_path / "no.parquet").write_text("no Parquet")
    with pytest.raises(ArtifactError, match=r"no\.parquet cannot be read as parquet"):
        import_scores(tmp_path / "no.parquet", beton)


def test_score_table_is_taken_as_it_is_if_it_is_of_the_beton(beton, tmp_path):
    table = ScoreTable(
        labels=beton.labels.copy(),
        metrics={"loss": np.arange(8, dtype=np.float32)},
        predictions=np.zeros(8, np.int64),
        class_std=np.array([1.0, 2.0]),
        class_counts=np.array([4, 4]),
        fingerprint=beton.fingerprint,
    )
    table.save(tmp_path / "scores.parquet")
    assert import_scores(tmp_path / "scores.parquet", beton).class_std.tolist() == [1, 2]
    score_table().save(tmp_path / "others.parquet")
    with pytest.raises(ArtifactMismatch, match=r"others\.parquet was made.*\n.*fastprune score"):
        import_scores(tmp_path / "others.parquet", beton)


def test_row_without_a_score_may_be_excluded_and_is_named_by_its_own_number(beton, tmp_path):
    scores = np.arange(8.0)
    scores[[2, 5]] = np.nan
    table = import_scores(write(tmp_path / "aum.npy", scores), beton)
    with pytest.raises(InvalidValueError, match=r"score of row 5 is nan.*--exclude"):
        make_subset(table, keep_ratio=0.5, exclude=[2])
    assert len(make_subset(table, keep_ratio=0.5, exclude=[2, 5]).rows) == 3


@pytest.mark.parametrize(
    "values",
    [
        np.array(list("abcdefgh")),
        np.zeros(8, "datetime64[s]"),
        np.zeros(8, complex),
        np.zeros(8, [("loss", "f4")]),
    ],
)
def test_scores_that_are_no_numbers_are_refused(beton, tmp_path, values):
    np.save(tmp_path / "aum.npy", values)
    with pytest.raises(InvalidValueError, match=r"aum\.npy holds .* for 'aum', but scores are"):
        import_scores(tmp_path / "aum.npy", beton)


def test_columns_of_one_name_are_refused(beton, tmp_path):
    lines = ["loss,loss", *(f"{i},{i}" for i in range(8))]
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    with pytest.raises(ArtifactError, match=r"several columns called 'loss'\. Rename"):
        import_scores(tmp_path / "scores.csv", beton)
