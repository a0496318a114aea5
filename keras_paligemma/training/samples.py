"""What a model answers while it learns: text, and pictures with boxes."""

from pathlib import Path

import keras
from PIL import Image

from keras_paligemma.tasks.boxes import draw_boxes
from keras_paligemma.tasks.boxes import parse_boxes


class SamplePredictions(keras.callbacks.Callback):
    """Answer a few prompts after each epoch, print and draw the answers.

    A loss does not tell that a model repeats itself, or that its boxes are
    shifted; a look does.

    Args:
        examples: dict of lists `images` and `prompts`, and `responses` where
            the right answers are known.
        directory: str or path for one picture an epoch, "epoch_0003.png", of
            all examples with their boxes; `None` draws none.
        every: int, epochs from one look to the next.
        max_new_tokens: int, as `generate` takes it.

    Attributes:
        answers: dict of epoch to the list of answers.
    """

    def __init__(self, examples, directory=None, every=1, max_new_tokens=None):
        super().__init__()
        self.examples = examples
        self.directory = None if directory is None else Path(directory)
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.answers = {}

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every:
            return
        inputs = {key: self.examples[key] for key in ("images", "prompts")}
        answers = self.model.generate(
            inputs, max_new_tokens=self.max_new_tokens
        )
        self.answers[epoch + 1] = answers
        wanted = self.examples.get("responses", [None] * len(answers))
        rows = zip(inputs["prompts"], answers, wanted, strict=True)
        for prompt, answer, right in rows:
            known = "" if right is None else f"  (right: {right!r})"
            print(f"\n{prompt!r} -> {answer!r}{known}", end="")
        print()
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            sheet = contact_sheet(inputs["images"], answers)
            sheet.save(self.directory / f"epoch_{epoch + 1:04}.png")


def contact_sheet(images, answers, side=448):
    """Draw pictures beside each other, each with the boxes of its answer.

    Args:
        images: list of paths, Pillow pictures or uint8 arrays.
        answers: list of str.
        side: int, longest side of a picture in pixels.

    Returns:
        `PIL.Image.Image`, at most four pictures wide.
    """
    drawn = []
    for image, answer in zip(images, answers, strict=True):
        picture = draw_boxes(image, parse_boxes(answer))
        picture.thumbnail((side, side))
        drawn.append(picture)
    columns = min(4, len(drawn))
    rows = -(-len(drawn) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for number, picture in enumerate(drawn):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * side, row * side))
    return sheet
