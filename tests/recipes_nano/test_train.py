"""A killed run resumes exactly."""

import json

import keras
import numpy as np
import pytest
import sentencepiece
from PIL import ImageFont
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from recipes.nano import lesson
from recipes.nano import lettering
from recipes.nano import scenes
from recipes.nano import train
from recipes.nano import variants
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import TRAINED_STYLES

NARROW = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 16}


@pytest.fixture
def small(monkeypatch):
    """Use a small model and three stages of one or two epochs of one step."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(len(CLASSES), 20, 20, 4), dtype="uint8")
    pixels[..., 3] = 255
    pictures = {
        name: [scenes.Sprite(scenes.premultiplied(pixel), "<seg001>" * 16)]
        for name, pixel in zip(CLASSES, pixels, strict=True)
    }
    sprites = dict.fromkeys(TRAINED_STYLES, pictures)
    stages = [
        train.Stage(
            trains,
            epochs,
            2,
            (1e-3, 1e-3),
            *sizes,
            1,
            0.5,
            0.5,
            0.5,
            train.MORE,
        )
        for trains, epochs, *sizes in (
            ("encoder", 2, 2, 1, 64, 28),
            ("both", 1, 2, 2, 24, 28),
            ("both", 2, 2, 2, 24, 28),
        )
    ]
    vision = train.VISION_ENCODER | NARROW | {"num_heads": 2}
    for target, name, value in (
        (scenes, "load_sprites", lambda cache: sprites),
        (variants, "all_variants", lambda sprites: sprites),
        (lettering, "load_words", lambda cache: (["boot"], [])),
        (lettering, "load_fonts", lambda cache, names: ["a font"]),
        (
            lettering,
            "font_of",
            lambda path, size: ImageFont.load_default(size),
        ),
        (train, "STAGES", stages),
        (train, "STEPS_AN_EPOCH", 1),
        (train, "WARMUP_STEPS", 0),
        (train, "VISION_ENCODER", vision),
        (train, "TEXT_DECODER", train.TEXT_DECODER | NARROW | {"head_dim": 4}),
    ):
        monkeypatch.setattr(target, name, value)


def losses(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["logs"]["loss"] for line in lines]


class Killed(Exception):
    pass


def train_until(stage, folder, monkeypatch, **options):
    """Train, and end in the second epoch of a stage."""

    def get(self, index):
        if (self.seed, self.epoch) == (stage, 1):
            raise Killed
        return arrays(self, index)

    arrays = lesson.Lessons.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(lesson.Lessons, "__getitem__", get)
        with pytest.raises(Killed):
            train.train(None, folder, **options)


@pytest.mark.parametrize(("stage", "before"), [(0, 1), (2, 4)])
def test_a_killed_run_goes_on_where_it_was(
    small, tmp_path, monkeypatch, stage, before
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(None, whole)
    train_until(stage, killed, monkeypatch)
    assert len(losses(killed)) == before
    train.train(None, killed)
    np.testing.assert_allclose(losses(killed), losses(whole), rtol=1e-5)
    assert len(set(losses(whole))) == 5
    second, third, mean = (
        keras.ops.convert_to_numpy(
            train.go_on_from(killed / name).backbone.token_embedding.table
        )
        for name in ("after-1", "after-2", "mean")
    )
    assert np.abs(third - second).max() > 1e-4
    np.testing.assert_allclose(mean, (second + third) / 2, atol=1e-7)
    names = {path.name for path in (killed / "mean").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= names


def test_a_killed_run_needs_its_preset_no_more(small, tmp_path, monkeypatch):
    """The loss of boxes is of the table of the preset."""
    source = train.build()
    table = source.backbone.token_embedding.table
    table.assign(keras.random.normal(table.shape, seed=1))
    source.save_to_preset(tmp_path / "source")
    options = {"start": str(tmp_path / "source")}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(None, whole, **options)
    train_until(0, killed, monkeypatch, **options)
    train.train(None, killed)
    np.testing.assert_allclose(losses(killed), losses(whole), rtol=1e-5)


def test_the_last_stage_alone_has_nothing_to_average(small, tmp_path):
    with pytest.raises(ValueError, match="Expected: `start`, a preset, or"):
        train.train(None, tmp_path, first_stage=2)


def test_a_run_goes_on_from_a_preset_with_other_pieces(small, tmp_path):
    """Rows follow their pieces; a new piece starts as the mean of its text."""
    source = train.build()
    proto = ModelProto.FromString(
        (train.FOLDER / "tokenizer.model").read_bytes()
    )
    number = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    cat, key = number["\u2581cat"], number["\u2581key"]
    proto.pieces[cat].piece, proto.pieces[key].piece = "\u2581key", "\u2581zq"
    source.save_to_preset(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.model").write_bytes(
        proto.SerializeToString()
    )
    found = train.go_on_from(str(tmp_path / "source"))
    table, before = (
        keras.ops.convert_to_numpy(model.backbone.token_embedding.table)
        for model in (found, source)
    )
    np.testing.assert_array_equal(table[key], before[cat])
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_proto=proto.SerializeToString()
    )
    np.testing.assert_allclose(
        table[cat], before[tokenizer.encode(" cat")].mean(0), rtol=1e-6
    )
    others = [i for i in range(len(table)) if i not in (cat, key)]
    np.testing.assert_array_equal(table[others], before[others])
    for new, old in zip(
        found.backbone.vision_encoder.weights,
        source.backbone.vision_encoder.weights,
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)
