import numpy as np
from PIL import Image

from fastprune.demo.pictures import CLASS_NAMES, WRONG_LABEL_SHARE, draw_picture, write_demo_images


def read_all(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.jpg"))}


def test_every_class_gets_its_pictures_in_both_splits(tmp_path):
    write_demo_images(tmp_path, train_per_class=3, val_per_class=2, seed=0)
    assert {p.name for p in (tmp_path / "train").iterdir()} == set(CLASS_NAMES)
    assert all(len(list(p.iterdir())) == 3 for p in (tmp_path / "train").iterdir())
    assert all(len(list(p.iterdir())) == 2 for p in (tmp_path / "val").iterdir())
    with Image.open(tmp_path / "val" / "star" / "00001.jpg") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_same_seed_draws_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo_images(tmp_path / name, train_per_class=2, val_per_class=1, seed=seed)
    first, second, other = (read_all(tmp_path / name) for name in "abc")
    assert first == second
    assert all(first[name] != other[name] for name in first)


def test_train_and_val_share_no_picture(tmp_path):
    write_demo_images(tmp_path, train_per_class=4, val_per_class=4, seed=0)
    pictures = list(read_all(tmp_path).values())
    assert len(set(pictures)) == len(pictures)


def test_pictures_differ_in_difficulty():
    """The noise, which rises with difficulty, spreads widely over a class."""
    generator = np.random.default_rng(0)
    noise = [
        np.abs(np.diff(np.asarray(draw_picture(0, generator), dtype=float)[:6], axis=1)).mean()
        for _ in range(40)
    ]
    assert np.quantile(noise, 0.9) > 2 * np.quantile(noise, 0.1)


def test_a_few_training_labels_are_wrong_by_design():
    assert 0 < WRONG_LABEL_SHARE < 0.1
