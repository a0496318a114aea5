"""The preprocessor, which defines how text is laid out in a sequence."""

import os
from typing import Any
from typing import Self

import keras
import keras_hub
import numpy as np

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.compat import classproperty
from keras_paligemma.preprocessing import parts
from keras_paligemma.preprocessing.graph import call_in_python
from keras_paligemma.preprocessing.graph import is_symbolic
from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.image_inputs import convert_images
from keras_paligemma.preprocessing.inputs import check_dictionary
from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.layout import LONGEST_RESPONSE
from keras_paligemma.preprocessing.layout import fit_responses
from keras_paligemma.preprocessing.layout import pack
from keras_paligemma.preprocessing.layout import part_lengths
from keras_paligemma.preprocessing.texts import tokenize_texts
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer
from keras_paligemma.types import Config
from keras_paligemma.types import PathLike

CONFIG_FILE = "preprocessor.json"


@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Convert images, prompts and responses to the model's inputs.

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
    The separator is tokenized on its own, as in the original. The layout adds
    `<image>` and `<bos>`, so a prompt that starts with them as text loses them
    with a warning; at other places they raise an error, as `<eos>` always
    does.

    Args:
        tokenizer: `PaliGemmaTokenizer`.
        image_converter: `PaliGemmaImageConverter`, or `None` for text alone.
        sequence_length: int, tokens of both parts, as in KerasHub's
            preprocessor: a part that is not given gets the rest; if neither
            is given, the response gets half, rounded down.
        add_start_token: bool, must be `True`: every prompt begins with bos.
        add_end_token: bool, must be `True`: every response ends with eos.
        prompt_length: int, tokens of the prompt part, bos and separator
            included; 64 if neither this nor `sequence_length` is given.
        response_length: int, tokens of the response part, eos included;
            likewise.
        on_long_prompt: str, `"error"`, or `"truncate"` to drop the end of the
            text and keep bos and separator.
        on_long_response: str, `"warn"` to truncate the response, without eos,
            and warn; `"keep_eos"` to truncate it with eos last; or `"error"`.

    Raises:
        ValueError: invalid argument; when called, inputs that do not match.

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
        sequence_length: int | None = None,
        add_start_token: bool = True,
        add_end_token: bool = True,
        *,
        prompt_length: int | None = None,
        response_length: int | None = None,
        on_long_prompt: str = "error",
        on_long_response: str = "warn",
        **kwargs: Any,
    ) -> None:
        prompt_length, response_length = part_lengths(
            sequence_length, prompt_length, response_length
        )
        if not (add_start_token and add_end_token):
            raise ValueError(
                "Prompts begin with bos and responses end with eos: "
                "PaliGemma's checkpoints have seen nothing else. Expected: "
                "True for both. Received: "
                f"add_start_token={add_start_token}, "
                f"add_end_token={add_end_token}."
            )
        _check_choice("on_long_prompt", on_long_prompt, ("error", "truncate"))
        _check_choice(
            "on_long_response",
            on_long_response,
            ("warn", "keep_eos", "error"),
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
    def from_preset(
        cls,
        preset: PathLike,
        config_file: str = CONFIG_FILE,
        **kwargs: Any,
    ) -> Self:
        """Create the preprocessor of a preset, without its weights.

        Args:
            preset: as in `PaliGemmaCausalLM.from_preset`, or a folder written
                by `save_to_preset` of a preprocessor.
            config_file: str, name of the file in such a folder.
            **kwargs: arguments of the class that override the preset's, and
                `tokenizer`, a path or handle, if the preset has none.

        Returns:
            `PaliGemmaCausalLMPreprocessor`.
        """
        saved = cls.saved_in(preset, config_file, **kwargs)
        if saved is not None:
            return saved
        tokenizer = kwargs.pop("tokenizer", True)
        checkpoint = formats.resolve(preset, False, tokenizer=tokenizer)
        if "resize" not in kwargs:
            checkpoint.say_assumed("resize")
        return cls.from_files(
            checkpoint.config,
            checkpoint.tokenizer,
            checkpoint.added_tokens,
            **kwargs,
        )

    @classmethod
    def saved_in(
        cls,
        folder: PathLike,
        config_file: str = CONFIG_FILE,
        **kwargs: Any,
    ) -> Self | None:
        """Read a folder written by `save_to_preset` of a preprocessor.

        Args:
            folder: argument of `from_preset`.
            config_file: str, name of the file.
            **kwargs: as in `from_preset`.

        Returns:
            `PaliGemmaCausalLMPreprocessor`; `None` if `folder` is not such a
            folder, or is a model's preset with a preprocessor.
        """
        config = parts.read(cls, folder, config_file)
        if config is None:
            return None
        config = _changed(config, kwargs)
        if "tokenizer" in kwargs:
            path = presets.locate(kwargs["tokenizer"])
            config["tokenizer"] = PaliGemmaTokenizer.from_file(path)
            return cls.from_config(config)
        preprocessor = cls.from_config(config)
        preprocessor.load_preset_assets(os.path.expanduser(folder))
        return preprocessor

    @classmethod
    def from_files(
        cls,
        config: Any,
        tokenizer: Any,
        added_tokens: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Create the preprocessor from the results of `formats.resolve`.

        Args:
            config: `ModelConfig`.
            tokenizer: path of a SentencePiece model or a `tokenizer.json`.
            added_tokens: dict of id to str, tokens that the SentencePiece
                model lacks.
            **kwargs: as in `from_preset`.

        Returns:
            `PaliGemmaCausalLMPreprocessor`.

        Raises:
            ValueError: there is no tokenizer.
        """
        size = config.backbone.text_decoder.vocabulary_size
        tokenizer = PaliGemmaTokenizer.from_file(tokenizer, size, added_tokens)
        fields = _changed(config.preprocessor.to_dict(), kwargs)
        converter = PaliGemmaImageConverter(
            config.backbone.image_size, resize=fields.pop("resize")
        )
        return cls(tokenizer, converter, **fields)

    def save_to_preset(self, preset_dir: PathLike) -> None:
        """Write configuration and vocabulary to a folder.

        Args:
            preset_dir: path of the folder, for `from_preset`. If it holds a
                backbone's preset, `PaliGemmaCausalLM.from_preset` reads both.

        Raises:
            ValueError: the folder holds a preset with a preprocessor, or
                another library's files.
        """
        super().save_to_preset(parts.folder_for(preset_dir))

    @classproperty
    def presets(cls) -> dict[str, Any]:
        """Descriptions of the presets, see `PaliGemmaBackbone.presets`."""
        return presets.describe_all()

    def build(self, input_shape: Any = None) -> None:
        """Do nothing; the base class would create a packer."""
        self.built = True

    def __call__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        # Keras's `__call__` raises on dicts that mix tensors with strings, and
        # there is nothing to trace or build.
        if isinstance(x, tuple):  # An element of a dataset.
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(x)
        if y is None and not _is_preprocessed(x) and is_symbolic(x):
            return call_in_python(self, x, sample_weight, sequence_length)
        return self.call(x, y, sample_weight, sequence_length)

    def call(
        self,
        x: dict,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        """Preprocess a training example, or a batch of them.

        Args:
            x: dict with `"images"`, `"prompts"` and `"responses"`: one
                picture and two strings, or lists of them. Preprocessed arrays
                (with `"token_ids"`) are returned unchanged. In a dataset's
                `map`, symbolic tensors are processed in Python by
                `tf.numpy_function`.
            y: `None`; targets come from the responses.
            sample_weight: `None`, or one weight per example.
            sequence_length: int, tokens of both parts in this call: the
                response gets the rest after `prompt_length`. `None` for the
                layer's own.

        Returns:
            `(x, y, sample_weight)`: `x` has `images` float32 (B, R, R, 3) or
            (B, frames, R, R, 3), `token_ids` int32, `padding_mask` and
            `response_mask` bool (B, prompt + response); `y` int32 (B,
            response) are the response ids; `sample_weight`, float32 of that
            shape, is 1 on them, eos included. A single example has no B.

        Raises:
            ValueError: missing responses, targets in `y`, or inputs that do
                not match.
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
        length = self.response_length_of(sequence_length)
        responses = fit_responses(
            [row + [self.tokenizer.end_token_id] for row in responses],
            length,
            self.on_long_response,
        )
        x = self._arrays(x, prompts, responses, length, batched)
        y = x["token_ids"][..., -length:]
        weights = x["response_mask"][..., -length:].astype("float32")
        if sample_weight is not None:
            sample_weight = to_numpy(sample_weight).astype("float32")
            if sample_weight.shape != weights.shape[:-1]:
                raise ValueError(
                    "`sample_weight` does not match the examples. Expected: "
                    f"shape {weights.shape[:-1]}, one weight an example. "
                    f"Received: shape {sample_weight.shape}."
                )
            if not (0 <= sample_weight).all() or np.isinf(sample_weight).any():
                raise ValueError(
                    "A sample weight is a finite number of at least 0. "
                    f"Received: {sample_weight.tolist()}."
                )
            weights = weights * sample_weight[..., None]
        return x, y, weights

    def response_length_of(self, sequence_length: int | None) -> int:
        """Return the tokens that a sequence has after its prompt part.

        Args:
            sequence_length: int, or `None` for that of the layer.
        """
        if sequence_length is None:
            return self.response_length
        sequence_length = to_integer(
            sequence_length, "sequence_length", least=self.prompt_length + 1
        )
        return sequence_length - self.prompt_length

    def generate_preprocess(
        self,
        x: dict,
        sequence_length: int | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Preprocess the inputs of generation, with room for the response.

        Args:
            x: dict with `"images"`, `"prompts"` and optionally `"responses"`,
                the beginnings of the answers. Preprocessed arrays are
                returned unchanged.
            sequence_length: int, tokens of both parts, as in `call`.
            max_new_tokens: int, length of the response part, beginnings
                included; `None` for `response_length`. Only one of the two
                can be given.

        Returns:
            dict as in `call`; both masks are `False` where there is no token
            yet.

        Raises:
            ValueError: both lengths, no room for an answer, or inputs that do
                not match.
        """
        if _is_preprocessed(x):
            return x
        if None not in (sequence_length, max_new_tokens):
            raise ValueError(
                "The answer's length is given twice. Received: "
                f"sequence_length={sequence_length}, "
                f"max_new_tokens={max_new_tokens}. Expected: one of them."
            )
        if max_new_tokens is None:
            length = self.response_length_of(sequence_length)
        else:
            length = to_integer(
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
        """Convert generated ids to strings.

        Args:
            x: dict with `"token_ids"`: ints (B, response) of the response
                part; tokens after the first eos are dropped.

        Returns:
            list of B strings; a string if there is no B.
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
        return tokenize_texts(
            x, self.tokenizer, self.prompt_length, self.on_long_prompt
        )

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
        pictures = convert_images(
            x, self.image_converter, len(prompts), batched
        )
        return pictures | arrays

    @property
    def sequence_length(self) -> int:
        """Text tokens of a row; a new value is divided as by the class."""
        return self.prompt_length + self.response_length

    @sequence_length.setter
    def sequence_length(self, value: int | None) -> None:
        self.prompt_length, self.response_length = part_lengths(value)

    def get_config(self) -> Config:
        config = super().get_config()
        # Arguments of the base class that follow from the others.
        for key in ("sequence_length", "add_start_token", "add_end_token"):
            del config[key]
        config.update(
            prompt_length=self.prompt_length,
            response_length=self.response_length,
            on_long_prompt=self.on_long_prompt,
            on_long_response=self.on_long_response,
        )
        return config


def _changed(config, kwargs):
    """Return a configuration with some arguments replaced."""
    if kwargs.get("sequence_length") is not None:
        lengths = ("prompt_length", "response_length")
        config = {k: v for k, v in config.items() if k not in lengths}
    return config | kwargs


def _is_preprocessed(x):
    check_dictionary(x)
    return "token_ids" in x


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {value!r}."
        )
