"""Run one of two hosts with four virtual devices: `… host FOLDER NUMBER PORT`.

Its test runs it after `sharded_runs`. Two hosts must reproduce the losses and
files of that run in the same folder. Collective operations are outside of the
checks, so that a check that fails on one host does not block the other.
"""

import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from tests.sharding import sharded_runs  # isort: skip

import keras
import numpy as np

from keras_paligemma.checkpoints import peft
from keras_paligemma.checkpoints.storage import safetensors
from keras_paligemma.generation.texts import cut
from keras_paligemma.sharding import data_shard
from keras_paligemma.sharding import distribute
from keras_paligemma.training import RunCheckpoint
from tests.helpers.checks import check
from tests.sharding.sharded_training import PROMPT
from tests.sharding.sharded_training import RESPONSE
from tests.sharding.sharded_training import tokens

# Override the other module's setting before JAX reads it.
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("count=8", "count=4")


def forbidden(*args, **kwargs):
    raise AssertionError("only the first process writes")


class Letters:
    """Preprocessor of arrays, in whose texts each token is one character."""

    tokenizer = SimpleNamespace(pad_token_id=0, end_token_id=1)
    response_length = RESPONSE

    def generate_preprocess(self, x, max_new_tokens):
        return x

    def generate_postprocess(self, x):
        ids = x["token_ids"]
        rows = np.atleast_2d(ids)
        texts = ["".join(map(chr, row[row > 0])) for row in rows]
        return texts if ids.ndim == 2 else texts[0]


def check_stop_strings(model, number):
    """The answers of one host end, and those of the other go on."""
    random = np.random.default_rng(number)
    ids = random.integers(1, 320, (2, PROMPT + RESPONSE)).astype("int32")
    pictures = random.uniform(-1, 1, (2, 28, 28, 3)).astype("float32")
    inputs = tokens(pictures, ids) | {"response_mask": np.zeros(ids.shape)}
    inputs = {
        name: array if name == "images" else array[:, :PROMPT]
        for name, array in inputs.items()
    }
    model.preprocessor = Letters()
    options = {"max_new_tokens": 24, "stop_token_ids": None}
    whole = model.generate(inputs, **options)
    stops = ["never"] if number else [text[0] for text in whole]
    found = model.generate(inputs, stop_strings=stops, **options)
    pieces = [
        *model.stream(inputs, stop_strings=stops, chunk=2, **options),
        ["", ""],
    ]
    wanted = [cut(text, stops) for text in whole]
    with check("stop strings"):
        assert found == wanted, (found, wanted)
        streamed = ["".join(row) for row in zip(*pieces, strict=True)]
        assert streamed == wanted, (streamed, wanted)


def main(folder, number, port):
    folder, number = Path(folder), int(number)
    keras.utils.set_random_seed(0)
    keras.distribution.initialize(f"localhost:{port}", 2, number)
    assert len(keras.distribution.list_devices()) == 8
    wanted = np.load(folder / "losses.npy")
    if number:
        safetensors.save_file = peft.save_file = forbidden

    # The eight chips of both hosts share each example, so the data has one
    # part.
    keras.distribution.set_distribution(distribute("tensor", (1, 8)))
    with check("one part of the data"):
        assert data_shard() == (0, 1)
    # The four chips of a host are a group. Weights are sharded over both hosts.
    chosen = distribute("both", (2, 4), small=64)
    keras.distribution.set_distribution(chosen)
    index, parts = data_shard()
    with check("two parts of the data"):
        assert (index, parts) == (number, 2)
    model, _, _ = sharded_runs.load(folder / "preset")
    losses = sharded_runs.train(model, folder / "hosts", parts, index)
    with check("a last batch that the hosts do not share evenly"):
        whole = itertools.islice(sharded_runs.batches(parts, index), 4)
        *_, (_, _, weights) = whole
        assert (weights.sum(1) > 0).sum() == (0 if number else 3)
    with check("losses"):
        difference = np.abs(losses / wanted - 1).max()
        assert difference <= 1e-5, (losses, wanted)

    with check("checkpoints"):
        # Both hosts write to one folder per step, and once more before the
        # last.
        steps = sorted(path.name for path in (folder / "hosts").iterdir())
        assert steps == ["2", "3", "4"], steps
    trained = sharded_runs.values(model)
    model.save_adapter(folder / "hosts_adapter")
    model.save_to_preset(folder / "hosts_preset")
    other, _, _ = sharded_runs.load(folder / "preset")
    checkpoint = RunCheckpoint(
        folder / "hosts", sharded_runs.batches(parts, index)
    )
    checkpoint.restore(other)
    adapted, _, _ = sharded_runs.load(
        folder / "preset", folder / "hosts_adapter"
    )
    saved = type(model).from_preset(folder / "hosts_preset", form="scanned")
    for name, read in (
        ("a restored run", other),
        ("a saved adapter", adapted),
        ("a saved preset", saved),
    ):
        found = sharded_runs.values(read)
        with check(name):
            sharded_runs.assert_same(found, trained)
    check_stop_strings(adapted, number)


if __name__ == "__main__":
    main(*sys.argv[1:])
