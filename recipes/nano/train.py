"""Train the nano preset: `python -m recipes.nano.train`.

Needs the sprites of `python -m recipes.nano.fetch`. A decoder on top of an
untrained encoder learns nothing for a long time. The encoder is therefore
trained first, as SigLIP was before PaliGemma. Each patch learns which object it
shows, the location tokens of that object's box, and the letters in its halves.
Then the decoder learns to find the named object, with few patches and short
answers, and after that all tasks. The last stage trains both towers on all
tasks. `Lesson` contains the computation of a step.

The run writes a checkpoint after every epoch, and resumes from it when it is
started again on the same device. On a CPU, `Stage` sets the pictures per step.
An accelerator takes `SCALE` times as many.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_paligemma.compat import platform
from keras_paligemma.models.backbone import PaliGemmaBackbone
from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
from keras_paligemma.preprocessing.image_converter import (
    PaliGemmaImageConverter,
)
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer
from recipes.nano import lesson
from recipes.nano import lettering
from recipes.nano import scenes
from recipes.nano import variants
from recipes.nano.fetch import DEFAULT_CACHE
from recipes.nano.fetch import TRAINED_FONTS
from recipes.nano.muon import Muon

NAME = "pali_gemma2_nano_112"
FOLDER = Path(__file__).parents[2] / "presets" / NAME
STEPS_AN_EPOCH = 50
WARMUP_STEPS = 50
PUBLISHED_LENGTH = 32

# The learning rate of Adam as a share of Muon's.
ADAM_RATIO = 0.2
WEIGHT_DECAY = 0.03

# Pictures per step on an accelerator, as a multiple of a CPU's.
SCALE = 8

VISION_ENCODER = {
    "patch_size": lesson.PATCH,
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
        trains: str, "encoder" (alone), "decoder" (with a frozen encoder) or
            "both".
        epochs: int, epochs of `STEPS_AN_EPOCH` steps.
        rates: pair of floats, Muon's learning rate before and after its decay
            along a cosine.
        pictures: int, pictures per step on a CPU.
        questions: int, questions per picture.
        patches: int, patches of each picture that the decoder sees; 64 are
            all.
        response_length: int, maximum tokens of an answer.
        fewest: int, minimum objects of a scene, of at most three.
        repeats: float, share of the other scenes with a class that occurs up
            to five times.
        written: float, share of scenes with a word; with several if the
            encoder is trained alone.
        varied: float, share of scenes with varied pictures.
        shares: dict of task to its approximate frequency; see
            `questions.TASKS`.
    """

    trains: str
    epochs: int
    rates: tuple
    pictures: int
    questions: int
    patches: int
    response_length: int
    fewest: int
    repeats: float
    written: float
    varied: float
    shares: dict


FIND = {"detect": 1.0}
# A word is asked for once, in nearly all of its scenes.
ALL = {
    "caption": 3.0,
    "translate": 2.5,
    "detect": 1.5,
    "detect_several": 3.0,
    "count": 4.0,
    "segment": 4.0,
    "read": 40.0,
}
STAGES = (
    Stage("encoder", 110, (8e-3, 2e-4), 32, 1, 64, 28, 1, 0.3, 0.65, 0.6, FIND),
    Stage("decoder", 18, (8e-3, 5e-3), 16, 2, 16, 6, 2, 0, 0, 0, FIND),
    Stage("decoder", 20, (8e-3, 4e-3), 24, 2, 64, 28, 1, 0.45, 0.5, 0.6, ALL),
    Stage("both", 190, (6e-3, 5e-5), 24, 2, 64, 28, 1, 0.45, 0.5, 0.6, ALL),
)

# The dense targets have larger weights: answers follow once objects are found.
LOSS_WEIGHTS = {
    "tokens": 1.0,
    "places": 3.0,
    "names": 1.0,
    "boxes": 3.0,
    "letters": 1.0,
}


def build():
    """Build the model with random weights."""
    backbone = PaliGemmaBackbone(
        lesson.SIZE, VISION_ENCODER, TEXT_DECODER, form="unrolled"
    )
    tokenizer = PaliGemmaTokenizer(str(FOLDER / "tokenizer.model"))
    preprocessor = PaliGemmaCausalLMPreprocessor(
        tokenizer,
        PaliGemmaImageConverter(lesson.SIZE, resize="bilinear_antialias"),
        prompt_length=PUBLISHED_LENGTH,
        response_length=PUBLISHED_LENGTH,
    )
    model = PaliGemmaCausalLM(backbone, preprocessor)
    smooth_locations(model)
    return model


def take_weights(model, preset):
    """Assign the weights of a preset of the same sizes."""
    source = PaliGemmaCausalLM.from_preset(preset, form="unrolled")
    model.backbone.set_weights(source.backbone.get_weights())


def first_location(model):
    """Return the id of `<loc0000>`."""
    return model.preprocessor.tokenizer.token_to_id("<loc0000>")


def smooth_locations(model):
    """Initialize the rows of neighbouring locations close to one another.

    Each row is a fixed random mixture of waves over the coordinate, with the
    same norm as the other rows. The values learned for one location are then
    nearly right for the next location.
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
    first = first_location(model)
    rows[first : first + scenes.LOCATIONS] = mixed / mixed.std() * rows.std()
    table.assign(rows)


def compile_for(trained, stage, model):
    """Set the optimizer and losses; every stage starts with a warmup."""
    first, last = stage.rates
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        stage.epochs * STEPS_AN_EPOCH - WARMUP_STEPS,
        alpha=last / first,
        warmup_target=first,
        warmup_steps=WARMUP_STEPS,
    )
    location = first_location(model)
    table = ops.convert_to_numpy(model.backbone.token_embedding.table)
    rows = table[location : location + scenes.LOCATIONS]
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(True)
    losses = {
        "names": cross_entropy,
        "boxes": lesson.RowLoss(rows / rows.std()),
        "letters": cross_entropy,
    }
    if stage.trains != "encoder":
        losses["tokens"] = lesson.SoftLocationLoss(location)
        losses["places"] = cross_entropy
    trained.compile(
        optimizer=Muon(
            rate,
            adam_beta_2=0.98,
            adam_lr_ratio=ADAM_RATIO,
            weight_decay=WEIGHT_DECAY,
            adam_weight_decay=WEIGHT_DECAY,
        ),
        loss=losses,
        loss_weights={name: LOSS_WEIGHTS[name] for name in losses},
        jit_compile=True,
    )


class Progress(keras.callbacks.Callback):
    """Set the data's epoch; write a checkpoint and the log after each epoch."""

    def __init__(self, data, folder, stage):
        super().__init__()
        self.data, self.folder, self.stage = data, folder, stage

    def on_epoch_begin(self, epoch, logs=None):
        self.data.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        draft = self.folder / "draft.weights.h5"
        self.model.save_weights(draft)
        state = {"stage": self.stage, "epochs": epoch + 1}
        # One state file names the complete weights.
        name = f"{self.stage}-{(epoch + 1) % 2}.weights.h5"
        draft.replace(self.folder / name)
        draft = self.folder / "draft.json"
        draft.write_text(json.dumps(state | {"weights": name}))
        draft.replace(self.folder / "last.json")
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(state | {"logs": logs}) + "\n")


def train(cache, folder):
    """Run all stages, or the remaining ones.

    Args:
        cache: path of the sprites.
        folder: path of the checkpoints.

    Returns:
        `PaliGemmaCausalLM`; it is also written to the folder `trained`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    material = lesson.Material(
        variants.all_variants(scenes.load_sprites(cache)),
        lettering.load_words(cache)[0],
        lettering.load_fonts(cache, TRAINED_FONTS),
    )
    keras.utils.set_random_seed(0)
    model = build()
    trained = lesson.Lesson(model.backbone)
    done = {"stage": 0, "epochs": 0}
    if (folder / "last.json").exists():
        done = json.loads((folder / "last.json").read_text())
    scale = 1 if platform() == "cpu" else SCALE
    for number in range(done["stage"], len(STAGES)):
        stage = STAGES[number]
        stage = dataclasses.replace(stage, pictures=scale * stage.pictures)
        model.backbone.vision_encoder.trainable = stage.trains != "decoder"
        # The optimizer would decay weights without gradients.
        model.backbone.text_decoder.trainable = stage.trains != "encoder"
        trained.encoder_alone = stage.trains == "encoder"
        goes_on = number == done["stage"] and done["epochs"]
        if goes_on and number:
            # The loss of boxes needs the table that the stage started with.
            take_weights(model, folder / f"after-{number - 1}")
        compile_for(trained, stage, model)
        # The file's optimizer state is only loaded into a built optimizer.
        trained.optimizer.build(trained.trainable_variables)
        first_epoch = 0
        if goes_on:
            trained.load_weights(folder / done["weights"])
            first_epoch = done["epochs"]
        preprocessor = PaliGemmaCausalLMPreprocessor(
            model.preprocessor.tokenizer,
            None,
            prompt_length=lesson.PROMPT_LENGTH,
            response_length=stage.response_length,
            on_long_response="error",
        )
        data = lesson.Lessons(
            material, preprocessor, stage, number, STEPS_AN_EPOCH
        )
        trained.fit(
            data,
            epochs=stage.epochs,
            initial_epoch=first_epoch,
            verbose=2,
            callbacks=[Progress(data, folder, number)],
        )
        model.save_to_preset(folder / f"after-{number}")
    model.save_to_preset(folder / "trained")
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--checkpoints", type=Path)
    options = parser.parse_args()
    train(options.cache, options.checkpoints or options.cache / "checkpoints")
