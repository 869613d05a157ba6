"""The MDSLR reference's selection, written plainly from its description, against ours."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.selection.strategies import select_rows

RATIOS = (0.3, 0.4, 0.5, 0.7)


def reference(scores, labels, keep_ratio):
    num_classes = max(labels) + 1
    per_class = int(len(scores) / num_classes * keep_ratio)
    chosen = []
    for label in range(num_classes):
        members = [row for row in range(len(scores)) if labels[row] == label]
        if per_class >= len(members):
            chosen += members
            continue
        ascending = sorted(members, key=lambda row: (scores[row], row))
        middle, half = int(len(members) / 2), int(per_class / 2)
        chosen += ascending[middle : middle + half]
        chosen += ascending[middle - (per_class - half) : middle]
    return sorted(chosen)


def ours(scores, labels, keep_ratio):
    return select_rows(scores, labels, keep_ratio=keep_ratio, compat="mdslr").tolist()


@pytest.mark.parametrize("keep_ratio", RATIOS)
@pytest.mark.parametrize("class_sizes", [[50] * 8, [51] * 8, [10, 90, 33, 1, 70], [3, 0, 200, 2]])
def test_rows_are_the_references(keep_ratio, class_sizes):
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.repeat(np.arange(len(class_sizes)), class_sizes)).tolist()
    scores = generator.exponential(size=len(labels)).tolist()
    assert ours(scores, labels, keep_ratio) == reference(scores, labels, keep_ratio)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=80),
    st.sampled_from(RATIOS) | st.floats(0.01, 1),
)
def test_rows_are_the_references_for_any_small_classes_and_ties(rows, keep_ratio):
    labels, scores = [label for label, _ in rows], [score for _, score in rows]
    assert ours(scores, labels, keep_ratio) == reference(scores, labels, keep_ratio)


@pytest.mark.parametrize(("keep_ratio", "kept"), [(0.3, 384), (0.4, 512), (0.5, 640), (0.7, 896)])
def test_imagenet_keeps_what_the_reference_keeps(keep_ratio, kept):
    # As ImageNet: 1,281,167 images, 732 to 1,300 in a class.
    class_sizes = np.array([732] * 33 + [1211] + [1300] * 966)
    labels = np.repeat(np.arange(1000), class_sizes)
    scores = np.random.default_rng(0).random(len(labels))
    rows = select_rows(scores, labels, keep_ratio=keep_ratio, compat="mdslr")
    assert len(labels) == 1_281_167
    counts = np.bincount(labels[rows])
    assert np.array_equal(counts, np.minimum(class_sizes, kept))
    if keep_ratio == 0.5:
        assert len(rows) == 640_000
