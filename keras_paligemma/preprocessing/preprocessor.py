"""The one place that knows how text is laid out in a sequence."""

import os

import keras
import keras_hub
import numpy as np

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.hugging_face.tokenizer import with_added_tokens
from keras_paligemma.compat import classproperty
from keras_paligemma.preprocessing import parts
from keras_paligemma.preprocessing.graph import call_in_python
from keras_paligemma.preprocessing.graph import is_symbolic
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

CONFIG_FILE = "preprocessor.json"


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
        sequence_length: Integer, tokens of both parts, for those who know
            KerasHub's preprocessor: a part that is not given gets what the
            other leaves; of none given, the response gets half, rounded down.
        add_start_token: `True`: the model knows no prompt without bos.
        add_end_token: `True`: the model ends each response with eos.
        prompt_length: Integer, tokens of the prompt part, bos and separator
            included; 64 if neither this nor `sequence_length` is given.
        response_length: Integer, tokens of the response part, eos included;
            likewise.
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
        sequence_length: int | None = None,
        add_start_token: bool = True,
        add_end_token: bool = True,
        *,
        prompt_length: int | None = None,
        response_length: int | None = None,
        on_long_prompt: str = "error",
        on_long_response: str = "warn",
        **kwargs,
    ):
        prompt_length, response_length = _lengths(
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
    def from_preset(cls, preset, config_file=CONFIG_FILE, **kwargs):
        """Reads the preprocessor of a preset; reads and fetches no weights.

        Args:
            preset: As `PaliGemmaCausalLM.from_preset` takes it, or a folder
                that `save_to_preset` of a preprocessor wrote.
            config_file: String, name of the file in such a folder.
            **kwargs: In place of what the preset says: arguments of the
                class, and `tokenizer`, a path or handle, where none is there.

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
    def saved_in(cls, folder, config_file=CONFIG_FILE, **kwargs):
        """Reads what `save_to_preset` of a preprocessor wrote.

        Args:
            folder: Whatever `from_preset` takes.
            config_file: String, name of its file.
            **kwargs: As `from_preset` takes them.

        Returns:
            `PaliGemmaCausalLMPreprocessor`; `None` where there is none, or a
            whole preset with one of its own.
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
        preprocessor.load_preset_assets(os.fspath(folder))
        return preprocessor

    @classmethod
    def from_files(cls, config, tokenizer, added_tokens=None, **kwargs):
        """Reads the preprocessor of what `formats.resolve` found.

        Args:
            config: `ModelConfig`.
            tokenizer: Path of a SentencePiece model or a `tokenizer.json`.
            added_tokens: Dictionary of id to string, tokens that this model
                does not have.
            **kwargs: As `from_preset` takes them.

        Returns:
            `PaliGemmaCausalLMPreprocessor`.

        Raises:
            ValueError: there is no tokenizer.
        """
        tokenizer = PaliGemmaTokenizer.from_file(tokenizer)
        fields = _changed(config.preprocessor.to_dict(), kwargs)
        converter = PaliGemmaImageConverter(
            config.backbone.image_size, resize=fields.pop("resize")
        )
        if added_tokens:
            size = config.backbone.text_decoder.vocabulary_size
            proto = with_added_tokens(tokenizer.proto, added_tokens, size)
            tokenizer = PaliGemmaTokenizer(proto)
        return cls(tokenizer, converter, **fields)

    def save_to_preset(self, preset_dir):
        """Writes configuration and vocabulary to a folder.

        Args:
            preset_dir: Path; `from_preset` reads it. Beside the preset of a
                backbone, `PaliGemmaCausalLM.from_preset` reads both.

        Raises:
            ValueError: the folder holds a preset with a preprocessor, or
                another library's files.
        """
        parts.refuse_other_files(preset_dir)
        super().save_to_preset(preset_dir)

    @classproperty
    def presets(cls):
        """Describes the presets, as `PaliGemmaBackbone.presets` does."""
        return presets.describe_all()

    def build(self, input_shape=None):
        """Does nothing; the base class would make a packer."""
        self.built = True

    def __call__(self, x, y=None, sample_weight=None, sequence_length=None):
        # Keras refuses dictionaries that mix tensors with strings, and has
        # nothing to trace or build here.
        if isinstance(x, tuple):  # An element of a dataset.
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(x)
        if y is None and not _is_preprocessed(x) and is_symbolic(x):
            return call_in_python(self, x, sample_weight, sequence_length)
        return self.call(x, y, sample_weight, sequence_length)

    def call(self, x: dict, y=None, sample_weight=None, sequence_length=None):
        """Makes a training example, or a batch of them.

        Args:
            x: Dictionary with `"images"`, `"prompts"` and `"responses"`: one
                picture and two strings, or lists of them. Arrays that are
                preprocessed already (`"token_ids"`) pass through. As a
                function of a dataset's `map` a call takes tensors of a graph,
                and runs in Python by `tf.numpy_function`.
            y: `None`; targets come from the responses.
            sample_weight: `None`, or one weight an example.
            sequence_length: Integer, tokens of both parts in this call: the
                response gets what the prompt leaves. `None` for that of the
                layer.

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
        length = self.response_length_of(sequence_length)
        responses = fit_responses(
            [row + [self.tokenizer.end_token_id] for row in responses],
            length,
            self.on_long_response,
        )
        x = self._arrays(x, prompts, responses, length, batched)
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

    def response_length_of(self, sequence_length: int | None) -> int:
        """Counts the tokens that prompts leave of a sequence's.

        Args:
            sequence_length: Integer, or `None` for that of the layer.
        """
        if sequence_length is None:
            return self.response_length
        sequence_length = to_length(
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
        """Makes the input of generation: the response part is to be filled.

        Args:
            x: Dictionary with `"images"`, `"prompts"` and, where the answers
                have begun, `"responses"`. Preprocessed arrays pass through.
            sequence_length: Integer, tokens of prompt part and response part
                together, as `call` takes it.
            max_new_tokens: Integer, length of the response part, the begun
                answer included; `response_length` where it is `None`. Only
                one of the two can be given.

        Returns:
            Dictionary as `call` makes it; both masks are `False` where there
            is no token yet.
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
        embeddings = x.get("image_embeddings")
        if images is None and embeddings is not None:
            embeddings = to_numpy(embeddings)
            # Those of one picture serve all prompts.
            if batched and embeddings.ndim == 2:
                shape = (len(prompts), *embeddings.shape)
                embeddings = np.broadcast_to(embeddings, shape)
            return {"image_embeddings": embeddings, **arrays}
        # A key that is forgotten is no text alone.
        if images is None and (self.image_converter is None or "images" in x):
            return arrays
        if images is None or self.image_converter is None:
            raise ValueError(
                "Images and the image converter go together. Expected: both, "
                "or neither for text alone, or 'images': None. Received: keys "
                f"{sorted(x)}, "
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
        """Text tokens of a row; set, it is divided as the class says."""
        return self.prompt_length + self.response_length

    @sequence_length.setter
    def sequence_length(self, value):
        self.prompt_length, self.response_length = _lengths(value)

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


def _lengths(sequence_length, prompt_length=None, response_length=None):
    """Gives the lengths of both parts; see the arguments of the class."""
    if sequence_length is None:
        prompt_length = 64 if prompt_length is None else prompt_length
        response_length = 64 if response_length is None else response_length
    else:
        sequence_length = to_length(sequence_length, "sequence_length", least=4)
        if prompt_length is None and response_length is None:
            response_length = sequence_length // 2
            response_length = min(response_length, sequence_length - 3)
        if response_length is None:
            response_length = sequence_length - prompt_length
        if prompt_length is None:
            prompt_length = sequence_length - response_length
    prompt_length = to_length(prompt_length, "prompt_length", least=3)
    response_length = to_length(response_length, "response_length")
    if sequence_length not in (None, prompt_length + response_length):
        raise ValueError(
            "The parts do not make up the whole. Received: "
            f"sequence_length={sequence_length}, "
            f"prompt_length={prompt_length}, "
            f"response_length={response_length}. Expected: two of them."
        )
    return prompt_length, response_length


def _changed(config, kwargs):
    """Puts arguments in place of what a configuration says."""
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
