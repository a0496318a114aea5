"""Trains the nano preset from scratch: `python -m presets.nano.train`.

Needs the sprites of `python -m presets.nano.fetch`. A decoder that starts above
an untrained encoder learns nothing for a long time, so the encoder goes first,
as SigLIP did before PaliGemma: each of its patches learns to say which object
it shows, the location tokens of that object's box, whether its middle is here
and how many of its kind there are. Then the decoder learns to read it, and then
both learn together. The run writes a checkpoint after every epoch and goes
on from it when it is started again; the preset folder is written at the end.
"""

import argparse
import dataclasses
import json
import textwrap
from pathlib import Path

import keras
import numpy as np
from keras import ops

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
MEASURED_EPOCHS = 10

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
    """One part of the run.

    Args:
        trains: str, "encoder" (alone, on its patches), "decoder" (above the
            encoder, which keeps still) or "both".
        epochs: int, of `STEPS_AN_EPOCH` steps.
        rates: pair of floats, learning rate at the first and the last step.
        batch_size: int.
    """

    trains: str
    epochs: int
    rates: tuple
    batch_size: int


STAGES = (
    Stage("encoder", 50, (1.5e-3, 1e-4), 64),
    # At 1.5e-3 it stays where it is; what is known of boxes and numbers comes
    # as the rate falls.
    Stage("decoder", 35, (8e-4, 8e-5), 32),
    # Slowly: at 1e-3 a decoder that is not done yet spoils the encoder.
    Stage("both", 14, (2e-4, 1e-5), 32),
)
# What an epoch's examples are of; captions are learnt first.
TASKS = ("caption", "detect", "detect", "count", "count")
WARMUP_STEPS = 100
MEAN_TOKENS = 6
SIZE = 112

# The longest prompt and response of the tasks; the published preset leaves
# more room, and padding changes nothing.
LENGTHS = (8, 13)
PUBLISHED_LENGTH = 32

# Most patches show no object; together they should not weigh more than those
# that do.
BACKGROUND_WEIGHT = 0.3
MIDDLE_WEIGHT = 10.0
MAX_REPEATS = 5

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
        tokenize: function of a list of strings that gives lists of ids.
    """

    def __init__(self, sprites, stage, tokenize):
        super().__init__(workers=2, max_queue_size=8)
        self.sprites = sprites
        self.tokenize = tokenize
        self.stage = stage
        self.epoch = 0

    def __len__(self):
        return STEPS_AN_EPOCH

    def __getitem__(self, index):
        rng = np.random.default_rng([0, self.stage, self.epoch, index])
        examples = [
            scenes.sample(
                rng,
                self.sprites,
                list(CLASSES),
                TRAINED_STYLES,
                tasks=TASKS,
                size=SIZE,
            )
            for _ in range(STAGES[self.stage].batch_size)
        ]
        if STAGES[self.stage].trains == "encoder":
            return patch_examples(examples)
        x = {
            "images": np.stack([one["image"] for one in examples]),
            "prompts": [one["prompt"] for one in examples],
            "responses": [one["response"] for one in examples],
        }
        # A count is one token, a detection up to twelve: each example counts
        # the same.
        tokens = self.tokenize(x["responses"])
        return x, None, np.array([MEAN_TOKENS / len(one) for one in tokens])


def patch_examples(examples):
    """Say of each patch what it shows, by the object around its middle.

    Args:
        examples: list of dicts of `scenes.sample`.

    Returns:
        Images in [-1, 1], targets and weights as `fit` takes them: "class"
        (batch, patches), 0 for none; "box" (batch, patches, 4), locations;
        "middle" (batch, patches, 1), 1 where an object has its middle; and
        "repeats" (batch, patches), the objects of this class in the scene.
        Boxes and repeats count where there is an object.
    """
    patch = VISION_ENCODER["patch_size"]
    side = SIZE // patch
    middles = np.arange(patch / 2, SIZE, patch)
    grids = np.meshgrid(middles, middles, indexing="ij")
    y, x = (grid.ravel() for grid in grids)
    classes = list(CLASSES)
    shape = (len(examples), len(y))
    class_BN = np.zeros(shape, "int32")
    repeats_BN = np.zeros(shape, "int32")
    box_BN4 = np.zeros((*shape, 4), "int32")
    middle_BN1 = np.zeros((*shape, 1), "float32")
    for row, example in enumerate(examples):
        names = [name for name, _ in example["objects"]]
        for name, box in example["objects"]:
            y1, x1, y2, x2 = box
            inside = (y1 <= y) & (y < y2) & (x1 <= x) & (x < x2)
            class_BN[row, inside] = 1 + classes.index(name)
            repeats_BN[row, inside] = names.count(name)
            share = np.array(box) / SIZE
            box_BN4[row, inside] = np.round(share * (scenes.LOCATIONS - 1))
            line, column = (y1 + y2) // 2 // patch, (x1 + x2) // 2 // patch
            middle_BN1[row, line * side + column] = 1
    images = np.stack([example["image"] for example in examples])
    shows_BN = (class_BN > 0).astype("float32")
    targets = {
        "class": class_BN,
        "box": box_BN4,
        "middle": middle_BN1,
        "repeats": repeats_BN,
    }
    weights = {
        "class": shows_BN + BACKGROUND_WEIGHT * (1 - shows_BN),
        "box": shows_BN,
        "middle": 1 + (MIDDLE_WEIGHT - 1) * middle_BN1[..., 0],
        "repeats": shows_BN,
    }
    return images.astype("float32") / 127.5 - 1, targets, weights


@keras.saving.register_keras_serializable(package="nano")
class RowLoss(keras.losses.Loss):
    """Squared distance to the embeddings of location tokens.

    What the encoder says of a box is then what the decoder's head reads, and
    the decoder has only to copy it.

    Args:
        rows: array (locations, width), scaled to a variance of one.
    """

    def __init__(self, rows, name="row_loss"):
        super().__init__(name=name, reduction="sum_over_batch_size")
        self.rows = ops.convert_to_tensor(rows)

    def call(self, bins_BN4, found_BNX):
        wanted = ops.take(self.rows, ops.cast(bins_BN4, "int32"), axis=0)
        wanted = ops.reshape(wanted, ops.shape(found_BNX))
        return ops.mean(ops.square(found_BNX - wanted), axis=-1)


def patch_model(model):
    """Put linear heads on the encoder and its projector."""
    images = keras.Input((SIZE, SIZE, 3))
    tokens = model.backbone.vision_encoder(images)
    units = {
        "class": 1 + len(CLASSES),
        "box": 4 * TEXT_DECODER["hidden_dim"],
        "middle": 1,
        "repeats": 1 + MAX_REPEATS,
    }
    outputs = {
        name: keras.layers.Dense(count, name=name)(tokens)
        for name, count in units.items()
    }
    return keras.Model(images, outputs)


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
        if (
            STAGES[self.stage].trains != "encoder"
            and (epoch + 1) % MEASURED_EPOCHS == 0
        ):
            state["scores"] = self.measure(self.model)
        draft = self.folder / "draft.json"
        draft.write_text(json.dumps(state))
        draft.replace(self.folder / "last.json")
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(state | {"logs": logs}) + "\n")


def build():
    """Makes the model with random weights."""
    backbone = PaliGemmaBackbone(SIZE, VISION_ENCODER, TEXT_DECODER)
    prompt_length, response_length = LENGTHS
    tokenizer = PaliGemmaTokenizer(str(FOLDER / "tokenizer.model"))
    preprocessor = PaliGemmaCausalLMPreprocessor(
        tokenizer,
        PaliGemmaImageConverter(SIZE),
        prompt_length=prompt_length,
        response_length=response_length,
        on_long_response="error",
    )
    model = PaliGemmaCausalLM(backbone, preprocessor)
    smooth_locations(model)
    return model


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


def compile_for(trained, stage, model):
    """Choose optimizer and losses; what is new in a stage warms up."""
    first, last = STAGES[stage].rates
    steps = STAGES[stage].epochs * STEPS_AN_EPOCH
    location = model.preprocessor.tokenizer.token_to_id("<loc0000>")
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - WARMUP_STEPS,
        alpha=last / first,
        warmup_target=first,
        warmup_steps=WARMUP_STEPS,
    )
    optimizer = keras.optimizers.AdamW(
        rate, beta_2=0.98, weight_decay=0.02, clipnorm=1.0
    )
    if STAGES[stage].trains == "encoder":
        table = ops.convert_to_numpy(model.backbone.token_embedding.table)
        rows = table[location : location + scenes.LOCATIONS]
        cross_entropy = keras.losses.SparseCategoricalCrossentropy(True)
        trained.compile(
            optimizer=optimizer,
            loss={
                "class": cross_entropy,
                "box": RowLoss(rows / rows.std()),
                "middle": keras.losses.BinaryCrossentropy(from_logits=True),
                "repeats": cross_entropy,
            },
        )
        return
    trained.compile(
        optimizer=optimizer,
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
    before = folder / "before"
    if before.exists():
        model = PaliGemmaCausalLM.from_preset(before)
    else:
        model = build()
    for stage in range(done["stage"], len(STAGES)):
        trains = STAGES[stage].trains
        model.backbone.vision_encoder.trainable = trains != "decoder"
        trained = patch_model(model) if trains == "encoder" else model
        compile_for(trained, stage, model)
        first_epoch = 0
        if stage == done["stage"] and done["epochs"]:
            # The optimizer's state is in the file, if there is an optimizer.
            trained.optimizer.build(trained.trainable_variables)
            trained.load_weights(folder / "last.weights.h5")
            first_epoch = done["epochs"]
        else:
            # An encoder's checkpoint has no decoder: it is found here.
            model.save_to_preset(before)
        data = Scenes(sprites, stage, model.preprocessor.tokenizer.tokenize)
        trained.fit(
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

WORDS = {
    "encoder": "the encoder alone",
    "decoder": "the decoder above it",
    "both": "both",
}

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
    model.save_to_preset(FOLDER)
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
            f"scenes for {WORDS[stage.trains]}"
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
