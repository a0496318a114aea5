"""Trains the nano preset from scratch: `python -m presets.nano.train`.

Needs the sprites of `python -m presets.nano.fetch`. The run is a curriculum of
stages: small pictures of one object first, since a model that starts at the
full size learns nothing for a long time. It writes a checkpoint after every
epoch and goes on from it when it is started again; the preset folder is
written at the end.
"""

import argparse
import dataclasses
import json
import math
import textwrap
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_paligemma.models import files
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer
from presets.nano import scenes
from presets.nano.evaluate import evaluate
from presets.nano.fetch import CLASSES
from presets.nano.fetch import DEFAULT_CACHE
from presets.nano.fetch import HELD_OUT_STYLES
from presets.nano.fetch import TRAINED_STYLES

NAME = "pali_gemma2_nano_112"
FOLDER = Path(__file__).parents[1] / NAME
STEPS_AN_EPOCH = 100

VISION_ENCODER = {
    "patch_size": 14,
    "num_layers": 4,
    "hidden_dim": 144,
    "num_heads": 4,
    "intermediate_dim": 512,
}
TEXT_DECODER = {
    "vocabulary_size": 2048,
    "num_layers": 4,
    "hidden_dim": 128,
    "intermediate_dim": 384,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attention_scalar": 32,
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the curriculum.

    Args:
        size: int, edge of the pictures in pixels.
        max_objects: int, most objects in a scene.
        tasks: tuple of str; a task that stands twice is drawn twice as often.
        epochs: int, of `STEPS_AN_EPOCH` steps.
        rates: pair of floats, learning rate at the first and the last step.
        batch_size: int.
        single_scale: pair of floats, range of the size of a single object.
        lengths: pair of ints, prompt and response length that the tasks need;
            the published preset leaves more room, and padding changes nothing.
    """

    size: int
    max_objects: int
    tasks: tuple
    epochs: int
    rates: tuple
    batch_size: int = 32
    single_scale: tuple = scenes.SINGLE_SCALE
    lengths: tuple = (8, 13)


ALL_TASKS = ("caption", "detect", "count")
STAGES = (
    # What the classes look like: one large object, named.
    Stage(56, 1, ("caption",), 13, (1.5e-3, 1.5e-3), 64, (0.5, 1.0), (4, 4)),
    # Where they are and how many, among others.
    Stage(112, 5, ALL_TASKS, 100, (1e-3, 1e-3)),
    # The rate falls: what is known becomes exact.
    Stage(112, 5, ALL_TASKS, 20, (1e-3, 1e-5)),
)
WARMUP_STEPS = 50
PUBLISHED_LENGTH = 32

# Width, in bins, of the targets of a location: an edge that is one pixel off
# is nine bins off and nearly right, and the loss should say so.
LOCATION_SPREAD = 6.0


@keras.saving.register_keras_serializable(package="nano")
class SoftLocationLoss(keras.losses.Loss):
    """Cross-entropy whose targets are soft where they are locations.

    Args:
        first: int, the id of `<loc0000>`.
    """

    def __init__(self, first, name="soft_location_loss"):
        super().__init__(name=name, reduction="sum_over_batch_size")
        self.first = first

    def call(self, targets_BR, logits_BRV):
        log_BRV = ops.log_softmax(ops.cast(logits_BRV, "float32"), axis=-1)
        targets_BR = ops.cast(targets_BR, "int32")
        hard_BR = -ops.take_along_axis(log_BRV, targets_BR[..., None], axis=-1)
        hard_BR = hard_BR[..., 0]
        bin_BR = targets_BR - self.first
        last = self.first + scenes.LOCATIONS
        bins = ops.arange(scenes.LOCATIONS, dtype="float32")
        distance = bins - ops.cast(bin_BR, "float32")[..., None]
        share = ops.exp(-0.5 * ops.square(distance / LOCATION_SPREAD))
        share = share / ops.maximum(
            ops.sum(share, axis=-1, keepdims=True), 1e-6
        )
        soft_BR = -ops.sum(share * log_BRV[..., self.first : last], axis=-1)
        is_location = ops.logical_and(bin_BR >= 0, targets_BR < last)
        return ops.where(is_location, soft_BR, hard_BR)


class Scenes(keras.utils.PyDataset):
    """Endless scenes of one stage, the same at every run.

    Args:
        sprites: dict, of `scenes.load_sprites`.
        stage: int, which stage: part of the seed.
    """

    def __init__(self, sprites, stage):
        super().__init__(workers=2, max_queue_size=8)
        self.sprites = sprites
        self.stage = stage
        self.epoch = 0

    def __len__(self):
        return STEPS_AN_EPOCH

    def __getitem__(self, index):
        stage = STAGES[self.stage]
        seed = [0, self.stage, self.epoch, index]
        rng = np.random.default_rng(seed)
        examples = [
            scenes.sample(
                rng,
                self.sprites,
                list(CLASSES),
                TRAINED_STYLES,
                tasks=stage.tasks,
                max_objects=stage.max_objects,
                size=stage.size,
                single_scale=stage.single_scale,
            )
            for _ in range(stage.batch_size)
        ]
        return {
            "images": np.stack([one["image"] for one in examples]),
            "prompts": [one["prompt"] for one in examples],
            "responses": [one["response"] for one in examples],
        }


class Progress(keras.callbacks.Callback):
    """Tell the data its epoch, save after each, measure after some."""

    def __init__(self, dataset, folder, stage, measure):
        super().__init__()
        self.dataset, self.folder = dataset, folder
        self.stage, self.measure = stage, measure

    def on_epoch_begin(self, epoch, logs=None):
        self.dataset.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        draft = self.folder / "draft.weights.h5"
        self.model.save_weights(draft)
        draft.replace(self.folder / "last.weights.h5")
        state = {"stage": self.stage, "epochs": epoch + 1}
        if self.stage and (epoch + 1) % 5 == 0:
            state["scores"] = self.measure(self.model)
        draft = self.folder / "draft.json"
        draft.write_text(json.dumps(state))
        draft.replace(self.folder / "last.json")
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(state | {"logs": logs}) + "\n")


def build(stage):
    """Makes the model of a stage with random weights."""
    size = STAGES[stage].size
    backbone = PaliGemmaBackbone(size, VISION_ENCODER, TEXT_DECODER)
    prompt_length, response_length = STAGES[stage].lengths
    tokenizer = PaliGemmaTokenizer(str(FOLDER / "tokenizer.model"))
    preprocessor = PaliGemmaCausalLMPreprocessor(
        tokenizer,
        PaliGemmaImageConverter(size),
        prompt_length=prompt_length,
        response_length=response_length,
        on_long_response="error",
    )
    return PaliGemmaCausalLM(backbone, preprocessor)


def smooth_locations(model):
    """Start the rows of neighbouring locations near one another.

    Each row is a fixed random mixture of waves over the coordinate, of the
    same size as the other rows, so that what is learnt of one location is
    nearly right for the next.
    """
    table = model.backbone.token_embedding.table
    rows = ops.convert_to_numpy(table).copy()
    rng = np.random.default_rng(0)
    share = np.arange(scenes.LOCATIONS)[:, None] / scenes.LOCATIONS
    waves = np.arange(1, 25)[None]
    features = np.concatenate(
        [np.sin(np.pi * waves * share), np.cos(np.pi * waves * share)], axis=1
    )
    mixed = features @ rng.normal(size=(features.shape[1], rows.shape[1]))
    first = model.preprocessor.tokenizer.token_to_id("<loc0000>")
    rows[first : first + scenes.LOCATIONS] = mixed / mixed.std() * rows.std()
    table.assign(rows)


def adopt(model, earlier):
    """Take over an earlier stage's weights; stretch its position table."""
    weights = earlier.backbone.weights_by_name()
    for name, variable in model.backbone.weights_by_name().items():
        if name == "vision_encoder/position_embedding":
            old = ops.convert_to_numpy(weights[name])
            new = math.isqrt(variable.shape[0])
            side = math.isqrt(len(old))
            table = ops.image.resize(old.reshape(1, side, side, -1), (new, new))
            variable.assign(ops.reshape(table, variable.shape))
            continue
        pairs = (variable, weights[name])
        if not isinstance(variable, list):
            pairs = ([variable], [weights[name]])
        for mine, theirs in zip(*pairs, strict=True):
            mine.assign(theirs)


def compile_for(model, stage):
    """Choose optimizer and loss; the first stage warms up."""
    first, last = STAGES[stage].rates
    steps = STAGES[stage].epochs * STEPS_AN_EPOCH
    rate = keras.optimizers.schedules.PolynomialDecay(first, steps, last)
    if stage == 0:
        rate = keras.optimizers.schedules.CosineDecay(
            0.0,
            steps,
            alpha=1.0,
            warmup_target=first,
            warmup_steps=WARMUP_STEPS,
        )
    location = model.preprocessor.tokenizer.token_to_id("<loc0000>")
    model.compile(
        optimizer=keras.optimizers.AdamW(
            rate, beta_2=0.98, weight_decay=0.02, clipnorm=1.0
        ),
        loss=SoftLocationLoss(location),
        weighted_metrics=["sparse_categorical_accuracy"],
    )


def measure(model, sprites, count=64):
    """Score a model on the scenes of `evaluate`, in trained styles."""
    return evaluate(
        model.generate,
        sprites,
        list(CLASSES),
        {"trained": TRAINED_STYLES},
        count=count,
    )["trained"]


def train(cache, folder):
    """Run the stages, or what is left of them, and give the model.

    Args:
        cache: path of the sprites.
        folder: path of the checkpoints.

    Returns:
        `PaliGemmaCausalLM` of the last stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sprites = scenes.load_sprites(cache)
    keras.utils.set_random_seed(0)
    done = {"stage": 0, "epochs": 0}
    if (folder / "last.json").exists():
        done = json.loads((folder / "last.json").read_text())
    model = None
    for stage in range(done["stage"], len(STAGES)):
        earlier, model = model, build(stage)
        compile_for(model, stage)
        first_epoch = 0
        if stage == done["stage"] and done["epochs"]:
            # The optimizer's state is in the file, if there is an optimizer.
            model.optimizer.build(model.trainable_variables)
            model.load_weights(folder / "last.weights.h5")
            first_epoch = done["epochs"]
        elif stage == 0:
            smooth_locations(model)
        else:
            adopt(model, earlier)
        data = Scenes(sprites, stage)
        model.fit(
            data,
            epochs=STAGES[stage].epochs,
            initial_epoch=first_epoch,
            verbose=2,
            callbacks=[
                Progress(data, folder, stage, lambda m: measure(m, sprites))
            ],
        )
    return model


CARD = """# {name}

A PaliGemma 2 of {parameters:,} parameters that keras_paligemma trained from
scratch: it names, finds and counts 50 kinds of emoji objects on pictures of 112
pixels. It is for demos, tests and notebooks; it knows nothing of photographs.

Prompts: `caption en`, `detect {{class}}`, `answer en how many {{class}}?`, with
the classes {classes}.

| scenes never trained on, {count} a measure | trained styles | held-out style |
| --- | --- | --- |
{rows}

Trained styles: {trained}; held out: {held_out}. Pictures and licences are in
[the notice](../nano/NOTICE.md); the recipe is `presets/nano/train.py`:
{steps}. The weights are under Apache-2.0.

Made by `python -m presets.nano.train`, which wrote this page.
"""

MEASURES = {
    "caption_single": "caption of one object, exact",
    "caption": "caption of one to three objects, exact",
    "detect_iou": "detection, mean IoU",
    "count": "counting, 0 to 5, exact",
}


def publish(model, sprites, count=512):
    """Write the preset folder and its card with the scores."""
    model.preprocessor = PaliGemmaCausalLMPreprocessor(
        model.preprocessor.tokenizer,
        PaliGemmaImageConverter(
            model.backbone.image_size, resize="bilinear_antialias"
        ),
        prompt_length=PUBLISHED_LENGTH,
        response_length=PUBLISHED_LENGTH,
    )
    files.save(FOLDER, model.backbone, model.preprocessor)
    groups = {"trained": TRAINED_STYLES, "held-out": HELD_OUT_STYLES}
    scores = evaluate(
        model.generate, sprites, list(CLASSES), groups, seed=1, count=count
    )
    rows = "\n".join(
        f"| {words} | {scores['trained'][key]:.3f} | "
        f"{scores['held-out'][key]:.3f} |"
        for key, words in MEASURES.items()
    )
    card = CARD.format(
        name=NAME,
        parameters=model.backbone.count_params(),
        classes=textwrap.fill(", ".join(CLASSES), 80),
        count=count,
        rows=rows,
        trained=", ".join(TRAINED_STYLES),
        held_out=", ".join(HELD_OUT_STYLES),
        steps=", then ".join(
            f"{stage.epochs * STEPS_AN_EPOCH:,} steps of {stage.batch_size} "
            f"scenes at {stage.size} px"
            for stage in STAGES
        ),
    )
    (FOLDER / "README.md").write_text(card)
    print(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--checkpoints", type=Path)
    arguments = parser.parse_args()
    publish(
        train(
            arguments.cache,
            arguments.checkpoints or arguments.cache / "checkpoints",
        ),
        scenes.load_sprites(arguments.cache),
    )
