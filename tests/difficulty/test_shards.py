"""What is measured of a folder of shards is what is measured of the single beton."""

import numpy as np
import pytest

from fastprune import convert, open_beton, score, select_rows
from fastprune.distillation.evaluation import evaluate_checkpoint
from fastprune.networks import build_network, save_weights
from tests.difficulty.betons import small_teacher
from tests.images import write_image_folder

SIDE = 32


@pytest.fixture(scope="module")
def betons(tmp_path_factory):
    root = tmp_path_factory.mktemp("betons")
    images = write_image_folder(root / "images", classes=3, per_class=5)
    convert(images, root / "one.beton")
    convert(images, root / "many", shards=4)
    return root / "one.beton", root / "many"


def test_scores_and_selected_rows_are_the_single_betons(betons, tmp_path):
    options = {"image_size": SIDE, "batch_size": 4, "num_workers": 1}
    tables = [
        score(beton, small_teacher(), tmp_path / f"{number}.parquet", **options)
        for number, beton in enumerate(betons)
    ]
    one, many = tables
    assert many.fingerprint == one.fingerprint
    for name in one.metrics:
        assert np.array_equal(many.metrics[name], one.metrics[name]), name
    kept = [
        select_rows(table.metrics["centroid"], table.labels, keep_ratio=0.5) for table in tables
    ]
    assert np.array_equal(*kept)


def test_accuracy_is_the_single_betons(betons, tmp_path):
    save_weights(build_network("resnet8x4", num_classes=3), tmp_path / "student.safetensors")
    one, many = (
        evaluate_checkpoint(
            tmp_path / "student.safetensors", beton, network="resnet8x4", image_size=SIDE
        )
        for beton in betons
    )
    assert one == many
    assert open_beton(betons[1]).num_rows == 15
