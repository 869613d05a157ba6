"""The page's way to FiftyOne, run on objects with the methods of its datasets and views."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fastprune import ScoreTable, Subset, convert, open_beton
from tests.images import write_image_folder

PAGE = Path(__file__).parents[2] / "docs" / "drop-in.md"


class Samples:
    """`values` and `set_values`, as of `fiftyone.Dataset` and its views."""

    def __init__(self, paths):
        self.fields = {"filepath": list(map(str, paths))}

    def values(self, field):
        return self.fields[field]

    def set_values(self, field, values):
        assert len(values) == len(self.fields["filepath"])
        self.fields[field] = values


def test_scores_become_fields_and_a_view_becomes_a_subset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images", classes=2, per_class=3)
    convert("images", "train.beton")
    beton = open_beton("train.beton")
    ScoreTable(
        labels=beton.labels,
        metrics={"centroid": np.arange(6, dtype=np.float32)},
        predictions=beton.labels,
        class_std=np.array([1.0, 2.0]),
        class_counts=np.array([3, 3]),
        fingerprint=beton.fingerprint,
    ).save("scores.parquet")
    files = sorted((tmp_path / "images").rglob("*.jpg"))[::-1]
    dataset, view = Samples(files), Samples([files[0], files[4]])
    section = PAGE.read_text().partition("## FiftyOne\n")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S)
    exec(code, {"dataset": dataset, "session": SimpleNamespace(view=view)})
    assert dataset.fields["row"] == [5, 4, 3, 2, 1, 0]
    assert dataset.fields["centroid"] == [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    chosen = Subset.load("chosen.npy")
    assert chosen.rows.tolist() == [1, 5]
    assert chosen.fingerprint == beton.fingerprint
    assert chosen.class_std.tolist() == [1.0, 2.0]
