"""The computation of a training step: batches, a model with heads, losses.

An earlier preset's decoder did not attend to the object that the prompt
named (`recipes.nano.diagnose`). Location tokens provide only four targets per
box, and another object's box is nearly as good a guess. This model therefore
has a second kind of target beside the answer's tokens. Each image token inside
the decoder predicts which label of the prompt its object has, if any. This
gives up to 64 targets per example that tell the model what to look for.
Captions have no labels; their targets are the position of the object in the
row. The heads for these targets are dropped after training.
"""

from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_paligemma.tasks.locations import to_locations
from recipes.nano import lettering
from recipes.nano import questions
from recipes.nano import scenes
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import TRAINED_STYLES

SIZE, PATCH = 112, 14
SIDE = SIZE // PATCH

# The number of classes of a place target: the index of a label, or of a
# position in a row or a word; 0 means none.
PLACES = 1 + max(questions.MAX_LABELS, questions.MAX_BOXES, lettering.LONGEST)

# The minimum area of a letter in its patch, in pixels.
LETTER_AREA = 30

# Maximum texts of a scene with words, where the encoder is trained alone.
TEXTS = 8

# The decoder block after which image tokens predict these places.
PLACES_AFTER = 1

# The longest prompt of the tasks. The published preset has more room, and
# padding changes nothing.
PROMPT_LENGTH = 8

# A count has one token, and a detection up to eighteen. The token weights of
# every answer sum to this number.
MEAN_TOKENS = 6

# Most patches show no object. Their total weight should not exceed that of the
# others.
BACKGROUND_WEIGHT = 0.3

# Width of a location's soft targets, in bins. An edge that is one pixel off is
# nine bins off and nearly right, which the loss should reflect.
LOCATION_SPREAD = 6.0

# Targets of the encoder's tokens.
OF_PATCHES = ("names", "boxes", "letters")

# The minimum number of an object's patches that a decoder sees, if it does not
# see all.
PATCHES_KEPT = 5


class Material(NamedTuple):
    """What scenes are made of.

    Args:
        sprites: dict, from `variants.all_variants`.
        words: list of str.
        fonts: list of str, paths.
    """

    sprites: dict
    words: list
    fonts: list


class Lessons(keras.utils.PyDataset):
    """Endless scenes with questions, identical in every run.

    Args:
        material: `Material`.
        preprocessor: `PaliGemmaCausalLMPreprocessor` without images.
        stage: `recipes.nano.train.Stage`.
        seed: int, the number of the stage.
        steps: int, batches per epoch.
    """

    def __init__(self, material, preprocessor, stage, seed, steps):
        super().__init__(workers=1, max_queue_size=4)
        self.material, self.preprocessor = material, preprocessor
        self.stage, self.seed, self.steps = stage, seed, steps
        self.epoch = 0

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        rng = np.random.default_rng([0, self.seed, self.epoch, index])
        made = [self._scene(rng) for _ in range(self.stage.pictures)]
        asked = [
            questions.ask(
                rng,
                scene,
                list(CLASSES),
                self.stage.shares,
                self.stage.questions,
            )
            for scene in made
        ]
        which = [object_of_patches(scene) for scene in made]
        kept = [
            some_patches(rng, picture, self.stage.patches) for picture in which
        ]
        x, y, w = batch(
            made, asked, np.stack(which), np.stack(kept), self.preprocessor
        )
        if self.stage.trains == "encoder":
            y, w = ({name: d[name] for name in OF_PATCHES} for d in (y, w))
        return x, y, w

    def _scene(self, rng):
        stage, classes = self.stage, list(CLASSES)
        written = rng.random() < stage.written
        # `ocr` asks for the only text, but an encoder learns from many.
        texts = TEXTS if stage.trains == "encoder" else 1
        if written:
            # Two objects are smaller than one.
            names = scenes.draw(
                rng, classes, 2 if texts > 1 else rng.integers(1, 3)
            )
        elif rng.random() < stage.repeats:
            names = scenes.choose_names("count", rng, classes, 5)
        else:
            number = rng.integers(stage.fewest, 4)
            names = scenes.draw(rng, classes, number)
        sprites, words, fonts = self.material
        varied = rng.random() < stage.varied
        scene = scenes.compose(
            rng, sprites, TRAINED_STYLES, names, SIZE, varied
        )
        for _ in range(texts * written):
            scene = lettering.write(rng, scene, words, fonts)
        return scene


def batch(made, asked, which, kept, preprocessor):
    """Make the arrays of a step.

    Args:
        made: list of `scenes.Scene`.
        asked: list of lists of `Question`, equally many for each picture.
        which: int array (pictures, patches), from `object_of_patches`.
        kept: int array (pictures, patches that the decoder sees), from
            `some_patches`.
        preprocessor: `PaliGemmaCausalLMPreprocessor` without images.

    Returns:
        Inputs, targets and weights, all with the pictures on the first axis.
    """
    count, each = len(asked), len(asked[0])
    flat = [question for several in asked for question in several]
    inputs, targets, weights = preprocessor(
        {
            "prompts": [question.prompt for question in flat],
            "responses": [question.response for question in flat],
        }
    )
    spell(flat, inputs, targets, weights, preprocessor.tokenizer)
    weights = weights * (
        MEAN_TOKENS / np.maximum(weights.sum(1, keepdims=True), 1)
    )
    seen = np.take_along_axis(which, kept, axis=1)
    place_BQI = np.zeros((count, each, kept.shape[1]), "int32")
    for row, several in enumerate(asked):
        for column, question in enumerate(several):
            for place, numbers in enumerate(question.mentioned, 1):
                place_BQI[row, column, np.isin(seen[row], numbers)] = place
    name_BI = np.zeros(which.shape, "int32")
    box_BI4 = np.zeros((*which.shape, 4), "int32")
    boxed_BI = np.zeros(which.shape, "float32")
    classes = list(CLASSES)
    for row, scene in enumerate(made):
        for number, placed in enumerate(scene.objects):
            here = which[row] == number
            name_BI[row, here] = 1 + classes.index(placed.name)
            box_BI4[row, here] = to_locations(np.divide(placed.box, SIZE))
            boxed_BI[row, here] = 1
    letter_BI2 = np.stack([letters_of_halves(scene) for scene in made])

    def by_picture(array):
        return np.reshape(array, (count, each, *np.shape(array)[1:]))

    x = {name: by_picture(inputs[name]) for name in inputs}
    x["images"] = np.stack([scene.image for scene in made])
    x["kept"] = kept.astype("int32")
    y = {
        "tokens": by_picture(targets),
        "places": place_BQI,
        "names": name_BI,
        "boxes": box_BI4,
        "letters": letter_BI2,
    }
    w = {
        "tokens": by_picture(weights).astype("float32"),
        "places": np.where(place_BQI > 0, 1.0, BACKGROUND_WEIGHT),
        "names": np.where(name_BI > 0, 1.0, BACKGROUND_WEIGHT),
        "boxes": boxed_BI,
        "letters": np.where(letter_BI2 > 0, 1.0, BACKGROUND_WEIGHT),
    }
    return x, y, {name: value.astype("float32") for name, value in w.items()}


def spell(asked, inputs, targets, weights, tokenizer):
    """Write the answers that read a word letter by letter, in place.

    The tokenizer has pieces of several letters, whose boundaries no picture
    shows. The text of the answer is the same.

    Args:
        asked: list of `Question`, one per row.
        inputs: dict of arrays of a preprocessor.
        targets: int array (rows, response length).
        weights: float array (rows, response length).
        tokenizer: `PaliGemmaTokenizer`.
    """
    length = targets.shape[1]
    for row, question in enumerate(asked):
        if question.prompt != questions.READ:
            continue
        ids = [tokenizer.token_to_id(letter) for letter in question.response]
        count = len(ids) + 1
        targets[row] = 0
        targets[row, :count] = [*ids, tokenizer.end_token_id]
        weights[row] = np.arange(length) < count
        inputs["token_ids"][row, -length:] = targets[row]
        for mask in ("padding_mask", "response_mask"):
            inputs[mask][row, -length:] = np.arange(length) < count


def object_of_patches(scene):
    """Return the object at the centre of each patch, -1 for none.

    A patch with enough of a letter, which may miss the centre, has the letter
    with the largest part in it.

    Args:
        scene: `scenes.Scene`.

    Returns:
        int array (patches,), row by row. Letters are counted after objects.
    """
    middles = np.arange(PATCH / 2, SIZE, PATCH)
    y, x = (g.ravel() for g in np.meshgrid(middles, middles, indexing="ij"))
    which = np.full(SIDE**2, -1)
    for number, placed in enumerate(scene.objects):
        y1, x1, y2, x2 = placed.box
        which[(y1 <= y) & (y < y2) & (x1 <= x) & (x < x2)] = number
    largest = np.full(SIDE**2, float(LETTER_AREA))
    half = PATCH / 2
    for number, letter in enumerate(scene.letters, len(scene.objects)):
        area = area_within(letter.box, y - half, x - half, PATCH, PATCH)
        which[area > largest] = number
        largest = np.maximum(largest, area)
    return which


def area_within(box, top, left, height, width):
    """Return the area of a box within rectangles, in pixels.

    Args:
        box: `(y1, x1, y2, x2)`.
        top, left: arrays, corners of the rectangles.
        height, width: int, their size.
    """
    y1, x1, y2, x2 = box
    rows = np.minimum(y2, top + height) - np.maximum(y1, top)
    columns = np.minimum(x2, left + width) - np.maximum(x1, left)
    return np.maximum(rows, 0) * np.maximum(columns, 0)


def letters_of_halves(scene):
    """Return the letter in the left and right half of each patch, 0 for none.

    Letters are narrower than patches, so a patch has up to two.

    Args:
        scene: `scenes.Scene`.

    Returns:
        int array (patches, 2), row by row.
    """
    top = np.arange(0, SIZE, PATCH)[:, None]
    left = np.arange(0, SIZE, PATCH // 2)[None]
    found = np.zeros((SIDE, 2 * SIDE), "int32")
    largest = np.full(found.shape, LETTER_AREA / 2)
    for name, box in scene.letters:
        area = area_within(box, top, left, PATCH, PATCH // 2)
        found[area > largest] = 1 + lettering.CHARACTERS.index(name)
        largest = np.maximum(largest, area)
    return found.reshape(SIDE**2, 2)


def some_patches(rng, which, number):
    """Choose the patches that the decoder sees, with some of each object.

    Tokens have positions, so most of them may be missing. A step of 24 tokens
    costs less than half of a step of 64.

    Args:
        rng: `numpy.random.Generator`.
        which: int array, from `object_of_patches`.
        number: int, number of patches to choose.

    Returns:
        int array (number,), in ascending order.
    """
    rank = rng.random(len(which))
    for place in range(which.max() + 1):
        mine = np.flatnonzero(which == place)
        rank[mine[np.argsort(rank[mine])[:PATCHES_KEPT]]] -= 1
    return np.sort(np.argsort(rank)[:number])


class Lesson(keras.Model):
    """The backbone with a head for each kind of target.

    Args:
        backbone: `PaliGemmaBackbone`, unrolled.

    Attributes:
        encoder_alone: bool, whether the decoder is left out.
    """

    def __init__(self, backbone):
        super().__init__(name="lesson")
        self.backbone = backbone
        self.encoder_alone = False
        width = backbone.hidden_dim
        self.names = keras.layers.Dense(1 + len(CLASSES), name="names")
        self.boxes = keras.layers.Dense(4 * width, name="boxes")
        self.letters = keras.layers.Dense(
            2 * (1 + len(lettering.CHARACTERS)), name="letters"
        )
        self.places = keras.layers.Dense(PLACES, name="places")
        for head in (self.names, self.boxes, self.letters, self.places):
            head.build((None, None, width))
        self.built = True

    def call(self, inputs, training=None):
        backbone = self.backbone
        images = ops.cast(inputs["images"], "float32") / 127.5 - 1
        image_NID = backbone.encode_images(images)
        of_patches = {
            "names": self.names(image_NID),
            "boxes": self.boxes(image_NID),
            "letters": ops.reshape(
                self.letters(image_NID), (*image_NID.shape[:2], 2, -1)
            ),
        }
        if self.encoder_alone:
            return of_patches
        count, each, length = inputs["token_ids"].shape
        rows = {
            name: ops.reshape(inputs[name], (count * each, length))
            for name in ("token_ids", "padding_mask", "response_mask")
        }
        kept_NK = inputs["kept"]
        some_NKD = ops.take_along_axis(image_NID, kept_NK[..., None], axis=1)
        rows["image_embeddings"] = ops.repeat(some_NKD, each, axis=0)
        x_BLD = backbone.embed(rows)
        images = kept_NK.shape[1]
        mask, positions = backbone.mask_and_positions(rows, images)
        # Positions of these tokens as if all tokens were present.
        missing = image_NID.shape[1] - images
        positions = ops.concatenate(
            [
                ops.repeat(kept_NK, each, axis=0),
                positions[:, images:] + missing,
            ],
            axis=1,
        )
        decoder = backbone.text_decoder
        arguments = decoder.arguments_of_blocks(mask, positions)
        for number, block in enumerate(decoder.blocks.each_block()):
            x_BLD = block(x_BLD, *arguments)
            if number == PLACES_AFTER:
                # Normalize as the next block does: places are predicted from
                # its inputs.
                seen_BID = rms(x_BLD[:, :images])
        x_BLD = decoder.final_norm(x_BLD)
        logits = backbone.logits(x_BLD[:, images + PROMPT_LENGTH - 1 : -1])
        return {
            "tokens": self._by_picture(logits, count, each),
            "places": self._by_picture(self.places(seen_BID), count, each),
            **of_patches,
        }

    def _by_picture(self, x, count, each):
        return ops.reshape(x, (count, each, *x.shape[1:]))


def rms(x_BTD):
    return x_BTD * ops.rsqrt(ops.mean(ops.square(x_BTD), -1, keepdims=True))


class SoftLocationLoss(keras.losses.Loss):
    """Cross-entropy with soft targets for location tokens.

    Args:
        first: int, the id of `<loc0000>`.
    """

    def __init__(self, first, name="soft_location_loss"):
        super().__init__(name=name, reduction="sum_over_batch_size")
        self.first = first

    def call(self, targets, logits):
        log = ops.log_softmax(ops.cast(logits, "float32"), axis=-1)
        targets = ops.cast(targets, "int32")
        hard = -ops.take_along_axis(log, targets[..., None], axis=-1)[..., 0]
        place = targets - self.first
        last = self.first + scenes.LOCATIONS
        bins = ops.arange(scenes.LOCATIONS, dtype="float32")
        distance = bins - ops.cast(place, "float32")[..., None]
        share = ops.exp(-0.5 * ops.square(distance / LOCATION_SPREAD))
        total = ops.maximum(ops.sum(share, axis=-1, keepdims=True), 1e-6)
        soft = -ops.sum(share / total * log[..., self.first : last], axis=-1)
        is_location = ops.logical_and(place >= 0, targets < last)
        return ops.where(is_location, soft, hard)


class RowLoss(keras.losses.Loss):
    """Squared distance to the embeddings of location tokens.

    The encoder's output for a box is then the vector that the decoder's head
    reads, so the decoder only has to copy it.

    Args:
        rows: array (locations, width), scaled to a variance of one.
    """

    def __init__(self, rows, name="row_loss"):
        super().__init__(name=name, reduction="sum_over_batch_size")
        self.rows = ops.convert_to_tensor(rows)

    def call(self, bins_BI4, found_BIX):
        wanted = ops.take(self.rows, ops.cast(bins_BI4, "int32"), axis=0)
        wanted = ops.reshape(wanted, ops.shape(found_BIX))
        return ops.mean(ops.square(found_BIX - wanted), axis=-1)
