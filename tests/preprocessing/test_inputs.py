import keras
import numpy as np
import pytest

from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.inputs import to_strings


def test_numbers_and_tensors_become_arrays():
    for x in ([[1, 2]], np.array([[1, 2]]), keras.ops.array([[1, 2]])):
        array = to_numpy(x)
        assert type(array) is np.ndarray and array.tolist() == [[1, 2]]


# Keras itself warns on Torch, where bfloat16 has no way to NumPy of its own.
@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")
def test_bfloat16_tensors_become_arrays():
    array = to_numpy(keras.ops.convert_to_tensor([1, 2], "bfloat16"))
    assert array.tolist() == [1, 2]


def test_tensors_of_tensorflow_work_on_every_backend():
    tf = pytest.importorskip("tensorflow")
    assert to_numpy(tf.constant([1, 2])).tolist() == [1, 2]
    assert to_strings(tf.constant(["東", "b"]), "x") == (["東", "b"], True)
    assert to_strings(tf.constant("東"), "x") == (["東"], False)


def test_symbolic_tensors_are_an_error():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices([1, 2])
    with pytest.raises(ValueError, match="not in a TensorFlow graph"):
        data.map(to_numpy)


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ("a", (["a"], False)),
        ("東".encode(), (["東"], False)),
        (["a", b"b"], (["a", "b"], True)),
        (("a",), (["a"], True)),
        (np.array("a"), (["a"], False)),
        (np.array(["a", "b"]), (["a", "b"], True)),
        (np.array([b"a", "b"], object), (["a", "b"], True)),
        ([np.str_("a")], (["a"], True)),
        ("", ([""], False)),
    ],
)
def test_text(x, expected):
    assert to_strings(x, "prompts") == expected


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "`prompts` is empty"),
        (3, "`prompts` holds something that is not text.*int at index 0"),
        (["a", None], "not text.*NoneType at index 1"),
        ([["a"]], "not text.*list at index 0"),
        (["a", b"\xff"], "not UTF-8.*at index 1"),
    ],
)
def test_what_is_no_text_is_an_error(x, message):
    with pytest.raises(ValueError, match=message):
        to_strings(x, "prompts")
