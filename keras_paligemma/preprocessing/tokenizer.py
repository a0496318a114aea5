"""SentencePiece with the location and segment pieces of PaliGemma."""

import math
import os
import warnings
from pathlib import Path
from typing import Any
from typing import Self

import keras
import keras_hub
import numpy as np

# protobuf makes the class at run time, where a type checker does not see it.
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.hugging_face.tokenizer import read_tokenizer
from keras_paligemma.checkpoints.hugging_face.tokenizer import with_added_tokens
from keras_paligemma.checksums import check_published
from keras_paligemma.compat import classproperty
from keras_paligemma.compat import sentence_piece_processor
from keras_paligemma.preprocessing import parts
from keras_paligemma.preprocessing.inputs import to_ids
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.inputs import to_strings
from keras_paligemma.types import Config
from keras_paligemma.types import PathLike

LOCATION_PIECES = [f"<loc{i:04d}>" for i in range(1024)]
SEGMENT_PIECES = [f"<seg{i:03d}>" for i in range(128)]

# Texts that are converted in turn. For a batch SentencePiece starts threads,
# which takes longer than the conversion of some 50 short texts.
FEW = 32


def append_location_and_segment_pieces(proto: bytes) -> bytes:
    """Append `<loc0000>`…`<loc1023>` and `<seg000>`…`<seg127>` to a model.

    This turns Gemma's tokenizer into PaliGemma's, which has the same pieces
    followed by these.

    Args:
        proto: bytes, a serialized SentencePiece model.

    Returns:
        bytes; `proto` itself if it has all of the pieces already.

    Raises:
        ValueError: `proto` has only some of the pieces, or in another order.

    Example:

    ```python
    with open("tokenizer.model", "rb") as file:
        proto = append_location_and_segment_pieces(file.read())
    ```

    Source: big_vision `pp/ops_text.py`, `tokensets=("loc", "seg")`. They are
    user-defined pieces of score 0, as in `paligemma_tokenizer.model`.
    """
    model = ModelProto.FromString(proto)
    wanted = LOCATION_PIECES + SEGMENT_PIECES
    wanted_set = set(wanted)
    ids, found = [], []
    for id, piece in enumerate(model.pieces):
        if piece.piece in wanted_set:
            ids.append(id)
            found.append(piece.piece)
    if found == wanted and ids[-1] - ids[0] == len(wanted) - 1:
        return proto
    if found:
        raise ValueError(
            "The SentencePiece model has some of the location and segment "
            f"pieces. Expected: none of the {len(wanted)}, or all of them in "
            f"one run. Received: {len(found)}, from {found[0]} at {ids[0]} "
            f"to {found[-1]} at {ids[-1]}. Pass Gemma's or PaliGemma's own "
            "file, or `add_location_and_segment_pieces=False`."
        )
    for piece in wanted:
        model.pieces.add(
            piece=piece,
            score=0.0,
            type=model.SentencePiece.USER_DEFINED,
        )
    return model.SerializeToString()


@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaTokenizer(keras_hub.tokenizers.SentencePieceTokenizer):
    """Convert strings to token ids and back, boxes and masks included.

    Boxes are written as four of 1024 location pieces, masks as 16 of 128
    segment pieces. Gemma's file lacks both; they are appended when it is read.
    Runs in Python and returns lists.

    Args:
        proto: path or bytes of a SentencePiece model whose pad, eos, bos and
            unknown ids are 0, 1, 2, 3. `None` to load assets later.
        add_bos: bool, whether `tokenize` puts the bos id first.
        add_eos: bool, whether `tokenize` puts the eos id last.
        add_location_and_segment_pieces: bool, append these pieces to a model
            that lacks them.

    Raises:
        ValueError: `proto` is not such a model, or is a damaged copy of
            Gemma's or PaliGemma's published file (by size and hash).

    Example:

    ```python
    tokenizer = PaliGemmaTokenizer("paligemma_tokenizer.model")
    ids = tokenizer.tokenize("caption en")  # [21209, 659]
    tokenizer.detokenize(ids)  # "caption en"
    ```

    Source: Kudo and Richardson, 2018, https://arxiv.org/abs/1808.06226.
    """

    pad_token_id = 0
    end_token_id = 1
    start_token_id = 2
    unknown_token_id = 3

    def __init__(
        self,
        proto: str | os.PathLike[str] | bytes | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        add_location_and_segment_pieces: bool = True,
        **kwargs: Any,
    ) -> None:
        # Before `super().__init__`, which calls `set_proto`.
        self.add_location_and_segment_pieces = add_location_and_segment_pieces
        super().__init__(
            proto=proto, add_bos=add_bos, add_eos=add_eos, **kwargs
        )

    @classmethod
    def from_preset(
        cls,
        preset: PathLike,
        config_file: str = "tokenizer.json",
        **kwargs: Any,
    ) -> Self:
        """Create the tokenizer of a preset, without its weights.

        Args:
            preset: as in `PaliGemmaCausalLM.from_preset`, or a folder written
                by `save_to_preset` of a tokenizer or preprocessor.
            config_file: str, name of the file in such a folder.
            **kwargs: arguments of the class that override the preset's.

        Returns:
            `PaliGemmaTokenizer`.

        Raises:
            ValueError: unknown preset, or one without a tokenizer.
        """
        config = parts.read(cls, preset, config_file)
        if config is None:
            checkpoint = formats.resolve(preset, False, tokenizer=True)
            return cls.from_file(
                checkpoint.tokenizer,
                checkpoint.config.backbone.text_decoder.vocabulary_size,
                checkpoint.added_tokens,
                **kwargs,
            )
        tokenizer = cls.from_config(config | kwargs)
        tokenizer.load_preset_assets(os.path.expanduser(preset))
        return tokenizer

    @classmethod
    def from_file(
        cls,
        path: PathLike | None,
        vocabulary_size: int | None = None,
        added_tokens: dict[int, str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Create the tokenizer from a checkpoint's file.

        Args:
            path: path of a SentencePiece model or a `tokenizer.json`; `None`
                if the checkpoint has none, which raises an error.
            vocabulary_size: int, rows of the checkpoint's embedding, or `None`
                if unknown. Pieces that have no rows are not appended.
            added_tokens: dict of id to str, tokens of transformers that the
                SentencePiece model lacks; needs `vocabulary_size`.
            **kwargs: arguments of the class.

        Returns:
            `PaliGemmaTokenizer`.

        Raises:
            ValueError: no file, or a damaged one.
        """
        if path is None:
            raise ValueError(
                "The checkpoint comes without a SentencePiece model or a "
                "tokenizer.json of transformers. Pass "
                "`tokenizer='paligemma_tokenizer.model'`, a path or a handle: "
                "gs://big_vision/paligemma_tokenizer.model is the original's, "
                "hf://google/paligemma2-3b-pt-224/tokenizer.model the same "
                "for every size. Or load with `preprocessor=None` to do "
                "without strings."
            )
        is_json = Path(path).suffix == ".json"
        proto = read_tokenizer(path) if is_json else path
        tokenizer = cls(proto, **kwargs)
        if (vocabulary_size or math.inf) < tokenizer.vocabulary_size():
            kwargs["add_location_and_segment_pieces"] = False
            tokenizer = cls(proto, **kwargs)
        if added_tokens:
            proto = with_added_tokens(
                tokenizer.proto, added_tokens, vocabulary_size
            )
            tokenizer = cls(proto, **kwargs)
        return tokenizer

    def save_to_preset(self, preset_dir: PathLike) -> None:
        """Write configuration and vocabulary to a folder.

        Args:
            preset_dir: path of the folder, for `from_preset`.

        Raises:
            ValueError: the folder holds a preset with a preprocessor, or
                another library's files.
        """
        super().save_to_preset(parts.folder_for(preset_dir))

    @classproperty
    def presets(cls) -> dict[str, Any]:
        """Descriptions of the presets, see `PaliGemmaBackbone.presets`."""
        return presets.describe_all()

    @property
    def start_token(self) -> str:
        """The piece that a prompt begins with, such as `<bos>`."""
        return self.id_to_token(self.start_token_id)

    @property
    def end_token(self) -> str:
        """The piece that a response ends with, such as `<eos>`."""
        return self.id_to_token(self.end_token_id)

    @property
    def pad_token(self) -> str:
        """The piece of padding, such as `<pad>`."""
        return self.id_to_token(self.pad_token_id)

    def _set_proto_tf(self, proto):
        # The base class would also create a TensorFlow resource, which starts
        # TensorFlow's runtime. This tokenizer never runs in a graph.
        pass

    def set_proto(self, proto: Any) -> None:
        """Load a SentencePiece model, see the class's `proto` argument."""
        if isinstance(proto, os.PathLike):
            proto = os.fspath(proto)
        is_path = isinstance(proto, str) and len(proto) < 2048  # else base64
        source = proto if is_path else "The tokenizer"
        try:
            with warnings.catch_warnings():
                # KerasHub does not close the file.
                warnings.simplefilter("ignore", ResourceWarning)
                super().set_proto(proto)
        except (OSError, RuntimeError) as error:
            source = proto if isinstance(proto, str) else f"{len(proto)} bytes"
            raise ValueError(
                "The tokenizer could not be read. Expected: path or bytes of "
                f"a SentencePiece model. Received: {source}: {error}"
            ) from error
        if proto is None:
            return
        check_published(self.proto, source)
        self._check_special_ids()
        if self.add_location_and_segment_pieces:
            extended = append_location_and_segment_pieces(self.proto)
            if extended is not self.proto:
                super().set_proto(extended)

    def _check_special_ids(self):
        model = ModelProto.FromString(self.proto)
        spec = model.trainer_spec
        names = [spec.pad_piece, spec.eos_piece, spec.bos_piece, spec.unk_piece]
        received = [piece.piece for piece in model.pieces[:4]]
        # Names differ between models (`<eos>`, `</s>`), so they are read from
        # the model itself.
        if received != names:
            raise ValueError(
                "The tokenizer has other special ids than Gemma. Expected: "
                f"pad, eos, bos, unknown = 0, 1, 2, 3, named {names} by this "
                f"model. Received: {received} as its first pieces."
            )

    @property
    def location_token_ids(self) -> range:
        """Range of the 1024 ids of `<loc0000>`…`<loc1023>`."""
        return self._run_of_ids(LOCATION_PIECES)

    @property
    def segment_token_ids(self) -> range:
        """Range of the 128 ids of `<seg000>`…`<seg127>`."""
        return self._run_of_ids(SEGMENT_PIECES)

    def _run_of_ids(self, pieces):
        first = self.token_to_id(pieces[0])
        if first == self.unknown_token_id:
            raise ValueError(
                f"The tokenizer has no `{pieces[0]}`. Make it with "
                "`add_location_and_segment_pieces=True`."
            )
        return range(first, first + len(pieces))

    def tokenize(self, inputs: Any) -> list[int] | list[list[int]]:
        """Split text into token ids.

        Args:
            inputs: str, or list of str.

        Returns:
            list of ids, or list of lists of ids.
        """
        strings, batched = to_strings(inputs, "inputs")
        if len(strings) > FEW or self.sequence_length:
            ids = super().tokenize(strings)
        else:
            processor = sentence_piece_processor(self)
            ids = [
                processor.Encode(
                    string, add_bos=self.add_bos, add_eos=self.add_eos
                )
                for string in strings
            ]
        return ids if batched else ids[0]

    def detokenize(self, inputs: Any) -> str | list[str]:
        """Convert token ids to text, without pad, eos and bos.

        Args:
            inputs: an id; list or array of ids; or a list of lists, or an
                array of shape `(batch, length)`.

        Returns:
            str, or list of str.

        Raises:
            ValueError: an id is not an integer, or outside of the vocabulary.
        """
        if not isinstance(inputs, (list, tuple)):
            inputs = np.atleast_1d(to_numpy(inputs)).tolist()
        batched = bool(inputs) and np.ndim(inputs[0]) == 1
        rows = inputs if batched else [inputs]
        size = self.vocabulary_size()
        rows = [to_ids(row, "inputs", size).tolist() for row in rows]
        if len(rows) > FEW:
            texts = super().detokenize(rows)
        else:
            processor = sentence_piece_processor(self)
            texts = [processor.Decode(row) for row in rows]
        return texts if batched else texts[0]

    def get_config(self) -> Config:
        config = super().get_config()
        config["add_location_and_segment_pieces"] = (
            self.add_location_and_segment_pieces
        )
        return config
