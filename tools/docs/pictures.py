"""Draw the pictures of the documentation: `python tools/docs/pictures.py`.

They show answers of the nano preset, which is part of the repository.
"""

import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

from keras_paligemma import PaliGemmaCausalLM
from keras_paligemma.tasks import prompts
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.answers import write_objects
from keras_paligemma.tasks.contact_sheet import contact_sheet
from keras_paligemma.tasks.drawing import draw_objects
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.objects import Object

ROOT = Path(__file__).parents[2]
SCENES = ROOT / "examples" / "pictures"
PICTURES = ROOT / "docs" / "pictures"
ASKED = {"scene_0": "lion", "scene_1": "bell", "scene_2": "guitar"}


def answers():
    """Draw captions and boxes of three scenes."""
    model = PaliGemmaCausalLM.from_preset("pali_gemma2_nano_112")
    scenes = [SCENES / f"{name}.png" for name in ASKED]
    captions = model.generate(
        {"images": scenes, "prompts": [prompts.caption()] * len(scenes)}
    )
    found = model.generate(
        {
            "images": scenes,
            "prompts": [prompts.detect(label) for label in ASKED.values()],
        }
    )
    drawn = [
        draw_objects(scene, read_objects(answer))
        for scene, answer in zip(scenes, found, strict=True)
    ]
    return contact_sheet(drawn, captions)


def masks():
    """Draw a mask, and the mask decoded from its 16 codes."""
    codec = MaskCodec.embedded()
    rows, columns = np.mgrid[-1:1:112j, -1:1:112j]
    ring = np.abs(np.hypot(rows - 0.2, columns - 0.05) - 0.45) < 0.15
    true = Object.from_mask(ring, label="ring")
    read = read_objects(write_objects([true], codec), codec)
    scene = SCENES / "scene_1.png"
    drawn = [draw_objects(scene, objects) for objects in ([true], read)]
    return contact_sheet(drawn, ["the mask", "from its 16 codes"])


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, draw in (("answers", answers), ("masks", masks)):
        draw().save(PICTURES / f"{name}.png", optimize=True)
