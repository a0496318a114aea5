"""The functions of a SavedModel's four signatures."""

import inspect
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
import tensorflow_text

from keras_paligemma.export.pictures import read_pictures
from keras_paligemma.export.prompts import read_prompts
from keras_paligemma.export.weights import BARE
from keras_paligemma.export.weights import Weights
from keras_paligemma.generation.loop import Plan
from keras_paligemma.generation.loop import answer
from keras_paligemma.generation.options import copy_seeds
from keras_paligemma.generation.options import prompt_seeds
from keras_paligemma.layers.cpu_products import answering_scope
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
        # No Keras objects are attributes: only variables are to be saved.
        weights = Weights(model.backbone)
        self.weights, self.adapters = weights.base, weights.adapters
        self.values = weights.values
        self.tokenizer = tensorflow_text.SentencepieceTokenizer(
            model.preprocessor.tokenizer.proto
        )
        self.functions = Functions(model, weights, self.tokenizer).signatures()


class Functions:
    """What the signatures compute.

    Args:
        model: `PaliGemmaCausalLM`, see `Answering`.
        weights: `Weights` of its backbone.
        tokenizer: `tensorflow_text.SentencepieceTokenizer`.
    """

    def __init__(self, model, weights, tokenizer):
        self.backbone = model.backbone
        self.preprocessor = model.preprocessor
        self.weights = weights
        self.tokenizer = tokenizer
        self.prompt_length = model.preprocessor.prompt_length
        self.response_length = model.preprocessor.response_length
        self.end = model.preprocessor.tokenizer.end_token_id
        # Alone: the preprocessor's own tokenizer may add bos and eos.
        self.separator = tokenizer.tokenize("\n").numpy().tolist()
        self.options = {
            option.name: option
            for option in _options(self.backbone, self.response_length)
        }
        # Traced once, for all signatures that call it.
        self._answer = tf.function(self._answer_eagerly, autograph=False)

    def signatures(self):
        """Return a dict of signature names to functions."""
        size = self.preprocessor.image_converter.image_size
        texts = [
            tf.TensorSpec([None], tf.string, name)
            for name in ("images", "prompts")
        ]
        arrays = [
            tf.TensorSpec([None, *size, 3], tf.float32, "images"),
            tf.TensorSpec([None, None], tf.int32, "token_ids"),
            tf.TensorSpec([None, None], tf.bool, "padding_mask"),
            tf.TensorSpec([None, None], tf.bool, "response_mask"),
        ]
        defaults = self._defaults()
        adapters = []
        if "adapter" in defaults:
            adapters = [tf.TensorSpec([], tf.string, "adapter")]
        options = [
            tf.TensorSpec([], option.default.dtype, name)
            for name, option in self.options.items()
        ]
        options += adapters
        return {
            "serving_default": _signature(
                self.serve, texts + options, defaults
            ),
            "batched": _signature(self.batched, texts, {}),
            "generate": _signature(self.generate, arrays + options, defaults),
            "score": _signature(self.score, arrays + adapters, defaults),
        }

    def serve(self, images, prompts, adapter=BARE, **options):
        """Answer encoded pictures and prompts."""
        same = tf.debugging.assert_equal(
            tf.size(images),
            tf.size(prompts),
            "Images and prompts do not match. Expected: one prompt a picture.",
        )
        with tf.control_dependencies([same]):
            images = tf.identity(images)
        converter = self.preprocessor.image_converter
        pixels, image_errors = read_pictures(
            images, converter.image_size, converter.resize
        )
        ids, padding, prompt_errors = read_prompts(
            self.tokenizer,
            prompts,
            self.preprocessor.tokenizer.start_token_id,
            self.separator,
            self.prompt_length,
            self.preprocessor.on_long_prompt,
        )
        errors = _first(
            self._option_error(adapter, options), image_errors, prompt_errors
        )
        shape = tf.shape(ids)[0], self.response_length
        inputs = {
            "images": pixels,
            "prompt_ids": ids,
            "prompt_mask": padding,
            "response_ids": tf.zeros(shape, tf.int32),
            "response_mask": tf.zeros(shape, tf.bool),
        }
        good: Any = errors == ""
        ids, log_probabilities = self._answer(inputs, good, adapter, options)
        kept = tf.ragged.boolean_mask(ids, (ids != self.end) & (ids != 0))
        return {
            "text": tf.where(good, self.tokenizer.detokenize(kept), ""),
            "log_probabilities": log_probabilities,
            "token_ids": ids,
            # In SentencePiece's spelling, so that a client that scores words
            # needs no tokenizer.
            "tokens": self.tokenizer.id_to_string(ids),
            "error": errors,
        }

    def batched(self, images, prompts):
        """Answer as `serve`; without scalar options, servers can batch."""
        return self.serve(images, prompts, **self._defaults())

    def generate(
        self,
        images,
        token_ids,
        padding_mask,
        response_mask,
        adapter=BARE,
        **options,
    ):
        """Answer the preprocessor's arrays."""
        text, _ = self._in_parts(token_ids, padding_mask, response_mask)
        inputs = {"images": images, **text.arrays()}
        check = tf.debugging.assert_equal(
            self._option_error(adapter, options), ""
        )
        with tf.control_dependencies([check]):
            wanted = tf.ones_like(text.prompt_ids[:, 0], tf.bool)
        ids, log_probabilities = self._answer(inputs, wanted, adapter, options)
        return {"token_ids": ids, "log_probabilities": log_probabilities}

    def score(
        self, images, token_ids, padding_mask, response_mask, adapter=BARE
    ):
        """Return log-probabilities of responses, and hidden states."""
        text, missing = self._in_parts(token_ids, padding_mask, response_mask)
        check = tf.debugging.assert_equal(self.weights.error(adapter), "")
        with (
            tf.control_dependencies([check]),
            self.weights.selected(adapter),
            answering_scope(),
        ):
            hidden_BLD = self.backbone({"images": images, **text.arrays()})
            logits_BRV = self.backbone.logits(text.predicting(hidden_BLD))
        each_BR = -tf.nn.sparse_softmax_cross_entropy_with_logits(
            text.response_ids, logits_BRV
        )
        each_BR = tf.where(text.response_mask, each_BR, 0.0)
        # Without the columns of padding.
        columns = self.prompt_length + self.response_length
        pictures = hidden_BLD.shape[1] - columns
        given = [hidden_BLD[:, :pictures], hidden_BLD[:, pictures + missing :]]
        return {
            "log_probabilities": each_BR,
            "log_likelihood": tf.reduce_sum(each_BR, 1),
            "hidden_states": tf.concat(given, 1),
        }

    def _defaults(self):
        """Return the options of a request that names none."""
        defaults: dict[str, Any] = {
            name: option.default for name, option in self.options.items()
        }
        if len(self.weights.names) > 1:
            defaults["adapter"] = tf.constant(self.weights.default)
        return defaults

    def _answer_eagerly(self, inputs, wanted_B, adapter, options):
        """Answer by the loop that `model.generate` runs.

        Args:
            inputs: dict as `generation.prefill.prefill` takes it, with the
                start of the responses.
            wanted_B: bool tensor, False on rows that need no answer.
            adapter: string tensor, see `Weights.selected`.
            options: dict of the names of `_options` to tensors.

        Returns:
            int32 ids (B, max_new_tokens), 0 after the end token; and the
            log-probability of each token at temperature 1, 0 for tokens that
            were given and after the end.
        """
        given_BR = inputs["response_ids"]
        rows = tf.shape(given_BR)[0]
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
        each = {name: tf.fill([rows], options[name]) for name in names}
        drawn = tf.random.uniform([], maxval=2**31 - 1, dtype=tf.int32)
        seed = tf.where(options["seed"] < 0, drawn, options["seed"])
        each["seed"] = copy_seeds(prompt_seeds(seed, tf.range(rows)), 0)
        each["wanted"] = wanted_B
        each["start_node"] = tf.zeros_like(given_BR[:, 0])
        shared = {"stop_ids": tf.constant([self.end]), "sampler": []}
        with self.weights.selected(adapter), answering_scope():
            state = answer(
                self.backbone, Plan(samples=True), inputs | each, shared
            )
        longest = self.response_length
        width = tf.clip_by_value(options["max_new_tokens"], 0, longest)
        return state.ids_BR[:, :width], state.log_probabilities_BR[:, :width]

    def _option_error(self, adapter, options):
        """Return the first error of a request's options: a string tensor."""
        errors = (
            option.error(options[name]) for name, option in self.options.items()
        )
        return _first(*errors, self.weights.error(adapter))

    def _in_parts(self, *texts):
        """Pad on the left to the longest prompt, and split off the response.

        Args:
            *texts: tensors (B, columns) of the names of `WHOLE_NAMES`.

        Returns:
            `PromptAndResponse`, and an int32 tensor, the columns that were
            added; they are masked.
        """
        columns = self.prompt_length + self.response_length
        width = tf.shape(texts[0])[1]
        check = tf.debugging.Assert(
            (width > self.response_length) & (width <= columns),
            [
                f"The text does not fit. Expected: 1 to {self.prompt_length} "
                f"columns of prompt, then {self.response_length} of response. "
                "Received, together: ",
                width,
            ],
        )
        with tf.control_dependencies([check]):
            missing = columns - width
        texts = [
            tf.ensure_shape(
                tf.pad(text, [[0, 0], [missing, 0]]), [None, columns]
            )
            for text in texts
        ]
        whole = dict(zip(WHOLE_NAMES, texts, strict=True))
        return PromptAndResponse.cut(whole, self.response_length), missing


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
