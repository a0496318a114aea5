import json
import pathlib

import keras
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from keras_paligemma.compat import sentence_piece_processor
from keras_paligemma.preprocessing.tokenizer import FEW
from keras_paligemma.preprocessing.tokenizer import LOCATION_PIECES
from keras_paligemma.preprocessing.tokenizer import SEGMENT_PIECES
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer
from keras_paligemma.preprocessing.tokenizer import (
    append_location_and_segment_pieces,
)

TOY = pathlib.Path(__file__).parents[1] / "golden" / "toy_sp.model"
TEXT = "Größe 東京 🐈 \t  two\nlines <loc0010><seg127>,"


@pytest.fixture(scope="module")
def tokenizer():
    return PaliGemmaTokenizer(TOY)


def edited(edit):
    model = sentencepiece_model_pb2.ModelProto.FromString(TOY.read_bytes())
    edit(model)
    return model.SerializeToString()


def test_pieces_are_appended_once_and_in_order(tokenizer):
    # The toy model has 420 pieces, so that the golden's `<loc0010>` is 430.
    assert tokenizer.location_token_ids == range(420, 1444)
    assert tokenizer.segment_token_ids == range(1444, 1572)
    assert tokenizer.get_vocabulary()[420:] == LOCATION_PIECES + SEGMENT_PIECES
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    kinds = {(piece.type, piece.score) for piece in model.pieces[420:]}
    assert kinds == {(model.SentencePiece.USER_DEFINED, 0.0)}
    assert append_location_and_segment_pieces(tokenizer.proto) is (
        tokenizer.proto
    )


def test_appending_changes_no_other_piece(tokenizer):
    plain = PaliGemmaTokenizer(TOY, add_location_and_segment_pieces=False)
    assert plain.vocabulary_size() == 420
    assert plain.tokenize("caption en\n") == tokenizer.tokenize("caption en\n")
    with pytest.raises(ValueError, match="no `<loc0000>`"):
        _ = plain.location_token_ids


@pytest.mark.parametrize(
    "names", [["<loc0005>"], LOCATION_PIECES, SEGMENT_PIECES + LOCATION_PIECES]
)
def test_some_of_the_pieces_are_an_error(names):
    def add(model):
        for name in names:
            model.pieces.add(piece=name, score=0.0, type=4)

    proto = edited(add)
    with pytest.raises(ValueError, match="has some of the location"):
        PaliGemmaTokenizer(proto)
    PaliGemmaTokenizer(proto, add_location_and_segment_pieces=False)


def test_other_special_ids_are_an_error():
    def swap(model):
        model.pieces[1].piece, model.pieces[2].piece = "<s>", "</s>"

    with pytest.raises(ValueError, match="other special ids.*Received.*</s>"):
        PaliGemmaTokenizer(edited(swap))


def test_unreadable_models_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="could not be read.*nowhere"):
        PaliGemmaTokenizer(str(tmp_path / "nowhere.model"))
    with pytest.raises(ValueError, match="could not be read.*4 bytes"):
        PaliGemmaTokenizer(b"oops")


def test_special_ids(tokenizer):
    ids = (
        tokenizer.pad_token_id,
        tokenizer.end_token_id,
        tokenizer.start_token_id,
        tokenizer.unknown_token_id,
    )
    assert [tokenizer.id_to_token(id) for id in ids] == [
        *("<pad>", "</s>", "<s>", "<unk>")
    ]


def test_tokenize_returns_lists(tokenizer):
    ids = tokenizer.tokenize("detect cat")
    assert ids == [404, 346, 338] and type(ids) is list
    assert tokenizer("detect cat") == ids
    assert tokenizer.tokenize(["detect cat", "\n"]) == [ids, [5]]
    assert tokenizer.tokenize(np.array(["detect cat"])) == [ids]
    assert tokenizer.tokenize(b"detect cat") == ids


def test_bos_and_eos_on_request():
    tokenizer = PaliGemmaTokenizer(TOY, add_bos=True, add_eos=True)
    assert tokenizer.tokenize(["\n"]) == [[2, 5, 1]]


def test_text_survives(tokenizer):
    ids = tokenizer.tokenize(TEXT)
    assert 430 in ids and 1571 in ids
    assert tokenizer.detokenize(ids) == TEXT
    assert tokenizer.detokenize([2, *ids, 1, 0, 0]) == TEXT


def test_detokenize_reads_lists_and_arrays(tokenizer):
    assert tokenizer.detokenize([]) == ""
    assert tokenizer.detokenize(404) == tokenizer.detokenize([404]) == "d"
    assert tokenizer.detokenize([[404, 346], []]) == ["detect", ""]
    assert tokenizer.detokenize(np.array([404, 346])) == "detect"
    assert tokenizer.detokenize((np.int32(404), np.int32(346))) == "detect"
    batch = keras.ops.convert_to_tensor([[404, 346], [338, 0]])
    assert tokenizer.detokenize(batch) == ["detect", " cat"]


@pytest.mark.parametrize("id", [-1, 1572])
def test_ids_outside_the_vocabulary_are_an_error(tokenizer, id):
    with pytest.raises(ValueError, match=f"0…1571.*Received: {id} at"):
        tokenizer.detokenize([[404, id]])


def test_few_texts_are_converted_as_many_are():
    tokenizer = PaliGemmaTokenizer(TOY, add_bos=True, add_eos=True)
    texts = [TEXT, "", "detect cat\n", "größe 日本", "  two  blanks "]
    many = tokenizer.tokenize(texts * FEW)
    assert tokenizer.tokenize(texts) * FEW == many
    assert many[1] == [tokenizer.start_token_id, tokenizer.end_token_id]
    assert tokenizer.detokenize(many[:5]) * FEW == tokenizer.detokenize(many)


def test_few_texts_start_no_threads(tokenizer, monkeypatch):
    processor = sentence_piece_processor(tokenizer)
    seen = []

    class Seeing:
        def __getattr__(self, name):
            def call(text, **options):
                seen.append(type(text))
                return getattr(processor, name)(text, **options)

            return call

    monkeypatch.setattr(tokenizer, "_sentence_piece_spm", Seeing())
    ids = tokenizer.tokenize(["detect", "cat"])
    tokenizer.detokenize(ids)
    # Of a batch, SentencePiece would see a list of texts.
    assert seen == [str, str, list, list]


def test_config_and_assets_round_trip(tmp_path):
    tokenizer = PaliGemmaTokenizer(TOY, add_bos=True)
    tokenizer.save_assets(tmp_path)
    config = keras.saving.serialize_keras_object(tokenizer)
    json.dumps(config)
    again = keras.saving.deserialize_keras_object(config)
    again.load_assets(tmp_path)
    assert again.add_bos
    assert again.proto == tokenizer.proto
    assert again.tokenize(TEXT) == tokenizer.tokenize(TEXT)


def test_tokenizing_without_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="No vocabulary"):
        PaliGemmaTokenizer().tokenize("cat")
