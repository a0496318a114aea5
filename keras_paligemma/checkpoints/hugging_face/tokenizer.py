"""Conversion between transformers' tokenizer files and SentencePiece."""

import json
import re

from google.protobuf.message import DecodeError

# protobuf makes the class at run time, where a type checker does not see it.
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # pyright: ignore[reportAttributeAccessIssue]

from keras_paligemma.checked import shown
from keras_paligemma.checkpoints.hugging_face.config import IMAGE
from keras_paligemma.checkpoints.hugging_face.config import to_json
from keras_paligemma.config import read_json

SPACE = "▁"
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# Names of the pieces with the ids 0 to 3.
SPECIAL = ("pad", "eos", "bos", "unk")
# Types of pieces in `sentencepiece_model.proto`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
# Maximum bytes; PaliGemma's tokenizer.json has 34 MB.
TOKENIZER_LIMIT = 200_000_000


def tokenizer_files(proto, vocabulary_size):
    """Create the files of a tokenizer with the same ids.

    transformers 5 reads only `tokenizer.json`, earlier versions also the
    SentencePiece model. `<image>` follows the pieces, as the model expects.
    As in the published files, the text of a special piece, such as `<bos>`,
    becomes that piece; SentencePiece treats it as plain text.

    Args:
        proto: bytes, a SentencePiece model.
        vocabulary_size: int, vocabulary size of its model.

    Returns:
        dict of file name to bytes.

    Raises:
        ValueError: listing features that transformers' Gemma tokenizer lacks.
    """
    try:
        model = ModelProto.FromString(proto)
    except DecodeError as error:
        raise ValueError(
            f"The tokenizer is no SentencePiece model: {error}. Expected: the "
            f"bytes of one. Received: {len(proto)} bytes."
        ) from error
    _check_vocabulary(model, vocabulary_size)
    special = {name: model.pieces[id].piece for id, name in enumerate(SPECIAL)}
    added = _added_tokens(model)
    return {
        "tokenizer.json": to_json(_tokenizer(model, special, added)),
        "tokenizer_config.json": to_json(_config(special, added)),
        "special_tokens_map.json": to_json(_special_tokens(special)),
        "tokenizer.model": proto,
    }


def read_tokenizer(path):
    """Read a `tokenizer.json` as a SentencePiece model.

    It is the only file that transformers 5 saves. Its pieces and the order of
    its merges determine the same model.

    Args:
        path: str or path.

    Returns:
        bytes of a SentencePiece model.

    Raises:
        ValueError: a damaged file, or a tokenizer of another kind than Gemma's.
    """
    content = read_json(path, TOKENIZER_LIMIT)
    try:
        return _to_sentencepiece(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no tokenizer of Gemma as transformers writes it: "
            f"{shown(error)}. Pass its SentencePiece model as "
            "`tokenizer='paligemma_tokenizer.model'`."
        ) from error


def _to_sentencepiece(content):
    """Convert the content of a `tokenizer.json` to a SentencePiece model."""
    bpe, normalizer = content["model"], content["normalizer"]
    if bpe["type"] != "BPE" or normalizer != NORMALIZER:
        raise ValueError("expected BPE over text whose spaces are replaced")
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    pieces = {id: piece for piece, id in bpe["vocab"].items()} | added
    # Tokens after `<image>` are added by name, see `with_added_tokens`.
    images = [id for id, piece in added.items() if piece == IMAGE]
    size = images[0] if images else len(pieces)
    # SentencePiece has a single score for all merges that produce a piece.
    ranks = {}
    for rank, pair in enumerate(bpe["merges"]):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault("".join(parts), rank)
    model = ModelProto()
    for id in range(size):
        piece = pieces[id]
        kind = NORMAL
        if id in (0, 1, 2):
            kind = CONTROL
        elif piece == bpe["unk_token"]:
            kind = UNKNOWN
        elif id in added:
            kind = USER_DEFINED
        elif bpe["byte_fallback"] and BYTE_PIECE.fullmatch(piece):
            kind = BYTE
        score = 0.0
        if kind == NORMAL:
            score = -float(ranks.get(piece, len(bpe["merges"])))
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = BPE, size
    trainer.byte_fallback = bpe["byte_fallback"]
    for id, name in enumerate(SPECIAL):
        setattr(trainer, f"{name}_id", id)
        setattr(trainer, f"{name}_piece", pieces[id])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


def added_tokens(folder):
    """Read the tokens that a tokenizer has in addition to its pieces.

    Versions of transformers store them in different files.

    Args:
        folder: `pathlib.Path`.

    Returns:
        dict of id to str, or `None` if the folder has no such file.

    Raises:
        ValueError: a damaged file, or an id with two names.
    """
    pairs, found = [], False
    for name, read in _ADDED_TOKENS.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            pairs += read(path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} does not list its added tokens as transformers does: "
                f"{shown(error)}. Save the tokenizer again."
            ) from error
        found = True
    tokens = {}
    for id, token in pairs:
        if type(id) is not int or not 0 <= id < 2**31 or type(token) is not str:
            raise ValueError(
                f"{folder} has a tokenizer that adds {shown(token)} with the "
                f"id {shown(id)}. Expected: a string and a whole number. Save "
                "the tokenizer again."
            )
        if tokens.setdefault(id, token) != token:
            raise ValueError(
                f"{folder} has a tokenizer whose files give the id {id} to "
                f"{shown(tokens[id])} and to {shown(token)}. Expected: one "
                "token an id. Save the tokenizer again."
            )
    return tokens if found else None


def _of_one_file(path):
    """List the added tokens of a `tokenizer.json`.

    They precede the vocabulary, up to 34 MB, which is not parsed.
    """
    text = path.read_text(encoding="utf-8")
    start = text.index('"added_tokens"') + len('"added_tokens"')
    start = text.index("[", start)
    try:
        listed, _ = json.JSONDecoder().raw_decode(text, start)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    return [(token["id"], token["content"]) for token in listed]


def _of_settings(path):
    tokens = read_json(path).get("added_tokens_decoder", {})
    return [(int(id), token["content"]) for id, token in tokens.items()]


def _of_a_list(path):
    return [(id, token) for token, id in read_json(path).items()]


_ADDED_TOKENS = {
    "tokenizer.json": _of_one_file,
    "tokenizer_config.json": _of_settings,
    "added_tokens.json": _of_a_list,
}


def with_added_tokens(proto, tokens, size):
    """Append the tokens that transformers added to a SentencePiece model.

    They are recognised in prompts and shown in answers. An id without a token,
    such as that of `<image>`, gets a piece that occurs in no text.

    Args:
        proto: bytes, a SentencePiece model.
        tokens: dict of id to str, which may include tokens of the model; an
            empty dict leaves the model unchanged.
        size: int, number of pieces of the result.

    Returns:
        Bytes.

    Raises:
        ValueError: a token that is already a piece.
    """
    if not tokens:
        return proto
    model = ModelProto.FromString(proto)
    pieces = {piece.piece for piece in model.pieces}
    for id in range(len(model.pieces), size):
        token, kind = tokens.get(id, IMAGE), USER_DEFINED
        # `<image>` is written after all of our pieces.
        if token == IMAGE:
            token, kind = f"<reserved{id}>", CONTROL
        # SentencePiece searches for pieces after it has replaced spaces.
        token = token.replace(" ", SPACE)
        if not token or token in pieces:
            raise ValueError(
                f"transformers' tokenizer adds {shown(token)} with the id "
                f"{id}, which the SentencePiece model has as a piece already. "
                "Expected: its own SentencePiece model. Pass that as "
                "`tokenizer=`."
            )
        pieces.add(token)
        model.pieces.add(piece=token, score=0.0, type=kind)
    return model.SerializeToString()


def _check_vocabulary(model, vocabulary_size):
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    named = {"<loc0000>", "<loc1023>", "<seg000>", "<seg127>"}
    wanted = {
        f"{vocabulary_size} pieces, one for each token of the model, not "
        f"{len(pieces)}": len(pieces) == vocabulary_size,
        "pad, eos, bos, unknown as the first pieces": (
            kinds[:4] == [CONTROL, CONTROL, CONTROL, UNKNOWN]
        ),
        # transformers appends those that a model lacks.
        "the pieces <loc0000>…<loc1023>, <seg000>…<seg127>": (
            named <= set(pieces)
        ),
        f"no piece {IMAGE}": IMAGE not in pieces,
        "a model of type BPE": trainer.model_type == BPE,
        "no unused pieces": UNUSED not in kinds,
        "text that is not normalized": not normalizer.precompiled_charsmap,
        "no space put before text": not normalizer.add_dummy_prefix,
        "no space taken away": not normalizer.remove_extra_whitespaces,
        f"spaces written as {SPACE}": normalizer.escape_whitespaces,
        "spaces before words": not trainer.treat_whitespace_as_suffix,
    }
    lacking = [name for name, holds in wanted.items() if not holds]
    if lacking:
        raise ValueError(
            "transformers' tokenizer of Gemma cannot do what this "
            f"SentencePiece model does. Expected: {'; '.join(lacking)}. "
            "Export the model without a tokenizer, or with PaliGemma's."
        )


def _added_tokens(model):
    """List the tokens that are split off before pieces are merged."""
    added = [
        _added_token(id, piece.piece, piece.type != USER_DEFINED)
        for id, piece in enumerate(model.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return [*added, _added_token(len(model.pieces), IMAGE, True)]


def _added_token(id, content, special):
    return {
        "id": id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        # SentencePiece splits off user-defined pieces after it has replaced
        # spaces, which some of Gemma's consist of.
        "normalized": not special,
        "special": special,
    }


def _merges(model):
    """List the pairs to merge, in order.

    SentencePiece has no such list. It merges the pair that gives the piece with
    the highest score, so every split of a piece into two pieces is a merge.
    """
    pieces = [
        (-piece.score, id, piece.piece)
        for id, piece in enumerate(model.pieces)
        if piece.type == NORMAL
    ]
    ids = {piece: id for _, id, piece in pieces}
    return [
        f"{left} {right}"
        for _, _, piece in sorted(pieces)
        for left, right in sorted(
            (
                (piece[:cut], piece[cut:])
                for cut in range(1, len(piece))
                if piece[:cut] in ids and piece[cut:] in ids
            ),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    ]


def _tokenizer(model, special, added):
    bos = special["bos"]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    vocabulary = {piece.piece: id for id, piece in enumerate(model.pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": NORMALIZER,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [2], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {
                    "type": "Replace",
                    "pattern": {"String": SPACE},
                    "content": " ",
                },
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": _merges(model),
        },
    }


def _config(special, added):
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {
                key: value for key, value in token.items() if key != "id"
            }
            for token in added
        },
        **_special_tokens(special),
        "clean_up_tokenization_spaces": False,
        # Gemma's class adds a piece of this name if there is none.
        "mask_token": None,
        "model_max_length": 10**30,
        "processor_class": "PaliGemmaProcessor",
        "tokenizer_class": "GemmaTokenizer",
    }


def _special_tokens(special):
    return {
        "additional_special_tokens": [IMAGE],
        **{f"{name}_token": piece for name, piece in special.items()},
    }
