"""Inputs of `fit`, `evaluate` and `predict`: raw examples from any source."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma.data import batches
from keras_paligemma.models import fitting
from keras_paligemma.preprocessing.prompt_and_response import PART_NAMES
from tests.helpers.text_models import build_tiny_model

tf = pytest.importorskip("tensorflow")
grain = pytest.importorskip("grain")


def rows_of(examples, start, stop):
    return {key: value[start:stop] for key, value in examples.items()}


def slices(examples):
    return tf.data.Dataset.from_tensor_slices(
        examples | {"images": np.stack(examples["images"])}
    )


def grains(examples):
    return grain.MapDataset.range(4).map(
        lambda i: {key: value[i] for key, value in examples.items()}
    )


# Four examples as two batches, repeated at least once.
SOURCES = {
    "dict": lambda examples: examples,
    "dict of arrays": lambda examples: {
        key: np.array(value) for key, value in examples.items()
    },
    "tf.data": lambda examples: slices(examples).batch(2),
    "tf.data of tuples": lambda examples: (
        slices(examples).batch(2).map(lambda x: (x,))
    ),
    "tf.data of unknown length": lambda examples: (
        slices(examples).batch(2).filter(lambda x: True).repeat()
    ),
    "list": lambda examples: [
        rows_of(examples, 0, 2),
        rows_of(examples, 2, 4),
    ],
    "generator": lambda examples: (
        rows_of(examples, start % 4, start % 4 + 2) for start in range(0, 20, 2)
    ),
    "grain": lambda examples: grains(examples).batch(2),
    "grain without end": lambda examples: grains(examples).batch(2).repeat(),
}


@pytest.fixture(scope="module")
def model():
    """Return a model that compiles fast and is not changed by training."""
    model = build_tiny_model(form="scanned")
    model.backbone.vision_encoder.trainable = False
    model.backbone.text_decoder.blocks.trainable = False
    model.compile(keras.optimizers.SGD(0.0))
    return model


@pytest.fixture(scope="module")
def losses(model):
    """Return a function that gives the loss of examples, in batches of two."""

    def measure(examples):
        # Other batch sizes would compile other programs.
        return model.evaluate(examples, batch_size=2, verbose=0)[0]

    return measure


@pytest.mark.parametrize("kind", SOURCES)
def test_raw_examples_of_any_kind_train_alike(model, losses, examples, kind):
    history = model.fit(
        SOURCES[kind](examples),
        batch_size=2,
        epochs=2,
        steps_per_epoch=2,
        shuffle=False,
        verbose=0,
        validation_data=examples,
    ).history
    wanted = [losses(examples)] * 2
    np.testing.assert_allclose(history["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"], wanted, rtol=1e-5)
    # KerasHub's metric name is reported too.
    names = "sparse_categorical_accuracy", "val_sparse_categorical_accuracy"
    ours = "token_accuracy", "val_token_accuracy"
    for name, own in zip(names, ours, strict=True):
        assert history[name] == history[own]


def test_an_iterable_begins_anew_each_epoch(model, losses, examples):
    """Keras finds the unknown length at the end of the first epoch."""
    dataset = grains(examples).to_iter_dataset().batch(2)
    with pytest.warns(UserWarning, match="ran out of data"):
        history = model.fit(dataset, epochs=2, verbose=0).history
    wanted = [losses(examples)] * 2
    np.testing.assert_allclose(history["loss"], wanted, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_a_generator_is_read_once(model, examples, count):
    """One of two batches, which Keras reads for shapes, can be repeated."""

    def batches():
        for i in range(count):
            yield rows_of(examples, i % 4, i % 4 + 1)

    seen = []

    class Counted(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(batch)

    options = {"callbacks": [Counted()], "epochs": 2, "verbose": 0}
    # Keras finds the unknown length at the end of the first epoch.
    with pytest.warns(UserWarning, match="ran out of data"):
        if count == 2:
            model.fit(batches(), **options)
        else:
            # TensorFlow raises what a generator raises as its own error.
            kinds = ValueError, tf.errors.InvalidArgumentError
            with pytest.raises(kinds, match="The generator is used up"):
                model.fit(batches(), **options)
    assert seen == ([0, 1] * 2 if count == 2 else [0, 1, 2, 3])


@pytest.mark.parametrize("kind", ["dict", "tf.data", "list", "grain"])
def test_evaluate_and_predict(model, losses, examples, kind):
    x = SOURCES[kind](examples)
    logs = model.evaluate(x, batch_size=2, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["loss"], losses(examples), rtol=1e-5)
    logits = model.predict(x, batch_size=2, verbose=0)
    assert logits.shape == (4, 20, 2048)
    # In training, the loss of these logits is the one above.
    _, y, weights = model.preprocessor(examples)
    log_BRV = ops.log_softmax(logits[:, 11:-1])
    chosen_BR = ops.take_along_axis(log_BRV, y[..., None], axis=-1)[..., 0]
    losses_B = -np.sum(ops.convert_to_numpy(chosen_BR) * weights, axis=1)
    loss = np.mean(losses_B / weights.sum(axis=1))
    np.testing.assert_allclose(loss, logs["loss"], rtol=1e-4)


def test_no_images_are_none_in_each_batch(model, examples):
    text = {key: examples[key] for key in ("prompts", "responses")}
    whole = text | {"images": None}
    batches = [rows_of(text, i, i + 2) | {"images": None} for i in (0, 2)]
    wanted = model.evaluate(batches, verbose=0)
    found = model.evaluate(whole, batch_size=2, verbose=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_last_batch_may_be_smaller(model, losses, examples):
    three = rows_of(examples, 0, 3)
    batches = [rows_of(three, 0, 2), rows_of(three, 2, 3)]
    found = model.evaluate(batches, verbose=0)[0]
    np.testing.assert_allclose(found, losses(three), rtol=1e-5)
    history = model.fit(batches, epochs=2, verbose=0).history
    np.testing.assert_allclose(history["loss"], [found] * 2, rtol=1e-5)


def test_a_batch_that_replicas_cannot_share_is_filled_up(
    model, losses, examples, monkeypatch
):
    """Blank rows change no result, and give all batches one shape."""
    three = rows_of(examples, 0, 3)
    pairs = [rows_of(three, 0, 2), rows_of(three, 2, 3)]
    stacked = three | {"images": np.stack(three["images"])}
    pipeline = tf.data.Dataset.from_tensor_slices(stacked).batch(2)
    wanted, rest = losses(three), losses(pairs[1])
    logits = model.predict(three, batch_size=2, verbose=0)
    monkeypatch.setattr(batches, "replicas", lambda: 2)
    options = {"batch_size": 2, "shuffle": False, "verbose": 0}
    for x in (three, pairs, pipeline.map(model.preprocessor)):
        history = model.fit(x, validation_data=x, **options).history
        np.testing.assert_allclose(history["loss"], [wanted], rtol=1e-5)
        np.testing.assert_allclose(history["val_loss"], [wanted], rtol=1e-5)
    x, y, weights = model.preprocessor(pairs[1])
    x, _, weights = batches.filled(x, y, weights)
    assert weights.any(axis=1).tolist() == [True, False]
    assert len(x["images"]) == len(x["token_ids"]) == 2
    found = model.test_on_batch(pairs[1])[0]
    np.testing.assert_allclose(found, rest, rtol=1e-5)
    found = model.predict(three, batch_size=1, verbose=0)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    # TensorFlow raises what a generator raises as its own error.
    kinds = ValueError, tf.errors.InvalidArgumentError
    with pytest.raises(kinds, match="divide by the 2 parts"):
        model.predict(pairs, verbose=0)


def test_hosts_have_batches_of_one_shape(model, losses, examples, monkeypatch):
    """Two hosts, each with one of the two replicas, and 3 and 2 examples."""
    three = rows_of(examples, 0, 3)
    wanted = losses(three)
    monkeypatch.setattr(batches, "replicas", lambda: 2)
    monkeypatch.setattr(batches, "process", lambda: (0, 2))
    data = batches.as_dataset(three, None, None, 2, model.preprocess_samples)
    assert {len(data[index][1]) for index in range(2)} == {2}
    found = model.evaluate(three, batch_size=2, verbose=0)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    # The other host has one batch.
    monkeypatch.setattr(batches, "least", lambda value: min(value, 1))
    with pytest.raises(ValueError, match="Received: 2 batches on this host"):
        model.evaluate(three, batch_size=2, verbose=0)
    monkeypatch.setattr(fitting, "process", lambda: (0, 2))
    with pytest.raises(ValueError, match="`predict`.*Received: 2 processes"):
        model.predict(three, verbose=0)


def test_no_graph_is_traced_for_raw_batches(
    model, losses, examples, monkeypatch
):
    """The only graph is the one that TensorFlow's training makes of batches."""
    data = slices(examples).batch(2)

    def refuse(*args, **kwargs):
        raise AssertionError("a graph")

    monkeypatch.setattr(tf.data.Dataset, "map", refuse)
    if keras.backend.backend() != "tensorflow":
        monkeypatch.setattr(tf.data.Dataset, "from_generator", refuse)
        monkeypatch.setattr(tf, "function", refuse)
    found = model.evaluate(data, verbose=0)[0]
    np.testing.assert_allclose(found, losses(examples), rtol=1e-5)


@pytest.mark.parametrize("attached", [True, False])
def test_preprocessed_data_passes(model, losses, examples, attached):
    """Preprocessed data is accepted as a dict and as a pipeline."""
    wanted = losses(examples)
    preprocessor = model.preprocessor
    x, y, weights = preprocessor(examples)
    pipeline = slices(examples).batch(2).map(preprocessor)
    model.preprocessor = preprocessor if attached else None
    try:
        for found in (
            model.evaluate(x, y, 2, weights, verbose=0),
            model.evaluate([(x, y, weights)], verbose=0),
            model.evaluate(pipeline, verbose=0),
        ):
            np.testing.assert_allclose(found[0], wanted, rtol=1e-5)
        logits = model.predict(pipeline, verbose=0)
        if not attached:
            with pytest.raises(ValueError, match="reads arrays"):
                model.evaluate(examples)
    finally:
        model.preprocessor = preprocessor
    wanted = model.predict(examples, batch_size=2, verbose=0)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def packed_to_the_left():
    """Return arrays as KerasHub packs them, targets and weights."""
    ids = np.array([[2, 7, 5, 8, 1, 0], [2, 5, 9, 1, 0, 0]], "int32")
    response = np.isin(ids, [8, 9, 1])
    masks = {"padding_mask": ids > 0, "response_mask": response}
    weights = response[:, -4:].astype("float32")
    return {"token_ids": ids, **masks}, ids[:, -4:], weights


def without_model(data, batch_size=None, **options):
    return batches.as_dataset(
        *data, batch_size, keras.utils.pack_x_y_sample_weight, **options
    )


def test_texts_packed_to_the_left_in_a_pipeline(packed_to_the_left):
    """Prompts end at different indices; no token of them is hidden."""
    pipeline = tf.data.Dataset.from_tensor_slices(packed_to_the_left).batch(2)
    wanted = without_model(packed_to_the_left, 2)[0]
    data = without_model((pipeline, None, None))
    (found,) = data.get_numpy_iterator()
    assert found[0].keys() == wanted[0].keys() == {*PART_NAMES}
    for name, array in wanted[0].items():
        np.testing.assert_array_equal(found[0][name], array)
    np.testing.assert_array_equal(found[1:], wanted[1:])


def test_batches_without_targets_are_predicted_from(packed_to_the_left):
    x, _, _ = packed_to_the_left
    pipeline = tf.data.Dataset.from_tensors(x)
    for data in ([x], pipeline, iter([x])):
        data = without_model((data, None, None), apart=False)
        ((found,),) = data.get_numpy_iterator()
        np.testing.assert_array_equal(found["token_ids"], x["token_ids"])


def test_each_epoch_has_all_rows_of_a_dictionary_in_an_order_of_its_own():
    numbers = np.arange(20)
    x = {"token_ids": numbers.tolist(), "other": numbers[:, None], "none": None}
    keras.utils.set_random_seed(0)
    data = batches.Examples(x, numbers, numbers, 8, shuffle=True)
    epochs = []
    for _ in range(3):
        rows = []
        for x, y, weights in data:
            np.testing.assert_array_equal(x["token_ids"], y)
            np.testing.assert_array_equal(x["other"][:, 0], y)
            np.testing.assert_array_equal(weights, y)
            assert "none" not in x
            rows.append(y.tolist())
        assert [len(row) for row in rows] == [8, 8, 4]
        epochs.append(sum(rows, []))
        data.on_epoch_end()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == numbers.tolist() for epoch in epochs)
    keras.utils.set_random_seed(0)
    again = batches.Examples({}, numbers, None, 20, shuffle=True)
    assert again[0][1].tolist() == epochs[0]


def test_a_split_keeps_the_rows_together():
    x = {"images": None, "prompts": ["a", "b", "c"]}
    first, last = batches.split(x, np.arange(3), [0.5, 1.0, 2.0], 0.3)
    assert first[0] == {"images": None, "prompts": ["a", "b"]}
    assert last[0] == {"images": None, "prompts": ["c"]}
    assert first[1].tolist() == [0, 1] and last[1].tolist() == [2]
    assert first[2] == [0.5, 1.0] and last[2] == [2.0]


@pytest.mark.parametrize("kind", [*SOURCES][2:])
def test_lengths_that_are_known(examples, kind):
    data = without_model((SOURCES[kind](examples), None, None), apart=False)
    is_known = kind in ("tf.data", "tf.data of tuples", "list", "grain")
    assert data.num_batches == (2 if is_known else None)


def test_an_epoch_of_a_py_dataset_begins_and_ends():
    """As one does that draws its order when an epoch begins."""
    calls = []

    class Epochs(keras.utils.PyDataset):
        num_batches = 3

        def on_epoch_begin(self):
            calls.append("begin")

        def on_epoch_end(self):
            calls.append("end")

    given = Epochs(workers=2, max_queue_size=5)
    data = without_model((given, None, None))
    assert (data.num_batches, data.workers, data.max_queue_size) == (3, 2, 5)
    data.on_epoch_begin()
    data.on_epoch_end()
    assert calls == ["begin", "end"]


def test_weights_of_examples(model, losses, examples):
    """An example with weight 0 is ignored, in a dict and in a tuple."""
    pair = rows_of(examples, 0, 2)
    weights = np.array([1.0, 0.0])
    wanted = losses({key: value[:1] * 2 for key, value in pair.items()})
    history = model.fit(
        pair,
        sample_weight=weights,
        validation_data=[(pair, None, weights)],
        verbose=0,
    ).history
    for found in (
        history["loss"],
        history["val_loss"],
        model.evaluate(pair, sample_weight=weights, verbose=0),
        model.evaluate([(pair, None, weights)], verbose=0),
    ):
        np.testing.assert_allclose(found[0], wanted, rtol=1e-5)


def test_the_last_examples_validate(model, losses, examples):
    history = model.fit(
        examples, validation_split=0.5, batch_size=2, verbose=0
    ).history
    first, last = (losses(rows_of(examples, i, i + 2)) for i in (0, 2))
    np.testing.assert_allclose(history["loss"], [first], rtol=1e-5)
    np.testing.assert_allclose(history["val_loss"], [last], rtol=1e-5)


def test_what_cannot_be_trained_on_says_so(model, examples):
    one = {key: value[0] for key, value in examples.items()}
    x, y, weights = model.preprocessor(examples)
    shifted = np.pad(x["token_ids"][:, 1:], ((0, 0), (0, 1)))
    for data, message in (
        ({"x": [one]}, r"on batches.*\.batch\(8\)"),
        ({"x": slices(examples)}, r"on batches.*\.batch\(8\)"),
        ({"x": examples, "y": [1] * 4}, "Targets come from the responses"),
        ({"x": [examples], "y": [1]}, "hold their own targets"),
        ({"x": [examples], "validation_split": 0.5}, "divides a dictionary"),
        ({"x": examples, "validation_split": 0.9}, "at least one example"),
        ({"x": x, "y": shifted}, "shifted by one as in KerasHub"),
        ({"x": ["a cat"]}, "An example is a dictionary"),
        ({"x": np.zeros((2, 3))}, "ndarray.*Expected: a dictionary"),
        ({"x": examples | {"prompts": "caption en"}}, "same length"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(**data, verbose=0)


def test_an_uncompiled_model_says_so(examples):
    model = build_tiny_model()
    model = type(model)(model.backbone, model.preprocessor, compile=False)
    for method in (model.fit, model.evaluate, model.generate):
        with pytest.raises(ValueError, match=r"must call `compile\(\)`"):
            method(examples)
