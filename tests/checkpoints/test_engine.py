"""Rows, comparison, reading and writing, without a model."""

import tracemalloc
import types

import numpy as np
import pytest

from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.engine import Row
from keras_paligemma.checkpoints.lazy_tensors import lazy_tensors
from keras_paligemma.layers import weight as weight_module
from keras_paligemma.layers.weight import Weight


def numbers(*shape):
    return np.arange(np.prod(shape), dtype="float32").reshape(shape)


ROWS = [
    (Row("a", "x"), (2, 3), (2, 3)),
    (Row("a", "x", "o i -> i o"), (2, 3), (3, 2)),
    (Row("a", "x", "(n h) d -> d n h"), (5, 2, 3), (6, 5)),
    (Row("a", "x", "d (n h) -> n h d"), (2, 3, 5), (5, 6)),
    (Row("a", "x", "1 i d -> i d"), (4, 3), (1, 4, 3)),
    (Row("a", "x", "o c y x -> y x c o"), (2, 2, 3, 5), (5, 3, 2, 2)),
    (Row("a", "x", extra=2), (4, 3), (6, 3)),
]


@pytest.mark.parametrize(("row", "ours", "theirs"), ROWS)
def test_a_row_is_reversible(row, ours, theirs):
    assert row.checkpoint_shape(ours) == theirs
    value = numbers(*ours)
    written = row.write(value)
    assert written.shape == theirs
    np.testing.assert_array_equal(row.read(written, ours), value)


def test_a_split_axis_is_split_in_their_order():
    row = Row("a", "x", "(n h) d -> d n h")
    theirs = numbers(6, 5)
    ours = row.read(theirs, (5, 2, 3))
    assert ours[4, 1, 2] == theirs[1 * 3 + 2, 4]


def test_parts_of_one_array():
    rows = [
        Row("t/blocks/key", "kv", "k d h -> d k h", part=0, parts=2),
        Row("t/blocks/value", "kv", "k d h -> d k h", part=1, parts=2),
    ]
    arrays = {
        row.name: numbers(3, 5, 2, 4) * (1 + n) for n, row in enumerate(rows)
    }
    weights = {
        name: Weight((array,), "scanned") for name, array in arrays.items()
    }
    assert engine.shapes(weights, rows) == {"kv": (3, 2, 2, 5, 4)}
    ((key, array),) = engine.write(weights, rows)
    assert key == "kv"
    np.testing.assert_array_equal(
        array[2, 1, 1, 3],
        [arrays["t/blocks/value"][2, 3, 1, h] for h in range(4)],
    )
    lazy = lazy_tensors(weights, rows, engine.Arrays({"kv": array}))
    for name, weight in lazy.items():
        np.testing.assert_array_equal([*weight.read_layers()], arrays[name])


def test_one_array_a_block():
    row = Row("t/blocks/norm", "layers.{layer}.norm")
    weights = {"t/blocks/norm": Weight((numbers(2, 3),), "scanned")}
    assert engine.shapes(weights, [row]) == {
        "layers.0.norm": (3,),
        "layers.1.norm": (3,),
    }
    written = dict(engine.write(weights, [row]))
    np.testing.assert_array_equal(written["layers.1.norm"], [3, 4, 5])


def test_every_problem_is_listed_at_once():
    rows = [Row("a", "x"), Row("b", "y"), Row("c", "z")]
    weights = {name: types.SimpleNamespace(shape=(2, 3)) for name in "abcd"}
    found = {"x": (2, 3), "y": (3, 2), "other": (1,)}
    assert engine.problems(weights, rows, found) == [
        "shape: y is (3, 2), expected (2, 3)",
        "missing: z (2, 3)",
        "no row: d",
        "unused: other",
    ]
    with pytest.raises(ValueError, match="in 4 places; nothing was loaded"):
        engine.check_names_and_shapes(weights, rows, found)


def test_stacked_arrays_are_read_once_when_lazy():
    reads = []

    class Counted(engine.Arrays):
        def __init__(self, arrays):
            super().__init__(arrays)
            read = self.read
            self.read = lambda key: reads.append(key) or read(key)

    weights = {"t/blocks/w": numbers(4, 2)}
    row = Row("t/blocks/w", "w")
    lazy = lazy_tensors(weights, [row], Counted({"w": numbers(4, 2)}))
    values = [*lazy["t/blocks/w"].read_layers()]
    np.testing.assert_array_equal(values, weights["t/blocks/w"])
    assert reads == ["w"]


@pytest.mark.parametrize("stacked", [False, True])
def test_memory_of_loading(monkeypatch, stacked):
    """Peak is at most 1.1 × the weights plus the largest tensor."""
    names = {"up": (60, 200), "gate": (60, 200), "norm": (60,)}
    layers = 12
    rows = [Row("t/table", "a/table"), Row("t/last", "z")]
    rows += [
        Row(f"t/blocks/{name}", f"layers.{{layer}}.{name}", axes)
        for name, axes in {"up": "i o -> o i", "gate": None}.items()
    ]
    rows.append(Row("t/blocks/norm", "layers.{layer}.norm"))

    def variable(*shape):
        return types.SimpleNamespace(shape=shape, dtype="float32")

    weights = {
        "t/table": Weight((variable(900, 60),)),
        "t/last": Weight((variable(7),)),
    }
    for name, shape in names.items():
        shape = shape[::-1] if name == "up" else shape
        many = tuple(variable(*shape) for _ in range(layers))
        weights[f"t/blocks/{name}"] = (
            Weight((variable(layers, *shape),), "scanned")
            if stacked
            else Weight(many, "unrolled")
        )
    # The file has float16 arrays, which are cast.
    expected = engine.shapes(weights, rows)
    tensors = types.SimpleNamespace(
        shapes=expected, read=lambda key: np.ones(expected[key], "float16")
    )
    kept = {}

    def fill(variable, value):
        kept[id(variable)] = np.array(value, variable.dtype)

    monkeypatch.setattr(weight_module, "fill", fill)
    tracemalloc.start()
    try:
        engine.load(weights, rows, tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    total = sum(array.nbytes for array in kept.values())
    assert total == 4 * engine.count(weights)
    largest = max(array.nbytes for array in kept.values())
    assert peak < 1.1 * total + largest


def test_further_rows_are_the_mean():
    """The logit of a further row is the mean, so it is never the argmax."""
    table = np.random.default_rng(0).normal(size=(50, 3)).astype("float32")
    written = Row("a", "x", extra=2).write(table)
    np.testing.assert_allclose(written[50:], [table.mean(axis=0)] * 2, 1e-5)
    hidden = np.random.default_rng(1).normal(size=(20, 3))
    assert (np.argmax(hidden @ written.T, axis=-1) < 50).all()
