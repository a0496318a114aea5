"""The functions of a SavedModel's four signatures."""

import inspect
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_text

from keras_paligemma.export.pictures import read_pictures
from keras_paligemma.export.prompts import read_prompts
from keras_paligemma.export.weights import BARE
from keras_paligemma.export.weights import Weights
from keras_paligemma.generation.prefill import decode
from keras_paligemma.generation.prefill import prefill
from keras_paligemma.preprocessing.prompt_and_response import WHOLE_NAMES
from keras_paligemma.preprocessing.prompt_and_response import PromptAndResponse


class Answering(tf.Module):
    """A model as TensorFlow functions, and the variables that they read.

    Args:
        model: `PaliGemmaCausalLM` of the TensorFlow backend with a
            preprocessor, whose lengths the functions have.
    """

    def __init__(self, model):
        super().__init__()
        preprocessor = model.preprocessor
        tokenizer = preprocessor.tokenizer
        backbone = model.backbone
        # No Keras objects are attributes: only variables are to be saved.
        held = Weights(backbone)
        self.weights, self.adapters = held.base, held.adapters
        self.values = held.values
        self.tokenizer = tensorflow_text.SentencepieceTokenizer(tokenizer.proto)
        self.functions = _signatures(
            backbone,
            self.tokenizer,
            preprocessor,
            held,
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
    options = [
        tf.TensorSpec([], tf.int32, "max_new_tokens"),
        tf.TensorSpec([], tf.float32, "temperature"),
    ]
    defaults: dict[Any, Any] = {
        "max_new_tokens": tf.constant(longest),
        "temperature": tf.constant(0.0),
        "adapter": tf.constant(weights.default),
    }
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
    def answer(inputs, max_new_tokens, temperature, adapter, done_B):
        with weights.selected(adapter):
            return answer_tokens(
                backbone, inputs, stop, max_new_tokens, temperature, done_B
            )

    def option_error(max_new_tokens, temperature, adapter):
        return _first(
            _option_error(max_new_tokens, temperature, longest),
            weights.error(adapter),
        )

    def serve(images, prompts, max_new_tokens, temperature, adapter=BARE):
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
            option_error(max_new_tokens, temperature, adapter),
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
        ids, log_probabilities = answer(
            inputs, max_new_tokens, temperature, adapter, ~good
        )
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
        """Answer as `serve`; servers batch inputs that all have rows."""
        return serve(images, prompts, *(defaults[one.name] for one in options))

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
        max_new_tokens,
        temperature,
        adapter=BARE,
    ):
        _, token_ids, padding_mask, response_mask = filled_up(
            token_ids, padding_mask, response_mask
        )
        text = in_parts(token_ids, padding_mask, response_mask)
        inputs = {"images": images, **text.arrays()}
        check = tf.debugging.assert_equal(
            option_error(max_new_tokens, temperature, adapter), ""
        )
        with tf.control_dependencies([check]):
            done = tf.zeros_like(token_ids[:, 0], tf.bool)
        ids, log_probabilities = answer(
            inputs, max_new_tokens, temperature, adapter, done
        )
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
        # Without the columns that were added by padding.
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


def answer_tokens(backbone, inputs, stop, max_new_tokens, temperature, done_B):
    """Prefill, then decode one token per row and step until all rows end.

    Args:
        backbone: `PaliGemmaBackbone`.
        inputs: dict as `generation.prefill.prefill` takes it.
        stop: int, id of the end token.
        max_new_tokens: int32 tensor.
        temperature: float32 tensor; 0 decodes greedily.
        done_B: bool tensor, True on rows that need no answer.

    Returns:
        int32 ids (B, max_new_tokens), 0 after the end token; and the
        log-probability of each token at temperature 1, 0 for tokens that were
        given and after the end.
    """
    given_BR = inputs["response_ids"]
    begun_BR = inputs["response_mask"]
    longest = given_BR.shape[1]
    hidden_B1D, cache = prefill(backbone, inputs, longest)

    def choose(index, logits_BV, state):
        ids_BR, each_BR, done_B = state
        token_B = tf.cond(
            temperature > 0,
            lambda: tf.random.categorical(
                logits_BV / tf.maximum(temperature, 1e-6), 1, tf.int32
            )[:, 0],
            lambda: tf.argmax(logits_BV, -1, tf.int32),
        )
        begun_B = begun_BR[:, index]
        token_B = tf.where(begun_B, given_BR[:, index], token_B)
        token_B = tf.where(done_B, 0, token_B)
        each_B = -tf.nn.sparse_softmax_cross_entropy_with_logits(
            token_B, logits_BV
        )
        each_B = tf.where(begun_B | done_B, 0.0, each_B)
        here_R = tf.range(longest) == index
        ids_BR = tf.where(here_R, token_B[:, None], ids_BR)
        each_BR = tf.where(here_R, each_B[:, None], each_BR)
        done_B |= (token_B == stop) & ~begun_B
        return ids_BR, each_BR, done_B

    def go_on(index, cache, state):
        return (index < max_new_tokens) & ~tf.reduce_all(state[2])

    def step(index, cache, state):
        token_B1 = state[0][:, index - 1, None]
        hidden_BD, cache = decode(backbone, token_B1, cache, index, longest)
        logits_BV = backbone.logits(hidden_BD)
        return index + 1, cache, choose(index, logits_BV, state)

    zeros_BR = tf.zeros_like(given_BR)
    state = (zeros_BR, tf.cast(zeros_BR, tf.float32), done_B)
    state = choose(0, backbone.logits(hidden_B1D[:, 0]), state)
    _, _, state = tf.while_loop(go_on, step, (1, cache, state))
    width = tf.clip_by_value(max_new_tokens, 0, longest)
    return state[0][:, :width], state[1][:, :width]


def _option_error(max_new_tokens, temperature, longest):
    """Return an error for options out of range, or "": a string tensor."""
    count = tf.strings.join(
        [
            f"`max_new_tokens` is out of range. Expected: 1 to {longest}, what "
            "the model was exported for. Received: ",
            tf.as_string(max_new_tokens),
            ".",
        ]
    )
    heat = tf.strings.join(
        [
            "`temperature` is out of range. Expected: 0, which takes the "
            "likeliest token, or more. Received: ",
            tf.as_string(temperature),
            ".",
        ]
    )
    is_count = (max_new_tokens >= 1) & (max_new_tokens <= longest)
    is_heat = (temperature >= 0) & tf.math.is_finite(temperature)
    return tf.where(is_count, tf.where(is_heat, "", heat), count)


def _first(*errors):
    """Return the first error of each row that is not empty."""
    *before, error = errors
    for other in reversed(before):
        error = tf.where(other == "", error, other)
    return error
