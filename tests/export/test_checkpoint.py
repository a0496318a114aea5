"""Writing values to the files of a SavedModel, part by part."""

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")

KEYS = [f"weights/{number}/.ATTRIBUTES/VARIABLE_VALUE" for number in range(3)]
VALUES = [
    np.arange(6, dtype="float32").reshape(2, 3),
    np.arange(4, dtype="int8"),
    np.float32(7),
]


@pytest.fixture
def prefix(tmp_path):
    """Return the variables of a SavedModel that have no size."""
    module = tf.Module()
    module.weights = [
        tf.Variable(
            tf.zeros([0] * value.ndim, value.dtype), shape=[None] * value.ndim
        )
        for value in VALUES
    ]
    module.read = tf.function(lambda: list(module.weights), input_signature=[])
    tf.saved_model.save(module, str(tmp_path / "served"))
    return str(tmp_path / "served" / "variables" / "variables")


@pytest.mark.parametrize(("part", "shards"), [(1, 3), (5, 2), (1000, 1)])
def test_values_are_written_in_parts(prefix, tmp_path, part, shards):
    from keras_paligemma.export import checkpoint

    seen = []

    def values():
        for pair in reversed([*zip(KEYS, VALUES, strict=True)]):
            # When the next value is made, the previous one is on disk.
            seen.append(len(list((tmp_path / "served/variables").iterdir())))
            yield pair

    checkpoint.write(prefix, values(), part)
    data = list((tmp_path / "served" / "variables").glob("*.data*"))
    assert len(data) == shards
    if part == 1:
        assert seen == [0, 2, 4]
    loaded = tf.saved_model.load(str(tmp_path / "served"))
    for found, value in zip(loaded.read(), VALUES, strict=True):
        np.testing.assert_array_equal(found, value)


def test_all_values_are_asked_for(prefix):
    from keras_paligemma.export import checkpoint

    with pytest.raises(ValueError, match="weights/2"):
        checkpoint.write(prefix, zip(KEYS[:2], VALUES[:2], strict=True))
