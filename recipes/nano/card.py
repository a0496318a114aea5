"""Publish the nano preset: `python -m recipes.nano.card --trained FOLDER`.

Weights are copied from the last folder of `recipes.nano.train` to `presets/`.
The card, `README.md` in the preset's folder, has the scores of
`recipes.nano.evaluate`. The sheet, `docs/pictures/nano_preset.png`, shows the
first scenes of a seed, with both right and wrong answers.
"""

import argparse
import textwrap
from pathlib import Path

from keras_paligemma.models.causal_lm import PaliGemmaCausalLM
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.contact_sheet import contact_sheet
from keras_paligemma.tasks.drawing import draw_objects
from recipes.nano import evaluate
from recipes.nano import scenes
from recipes.nano import variants
from recipes.nano.fetch import CLASSES
from recipes.nano.fetch import DEFAULT_CACHE
from recipes.nano.fetch import HELD_OUT_STYLES
from recipes.nano.fetch import TRAINED_STYLES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "presets/pali_gemma2_nano_112"
SHEET = ROOT / "docs/pictures/nano_preset.png"

# Number of scenes on the sheet for each measure.
SHOWN = {"caption": 3, "several": 6, "count": 3, "read": 3}

CARD = """# pali_gemma2_nano_112

A PaliGemma 2 of {parameters:,} parameters that keras_paligemma trained from
scratch: on pictures of 112 pixels, it names, finds, outlines and counts 50
kinds of emoji objects, and reads words and numbers of up to five characters.
It is for demos, tests and notebooks; it knows nothing of photographs.

Prompts: `caption en` (or `de`, `fr`, `es`, `ja`), `detect {{class}}`,
`detect {{class}} ; {{class}} ; …`, `segment {{class}}`,
`answer en how many {{class}}?`, `ocr`, with the classes
{classes}.
Masks are codes of the codec beside the weights, `MaskCodec.embedded()`.

| scenes never trained on, {count} a measure | trained styles | held-out style |
| --- | --- | --- |
{rows}

A box is right if its intersection over union with the named object is at least
{on_object}. Each named object counts with its best box. More boxes than objects
do not lower these scores, but the average precision in `tasks/scores.py`.
Trained styles: {trained}; held out: {held_out}. Pictures and
licences are in [the notice](NOTICE.md), pictures of answers and the recipe on
[its page](../../docs/nano_preset.md). The weights are under Apache-2.0.

Written by `python -m recipes.nano.card`.
"""


def table(results):
    """Return the rows of the card's table.

    Args:
        results: dict, from `evaluate.evaluate` for two groups of styles.
    """
    rows = []
    for key, value in results["trained"].items():
        measure, name = key.split(" ")
        words = evaluate.MEASURES[measure].words
        rows.append(
            f"| {words}: {evaluate.SCORES[name]} | {value:.3f} | "
            f"{results['held-out'][key]:.3f} |"
        )
    return "\n".join(rows)


def sheet(model, sprites, group):
    """Draw a model's answers to some scenes, with their prompts."""
    drawn, words = [], []
    for measure, count in SHOWN.items():
        examples = evaluate.held_out_scenes(
            sprites, list(CLASSES), group, measure, 7, count
        )
        responses = evaluate.respond(model.generate, examples)
        for example, response in zip(examples, responses, strict=True):
            boxes = read_objects(response)
            drawn.append(draw_objects(example["image"], boxes))
            scores = evaluate.score(example, response)
            right = min(scores.get("exact", []) + scores.get("right", []))
            text = example["prompt"].removeprefix("answer en ")
            if not boxes:
                text = f"{text}: {response}"
            words.append(f"{'right' if right == 1 else 'WRONG'}: {text}")
    return contact_sheet(drawn, words)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--trained", help="a folder of weights to publish")
    options = parser.parse_args()
    sprites = variants.with_codes(scenes.load_sprites(options.cache))
    groups = evaluate.load_groups(options.cache)
    model = PaliGemmaCausalLM.from_preset(options.trained or FOLDER)
    if options.trained:
        model.save_to_preset(FOLDER)
    sheet(model, sprites, groups["trained"]).quantize(64).save(
        SHEET, optimize=True
    )
    results = evaluate.evaluate(
        model.generate,
        sprites,
        list(CLASSES),
        groups,
        seed=1,
        count=options.count,
        measures=tuple(evaluate.MEASURES),
    )
    card = CARD.format(
        parameters=model.backbone.count_params(),
        classes=textwrap.fill(", ".join(CLASSES), 80),
        count=options.count,
        rows=table(results),
        on_object=evaluate.ON_OBJECT,
        trained=", ".join(TRAINED_STYLES),
        held_out=", ".join(HELD_OUT_STYLES),
    )
    (FOLDER / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
