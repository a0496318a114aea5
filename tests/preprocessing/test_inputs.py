import keras
import numpy as np
import pytest

from keras_paligemma.preprocessing.inputs import check_dictionary
from keras_paligemma.preprocessing.inputs import plain_prompts
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.inputs import to_strings


def test_numbers_and_tensors_become_arrays():
    for x in ([[1, 2]], np.array([[1, 2]]), keras.ops.array([[1, 2]])):
        array = to_numpy(x)
        assert type(array) is np.ndarray and array.tolist() == [[1, 2]]


# Keras itself warns on Torch, where bfloat16 tensors cannot convert to NumPy.
@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")
def test_bfloat16_tensors_become_arrays():
    array = to_numpy(keras.ops.convert_to_tensor([1, 2], "bfloat16"))
    assert array.tolist() == [1, 2]


def test_tensors_of_torch_work_on_every_backend():
    torch = pytest.importorskip("torch")
    for options in ({"dtype": torch.bfloat16}, {"requires_grad": True}):
        found = to_numpy(torch.full((2, 3), 7.0, **options))
        np.testing.assert_array_equal(found, np.full((2, 3), 7, "float32"))
        assert found.dtype == "float32"


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
        (["a", "b\ud800"], r"'\\ud800' at character 1 of .* at index 1"),
    ],
)
def test_what_is_no_text_is_an_error(x, message):
    with pytest.raises(ValueError, match=message):
        to_strings(x, "prompts")


@pytest.mark.parametrize(
    "typed",
    [
        "<image>detect cat",
        "<image> detect cat\n",
        "<image><image>\n<bos>detect cat",
        " <bos> detect cat",
    ],
)
def test_what_the_layout_adds_is_dropped_with_one_warning(typed):
    with pytest.warns(UserWarning, match="begins with <image> or <bos>") as all:
        assert plain_prompts([typed, typed, "ocr"]) == ["detect cat"] * 2 + [
            "ocr"
        ]
    assert len(all) == 1


def test_text_is_left_as_it_is():
    texts = ["  two  blanks ", "<imag> <b>", "< image>", "<loc0001> é", ""]
    assert plain_prompts(texts) == texts


@pytest.mark.parametrize(
    ("prompt", "place"),
    [
        ("a <image>", "<image> at character 2"),
        ("<image>é <bos>", "<bos> at character 9"),
        ("<eos>", "<eos> at character 0"),
        ("<image><eos>", "<eos> at character 7"),
    ],
)
def test_special_tokens_elsewhere_are_told(prompt, place):
    with pytest.raises(ValueError, match=f"{place} of .* at index 1"):
        plain_prompts(["fine", prompt])


@pytest.mark.parametrize(
    "x",
    [
        [2.0, 7.0],
        np.array([2, 7], "int64"),
        keras.ops.convert_to_tensor([2, 7], "int32"),
    ],
)
def test_ids_are_int32(x):
    ids = to_ids(x, "ids", 8)
    assert ids.dtype == np.int32 and ids.tolist() == [2, 7]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([2, 8], r"`ids` holds what is no .*0…7. Received: 8 at index \(1,\)"),
        ([[2], [-1]], r"Received: -1 at index \(1, 0\)"),
        ([2, 2.5], "whole numbers.*Received: 2.5"),
        ([np.nan, 2], "Received: nan"),
        ([[1, 2], [3]], "rows of one length"),
        ("cat", "not made of token ids.*Received: 'cat'"),
        (["2"], "Received: '2'"),
        ([True], "Received: True"),
        (None, "Received: None"),
    ],
)
def test_what_is_no_id_is_an_error(x, message):
    with pytest.raises(ValueError, match=message):
        to_ids(x, "ids", 8)


@pytest.mark.parametrize("x", [0, 9, -1, 1.5, 2.0, True, "3", None, [3]])
def test_lengths_are_integers_in_a_range(x):
    assert to_integer(np.int64(8), "length", most=8) == 8
    with pytest.raises(ValueError, match="`length` .*integer of 1 to 8. Rec"):
        to_integer(x, "length", most=8)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ("caption en", "Received: str 'caption en'"),
        (["caption en"], "Received: list.$"),
        ([{"prompts": "a"}], r"Received: list. One dictionary of lists: \{key"),
        (None, "Received: NoneType"),
    ],
)
def test_inputs_are_one_dictionary(x, message):
    with pytest.raises(ValueError, match=message):
        check_dictionary(x)
