"""From JSONL to `fit`, through the real preprocessor."""

import contextlib
import json
import pickle

import keras
import numpy as np
import pytest
from PIL import Image

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.data import Batches
from keras_paligemma.data import ExampleError
from keras_paligemma.data import JSONLSource
from tests.helpers.text_models import build_tiny_model
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import PRESETS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write six examples; the fourth lacks its picture, the fifth is cut."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    lines = []
    for i in range(6):
        pixels = random.integers(0, 256, (30 + i, 40, 3), "uint8")
        if i != 3:
            Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(
            {"image": f"{i}.png", "prefix": "caption en", "suffix": f"a {i}"}
        )
    torn = (folder / "4.png").read_bytes()[:1500]
    (folder / "4.png").write_bytes(torn)
    path = folder / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return JSONLSource(path)


@pytest.fixture(scope="module")
def preprocessor():
    return PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(GOLDEN / "toy_sp.model"),
        PaliGemmaImageConverter(28),
        prompt_length=9,
        response_length=6,
    )


@pytest.fixture(scope="module")
def model():
    model = PaliGemmaCausalLM.from_preset(
        PRESETS / "pali_gemma2_nano_112",
        form="scanned",
        prompt_length=9,
        response_length=6,
    )
    # A shorter backward pass halves the compile time.
    model.backbone.vision_encoder.trainable = False
    model.backbone.text_decoder.blocks.trainable = False
    model.backbone.text_decoder.token_embedding.trainable = False
    model.compile(optimizer=keras.optimizers.SGD(1e-3))
    return model


class Losses(keras.callbacks.Callback):
    """Record the loss of each step separately."""

    def on_train_begin(self, logs=None):
        self.losses = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


def test_fit_goes_on_where_it_was(model, source):
    losses = Losses()

    def fit(batches, **kwargs):
        model.set_weights(weights)
        with pytest.warns(UserWarning, match="skipped so far: 1. "):
            model.fit(batches, verbose=0, callbacks=[losses], **kwargs)
        return losses.losses

    weights = model.get_weights()
    batches = Batches(source, model.preprocessor, 2, skip_errors=True)
    model.optimizer.learning_rate.assign(0.0)
    wanted = fit(batches, epochs=2)
    assert len(wanted) == 6 and np.isfinite(wanted).all()
    assert len(set(wanted)) > 4
    # Two steps per epoch. TensorFlow prefetches batches.
    assert 4 <= batches.skipped <= 8
    assert set(batches.problems) == {3, 4}
    # Exactly these batches, from the middle of an epoch onwards.
    batches = Batches(source, model.preprocessor, 2, skip_errors=True)
    batches.set_state(json.loads(json.dumps(batches.get_state(2))))
    assert fit(batches, steps_per_epoch=4) == wanted[2:]
    # The same with a callback, which runs once `fit` has begun.
    late = Batches(source, model.preprocessor, 2, skip_errors=True)
    restore = keras.callbacks.LambdaCallback(
        on_train_begin=lambda logs: late.set_state(batches.get_state(1))
    )
    model.set_weights(weights)
    with pytest.warns(UserWarning, match="skipped so far: 1. "):
        model.fit(
            late, steps_per_epoch=3, verbose=0, callbacks=[restore, losses]
        )
    assert losses.losses == wanted[3:]


def test_fit_learns_and_validates(model, source):
    model.optimizer.learning_rate.assign(1e-3)
    batches = Batches(source, model.preprocessor, 2, skip_errors=True)
    held_out = Batches(
        [source[i] for i in (0, 1, 2)],
        model.preprocessor,
        2,
        shuffle=False,
        drop_remainder=False,
    )
    before = [np.array(x) for x in model.get_weights()]
    with pytest.warns(UserWarning, match="skipped so far: 1. "):
        logs = model.fit(
            batches,
            steps_per_epoch=2,
            epochs=2,
            validation_data=held_out,
            verbose=0,
        ).history
    assert len(logs["loss"]) == len(logs["val_loss"]) == 2
    assert logs["val_loss"][0] != logs["val_loss"][1]
    after = model.get_weights()
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
    again = model.evaluate(held_out, verbose=0, return_dict=True)
    assert again["loss"] == pytest.approx(logs["val_loss"][-1], rel=1e-5)


def test_blank_rows_change_no_loss(model, source):
    kwargs = {"drop_remainder": False, "epochs": 1}
    (half,) = Batches([source[0]], model.preprocessor, 2, **kwargs)
    (full,) = Batches([source[0]] * 2, model.preprocessor, 2, **kwargs)
    assert half[2].any(axis=1).tolist() == [True, False]
    losses = [
        float(model.test_on_batch(*batch, return_dict=True)["loss"])
        for batch in (half, full)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bad_pictures_are_told_by_line(source, preprocessor):
    batches = iter(Batches(source, preprocessor, 3, shuffle=False))
    x, y, _ = next(batches)
    assert x["images"].shape == (3, 28, 28, 3) and y.shape == (3, 6)
    message = r"train.jsonl, line 4: .*3.png.*No such file"
    with pytest.raises(ExampleError, match=message):
        next(batches)
    batches = Batches(source, preprocessor, 6, shuffle=False, skip_errors=True)
    with pytest.warns(UserWarning, match="skipped so far: 1. "):
        x, y, weights = next(iter(batches))
    assert weights.any(axis=1).tolist() == [True] * 3 + [False] * 2 + [True]
    assert not x["images"][3:5].any() and not y[3:5].any()
    assert "line 5: " in batches.problems[4]
    # Worker processes receive it pickled.
    copy = pickle.loads(pickle.dumps(preprocessor))
    for mine, theirs in zip(
        preprocessor(source[0]), copy(source[0]), strict=True
    ):
        for key, value in (
            mine.items() if isinstance(mine, dict) else [(..., mine)]
        ):
            np.testing.assert_array_equal(
                value, theirs[key] if key is not ... else theirs
            )


def test_arrays_without_targets_are_refused(model):
    images = [np.zeros((28, 28, 3), "uint8")] * 2
    texts = {"prompts": ["caption en"] * 2, "responses": ["a", "b"]}
    x, _, _ = model.preprocessor({"images": images, **texts})
    for method in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(ValueError, match="needs the ids of the responses"):
            method(x)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a strategy of TensorFlow"
)
def test_a_strategy_of_one_device_trains_and_of_two_is_refused(monkeypatch):
    import tensorflow as tf

    random = np.random.default_rng(0)
    x = {
        "images": list(random.integers(0, 256, (4, 28, 28, 3), "uint8")),
        "prompts": ["caption en"] * 4,
        "responses": ["a cat", "a dog", "two cats", "a bell"],
    }
    losses = []
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    for scope in (strategy.scope(), contextlib.nullcontext()):
        keras.utils.set_random_seed(0)
        with scope:
            model = build_tiny_model()
            model.compile(optimizer=keras.optimizers.Adam(1e-2))
        # Outside of the scope, as Keras's own models are trained.
        found = model.fit(x, batch_size=2, epochs=2, shuffle=False, verbose=0)
        losses.append(found.history["loss"])
        losses.append(model.evaluate(x, batch_size=2, verbose=0)[0])
    np.testing.assert_allclose(losses[0], losses[2], rtol=1e-6)
    np.testing.assert_allclose(losses[1], losses[3], rtol=1e-6)
    with strategy.scope():
        model = build_tiny_model()
        model.compile()
    # A second CPU would have to be configured before TensorFlow starts.
    monkeypatch.setattr(type(strategy), "num_replicas_in_sync", 2)
    before = [keras.ops.copy(value) for value in model.weights]
    for method in (model.fit, model.evaluate, model.train_on_batch):
        with pytest.raises(ValueError, match="for 2 devices"):
            method(x)
    for value, old in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(value, old)
