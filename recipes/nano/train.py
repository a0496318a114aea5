"""Train the nano preset: `python -m recipes.nano.train`.

Needs the sprites of `python -m recipes.nano.fetch`. A decoder on top of an
untrained encoder learns nothing for a long time. The encoder is therefore
trained first, as SigLIP was before PaliGemma. Each patch learns which object it
shows and the location tokens of that object's box. Then the decoder learns to
find the named object, with few patches and short answers. All tasks of objects
follow, with both towers. The fifth stage adds words to read, captions in other
languages and varied pictures; the sixth has no words. The next eight teach to
read: the encoder sees many letters, the decoder learns to spell, both learn all
tasks in two stages, then twice mostly words and all tasks again. The last has
more varied pictures. The result is the mean of the weights before and after it,
which is better in trained and in held-out styles than either. `Lesson` contains
the computation of a step.

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

NAME = "pali_gemma2_nano_112"
FOLDER = Path(__file__).parents[2] / "presets" / NAME
STEPS_AN_EPOCH = 50
WARMUP_STEPS = 50
PUBLISHED_LENGTH = 32

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
        decay: int, epochs in which the learning rate falls along a cosine; the
            stage may end earlier.
        rates: pair of floats, learning rate before and after the decay.
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
    decay: int
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
ALL = {
    "caption": 2.0,
    "detect": 2.0,
    "detect_several": 2.0,
    "count": 2.0,
    "segment": 2.0,
}
# A word is asked for in nearly all of its scenes.
MORE = ALL | {"translate": 2.5, "detect_several": 3.0, "count": 3.0}
MORE |= {"segment": 1.5, "read": 20.0}
# Words are not learned in so few steps; what is measured worst is asked more.
LAST = {
    "caption": 2.0,
    "translate": 2.5,
    "detect": 1.5,
    "detect_several": 2.5,
    "count": 3.5,
    "segment": 3.0,
}
READ = LAST | {"translate": 1.0, "count": 2.0, "read": 20.0}
CLOSE = READ | {"segment": 6.0, "read": 24.0}
SPELL = CLOSE | {"read": 80.0}
FINISH = CLOSE | {"caption": 2.5, "translate": 2.5, "detect_several": 3.0}
FINISH |= {"segment": 5.0}
VARY = FINISH | {"caption": 4.0, "read": 40.0}
# Most questions of the first of these stages read a word. A word is asked for
# once, so many pictures with one question have more words than few with three.
WORDS = Stage(
    "both", 90, 90, (6e-4, 1e-4), 48, 1, 64, 28, 1, 0.45, 0.75, 0.5, SPELL
)
TASKS = Stage(
    "both", 30, 30, (2e-4, 1e-5), 24, 2, 64, 28, 1, 0.45, 0.6, 0.5, FINISH
)
STAGES = (
    Stage("encoder", 120, 120, (1.5e-3, 1e-4), 48, 1, 64, 6, 1, 0, 0, 0, FIND),
    Stage("decoder", 18, 18, (1.2e-3, 8e-4), 16, 2, 16, 6, 2, 0, 0, 0, FIND),
    Stage("both", 28, 28, (6e-4, 3.6e-4), 16, 3, 24, 24, 1, 0.35, 0, 0, ALL),
    Stage("both", 40, 40, (4e-4, 1e-5), 16, 3, 64, 24, 1, 0.35, 0, 0, ALL),
    Stage("both", 147, 180, (6e-4, 1e-5), 16, 3, 64, 28, 1, 0.45, 0.4, 1, MORE),
    Stage("both", 40, 40, (3e-4, 1e-5), 16, 3, 64, 28, 1, 0.45, 0, 0.5, LAST),
    Stage(
        "encoder", 160, 160, (1e-3, 2e-5), 32, 1, 64, 24, 1, 0.3, 0.6, 0.5, FIND
    ),
    Stage(
        "decoder", 40, 40, (8e-4, 1e-4), 24, 2, 64, 28, 1, 0.3, 0.9, 0.5, READ
    ),
    Stage(
        "both", 100, 100, (4e-4, 1e-5), 16, 3, 64, 28, 1, 0.45, 0.5, 0.5, READ
    ),
    Stage(
        "both", 30, 30, (2e-4, 1e-5), 16, 3, 64, 28, 1, 0.45, 0.5, 0.5, CLOSE
    ),
    WORDS,
    TASKS,
    dataclasses.replace(WORDS, epochs=84, decay=84, rates=(6e-4, 6e-5)),
    TASKS,
    Stage("both", 62, 62, (5e-4, 1e-5), 48, 1, 64, 28, 1, 0.45, 0.6, 0.7, VARY),
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


def go_on_from(start):
    """Build the model with a preset's weights, which may have other pieces.

    The row of a piece that the preset's tokenizer lacks starts as the mean of
    the rows of that piece's text.

    Args:
        start: str, a preset.
    """
    model = build()
    take_weights(model, start)
    return model


def take_weights(model, start):
    """Assign a preset's weights; rows of the table follow their pieces."""
    source = PaliGemmaCausalLM.from_preset(start, form="unrolled")
    table = ops.convert_to_numpy(source.backbone.token_embedding.table)
    earlier = source.preprocessor.tokenizer
    known = {earlier.id_to_token(i): i for i in range(len(table))}
    tokenizer = model.preprocessor.tokenizer
    rows = []
    for number in range(len(table)):
        piece = tokenizer.id_to_token(number)
        text = piece.replace("\u2581", " ")
        ids = [known[piece]] if piece in known else earlier.tokenize(text)
        rows.append(table[np.asarray(ids)].mean(0))
    for weight, value in zip(
        model.backbone.weights,
        source.backbone.weights,
        strict=True,
    ):
        weight.assign(value)
    model.backbone.token_embedding.table.assign(np.stack(rows))


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
        stage.decay * STEPS_AN_EPOCH - WARMUP_STEPS,
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
        optimizer=keras.optimizers.AdamW(
            rate, beta_2=0.98, weight_decay=0.02, clipnorm=1.0
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


def train(cache, folder, start=None, first_stage=0):
    """Run all stages, or the remaining ones, and average the last two.

    Args:
        cache: path of the sprites.
        folder: path of the checkpoints.
        start: path of a preset to start from, or `None` for random weights; a
            run that goes on has it in `folder`.
        first_stage: int, the stage to start with.

    Returns:
        `PaliGemmaCausalLM` with the mean of the weights after the last two
        stages; it is also written to the folder `mean`.

    Raises:
        ValueError: the last stage is the first, without weights before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    material = lesson.Material(
        variants.all_variants(scenes.load_sprites(cache)),
        lettering.load_words(cache)[0],
        lettering.load_fonts(cache, TRAINED_FONTS),
    )
    keras.utils.set_random_seed(0)
    model = go_on_from(start) if start else build()
    trained = lesson.Lesson(model.backbone)
    done = {"stage": first_stage, "epochs": 0}
    if (folder / "last.json").exists():
        done = json.loads((folder / "last.json").read_text())
    elif start:
        # Where the run looks for them when it goes on.
        model.save_to_preset(folder / f"after-{first_stage - 1}")
    before = folder / f"after-{len(STAGES) - 2}"
    if done["stage"] == len(STAGES) - 1 and not before.exists():
        raise ValueError(
            "The result is the mean of the weights before and after the last "
            f"stage. Expected: `start`, a preset, or {before}. Received: "
            "neither."
        )
    scale = 1 if platform() == "cpu" else SCALE
    for number in range(done["stage"], len(STAGES)):
        stage = STAGES[number]
        stage = dataclasses.replace(stage, pictures=scale * stage.pictures)
        model.backbone.vision_encoder.trainable = stage.trains != "decoder"
        # The optimizer would decay weights without gradients.
        model.backbone.text_decoder.trainable = stage.trains != "encoder"
        trained.encoder_alone = stage.trains == "encoder"
        goes_on = number == done["stage"] and done["epochs"]
        if goes_on and (folder / f"after-{number - 1}").exists():
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
    average(model, before)
    model.save_to_preset(folder / "mean")
    return model


def average(model, preset):
    """Assign the mean of a model's weights and those of a preset.

    The model continued the training of the preset, so the mean of their weights
    still works, and their different errors cancel.

    Source: https://arxiv.org/abs/2109.01903.
    """
    later = [ops.convert_to_numpy(w) for w in model.backbone.weights]
    take_weights(model, preset)
    for weight, value in zip(model.backbone.weights, later, strict=True):
        weight.assign((ops.convert_to_numpy(weight) + value) / 2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--checkpoints", type=Path)
    parser.add_argument("--start", help="a preset to go on from")
    parser.add_argument("--first-stage", type=int, default=0)
    options = parser.parse_args()
    train(
        options.cache,
        options.checkpoints or options.cache / "checkpoints",
        options.start,
        options.first_stage,
    )
