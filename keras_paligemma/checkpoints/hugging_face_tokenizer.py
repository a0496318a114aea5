"""The tokenizer's files of transformers, from a SentencePiece model."""

import json

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

IMAGE = "<image>"
SPACE = "▁"
# Types of pieces in `sentencepiece_model.proto`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


def tokenizer_files(proto, vocabulary_size):
    """Make the files of a tokenizer that gives the same ids.

    transformers 5 reads `tokenizer.json` alone, earlier versions also the
    SentencePiece model. `<image>` follows the pieces, as the model expects.
    As in the published files, the text of a special piece, such as `<bos>`,
    means that piece; in SentencePiece it is plain text.

    Args:
        proto: bytes, a SentencePiece model.
        vocabulary_size: int, of the model that it belongs to.

    Returns:
        Dict of file name to bytes.

    Raises:
        ValueError: listing what transformers' class of Gemma lacks.
    """
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    except DecodeError as error:
        raise ValueError(
            f"The tokenizer is no SentencePiece model: {error}. Expected: the "
            f"bytes of one. Received: {len(proto)} bytes."
        ) from error
    _check(model, vocabulary_size)
    special = {
        name: model.pieces[id].piece
        for id, name in enumerate(("pad", "eos", "bos", "unk"))
    }
    added = _added_tokens(model)
    files = {
        "tokenizer.json": _tokenizer(model, special, added),
        "tokenizer_config.json": _config(special, added),
        "special_tokens_map.json": _special_tokens(special),
    }
    files = {
        name: json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
        for name, value in files.items()
    }
    return files | {"tokenizer.model": proto}


def _check(model, vocabulary_size):
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
        # transformers adds them, behind what the model has, if they lack.
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
    """List what is cut out of a text before pieces are merged."""
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
        # SentencePiece cuts user-defined pieces after it has replaced spaces,
        # of which some of Gemma's are made.
        "normalized": not special,
        "special": special,
    }


def _merges(model):
    """List the pairs to merge, the first ones first.

    SentencePiece merges the pair that makes the piece of the highest score,
    and has no list: every way to cut a piece into two is one.
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
        "normalizer": {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": SPACE,
        },
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
        "additional_special_tokens": [IMAGE],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": piece for name, piece in special.items()},
        # Gemma's class would add a piece of this name where there is none.
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
