"""A small run that can kill itself: `tests.training.killed_run DIR [STEP]`."""

import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

from keras_paligemma import Adam
from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.data import Batches
from keras_paligemma.training import fit
from tests.helpers.programs import make_programs_quickly
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import IMAGE_SIZE
from tests.helpers.tiny_models import TEXT
from tests.helpers.tiny_models import VISION


def set_up():
    """Return a model with adapter dropout, and five batches per epoch."""
    # Numbers of processes are compared bit by bit.
    make_programs_quickly()
    keras.utils.set_random_seed(0)
    backbone = PaliGemmaBackbone(
        IMAGE_SIZE,
        VISION | {"num_layers": 1},
        TEXT | {"vocabulary_size": 2048, "num_layers": 1},
    )
    proto = (GOLDEN / "english_sp.model").read_bytes()
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(proto),
        PaliGemmaImageConverter(IMAGE_SIZE),
        prompt_length=6,
        response_length=5,
    )
    model = PaliGemmaCausalLM(backbone, preprocessor)
    model.backbone.enable_lora(2, dropout=0.2)
    model.compile(Adam(keras.optimizers.schedules.CosineDecay(1e-2, 10)))
    random = np.random.default_rng(0)
    source = [
        {
            "images": random.integers(0, 256, (9, 9, 3), "uint8"),
            "prompts": "caption en",
            "responses": f"a {word}",
        }
        for word in ("cat", "dog", "owl", "tree", "car", "sun") * 2
    ]
    return model, Batches(source, preprocessor, 2, seed=3)


class Watch(keras.callbacks.Callback):
    """Write each step's loss, and kill the process before a given step ends."""

    def __init__(self, folder, kill_at):
        super().__init__()
        self.folder, self.kill_at = folder, kill_at

    def on_train_batch_end(self, batch, logs=None):
        # The epoch's running mean, which must continue as well.
        step = int(self.model.optimizer.iterations)
        with open(self.folder / "losses.jsonl", "a") as file:
            line = {"step": step, "loss": float(logs["loss"])}
            file.write(json.dumps(line) + "\n")
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, kill_at=None):
    folder = Path(folder)
    model, batches = set_up()
    watch = Watch(folder, kill_at and int(kill_at))
    fit(
        model,
        batches,
        folder / "run",
        epochs=2,
        every=3,
        callbacks=[watch],
        verbose=0,
    )
    values = {
        f"{group}{number}": keras.ops.convert_to_numpy(variable)
        for group, variables in (
            ("weight", model.trainable_variables),
            ("optimizer", model.optimizer.variables),
        )
        for number, variable in enumerate(variables)
    }
    np.savez(folder / "end.npz", **values)


if __name__ == "__main__":
    main(*sys.argv[1:])
