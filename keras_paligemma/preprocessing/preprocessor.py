"""The one place that knows how text is laid out in a sequence."""

import keras
import keras_hub
import numpy as np

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.known_files import read_checked
from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.inputs import check_dictionary
from keras_paligemma.preprocessing.inputs import check_no_special_tokens
from keras_paligemma.preprocessing.inputs import plain_prompts
from keras_paligemma.preprocessing.inputs import to_length
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.inputs import to_strings
from keras_paligemma.preprocessing.layout import LONGEST_RESPONSE
from keras_paligemma.preprocessing.layout import fit_prompts
from keras_paligemma.preprocessing.layout import fit_responses
from keras_paligemma.preprocessing.layout import pack
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer

_NO_SEQUENCE_LENGTH = (
    "`sequence_length` cannot be set. Expected: `prompt_length` and "
    "`response_length`, whose sum it is. Received: sequence_length={}."
)


@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Images, prompts and responses to the arrays that the model reads.

    The text of an example has two parts of fixed length; the model puts the
    image tokens before them:

    ```
        prompt_length             response_length
    | 0 0 0 <bos> caption en \\n | a cat <eos> 0 0 0 |   token_ids
    | 0 0 0   1      1    1   1  | 1  1    1   0 0 0 |   padding_mask
    | 0 0 0   0      0    0   0  | 1  1    1   0 0 0 |   response_mask
    ```

    The prompt is aligned to the right, so prompts of all lengths end at one
    index, where generation begins; logits are needed for the response only.
    The separator is tokenized on its own, as in the original. `<image>` and
    `<bos>` typed in front of a prompt are what the layout adds anyway, and are
    dropped with a warning; elsewhere, and `<eos>`, they are an error.

    Args:
        tokenizer: `PaliGemmaTokenizer`.
        image_converter: `PaliGemmaImageConverter`, or `None` for text alone.
        prompt_length: Integer, tokens of the prompt part, bos and separator
            included.
        response_length: Integer, tokens of the response part, eos included.
        on_long_prompt: `"error"`, or `"truncate"`, which drops the end of the
            text and keeps bos and separator.
        on_long_response: `"warn"` cuts the response, which loses its eos, and
            warns; `"keep_eos"` cuts it and puts eos last; `"error"`.

    Raises:
        ValueError: an argument is none of these, or, on calling, the input
            does not fit together.

    Example:

    ```python
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer("paligemma_tokenizer.model"),
        PaliGemmaImageConverter(224),
        prompt_length=16,
        response_length=32,
    )
    x, y, sample_weight = preprocessor({
        "images": ["cat.jpg", "dog.png"],
        "prompts": ["caption en", "answer en what is it?"],
        "responses": ["a cat on a mat", "dog"],
    })
    x["token_ids"].shape, y.shape  # (2, 48), (2, 32)
    ```

    Source: big_vision `configs/proj/paligemma/transfers/common.py` and
    `pp/proj/paligemma/ops.py`, which packs the same tokens to the left.
    """

    tokenizer_cls = PaliGemmaTokenizer
    image_converter_cls = PaliGemmaImageConverter

    def __init__(
        self,
        tokenizer: PaliGemmaTokenizer,
        image_converter: PaliGemmaImageConverter | None = None,
        prompt_length: int = 64,
        response_length: int = 64,
        on_long_prompt: str = "error",
        on_long_response: str = "warn",
        **kwargs,
    ):
        prompt_length = to_length(prompt_length, "prompt_length", least=3)
        response_length = to_length(response_length, "response_length")
        _check_choice("on_long_prompt", on_long_prompt, ("error", "truncate"))
        _check_choice(
            "on_long_response",
            on_long_response,
            ("warn", "keep_eos", "error"),
        )
        if "sequence_length" in kwargs:
            raise ValueError(
                _NO_SEQUENCE_LENGTH.format(kwargs["sequence_length"])
            )
        super().__init__(
            tokenizer,
            sequence_length=prompt_length + response_length,
            **kwargs,
        )
        self.image_converter = image_converter
        self.prompt_length = prompt_length
        self.response_length = response_length
        self.on_long_prompt = on_long_prompt
        self.on_long_response = on_long_response
        self.built = True

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Reads the preprocessor of a preset; reads and fetches no weights.

        Args:
            preset: As `PaliGemmaCausalLM.from_preset` takes it.
            **kwargs: In place of what the preset says: arguments of the
                class, and `tokenizer`, a path or handle, where none is there.

        Returns:
            `PaliGemmaCausalLMPreprocessor`.
        """
        if "tokenizer" in kwargs:
            checkpoint = formats.resolve(preset, load_weights=False)
            checkpoint.tokenizer = presets.locate(kwargs.pop("tokenizer"))
        else:
            checkpoint = formats.resolve(preset, False, tokenizer=True)
        return cls.from_files(checkpoint.config, checkpoint.tokenizer, **kwargs)

    @classmethod
    def from_files(cls, config, tokenizer, **kwargs):
        """Reads the preprocessor of what `formats.resolve` found.

        Args:
            config: Dictionary.
            tokenizer: Path of a SentencePiece model.
            **kwargs: As `from_preset` takes them.

        Returns:
            `PaliGemmaCausalLMPreprocessor`.

        Raises:
            ValueError: there is no tokenizer.
        """
        if tokenizer is None:
            raise ValueError(
                "The checkpoint comes without a SentencePiece model; a "
                "tokenizer.json of transformers cannot stand for it. Pass "
                "`tokenizer='paligemma_tokenizer.model'`, a path or a handle: "
                "gs://big_vision/paligemma_tokenizer.model is the original's, "
                "hf://google/paligemma2-3b-pt-224/tokenizer.model the same "
                "for every size. Or load with `preprocessor=None` to do "
                "without strings."
            )
        fields = config["preprocessor"] | kwargs
        converter = PaliGemmaImageConverter(
            config["backbone"]["image_size"], resize=fields.pop("resize")
        )
        tokenizer = PaliGemmaTokenizer(read_checked(tokenizer))
        return cls(tokenizer, converter, **fields)

    def build(self, input_shape=None):
        """Does nothing; the base class would make a packer."""
        self.built = True

    def __call__(self, x, y=None, sample_weight=None):
        # Keras refuses dictionaries that mix tensors with strings, and has
        # nothing to trace or build here.
        if isinstance(x, tuple):  # An element of a dataset.
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(x)
        return self.call(x, y, sample_weight)

    def call(self, x: dict, y=None, sample_weight=None):
        """Makes a training example, or a batch of them.

        Args:
            x: Dictionary with `"images"`, `"prompts"` and `"responses"`: one
                picture and two strings, or lists of them. Arrays that are
                preprocessed already (`"token_ids"`) pass through.
            y: `None`; targets come from the responses.
            sample_weight: `None`, or one weight an example.

        Returns:
            `(x, y, sample_weight)`: `x` has `images` float32 (B, R, R, 3) or
            (B, frames, R, R, 3), `token_ids` int32, `padding_mask` and
            `response_mask` bool (B, prompt + response); `y` int32 (B,
            response) are the response ids, `sample_weight` float32 of that
            shape is 1 on them, eos included. One example has no B.
        """
        if _is_preprocessed(x):
            return keras.utils.pack_x_y_sample_weight(x, y, sample_weight)
        if y is not None:
            raise ValueError(
                "Targets are made from `x['responses']`. Expected: `y=None`. "
                f"Received: `y` of type {type(y).__name__}."
            )
        if x.get("responses") is None:
            raise ValueError(
                "Training needs the answers. Expected: a dictionary with "
                f"'images', 'prompts', 'responses'. Received: {sorted(x)}. "
                "To predict, use `generate` or `generate_preprocess`."
            )
        prompts, responses, batched = self._texts(x)
        responses = fit_responses(
            [row + [self.tokenizer.end_token_id] for row in responses],
            self.response_length,
            self.on_long_response,
        )
        x = self._arrays(x, prompts, responses, self.response_length, batched)
        y = x["token_ids"][..., self.prompt_length :]
        weights = x["response_mask"][..., self.prompt_length :]
        weights = weights.astype("float32")
        if sample_weight is not None:
            sample_weight = to_numpy(sample_weight).astype("float32")
            if sample_weight.shape != weights.shape[:-1]:
                raise ValueError(
                    "`sample_weight` does not match the examples. Expected: "
                    f"shape {weights.shape[:-1]}, one weight an example. "
                    f"Received: shape {sample_weight.shape}."
                )
            weights = weights * sample_weight[..., None]
        return x, y, weights

    def generate_preprocess(
        self, x: dict, max_new_tokens: int | None = None
    ) -> dict[str, np.ndarray]:
        """Makes the input of generation: the response part is to be filled.

        Args:
            x: Dictionary with `"images"`, `"prompts"` and, where the answers
                have begun, `"responses"`. Preprocessed arrays pass through.
            max_new_tokens: Integer, length of the response part, the begun
                answer included; `response_length` where it is `None`.

        Returns:
            Dictionary as `call` makes it; both masks are `False` where there
            is no token yet.
        """
        if _is_preprocessed(x):
            return x
        length = self.response_length
        if max_new_tokens is not None:
            length = to_length(
                max_new_tokens, "max_new_tokens", most=LONGEST_RESPONSE
            )
        prompts, responses, batched = self._texts(x)
        longest = max(map(len, responses))
        if longest >= length:
            raise ValueError(
                "A begun answer leaves no room to go on. Expected: fewer than "
                f"{length} tokens. Received: {longest}. Raise "
                "`max_new_tokens` or shorten `responses`."
            )
        return self._arrays(x, prompts, responses, length, batched)

    def generate_postprocess(self, x: dict) -> str | list[str]:
        """Makes strings of generated ids.

        Args:
            x: Dictionary with `"token_ids"`: integers (B, response) of the
                response part; what follows the first eos is dropped.

        Returns:
            List of B strings; one string where there is no B.
        """
        ids = to_numpy(x["token_ids"])
        end, pad = self.tokenizer.end_token_id, self.tokenizer.pad_token_id
        rows = []
        for row in np.atleast_2d(ids).tolist():
            row = row[: row.index(end)] if end in row else row
            rows.append([id for id in row if id != pad])
        texts = self.tokenizer.detokenize(rows)
        return texts if ids.ndim == 2 else texts[0]

    def _texts(self, x):
        """Token rows of prompts and responses, and whether x is a batch."""
        if x.get("prompts") is None:
            raise ValueError(
                "The prompts are missing. Expected: a dictionary with "
                f"'images' and 'prompts'. Received: {sorted(x)}."
            )
        strings, batched = to_strings(x["prompts"], "prompts")
        separator = self._tokenize(["\n"])[0]
        if not separator:
            raise ValueError(
                "The tokenizer drops newlines, which separate prompt and "
                "response. Expected: a SentencePiece model whose normalizer "
                "keeps them, such as 'identity'. Received: no token."
            )
        prompts = fit_prompts(
            self._tokenize(plain_prompts(strings)),
            [self.tokenizer.start_token_id],
            separator,
            self.prompt_length,
            self.on_long_prompt,
        )
        if x.get("responses") is None:
            return prompts, [[] for _ in prompts], batched
        strings, responses_batched = to_strings(x["responses"], "responses")
        if (len(strings), responses_batched) != (len(prompts), batched):
            raise ValueError(
                "Prompts and responses do not match. Expected: one response a "
                "prompt, both strings or both lists. Received: "
                f"{len(prompts)} prompts, {len(strings)} responses."
            )
        check_no_special_tokens(strings, "responses")
        return prompts, self._tokenize(strings), batched

    def _tokenize(self, strings):
        """Token rows without bos and eos, whatever the tokenizer adds."""
        rows = self.tokenizer.tokenize(strings)
        start, end = self.tokenizer.start_token_id, self.tokenizer.end_token_id
        rows = [row[1:] if row[:1] == [start] else row for row in rows]
        return [row[:-1] if row[-1:] == [end] else row for row in rows]

    def _arrays(self, x, prompts, responses, response_length, batched):
        arrays = pack(
            prompts,
            responses,
            self.prompt_length,
            response_length,
            self.tokenizer.pad_token_id,
        )
        if not batched:
            arrays = {key: value[0] for key, value in arrays.items()}
        images = x.get("images")
        if images is None and self.image_converter is None:
            return arrays
        if images is None or self.image_converter is None:
            raise ValueError(
                "Images and the image converter go together. Expected: both, "
                f"or neither for text alone. Received: keys {sorted(x)}, "
                f"image_converter={self.image_converter}."
            )
        images = self.image_converter(images)
        # One picture has rank 3, frames add one, and so does the batch.
        if images.ndim - batched not in (3, 4) or (
            batched and len(images) != len(prompts)
        ):
            raise ValueError(
                "Images and prompts do not match. Expected: one image, or one "
                f"list of frames, a prompt. Received: {len(prompts)} prompts"
                f"{'' if batched else ' (one string)'} and images of shape "
                f"{images.shape} after conversion."
            )
        return {"images": images, **arrays}

    @property
    def sequence_length(self) -> int:
        """Text tokens of a row: `prompt_length + response_length`."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value):
        # The constructor of the base class sets it once.
        if hasattr(self, "_sequence_length"):
            raise ValueError(_NO_SEQUENCE_LENGTH.format(value))
        self._sequence_length = value

    def get_config(self):
        config = super().get_config()
        # The base's arguments; here they follow from the others.
        for key in ("sequence_length", "add_start_token", "add_end_token"):
            del config[key]
        config.update(
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            on_long_prompt=self.on_long_prompt,
            on_long_response=self.on_long_response,
        )
        return config


def _is_preprocessed(x):
    check_dictionary(x)
    return "token_ids" in x


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {value!r}."
        )
