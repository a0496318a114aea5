"""Calibration: int4 kernels rounded for the activations of examples."""

import contextlib
import functools
import math

import keras
import numpy as np
from keras import ops

from keras_paligemma.compat import to_host
from keras_paligemma.compat import without_values
from keras_paligemma.layers.projection import Projection
from keras_paligemma.layers.stack import stable_name
from keras_paligemma.layers.weight import Weight
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.quantization.rounding import order_and_factor
from keras_paligemma.quantization.rounding import round_for

# Examples in a batch.
BATCH = 8
EXPECTED = ("images", "prompts", "responses")
TABLE = "text_decoder/token_embedding/table"


def check_can_calibrate(stored, quantize, load_weights):
    """Raise `ValueError` unless floats are being quantised to int4."""
    if not load_weights:
        raise ValueError(
            "Random weights are not calibrated. Received: load_weights=False "
            "and a calibration. Leave one of them out."
        )
    if stored is not None or quantize != "int4":
        raise ValueError(
            "Examples calibrate a checkpoint of floats that is rounded to 4 "
            "bits. Received: a checkpoint of "
            f"{stored or 'floats'} and quantize={quantize!r}. Expected: "
            "quantize='int4' of floats. (int8 moves so little that there is "
            "nothing to gain.)"
        )


def batches_of(examples, preprocessor):
    """Preprocess the examples of a calibration.

    Args:
        examples: dict of equally long lists `images`, `prompts`, `responses`;
            `images` is `None` for text alone.
        preprocessor: `PaliGemmaCausalLMPreprocessor`.

    Returns:
        list of `(x, y, sample_weight)`.

    Raises:
        ValueError: not a dict of lists, unknown keys, no examples or no
            preprocessor.
    """
    if preprocessor is None:
        raise ValueError(
            "A calibration's examples are preprocessed. Received: "
            "preprocessor=None. Pass `tokenizer=` or a preprocessor."
        )
    columns = examples if isinstance(examples, dict) else {}
    # Text alone has "images": None, as in `fit`.
    columns = {key: rows for key, rows in columns.items() if rows is not None}
    lengths = set()
    # An iterator, for example, has no length. That of a text is no number of
    # examples.
    with contextlib.suppress(TypeError):
        lengths = {
            0 if isinstance(rows, (str, dict)) else len(rows)
            for rows in columns.values()
        }
    if (
        set(columns) not in (set(EXPECTED), set(EXPECTED[1:]))
        or len(lengths) != 1
        or 0 in lengths
    ):
        raise ValueError(
            "A calibration takes a dict of equally long lists, of one example "
            f"at least. Expected: {EXPECTED}. Received: {examples!r:.200}."
        )
    (length,) = lengths
    # All at once: an error names the number of its example.
    arrays = preprocessor(examples | {k: list(v) for k, v in columns.items()})
    return [
        keras.tree.map_structure(
            lambda array, start=start: array[start : start + BATCH], arrays
        )
        for start in range(0, length, BATCH)
    ]


def calibrate(backbone, floats, batches):
    """Round the weights of an int4 backbone again, calibrated on examples.

    The order is block by block, vision encoder first. The inputs of a block are
    the outputs of the rounded blocks before it. Each of its kernels is rounded
    to minimise the change of its products with these inputs. The outputs of the
    rounded block are the inputs of the next. The embedding table, if it is
    int4, comes last, in its role as the output head.

    Memory besides the backbone: one block's outputs for all examples, one block
    in float32, and for a kernel of F inputs about 28·F² bytes: 2.4 GB for 3b,
    38 GB for 28b.

    Args:
        backbone: `PaliGemmaBackbone` of int4, already rounded to the nearest.
        floats: dict of name to `checkpoints.lazy_tensors.LazyTensor`.
        batches: list of `(x, y, sample_weight)` of arrays, as returned by the
            preprocessor.
    """
    weights = dequantized(backbone.weights_by_name())
    twin = _one_block(backbone)
    images = [None] * len(batches)
    if "images" in batches[0][0]:
        images = _through_vision(backbone, twin, floats, weights, batches)
    _through_text(backbone, twin, floats, weights, batches, images)


def _one_block(backbone):
    """Build a float32 backbone of one block per tower, without values."""
    config = backbone.get_config()
    for tower in ("vision_encoder", "text_decoder"):
        config[tower] = config[tower] | {"num_layers": 1}
    config |= {"quantization": None, "form": "unrolled", "remat": None}
    config |= {"dtype": "float32", "name": "one_block"}
    with without_values():
        twin = type(backbone).from_config(config)
    # Otherwise Torch saves activations for a gradient.
    twin.trainable = False
    return twin


def _through_vision(backbone, twin, floats, weights, batches):
    """Calibrate the vision encoder; return each batch's image tokens."""
    encoder, projector = backbone.vision_encoder, twin.vision_encoder.projector
    images = [x["images"] for x, _, _ in batches]
    xs = [_to_float(encoder.embed(image)) for image in images]
    arguments, valid = [()] * len(xs), [None] * len(xs)
    (block,) = twin.vision_encoder.blocks.each_block()
    xs = _through_blocks(
        encoder.blocks, block, floats, weights, xs, arguments, valid
    )
    xs = [encoder.final_norm(x) for x in xs]
    writers = _writers(projector, weights)
    _calibrate(
        projector, 0, floats, writers, lambda at: projector(xs[at]), valid
    )
    shapes = [encoder.compute_output_shape(image.shape) for image in images]
    return [
        np.reshape(_to_float(projector(x)), shape)
        for x, shape in zip(xs, shapes, strict=True)
    ]


def _through_text(backbone, twin, floats, weights, batches, images):
    """Calibrate the decoder's blocks, and the table."""
    decoder = backbone.text_decoder
    xs, arguments, valid = [], [], []
    for (x, _, _), image_BID in zip(batches, images, strict=True):
        x = {key: array for key, array in x.items() if key != "images"}
        if image_BID is not None:
            x["image_embeddings"] = image_BID
        xs.append(_to_float(backbone.embed(x)))
        count = xs[-1].shape[1] - x["token_ids"].shape[1]
        mask, positions_BL = backbone.mask_and_positions(x, count)
        arguments.append(decoder.arguments_of_blocks(mask, positions_BL))
        image_part = ((0, 0), (count, 0))
        valid.append(np.pad(x["padding_mask"], image_part, constant_values=1))
    (block,) = twin.text_decoder.blocks.each_block()
    xs = _through_blocks(
        decoder.blocks, block, floats, weights, xs, arguments, valid
    )
    layout = weights[TABLE].quantized_format
    if layout.mode != "int4":
        return
    moment = 0
    for x, (_, y, sample_weight) in zip(xs, batches, strict=True):
        # The states that predict the responses: all inputs of the head.
        states = _to_float(decoder.final_norm(x))[:, -y.shape[1] - 1 : -1]
        states = states[np.asarray(sample_weight) > 0]
        moment = moment + states.T @ states
    table = floats[TABLE].read_layer(0)
    rounded = round_for(layout, np.asarray(table), *order_and_factor(moment))
    weights[TABLE].layer_writer()(0, *rounded)


def _through_blocks(stack, block, floats, weights, xs, arguments, valid):
    """Calibrate the blocks of a tower.

    Args:
        stack: `LayerStack`.
        block: a float block, which takes the weights of each block in turn.
        floats: dict of name to `LazyTensor`.
        weights: dict of name to the `Weight` that is rounded.
        xs: list of arrays (B, T, D), one per batch.
        arguments: list of tuples, the other arguments of the blocks.
        valid: list of bool arrays (B, T), the tokens that count; `None`: all.

    Returns:
        list of arrays (B, T, D), the outputs of the last rounded block.
    """
    writers = _writers(block, weights)
    for number in range(stack.num_layers):
        more = stack.number_argument(number)

        def run(at, xs=xs, more=more):
            return block(xs[at], *arguments[at], **more)

        _calibrate(block, number, floats, writers, run, valid)
        xs = [_to_float(run(at)) for at in range(len(xs))]
    return xs


def _writers(layer, weights):
    """Return a dict of kernel name to its format and its writer."""
    names = [stable_name(variable.path) for variable in layer.variables]
    return {
        name: (weights[name].quantized_format, weights[name].layer_writer())
        for name in names
        if weights[name].scales
    }


def _calibrate(layer, number, floats, writers, run, valid):
    """Round the projections of a layer, calibrated on their inputs.

    Args:
        layer: Keras layer of floats; afterwards it holds the rounded kernels.
        number: int, index of the layer in `floats` and `writers`.
        floats: dict of stable name to `LazyTensor`.
        writers: see `_writers`.
        run: function of a batch's index that calls the layer.
        valid: see `_through_blocks`.
    """
    for variable in layer.variables:
        name = stable_name(variable.path)
        Weight((variable,)).assign(floats[name].read_layer(number))
    for moment, projections in _moments(layer, run, valid):
        factored = order_and_factor(moment)
        for projection in projections:
            layout, write = writers[stable_name(projection.kernel.path)]
            kernel = Weight((projection.kernel,))
            stored, scale = round_for(layout, kernel.read(), *factored)
            write(number, stored, scale)
            # The rounded kernel, for the inputs of the next block.
            rounded = layout.dequantize(
                ops.convert_to_tensor(stored),
                ops.convert_to_tensor(scale.astype("float32")),
                "float32",
            )
            kernel.assign(ops.convert_to_numpy(rounded))


def _moments(layer, run, valid):
    """Sum x·xᵀ over the inputs of each projection of a layer.

    Returns:
        list of pairs: an array, and the projections that share these inputs.
    """
    sums, sharing = {}, {}
    last = tokens = None

    def observe(projection, x):
        nonlocal last
        if last is None or x is not last[0]:
            last = x, projection
            size = math.prod(projection.input_axes)
            x = ops.reshape(ops.cast(x, "float32"), (-1, size))
            if tokens is not None:
                x = x * ops.convert_to_tensor(tokens)
            moment = ops.matmul(ops.transpose(x), x)
            sums[projection] = sums.get(projection, 0) + moment
        sharing[projection] = last[1]

    projections = [
        inner
        for inner in layer._flatten_layers()
        if isinstance(inner, Projection)
    ]
    for projection in projections:
        projection.observer = functools.partial(observe, projection)
    for at, mask in enumerate(valid):
        if mask is not None:
            tokens = np.reshape(mask, (-1, 1)).astype("float32")
        run(at)
    for projection in projections:
        projection.observer = None
    return [
        (to_host(moment), [key for key in projections if sharing[key] is first])
        for first, moment in sums.items()
    ]


def _to_float(x):
    return np.asarray(to_host(x), "float32")
