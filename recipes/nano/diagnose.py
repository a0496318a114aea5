"""Diagnose a nano preset's detections: `python -m recipes.nano.diagnose`.

Prints four measures of detection scenes in trained styles, which training never
draws. The first is the object that the answer's box is on, by the number of
objects. The second is what a linear probe reads from the encoder's tokens. The
third is the decoder's attention when it writes the first location. The fourth
is the share of each kind of token in the loss.
"""

import argparse

import numpy as np

from keras_paligemma.layers.attention import rotate
from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
from recipes.nano import evaluate
from recipes.nano import lesson
from recipes.nano import scenes
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import DEFAULT_CACHE
from recipes.nano.fetch import TRAINED_STYLES

# The probe's penalty, as a share of the variance of a token's values.
RIDGE = 1e-2


def one_of(sprites, objects, count, seed):
    """Draw detection scenes with a number of different objects.

    Args:
        sprites: dict, from `scenes.load_sprites`.
        objects: int, objects per scene.
        count: int, number of scenes.
        seed: int.

    Returns:
        List of examples like those of `scenes.sample`.
    """
    examples = []
    for index in range(count):
        rng = np.random.default_rng([1, seed, objects, index])
        names = scenes.draw(rng, list(CLASSES), objects)
        image, placed, _ = scenes.compose(rng, sprites, TRAINED_STYLES, names)
        prompt, response = scenes.detect_example(rng, placed, None, len(image))
        examples.append(
            {
                "image": image,
                "prompt": prompt,
                "response": response,
                "objects": placed,
                "task": "detect",
            }
        )
    return examples


def which_object(examples, responses):
    """Count boxes on the named object, on another object, and on none."""
    right, other, overlaps = [], [], []
    for example, response in zip(examples, responses, strict=True):
        asked = example["prompt"].removeprefix("detect ")
        found = evaluate.read_boxes(response, asked, len(example["image"]))
        box = found[0] if found else (0, 0, 0, 0)
        here = {n: scenes.overlap(b, box) for n, b, *_ in example["objects"]}
        overlaps.append(here.pop(asked))
        right.append(overlaps[-1] >= 0.5)
        other.append(max(here.values(), default=0) >= 0.5)
    return {
        "mean IoU": np.mean(overlaps),
        "on the named object": np.mean(right),
        "on another": np.mean(other),
        "on none": 1 - np.mean(right) - np.mean(other),
    }


def patches(examples):
    """Return the object at each patch's centre, (B, I), with -1 for none."""
    return np.stack(
        [
            lesson.object_of_patches(
                scenes.Scene(example["image"], example["objects"])
            )
            for example in examples
        ]
    )


def pictures(examples):
    images = np.stack([example["image"] for example in examples])
    return images.astype("float32") / 127.5 - 1


def probe(backbone, fitted, tested):
    """Predict class and box from single tokens by least squares.

    Args:
        backbone: `PaliGemmaBackbone`.
        fitted: list of examples, to fit the probe.
        tested: list of examples, to measure the probe.

    Returns:
        Dict of the share of right classes and the mean error of an edge in
        pixels, over patches whose centre is on an object.
    """
    rows = []
    for examples in (fitted, tested):
        tokens = np.asarray(backbone.encode_images(pictures(examples)))
        which = patches(examples)
        features, names, boxes = [], [], []
        for row, example in enumerate(examples):
            for place in np.flatnonzero(which[row] >= 0):
                name, box, *_ = example["objects"][which[row, place]]
                features.append(np.append(tokens[row, place], 1))
                names.append(list(CLASSES).index(name))
                boxes.append(box)
        rows.append(tuple(map(np.array, (features, names, boxes))))
    (x, names, boxes), (new, new_names, new_boxes) = rows
    wanted = np.concatenate([np.eye(len(CLASSES))[names], boxes], axis=1)
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]) * x.var()
    found = new @ np.linalg.solve(gram, x.T @ wanted)
    classes, edges = found[:, : len(CLASSES)], found[:, len(CLASSES) :]
    return {
        "class of a patch": (classes.argmax(1) == new_names).mean(),
        "edge error, pixels": np.abs(edges - new_boxes).mean(),
    }


def teacher_forced(model, examples):
    """Preprocess examples together with their responses, as `fit` does."""
    data = {
        "images": np.stack([example["image"] for example in examples]),
        "prompts": [example["prompt"] for example in examples],
        "responses": [example["response"] for example in examples],
    }
    return model.preprocessor(data)


def attention_on_objects(model, examples):
    """Measure the attention of the token before the first location.

    Returns:
        Dict of "layer head" to the share of attention on the named object's
        patches, relative to the attention on all objects' patches. A head
        that does not distinguish objects gives the named object's share of
        these patches.
    """
    backbone = model.backbone
    decoder = backbone.text_decoder
    inputs, _, _ = teacher_forced(model, examples)
    x_BLD = np.asarray(backbone.embed(inputs))
    count = x_BLD.shape[1] - inputs["token_ids"].shape[1]
    mask, positions = backbone.mask_and_positions(inputs, count)
    last = count + np.argmax(np.asarray(inputs["response_mask"]), axis=1) - 1
    named = np.array(
        [
            [name for name, *_ in example["objects"]].index(
                example["prompt"].removeprefix("detect ")
            )
            for example in examples
        ]
    )
    which = patches(examples)
    arguments = decoder.arguments_of_blocks(mask, positions)
    angles = (
        arguments["angles"] if isinstance(arguments, dict) else arguments[1]
    )
    found = {"patches": share_of((which >= 0) * 1.0, which, named)}
    config = decoder.config
    for number, block in enumerate(decoder.blocks.each_block()):
        attention = block.attention
        normed = block.pre_attention_norm(x_BLD)
        query = np.asarray(rotate(attention.query(normed), angles))
        key = np.asarray(rotate(attention.key(normed), angles))
        query = query[np.arange(len(last)), last] * attention.query_scale
        groups = config.num_query_heads // config.num_key_value_heads
        for head in range(config.num_query_heads):
            logits = np.einsum(
                "bh,bsh->bs", query[:, head], key[:, :, head // groups]
            )
            if attention.logit_soft_cap:
                cap = attention.logit_soft_cap
                logits = cap * np.tanh(logits / cap)
            weights = np.exp(
                logits[:, :count] - logits[:, :count].max(1)[:, None]
            )
            found[f"layer {number} head {head}"] = share_of(
                weights, which, named
            )
        x_BLD = np.asarray(block(x_BLD, mask, angles))
    return found


def share_of(weights_BI, which, named):
    on_named = (weights_BI * (which == named[:, None])).sum(1)
    on_any = (weights_BI * (which >= 0)).sum(1)
    return np.mean(on_named / np.maximum(on_any, 1e-9))


def loss_by_kind(model, examples):
    """Return mean cross-entropy and share of the sum by kind of token."""
    inputs, targets, weights = teacher_forced(model, examples)
    hidden = model.backbone(inputs)[:, -targets.shape[1] - 1 : -1]
    logits = np.asarray(model.backbone.logits(hidden))
    highest = logits.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(-1)) + highest[..., 0]
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = (log_sum - chosen) * weights
    first = model.preprocessor.tokenizer.token_to_id("<loc0000>")
    is_location = (targets >= first) & (targets < first + scenes.LOCATIONS)
    kinds = {
        "locations": is_location * weights,
        "words and end": ~is_location * weights,
    }
    return {
        name: {
            "a token": float((loss * kind).sum() / kind.sum()),
            "share of the sum": float((loss * kind).sum() / loss.sum()),
        }
        for name, kind in kinds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="pali_gemma2_nano_112")
    parser.add_argument("--count", type=int, default=256)
    arguments = parser.parse_args()
    sprites = scenes.load_sprites(DEFAULT_CACHE)
    model = PaliGemmaCausalLM.from_preset(arguments.preset)
    count = arguments.count
    for objects in (1, 2, 3):
        examples = one_of(sprites, objects, count, seed=0)
        responses = evaluate.respond(model.generate, examples)
        print(f"{objects} objects:", which_object(examples, responses))
    fitted = one_of(sprites, 3, 2 * count, seed=1)
    print("probe:", probe(model.backbone, fitted, examples))
    for name, share in attention_on_objects(model, examples).items():
        print(f"{name}: {share:.3f}")
    print("loss:", loss_by_kind(model, examples))


if __name__ == "__main__":
    main()
