"""The loss compared with the original's numbers and with a plain loss."""

import os

import keras
import numpy as np
import pytest
from keras import ops

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import StreamedCrossEntropy
from keras_paligemma.checkpoints import big_vision
from keras_paligemma.data.batches import in_parts
from keras_paligemma.tuning.losses import token_losses
from tests.helpers.gradients import differentiate
from tests.helpers.gradients import gradients
from tests.helpers.tiny_models import golden_training
from tests.helpers.tiny_models import jitted
from tests.helpers.tiny_models import run

# A share of the largest gradient. Rounding in oneDNN's products depends on
# their shapes; 1.3e-6 was measured. The Makefile also runs these tests with
# TensorFlow without oneDNN. There, all gradients but one were bitwise equal,
# and that one differed by 6e-8.
ONEDNN = os.environ.get("TF_ENABLE_ONEDNN_OPTS") != "0"
IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
ROUNDING = 2e-6 if IS_TENSORFLOW and ONEDNN else 1e-6


def responses(backbone, x, targets):
    """Return the hidden states that predict the responses."""
    return backbone(x)[:, -targets.shape[1] - 1 : -1]


def test_loss_is_the_originals(golden_backbone, expected):
    backbone = golden_backbone()
    x, targets, weights = golden_training(expected)
    hidden = run(lambda x: responses(backbone, x, targets), x)
    for smoothing in (0.0, 0.3):
        # The original trains without the final cap.
        loss, _, each = StreamedCrossEntropy(smoothing).stream(
            hidden, lambda x: backbone.logits(x, False), targets, weights
        )
        wanted = f"f32/loss/ls{smoothing}/"
        found = float(ops.convert_to_numpy(loss))
        mean = float(expected[wanted + "mean"])
        assert found == pytest.approx(mean, rel=2e-5)
        np.testing.assert_allclose(
            ops.convert_to_numpy(each),
            expected[wanted + "per_example"],
            rtol=2e-5,
        )


def test_loss_of_a_batch_is_the_originals(golden_backbone, expected):
    model = PaliGemmaCausalLM(golden_backbone())
    loss = StreamedCrossEntropy(0.3, final_soft_cap=False, chunk_tokens=16)
    model.compile("sgd", loss=loss)
    x, targets, weights = golden_training(expected)
    logs = model.test_on_batch(x, targets, weights, return_dict=True)
    wanted = float(expected["f32/loss/ls0.3/mean"])
    assert float(logs["loss"]) == pytest.approx(wanted, rel=2e-5)


def test_losses_of_layers_are_added(golden_backbone, expected):
    backbone = golden_backbone()
    scale = backbone.text_decoder.final_norm.scale
    scale.regularizer = keras.regularizers.L2(1e-2)
    penalty = 1e-2 * np.square(ops.convert_to_numpy(scale)).sum()
    assert penalty > 1
    model = PaliGemmaCausalLM(backbone)
    loss = StreamedCrossEntropy(0.3, final_soft_cap=False, chunk_tokens=16)
    model.compile("sgd", loss=loss)
    x, targets, weights = golden_training(expected)
    logs = model.test_on_batch(x, targets, weights, return_dict=True)
    wanted = float(expected["f32/loss/ls0.3/mean"]) + penalty
    assert float(logs["loss"]) == pytest.approx(wanted, rel=2e-5)


@pytest.mark.parametrize("form", ["unrolled", "scanned"])
def test_gradient_norms_are_the_originals(golden_backbone, expected, form):
    backbone = golden_backbone(form=form)
    x, targets, weights = golden_training(expected)
    # With the label smoothing of the golden trajectory.
    loss = StreamedCrossEntropy(0.1, final_soft_cap=False, chunk_tokens=16)

    def function():
        hidden = responses(backbone, x, targets)

        def head(x):
            return backbone.logits(x, False)

        return loss.stream(hidden, head, targets, weights)[0]

    found = gradients(function, backbone)
    squares = {}
    for row in big_vision.rows(True):
        square = float(np.square(found[row.name]).sum())
        squares[row.key] = squares.get(row.key, 0.0) + square
    for key, square in squares.items():
        wanted = expected["f32/grad_l2/full/" + key.removeprefix("params/")]
        # A key's bias does not change a softmax: its gradient is only rounding.
        assert np.sqrt(square) == pytest.approx(wanted, rel=2e-4, abs=2e-4), key


def plain(hidden, table, targets, weights, smoothing, mean):
    """Compute the loss in NumPy in float64, over all logits at once."""
    logits = hidden.astype("float64") @ table.T.astype("float64")
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hot = np.eye(len(table))[targets]
    hot = hot * (1 - smoothing) + (1 - hot) * smoothing / (len(table) - 1)
    loss = -(hot * log).sum(-1) * weights
    if mean == "token":
        return loss.sum() / (weights > 0).sum(), logits
    count = (weights > 0).sum(1)
    return (loss.sum(1)[count > 0] / count[count > 0]).mean(), logits


@pytest.mark.parametrize("mean", ["example", "token"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_streamed_loss_is_the_plain_loss(smoothing, mean):
    random = np.random.default_rng(0)
    hidden = random.normal(size=(3, 7, 6)).astype("float32")
    table = random.normal(size=(11, 6)).astype("float32")
    targets = random.integers(0, 11, (3, 7))
    weights = (random.random((3, 7)) > 0.4).astype("float32")
    # One row only fills the batch, and one counts twice.
    weights[2] = 0
    weights[1] *= 2

    def head(x):
        return ops.matmul(x, ops.transpose(ops.convert_to_tensor(table)))

    wanted, logits = plain(hidden, table, targets, weights, smoothing, mean)
    right = ((logits.argmax(-1) == targets) * weights).sum() / weights.sum()
    for chunk in (4, 5, 1000):
        loss = StreamedCrossEntropy(smoothing, mean, chunk_tokens=chunk)
        found, accuracy, _ = loss.stream(
            ops.convert_to_tensor(hidden), head, targets, weights
        )
        assert float(found) == pytest.approx(wanted, rel=1e-6)
        assert float(accuracy) == pytest.approx(right, rel=1e-6)


def test_streamed_gradients_are_the_plain_ones(golden_backbone, expected):
    """Compare gradients of the loss's inputs: hidden states and the tied table.

    The backward pass of the towers would amplify the rounding tenfold. It is
    tested in `test_gradient_norms_are_the_originals`.
    """
    backbone = golden_backbone()
    x, targets, weights = golden_training(expected)
    hidden = run(lambda x: responses(backbone, x, targets), x)
    table = backbone.token_embedding.table

    def with_chunks(chunk_tokens):
        loss = StreamedCrossEntropy(0.1, chunk_tokens=chunk_tokens)

        def function(values):
            hidden, rows = values
            with keras.StatelessScope([(table, rows)]):
                return loss.stream(hidden, backbone.logits, targets, weights)[0]

        values = [*map(ops.convert_to_tensor, (hidden, table.value))]
        return differentiate(function, values, optimized=True)

    whole, parts = with_chunks(1000), with_chunks(9)
    for plain, streamed in zip(whole, parts, strict=True):
        difference = np.abs(streamed - plain).max()
        assert difference < ROUNDING * np.abs(plain).max()


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_gradients_beside_a_frozen_head(
    golden_backbone, expected, tmp_path, quantize
):
    backbone = golden_backbone()
    if quantize:
        backbone.save_to_preset(tmp_path)
        backbone = PaliGemmaBackbone.from_preset(tmp_path, quantize=quantize)
    else:
        backbone.freeze("text_decoder/token_embedding/*")
    _, targets, weights = golden_training(expected)
    head = backbone.head()
    assert head.frozen
    width = backbone.text_config.hidden_dim
    hidden = np.random.default_rng(0).normal(size=(*targets.shape, width))
    # Large enough for the cap to matter.
    hidden = ops.convert_to_tensor(100 * hidden.astype("float32"))
    assert float(ops.max(head(hidden))) > 10

    def with_head(head, chunk_tokens):
        loss = StreamedCrossEntropy(0.1, chunk_tokens=chunk_tokens)

        def function(values):
            return loss.stream(values[0], head, targets, weights)[0]

        return differentiate(function, [hidden], optimized=True)[0]

    # The same function, differentiated by the backend.
    plain = with_head(lambda hidden: head(hidden), 1000)
    for chunk_tokens in (9, 1000):
        found = with_head(head, chunk_tokens)
        difference = np.abs(found - plain).max()
        assert difference < ROUNDING * np.abs(plain).max()


def test_auto_loss_equals_keras_loss_on_full_logits(tiny_model, examples):
    model = tiny_model()
    # Responses have equal lengths, so that both means weight tokens equally.
    examples["responses"] = ["a cat"] * 4
    model.compile(optimizer="sgd")
    auto = model.evaluate(examples, verbose=0, return_dict=True)
    # The accuracy also has KerasHub's name.
    accuracy = auto.pop("sparse_categorical_accuracy")
    assert accuracy == auto["token_accuracy"]
    assert set(auto) == {"loss", "token_accuracy"}
    model.compile(
        optimizer="sgd",
        loss=keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=["sparse_categorical_accuracy"],
    )
    plain = model.evaluate(examples, verbose=0, return_dict=True)
    assert auto["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert auto["token_accuracy"] == pytest.approx(
        plain["sparse_categorical_accuracy"]
    )


@pytest.mark.usefixtures("eager")
def test_own_loss_beside_metrics(tiny_model, examples):
    model = tiny_model()
    for capped in (True, False):
        loss = StreamedCrossEntropy(final_soft_cap=capped)
        model.compile("sgd", loss=loss)
        alone = model.evaluate(examples, verbose=0, return_dict=True)
        model.compile(
            "sgd", loss=loss, weighted_metrics=["sparse_categorical_accuracy"]
        )
        beside = model.evaluate(examples, verbose=0, return_dict=True)
        assert beside["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert beside["token_accuracy"] == alone["token_accuracy"]


def test_padding_and_order_of_tokens_leak_nothing(golden_backbone, expected):
    backbone = golden_backbone()
    x, targets, weights = golden_training(expected)
    loss = StreamedCrossEntropy()

    def both(x):
        hidden = responses(backbone, x, targets)
        each = loss.stream(hidden, backbone.logits, targets, weights)[2]
        return backbone.logits(hidden), each

    compiled = jitted(both)

    def measure(x):
        return [ops.convert_to_numpy(gradient) for gradient in compiled(x)]

    logits, each = measure(x)
    for position in np.flatnonzero(x["response_mask"][0])[::2]:
        changed = x | {"token_ids": x["token_ids"].copy()}
        changed["token_ids"][0, position] = 7
        found, _ = measure(changed)
        # Logits at i predict token i + 1 and depend on tokens up to i.
        np.testing.assert_array_equal(
            found[0, : position - 1], logits[0, : position - 1]
        )
        assert (found[0, position] != logits[0, position]).any()
    # Values in padded positions and padded rows do not change the loss.
    padded = {
        "images": x["images"],
        "token_ids": np.pad(x["token_ids"], ((0, 0), (0, 3)))[:, :],
        "padding_mask": np.pad(x["padding_mask"], ((0, 0), (0, 3))),
        "response_mask": np.pad(x["response_mask"], ((0, 0), (0, 3))),
    }
    padded["token_ids"][:, -3:] = [[7, 8, 9]]
    longer = np.pad(targets, ((0, 0), (0, 3)))
    hidden = run(lambda x: responses(backbone, x, longer), padded)
    found = loss.stream(
        hidden, backbone.logits, longer, np.pad(weights, ((0, 0), (0, 3)))
    )[2]
    np.testing.assert_allclose(ops.convert_to_numpy(found), each, rtol=1e-5)


def test_loss_of_logits_and_its_config():
    loss = StreamedCrossEntropy(0.1, "token", False, 64)
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype("float32")
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    each, right = token_losses(logits, targets, 0.1)
    assert float(loss(targets, logits)) == pytest.approx(
        float(ops.mean(each)), rel=1e-6
    )
    assert ops.convert_to_numpy(right).tolist() == (
        (logits.argmax(-1) == targets).astype("float32").tolist()
    )
    again = StreamedCrossEntropy.from_config(loss.get_config())
    assert again.get_config() == loss.get_config()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"mean": "sum"}, "Unknown mean"), ({"label_smoothing": 1.0}, "below 1")],
)
def test_arguments_that_mean_nothing(arguments, words):
    with pytest.raises(ValueError, match=words):
        StreamedCrossEntropy(**arguments)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="reads JAX's HLO")
def test_no_step_holds_the_logits_of_all_tokens(golden_backbone, expected):
    import re

    import jax

    model = PaliGemmaCausalLM(golden_backbone())
    x, targets, weights = golden_training(expected)
    model.compile("sgd", loss=StreamedCrossEntropy(chunk_tokens=16))
    model.train_on_batch(x, targets, weights)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
        purge_model_variables=False,
    )
    data = in_parts(x, targets, weights)
    compiled = jax.jit(model.train_step).lower(state, data)
    text = compiled.compile().as_text()
    V = 320
    sizes = [
        int(np.prod([int(n) for n in shape.split(",")]))
        for shape in re.findall(rf"f32\[((?:\d+,)*{V})\]", text)
    ]
    assert V * 16 in sizes  # A chunk: 4 tokens of each of 4 rows.
    table = V * 64
    assert max(size for size in sizes if size != table) <= V * 16


def test_fit_of_all_weights_in_chunks_is_fit(tiny_model, examples):
    """The table is trained too, and the graph does not know the batch size."""
    losses = []
    for tokens in (4, 4096):
        model = tiny_model()
        loss = StreamedCrossEntropy(chunk_tokens=tokens)
        model.compile(keras.optimizers.SGD(0.1), loss=loss)
        # Eight steps with a chunk each, or one step with all tokens.
        done = model.fit(
            examples, batch_size=4, shuffle=False, epochs=3, verbose=0
        )
        losses.append(done.history["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize("mean", ["example", "token"])
def test_means_over_batches_are_those_of_all(tiny_model, examples, mean):
    """The means do not depend on batch sizes, or on blank batches."""
    model = tiny_model()
    model.compile("sgd", loss=StreamedCrossEntropy(mean=mean))
    x, y, weights = model.preprocessor(examples)
    wanted = model.evaluate(examples, batch_size=4, verbose=0)
    found = model.evaluate(examples, batch_size=3, verbose=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)

    class WithBlanks(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, number):
            rows = slice(0, 3) if number < 2 else slice(3, 4)
            share = 0 if number == 1 else 1
            inputs = {key: value[rows] for key, value in x.items()}
            return inputs, y[rows], share * weights[rows]

    found = model.evaluate(WithBlanks(), verbose=0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
