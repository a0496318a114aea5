"""A damaged copy of a published tokenizer is refused by every reader."""

import hashlib

import pytest

from keras_paligemma import checksums
from tests.helpers.tiny_models import PRESETS

TOKENIZER = PRESETS / "pali_gemma2_nano_112" / "tokenizer.model"


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """Flip one bit of a known file so that SentencePiece still loads it."""
    content = TOKENIZER.read_bytes()
    wanted = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(
        checksums, "KNOWN", {len(content): ("the nano tokenizer", wanted)}
    )
    place = content.index(b"detect")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content[:place] + b"e" + content[place + 1 :])
    return path


def test_the_table():
    assert len(checksums.KNOWN) == 3
    for _, (name, digest) in checksums.KNOWN.items():
        assert len(bytes.fromhex(digest)) == 32
        assert name.endswith((".model", ".npz"))


def test_a_known_file_and_an_unknown_one(damaged, tmp_path):
    content = TOKENIZER.read_bytes()
    assert checksums.read_checked(TOKENIZER) == content
    (tmp_path / "other").write_bytes(content[:-1])
    assert checksums.read_checked(tmp_path / "other") == content[:-1]
    with pytest.raises(ValueError, match="bytes of the nano tokenizer and"):
        checksums.read_checked(damaged)


@pytest.mark.parametrize("kind", [str, lambda path: path.read_bytes()])
def test_a_tokenizer(damaged, kind):
    from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer

    PaliGemmaTokenizer(kind(TOKENIZER))
    named = str(damaged) if kind is str else "The tokenizer"
    with pytest.raises(ValueError, match=f"{named} is damaged"):
        PaliGemmaTokenizer(kind(damaged))


def test_a_model(damaged):
    from keras_paligemma import PaliGemmaCausalLM

    with pytest.raises(ValueError, match=f"{damaged} is damaged"):
        PaliGemmaCausalLM.from_preset(
            "pali_gemma2_nano_112", tokenizer=str(damaged)
        )
