"""The int8 cache: rounding, attention to it, and answers with it."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma.layers import attention
from keras_paligemma.layers.cache import Int8Heads
from keras_paligemma.layers.cache import empty_heads
from keras_paligemma.layers.cache import read_cache
from keras_paligemma.layers.cache import to_int8
from keras_paligemma.layers.cache import write_cache


def to_float(heads):
    """Return keys or values without rounding them again."""
    codes, scales = (ops.convert_to_numpy(array) for array in heads)
    return codes.astype("float32") * scales


def test_rounding_is_within_half_a_step():
    heads = np.random.default_rng(0).normal(size=(2, 5, 3, 8)) * 7
    heads[1, 2] = 0
    found = to_int8(ops.convert_to_tensor(heads, "float32"))
    assert keras.backend.standardize_dtype(found.codes.dtype) == "int8"
    scales = ops.convert_to_numpy(found.scales)
    largest = np.abs(heads).max(axis=-1, keepdims=True)
    np.testing.assert_allclose(scales, largest / 127, rtol=1e-6, atol=1e-30)
    error = np.abs(to_float(found) - heads)
    assert (error <= scales * 0.5001).all()
    assert not to_float(found)[1, 2].any()


@pytest.mark.parametrize("layer", [None, 1], ids=["unrolled", "scanned"])
def test_attention_reads_the_rounded_heads(layer):
    rng = np.random.default_rng(1)
    query, keys, values = (
        rng.normal(size=shape).astype("float32")
        for shape in ((2, 1, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8))
    )
    seen = rng.random((2, 1, 6)) < 0.7
    seen[:, :, 0] = True
    shape = (2, 6, 2, 8) if layer is None else (2, 3, 6, 2, 8)
    cache = empty_heads(shape, "int8"), empty_heads(shape, "int8"), layer
    # Two writes: a prompt of four tokens, and then two more tokens.
    for start, stop in ((0, 4), (4, 6)):
        new = [ops.array(array[:, start:stop]) for array in (keys, values)]
        cache = write_cache(cache, *new, start)
    heads = read_cache(cache)
    found = attention.attend(ops.array(query), *heads, ops.array(seen), 20.0)
    assert all(isinstance(each, Int8Heads) for each in heads)
    wanted = attention.attend(
        ops.array(query),
        *(ops.array(to_float(each)) for each in heads),
        ops.array(seen),
        20.0,
    )
    found, wanted = (ops.convert_to_numpy(each) for each in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    rounded = to_float(to_int8(ops.array(keys)))
    np.testing.assert_allclose(to_float(heads[0]), rounded, rtol=0, atol=1e-6)


def rounding(write):
    """Return `write_cache` for a float cache that receives rounded values."""

    def write_rounded(cache, key_BTKH, value_BTKH, index):
        rounded = []
        for heads in (key_BTKH, value_BTKH):
            codes, scales = to_int8(heads)
            rounded.append(ops.cast(codes, "float32") * scales)
        return write(cache, *rounded, index)

    return write_rounded


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("scanned", {}),
        ("scanned", {"beams": 2}),
        ("unrolled", {"temperature": 1.2, "seed": 4, "num_samples": 2}),
    ],
    ids=["greedy", "beams", "samples"],
)
def test_answers_are_those_of_a_rounded_cache(
    tiny_model, examples, monkeypatch, form, options
):
    inputs = {key: examples[key] for key in ("images", "prompts")}

    def answers(model, **options):
        found = model.generate(
            inputs, stop_token_ids=None, details=True, **options
        )
        found = [row if isinstance(row, list) else [row] for row in found]
        rows = [answer for row in found for answer in row]
        return (
            np.array([answer.token_ids for answer in rows]),
            np.array([answer.log_probabilities for answer in rows]),
        )

    model = tiny_model(form=form)
    ids, numbers = answers(model, cache_dtype="int8", **options)
    _, full = answers(model, **options)
    monkeypatch.setattr(
        attention, "write_cache", rounding(attention.write_cache)
    )
    model.generate_function = None
    wanted_ids, wanted = answers(model, **options)
    np.testing.assert_array_equal(ids, wanted_ids)
    away = np.abs(numbers - wanted)
    # The last bit of a sum differs between two programs, and decides how a
    # value halfway between two codes is rounded. It changes the later tokens of
    # its row: of four rows, one may have such a value.
    assert np.mean(away < 1e-5) >= 0.75
    assert away.max() < 2e-4
    assert np.median(np.abs(numbers - full)) > 5e-4


def test_a_prefix_is_continued_in_int8(tiny_model, examples):
    model = tiny_model()
    inputs = {key: examples[key] for key in ("images", "prompts")}
    options = {"cache_dtype": "int8", "details": True, "stop_token_ids": None}
    whole = model.generate(inputs, **options)
    prefix = model.prefill(inputs)
    found = model.generate({"prefix": prefix}, **options)
    for one, other in zip(whole, found, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(
            one.log_probabilities, other.log_probabilities, rtol=0, atol=1e-5
        )
    pieces = zip(
        *model.stream(
            {"prefix": prefix}, stop_token_ids=None, cache_dtype="int8"
        ),
        strict=True,
    )
    assert ["".join(row) for row in pieces] == [a.text for a in found]


@pytest.mark.parametrize("dtype", ["int4", "bfloat16", 8])
def test_other_dtypes_are_refused(tiny_model, examples, dtype):
    inputs = {key: examples[key] for key in ("images", "prompts")}
    with pytest.raises(ValueError, match="Expected: one of .*'int8'"):
        tiny_model().generate(inputs, cache_dtype=dtype)
