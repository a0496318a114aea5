"""Train on one device and on eight virtual ones; run by its test.

Every layout must give the losses and tokens of one device, in both forms. The
arguments are names of checks.
"""

import os
import sys
import zlib

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import compat
from keras_paligemma import without_values
from keras_paligemma.compat import compiling_for
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.splash import should_use_splash
from keras_paligemma.layers.stack import LayerStack
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.models.text_decoder import TokenEmbedding
from keras_paligemma.quantization import products
from keras_paligemma.quantization import storage
from keras_paligemma.sharding import distribute
from keras_paligemma.sharding import layouts
from tests.helpers.attention import draw_attention
from tests.helpers.attention import fused
from tests.helpers.attention import plain
from tests.helpers.checks import check
from tests.helpers.programs import make_programs_quickly

make_programs_quickly()
# As in published models, whose layers are wide.
storage.SMALL = 1

# Three key-value heads are not divisible by a group. Six query heads are
# divisible by two.
VISION = {
    "patch_size": 14,
    "num_layers": 1,
    "hidden_dim": 48,
    "num_heads": 4,
    "intermediate_dim": 88,
}
TEXT = {
    "vocabulary_size": 320,
    "num_layers": 1,
    "hidden_dim": 64,
    "intermediate_dim": 112,
    "num_query_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "query_pre_attention_scalar": 24,
}
# Kernels with all kinds of axes, but few enough to compile quickly.
TARGETS = ("query", "value", "down", "vision.output")
STEPS, BATCH, PROMPT, RESPONSE = 3, 8, 4, 3


class Batches(keras.utils.PyDataset):
    """Preprocessed batches of random pictures and tokens."""

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        shape = (BATCH, PROMPT + RESPONSE)
        ids = random.integers(1, 320, shape).astype("int32")
        images = random.uniform(-1, 1, (BATCH, 28, 28, 3)).astype("f4")
        weights = np.ones((BATCH, RESPONSE), "float32")
        return tokens(images, ids), ids[:, PROMPT:], weights


def tokens(images, ids):
    """Return the model's inputs; the last ids are the response."""
    response = np.arange(ids.shape[-1]) >= PROMPT
    return {
        "images": images,
        "token_ids": ids,
        "padding_mask": np.ones(ids.shape, bool),
        "response_mask": np.broadcast_to(response, ids.shape),
    }


class Losses(keras.callbacks.Callback):
    """Record each step's loss. (Keras's logs are means of all steps so far.)"""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs):
        self.values.append(float(logs["loss"]))


def draw(backbone):
    """Return random values by name, equal in both forms."""
    values = {}
    for name, weight in dequantized(backbone.weights_by_name()).items():
        shape = weight.shape
        random = np.random.default_rng(zlib.crc32(name.encode()))
        spread = 0.3 if "norm" in name else shape[-1] ** -0.5
        values[name] = random.normal(size=shape).astype("float32") * spread
    return values


def build(form, trained):
    """Build a model whose weights come from the host, without initializers."""
    quantization = "int4" if trained == "int4" else None
    with without_values():
        backbone = PaliGemmaBackbone(
            28, VISION, TEXT, form=form, quantization=quantization
        )
        if trained != "full":
            backbone.enable_lora(rank=2, targets=TARGETS)
    weights = dequantized(backbone.weights_by_name())
    for name, value in draw(backbone).items():
        weights[name].assign(value)
    model = PaliGemmaCausalLM(backbone, compile=False)
    model.compile(Adam(1e-2))
    return model


def train(form, trained, generate):
    """Return the losses of three steps, and the trained model's answers."""
    model = build(form, trained)
    losses = Losses()
    model.fit(Batches(), epochs=1, shuffle=False, verbose=0, callbacks=[losses])
    ids = None
    if generate:
        inputs, _, _ = Batches()[0]
        inputs["response_mask"] = np.zeros_like(inputs["response_mask"])
        inputs = {
            name: value if name == "images" else value[:, :PROMPT]
            for name, value in inputs.items()
        }
        ids = model.generate(inputs, max_new_tokens=5, stop_token_ids=None)
    return model, np.array(losses.values), ids


def check_shards(model, layout):
    """Compare all shards with the table; return the number of split arrays."""
    parts = {"model": layout.group, "batch": layout.groups, None: 1}
    split = 0
    for variable in model.variables + model.optimizer.variables:
        shape = tuple(variable.shape)
        axes = layout.axes(stable_name(variable.path), shape)
        shard = variable.value.addressable_shards[0].data.shape
        wanted = [n // parts[axis] for n, axis in zip(shape, axes, strict=True)]
        assert shard == tuple(wanted), (variable.path, shard, axes)
        split += shard != shape
    return split


def refused(function, message):
    """Check that a call raises a `ValueError` with a given message."""
    try:
        function()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


def check_kernel():
    """Compare fused attention, sharded by rows and heads."""
    arrays, valid = draw_attention(batch=8)
    wanted = np.asarray(plain(valid, 5.0)(*arrays[:3]))
    for strategy, mesh in (
        ("data", None),
        ("weights", (2, 4)),
        ("tensor", (4, 2)),
    ):
        with distribute(strategy, mesh).scope(), compiling_for("tpu"):
            assert should_use_splash(8, 2, 128)
            found = np.asarray(fused(valid, 5.0)(*arrays[:3]))
        np.testing.assert_allclose(found[valid], wanted[valid], atol=5e-5)


# One device must use the same order of axes and products as eight.
@compiling_for("cpu")
def check_parts():
    """Compare products whose kernels are gathered in parts from all chips."""
    x = np.random.default_rng(0).normal(size=(8, 3, 1024)).astype("float32")
    table = TokenEmbedding(1024, 1024, "int8", name="table")
    table.build()
    cases = [(table.logits, "table/table", ("model", None), True)]
    for mode, axes in (
        ("int4", (None, None, "model")),
        ("int4", (None, "model", None)),
        ("int8", (None, None, "model")),
    ):
        stack = LayerStack(
            lambda mode=mode: Projection(
                (1024,), (1024,), quantization=mode, name="block"
            ),
            num_layers=2,
            form="scanned",
            name="blocks",
        )
        stack.build()
        # An int8 kernel is used directly in its product.
        cases.append((stack, "blocks/kernel", axes, mode == "int4"))
    for layer, path, axes, in_parts in cases:

        def both(x, layer=layer):
            y, back = jax.vjp(layer, x)
            return y, back(jax.numpy.cos(y))[0]

        wanted = jax.jit(both)(x)
        chosen = distribute("weights", (2, 4))
        chosen.layout_map[path] = chosen.layout_map[f"{path}_scale"] = axes
        with chosen.scope():
            # A new function, since the other is already traced for one device.
            lowered = jax.jit(lambda x, both=both: both(x)).lower(x)
            found = lowered.compile()(x)
        assert ("all_gather" in lowered.as_text()) == in_parts
        for array, other in zip(found, wanted, strict=True):
            scale = np.abs(other).max()
            np.testing.assert_allclose(array, other, rtol=0, atol=1e-5 * scale)


def check_layout(case, wanted):
    """Compare losses, answers and shards of a layout."""
    strategy, mesh, form, trained, *generate = case.split()
    mesh = tuple(map(int, mesh.split("x")))
    chosen = distribute(strategy, mesh, small=64)
    keras.distribution.set_distribution(chosen)
    try:
        model, losses, ids = train(form, trained, generate)
        if strategy != "data":
            assert check_shards(model, chosen.layout)
    finally:
        keras.distribution.set_distribution(None)
    np.testing.assert_allclose(losses, wanted[trained][0], rtol=1e-5)
    if generate:
        np.testing.assert_array_equal(ids, wanted[trained][1])


def check_answers(wanted):
    """Check that the compared answers vary."""
    assert len(np.unique(wanted["lora"][1])) > 3, wanted["lora"][1]


def check_last_batches():
    """Compare what eleven examples give in batches of eight."""
    parts = [Batches()[index] for index in range(2)]
    x, y, weights = jax.tree.map(lambda *a: np.concatenate(a)[:11], *parts)
    options = {"batch_size": BATCH, "verbose": 0}

    def results():
        model = build("scanned", "lora")
        model.compile(Adam(1e-2))
        found = model.fit(
            x, y, sample_weight=weights, shuffle=False, **options
        ).history["loss"]
        found += model.evaluate(x, y, sample_weight=weights, **options)
        return np.array(found), model.predict(x, **options)

    wanted, logits = results()
    for chosen in (distribute("data"), distribute("weights", (2, 4), small=64)):
        with chosen.scope():
            found, others = results()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
        assert others.shape == logits.shape == (11, 7, 320)
        np.testing.assert_allclose(others, logits, atol=1e-4)


def check_replicas():
    """Compare how many parts a batch is split into, of layouts and Keras's."""
    mesh = keras.distribution.DeviceMesh(
        (2, 4), ["batch", "model"], keras.distribution.list_devices()
    )
    own = keras.distribution.ModelParallel(
        layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="batch"
    )
    assert layouts.data_shard() == (0, 1) and compat.replicas() == 1
    layouts.process = lambda: (3, 4)
    for chosen, parts, shard in (
        (distribute("data"), 8, (3, 4)),
        (distribute("weights", (1, 8)), 8, (3, 4)),
        (distribute("tensor", (2, 4)), 2, (1, 2)),
        (own, 2, (1, 2)),
    ):
        with chosen.scope():
            assert compat.replicas() == parts
            assert layouts.data_shard() == shard
    layouts.process = compat.process


def check_meshes():
    chosen = distribute("weights", (1, 8))
    refused(lambda: chosen.get_data_layout((6, 4)), "Expected: 8")
    refused(lambda: distribute("weights", (2, 3)), "groups of 3: 2x3")


def main(*names):
    # Small quantized weights are dequantized in parts, too.
    products.PART = 2**10
    wanted = {}
    for trained in ("lora", "full", "int4"):
        wanted[trained] = train("scanned", trained, trained != "full")[1:]
    others = {
        "answers": lambda: check_answers(wanted),
        "fused attention": check_kernel,
        "products in parts": check_parts,
        "last batches": check_last_batches,
        "replicas": check_replicas,
        "meshes": check_meshes,
    }
    for name in names:
        with check(name):
            if name in others:
                others[name]()
            else:
                check_layout(name, wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
