"""A killed run resumes exactly."""

import json

import numpy as np
import pytest
from PIL import ImageFont
from safetensors import safe_open

from recipes.nano import lesson
from recipes.nano import lettering
from recipes.nano import scenes
from recipes.nano import train
from recipes.nano import variants
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import TRAINED_STYLES

TABLE = "text_decoder/token_embedding/table"
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
            (1e-3, 1e-3),
            *sizes,
            1,
            0.5,
            0.5,
            0.5,
            train.ALL,
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


def train_until(stage, folder, monkeypatch):
    """Train, and end in the second epoch of a stage."""

    def get(self, index):
        if (self.seed, self.epoch) == (stage, 1):
            raise Killed
        return arrays(self, index)

    arrays = lesson.Lessons.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(lesson.Lessons, "__getitem__", get)
        with pytest.raises(Killed):
            train.train(None, folder)


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
    with safe_open(killed / "trained/model.safetensors", "np") as file:
        table = file.get_tensor(TABLE)
    with safe_open(whole / "after-2/model.safetensors", "np") as file:
        np.testing.assert_allclose(table, file.get_tensor(TABLE), rtol=1e-4)
    names = {path.name for path in (killed / "trained").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= names
