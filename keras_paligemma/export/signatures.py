"""The functions of a SavedModel's four signatures."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text

from keras_paligemma.export.pictures import read_pictures
from keras_paligemma.export.prompts import read_prompts
from keras_paligemma.export.weights import BARE
from keras_paligemma.export.weights import Weights
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.loop import answer as answered
from keras_paligemma.generation.options import copy_seeds
from keras_paligemma.generation.options import prompt_seeds
from keras_paligemma.preprocessing.prompt_and_response import WHOLE_NAMES
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse


class Answering(tf.Module):
    """A model as TensorFlow functions, and the variables that they read.

    Args:
        model: `PaliGemmaCausalLM` of the TensorFlow backend with a
            preprocessor, which sets the lengths.
    """

    def __init__(self, model):
        super().__init__()
        preprocessor = model.preprocessor
        tokenizer = preprocessor.tokenizer
        backbone = model.backbone
        # No Keras objects are attributes: only variables are to be saved.
        weights = Weights(backbone)
        self.weights, self.adapters = weights.base, weights.adapters
        self.values = weights.values
        self.tokenizer = tensorflow_text.SentencepieceTokenizer(tokenizer.proto)
        self.functions = _signatures(
            backbone,
            self.tokenizer,
            preprocessor,
            weights,
            np.array(tokenizer.tokenize("\n")).tolist(),
        )


def _signatures(backbone, tokenizer, preprocessor, weights, separator):
    """Return a dict of signature names to functions."""
    size = preprocessor.image_converter.image_size
    rule = preprocessor.image_converter.resize
    prompt = preprocessor.prompt_length
    longest = preprocessor.response_length
    start = preprocessor.tokenizer.start_token_id
    stop = preprocessor.tokenizer.end_token_id
    texts = [
        tf.TensorSpec([None], tf.string, name) for name in ("images", "prompts")
    ]
    chosen = {option.name: option for option in _options(backbone, longest)}
    options = [
        tf.TensorSpec([], option.default.dtype, name)
        for name, option in chosen.items()
    ]
    defaults: dict[Any, Any] = {
        name: option.default for name, option in chosen.items()
    }
    defaults["adapter"] = tf.constant(weights.default)
    adapters = []
    if len(weights.names) > 1:
        adapters = [tf.TensorSpec([], tf.string, "adapter")]
    arrays = [
        tf.TensorSpec([None, *size, 3], tf.float32, "images"),
        *(
            tf.TensorSpec([None, None], dtype, name)
            for name, dtype in (
                ("token_ids", tf.int32),
                ("padding_mask", tf.bool),
                ("response_mask", tf.bool),
            )
        ),
    ]

    # Traced once, for both signatures that call it.
    @tf.function(autograph=False)
    def answer(inputs, wanted_B, adapter, options):
        with weights.selected(adapter):
            return answer_tokens(backbone, inputs, stop, wanted_B, options)

    def option_error(adapter, options):
        errors = (chosen[name].error(options[name]) for name in chosen)
        return _first(*errors, weights.error(adapter))

    def serve(images, prompts, adapter=BARE, **options):
        same = tf.debugging.assert_equal(
            tf.size(images),
            tf.size(prompts),
            "Images and prompts do not match. Expected: one prompt a picture.",
        )
        with tf.control_dependencies([same]):
            images = tf.identity(images)
        pixels, image_errors = read_pictures(images, size, rule)
        ids, padding, prompt_errors = read_prompts(
            tokenizer,
            prompts,
            start,
            separator,
            prompt,
            preprocessor.on_long_prompt,
        )
        errors = _first(
            option_error(adapter, options),
            image_errors,
            prompt_errors,
        )
        rows = tf.shape(ids)[0]
        inputs = {
            "images": pixels,
            "prompt_ids": ids,
            "prompt_mask": padding,
            "response_ids": tf.zeros((rows, longest), tf.int32),
            "response_mask": tf.zeros((rows, longest), tf.bool),
        }
        good: Any = errors == ""
        ids, log_probabilities = answer(inputs, good, adapter, options)
        kept = tf.ragged.boolean_mask(ids, (ids != stop) & (ids != 0))
        return {
            "text": tf.where(good, tokenizer.detokenize(kept), ""),
            "log_probabilities": log_probabilities,
            "token_ids": ids,
            # In SentencePiece's spelling, so that a client that scores words
            # needs no tokenizer.
            "tokens": tokenizer.id_to_string(ids),
            "error": errors,
        }

    def batched(images, prompts):
        """Answer as `serve`; without scalar options, servers can batch."""
        given: Any = {option.name: defaults[option.name] for option in options}
        return serve(images, prompts, **given)

    def filled_up(*texts):
        """Pad on the left to the longest prompt; padding is masked."""
        width = tf.shape(texts[0])[1]
        check = tf.debugging.Assert(
            (width > longest) & (width <= prompt + longest),
            [
                f"The text does not fit. Expected: 1 to {prompt} columns of "
                f"prompt, then {longest} of response. Received, together: ",
                width,
            ],
        )
        with tf.control_dependencies([check]):
            missing = prompt + longest - width
        texts = [tf.pad(text, [[0, 0], [missing, 0]]) for text in texts]
        return missing, *(
            tf.ensure_shape(text, [None, prompt + longest]) for text in texts
        )

    def in_parts(*texts):
        return PromptAndResponse.cut(
            dict(zip(WHOLE_NAMES, texts, strict=True)), longest
        )

    def generate(
        images,
        token_ids,
        padding_mask,
        response_mask,
        adapter=BARE,
        **options,
    ):
        _, token_ids, padding_mask, response_mask = filled_up(
            token_ids, padding_mask, response_mask
        )
        text = in_parts(token_ids, padding_mask, response_mask)
        inputs = {"images": images, **text.arrays()}
        check = tf.debugging.assert_equal(option_error(adapter, options), "")
        with tf.control_dependencies([check]):
            wanted = tf.ones_like(token_ids[:, 0], tf.bool)
        ids, log_probabilities = answer(inputs, wanted, adapter, options)
        return {"token_ids": ids, "log_probabilities": log_probabilities}

    def score(images, token_ids, padding_mask, response_mask, adapter=BARE):
        missing, token_ids, padding_mask, response_mask = filled_up(
            token_ids, padding_mask, response_mask
        )
        text = in_parts(token_ids, padding_mask, response_mask)
        check = tf.debugging.assert_equal(weights.error(adapter), "")
        with tf.control_dependencies([check]), weights.selected(adapter):
            hidden_BLD = backbone({"images": images, **text.arrays()})
            logits_BRV = backbone.logits(text.predicting(hidden_BLD))
        each_BR = -tf.nn.sparse_softmax_cross_entropy_with_logits(
            text.response_ids, logits_BRV
        )
        each_BR = tf.where(text.response_mask, each_BR, 0.0)
        # Without the columns of padding.
        pictures = hidden_BLD.shape[1] - prompt - longest
        given = [hidden_BLD[:, :pictures], hidden_BLD[:, pictures + missing :]]
        return {
            "log_probabilities": each_BR,
            "log_likelihood": tf.reduce_sum(each_BR, 1),
            "hidden_states": tf.concat(given, 1),
        }

    options += adapters
    return {
        "serving_default": _signature(serve, texts + options, defaults),
        "batched": _signature(batched, texts, {}),
        "generate": _signature(generate, arrays + options, defaults),
        "score": _signature(score, arrays + adapters, defaults),
    }


def _signature(function, specs, defaults):
    """Return a `tf.function` for a signature with default arguments.

    Args:
        function: function whose arguments have the names of `specs`.
        specs: list of `tf.TensorSpec`.
        defaults: dict of argument names to tensors.
    """

    def called(*inputs):
        # A loaded function takes tensors of any shape, so shapes are checked.
        return function(
            **{
                spec.name: tf.ensure_shape(tensor, spec.shape, spec.name)
                for spec, tensor in zip(specs, inputs, strict=True)
            }
        )

    # TensorFlow reads argument names and defaults from here.
    called.__signature__ = inspect.Signature(
        [
            inspect.Parameter(
                spec.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=defaults.get(spec.name, inspect.Parameter.empty),
            )
            for spec in specs
        ]
    )
    return tf.function(called, input_signature=specs, autograph=False)


def answer_tokens(backbone, inputs, stop, wanted_B, options):
    """Answer by the loop that `generate` runs.

    Args:
        backbone: `PaliGemmaBackbone`.
        inputs: dict as `generation.prefill.prefill` takes it, with the start
            of the responses.
        stop: int, id of the end token.
        wanted_B: bool tensor, False on rows that need no answer.
        options: dict of the names of `_options` to tensors.

    Returns:
        int32 ids (B, max_new_tokens), 0 after the end token; and the
        log-probability of each token at temperature 1, 0 for tokens that were
        given and after the end.
    """
    given_BR = inputs["response_ids"]
    rows = tf.shape(given_BR)[0]
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    each = {name: tf.fill([rows], options[name]) for name in names}
    drawn = tf.random.uniform([], maxval=2**31 - 1, dtype=tf.int32)
    seed = tf.where(options["seed"] < 0, drawn, options["seed"])
    each["seed"] = copy_seeds(prompt_seeds(seed, tf.range(rows)), 0)
    each |= {"wanted": wanted_B, "start_node": tf.zeros_like(given_BR[:, 0])}
    shared = {"stop_ids": tf.constant([stop]), "sampler": []}
    state = answered(backbone, Plan(samples=True), inputs | each, shared)
    width = tf.clip_by_value(options["max_new_tokens"], 0, given_BR.shape[1])
    return state.ids_BR[:, :width], state.log_probabilities_BR[:, :width]


@dataclass(frozen=True)
class _Option:
    """An input of a signature that controls decoding, with its range.

    Args:
        name: str.
        default: scalar tensor.
        expected: str, the range in words.
        least, most: numbers.
        above: bool, whether `least` itself is out of range.
    """

    name: str
    default: Any
    expected: str
    least: float
    most: float
    above: bool = False

    def error(self, value):
        """Return an error for a value out of range, or "": a string tensor."""
        low = value > self.least if self.above else value >= self.least
        message = tf.strings.join(
            [
                f"`{self.name}` is out of range. Expected: {self.expected}. "
                "Received: ",
                tf.as_string(value),
                ".",
            ]
        )
        return tf.where(low & (value <= self.most), "", message)


def _options(backbone, longest):
    """Return the options of a request, for all of its rows."""
    size = backbone.vocabulary_size
    return (
        _Option(
            "max_new_tokens",
            tf.constant(longest),
            f"1 to {longest}, what the model was exported for",
            1,
            longest,
        ),
        _Option(
            "temperature",
            tf.constant(0.0),
            "0, which takes the likeliest token, or more",
            0,
            tf.float32.max,
        ),
        _Option(
            "top_k",
            tf.constant(size),
            f"1 to {size}, the vocabulary's size",
            1,
            size,
        ),
        _Option(
            "top_p",
            tf.constant(1.0),
            "more than 0, at most 1",
            0,
            1,
            above=True,
        ),
        _Option("min_p", tf.constant(0.0), "0 to 1", 0, 1),
        _Option(
            "seed",
            tf.constant(-1),
            "0 or more, or -1, which draws one",
            -1,
            tf.int32.max,
        ),
    )


def _first(*errors):
    """Return the first error of each row that is not empty."""
    *before, error = errors
    for other in reversed(before):
        error = tf.where(other == "", error, other)
    return error
