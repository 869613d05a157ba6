import numpy as np
import pytest

from fastprune import Loader
from fastprune.base.errors import ContentNotComparedWarning
from fastprune.base.provenance import Fingerprint
from fastprune.base.provenance import require_same_images as compare
from tests.difficulty.betons import small_beton


def test_a_warning_points_at_the_callers_line_however_deep_it_is_raised(tmp_path):
    beton = small_beton(tmp_path)
    np.save(tmp_path / "bare.npy", np.arange(20))
    with pytest.warns(ContentNotComparedWarning) as deep:
        Loader(beton, tmp_path / "bare.npy", batch_size=4, device="cpu")
    images = Fingerprint(3, "0" * 32)
    with pytest.warns(ContentNotComparedWarning) as direct:
        compare(images, "a.npy", images, "a.beton", cure="")
    assert [warning.filename for warning in (*deep, *direct)] == [__file__, __file__]
