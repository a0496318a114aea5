"""A killed run resumes exactly."""

import json

import numpy as np
import pytest

from recipes.nano import lesson
from recipes.nano import questions
from recipes.nano import scenes
from recipes.nano import train
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import TRAINED_STYLES

NARROW = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 16}


@pytest.fixture
def small(monkeypatch):
    """Use a small model: two encoder epochs, one joint epoch, one step each."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(len(CLASSES), 20, 20, 4), dtype="uint8")
    pixels[..., 3] = 255
    pictures = {
        name: scenes.premultiplied(pixel)
        for name, pixel in zip(CLASSES, pixels, strict=True)
    }
    sprites = dict.fromkeys(TRAINED_STYLES, pictures)
    codes = {(s, n): "<seg001>" * 16 for s in sprites for n in CLASSES}
    stages = [
        train.Stage(trains, epochs, (1e-3, 1e-3), *sizes, 1, 0.5, train.ALL)
        for trains, epochs, *sizes in (
            ("encoder", 2, 2, 1, 64, 24),
            ("both", 1, 2, 2, 24, 24),
        )
    ]
    vision = train.VISION_ENCODER | NARROW | {"num_heads": 2}
    for target, name, value in (
        (scenes, "load_sprites", lambda cache: sprites),
        (questions, "mask_codes", lambda sprites: codes),
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


def test_a_killed_run_goes_on_where_it_was(small, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.train(None, whole)

    class Killed(Exception):
        pass

    def get(self, index):
        if self.epoch == 1:
            raise Killed
        return arrays(self, index)

    arrays = lesson.Lessons.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(lesson.Lessons, "__getitem__", get)
        with pytest.raises(Killed):
            train.train(None, killed)
    assert len(losses(killed)) == 1
    train.train(None, killed)
    np.testing.assert_allclose(losses(killed), losses(whole), rtol=1e-5)
    assert len(set(losses(whole))) == 3
    names = {path.name for path in (killed / "after-1").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= names
