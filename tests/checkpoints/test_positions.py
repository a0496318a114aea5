"""Tables of positions at another resolution."""

import numpy as np
import pytest

from keras_paligemma.checkpoints.positions import resample


@pytest.mark.parametrize(
    ("old", "new"), [(2, 5), (5, 2), (4, 4), (3, 7), (4, 1), (1, 3)]
)
def test_resampled_as_the_original_does(old, new):
    """The original calls SciPy's `zoom`."""
    ndimage = pytest.importorskip("scipy.ndimage")
    table = np.random.default_rng(0).normal(size=(2, old * old, 3))
    grid, scale = table.reshape(2, old, old, 3), new / old
    wanted = ndimage.zoom(grid, (1, scale, scale, 1), order=1)
    found = resample(table, new * new)
    np.testing.assert_allclose(found, wanted.reshape(found.shape), atol=1e-12)
    assert resample(table.astype("float16"), new * new).dtype == "float16"


def test_positions_that_are_no_square_are_refused():
    for rows, tokens in ((5, 9), (4, 8)):
        with pytest.raises(ValueError, match=f"{rows} rows to make {tokens}"):
            resample(np.zeros((rows, 2)), tokens)
