"""Randomly corrupted files either load or are refused with a clear error.

Each mutation is drawn from a seed, so that a failure can be reproduced.
"""

import json
import random
import shutil

import pytest

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import without_values
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints import writing
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import PreprocessorConfig

FIELDS = {
    "query_pre_attention_scalar": 4,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
}
DEEP = 50_000
# Values of all JSON types, valid for some fields and invalid for others.
VALUES = (None, True, False, 0, 1, -1, 3, 7, 2**31, 10_000_000, 10**400)
VALUES += (0.5, 1e-300, 1e300, float("nan"), float("inf"), "", "x", "8")
VALUES += ("x" * 1000, "../x", "a\0b", "\ud800", [], {}, [1], {"a": 1})
VALUES += ("keras_paligemma", "paligemma", "gemma2", "bfloat16", [[[]]])
MUTATIONS = 80  # For each format.


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return a function that gives a format's small checkpoint and shapes."""
    home = tmp_path_factory.mktemp("originals")
    backbone = PaliGemmaBackbone(
        4,
        {
            "patch_size": 2,
            "num_layers": 2,
            "hidden_dim": 6,
            "num_heads": 2,
            "intermediate_dim": 5,
        },
        {
            "vocabulary_size": 9,
            "num_layers": 2,
            "hidden_dim": 8,
            "intermediate_dim": 7,
            "num_query_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "query_pre_attention_scalar": 4,
        },
    )
    config = ModelConfig(
        name="tiny",
        backbone=backbone.architecture(),
        preprocessor=PreprocessorConfig("bicubic"),
    )
    weights = backbone.weights_by_name()
    for to in formats.FORMATS:
        (home / to).mkdir()
        # An npz is split into pieces; safetensors and h5 are split into shards.
        path = home / to / ("x.npz" if to == "big_vision" else "model")
        if to in ("keras", "big_vision"):
            writing.write(path, to, config, weights, piece_size=4000)
        else:
            writing.write(
                path,
                to,
                ModelConfig(backbone=config.backbone),
                weights,
            )
    (home / "keras" / "model" / "tokenizer.model").write_bytes(b"tokenizer")
    tokens = {"added_tokens": [{"id": 9, "content": "<image>"}], "model": {}}
    added = json.dumps(tokens)
    (home / "transformers" / "model" / "tokenizer.json").write_text(added)
    return home, engine_shapes(weights)


def engine_shapes(weights):
    return {name: weight.shape for name, weight in weights.items()}


def folder_of(home, to):
    return home / to / ("" if to == "big_vision" else "model")


def load(folder, known):
    """Read all arrays as a model with the configuration would."""
    fields = FIELDS if any(folder.glob("*.npz*")) else {}
    checkpoint = formats.find(folder, fields)
    backbone = checkpoint.config.backbone
    key = repr(backbone)
    if key not in known:
        with without_values():
            model = PaliGemmaBackbone(**backbone.to_dict())
        known[key] = engine_shapes(model.weights_by_name())
    weights = {name: Shaped(shape) for name, shape in known[key].items()}
    rows = checkpoint.rows_for(weights)
    with checkpoint.open() as tensors:
        engine.check_names_and_shapes(weights, rows, tensors.shapes)
        for name, shape in tensors.shapes.items():
            assert tensors.read(name).shape == tuple(shape)
    return known[key]


class Shaped:
    """A weight that has only a shape."""

    def __init__(self, shape):
        self.shape = shape


def places(value, path=()):
    """List the paths of all values in a JSON value, including its own."""
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def mutate_json(draw, path):
    """Replace or remove a random value of a JSON file."""
    content = json.loads(path.read_text())
    *parents, last = draw.choice([place for place in places(content) if place])
    inner = content
    for key in parents:
        inner = inner[key]
    kind = draw.choice(["replace"] * 6 + ["remove", "rename", "deep"])
    value = draw.choice(VALUES)
    if kind == "remove":
        del inner[last]
    elif kind == "rename" and isinstance(inner, dict):
        inner[f"{last}_"] = inner.pop(last)
    else:
        inner[last] = "DEEP" if kind == "deep" else value
    text = json.dumps(content)
    text = text.replace('"DEEP"', DEEP * "[" + DEEP * "]")
    path.write_text(text)
    return kind, (*parents, last), value


def mutate_bytes(draw, path):
    """Change, cut or repeat bytes, mostly near the start or the end."""
    content = bytearray(path.read_bytes())
    size = len(content)
    near = min(size, 400)
    place = draw.choice(
        [draw.randrange(near), size - 1 - draw.randrange(near)]
        + [draw.randrange(size)]
    )
    kind = draw.choice(["flip"] * 4 + ["cut", "zero", "ones", "repeat"])
    if kind == "flip":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "repeat":
        content[place:place] = content[place : place + 64]
    else:
        byte = b"\0" if kind == "zero" else b"\xff"
        content[place : place + 8] = byte * len(content[place : place + 8])
    path.write_bytes(content)
    return kind, place


@pytest.mark.parametrize("to", formats.FORMATS)
def test_mutated_checkpoints_load_or_are_refused(originals, tmp_path, to):
    home, wanted = originals
    source = folder_of(home, to)
    known = {}
    assert load(source, known) == wanted
    refused = 0
    for seed in range(MUTATIONS):
        draw = random.Random(f"{to} {seed}")
        folder = tmp_path / "folder"
        shutil.copytree(source, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files = [file for file in files if file.name != "tokenizer.model"]
        parsed = [file for file in files if file.suffix == ".json"]
        path = draw.choice(files)
        if parsed and draw.random() < 0.6:
            path = draw.choice(parsed)
        how = mutate_bytes
        if path.suffix == ".json" and draw.random() < 0.8:
            how = mutate_json
        what = (seed, path.name, how(draw, path))
        try:
            found = load(folder, known)
        except ValueError as error:
            refused += 1
            message = str(error)
            named = str(folder) in message or "does not fit" in message
            assert named and len(message) < 20_000, (what, message)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            assert found == wanted, what
        shutil.rmtree(folder)
    # Some mutations change nothing that weights depend on, such as a cap or a
    # value.
    assert MUTATIONS / 4 < refused < MUTATIONS
