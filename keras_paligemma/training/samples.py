"""Sample predictions during training: text, and pictures with boxes."""

import re
from pathlib import Path
from typing import Any

import keras

from keras_paligemma.data.examples import frames_of
from keras_paligemma.tasks.answers import read_objects
from keras_paligemma.tasks.contact_sheet import contact_sheet
from keras_paligemma.tasks.drawing import draw_objects
from keras_paligemma.types import PathLike


class SamplePredictions(keras.callbacks.Callback):
    """Generate, print and draw answers to a few prompts after each epoch.

    They show faults that the loss does not, such as repetition or shifted
    boxes.

    Args:
        examples: dict of lists `images` and `prompts`, and `responses` if the
            reference answers are known.
        directory: str or path, folder for one picture per epoch, such as
            "epoch_0003.png", of all examples with boxes and words; `None`
            draws none.
        every: int, epochs between samples.
        max_new_tokens: int, as `generate` takes it.

    Attributes:
        answers: dict of epochs to lists of str.

    Raises:
        ValueError: lists of different lengths, or `every` below 1.
    """

    def __init__(
        self,
        examples: dict[str, Any],
        directory: PathLike | None = None,
        every: int = 1,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        lengths = {
            key: len(column)
            if hasattr(column, "__len__")
            and not isinstance(column, (str, bytes))
            else None
            for key, column in examples.items()
        }
        if (
            not {"images", "prompts"} <= set(lengths)
            or len(set(lengths.values())) != 1
            or not all(lengths.values())
        ):
            raise ValueError(
                "Samples are equally long lists `images`, `prompts` and, if "
                "known, `responses`, of one or more. Received lengths: "
                f"{lengths}."
            )
        if every < 1:
            raise ValueError(f"`every` is at least 1. Received: {every!r}.")
        self.examples = examples
        self.directory = None if directory is None else Path(directory)
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.answers = {}

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
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
            pictures = [
                # Of frames, the first one.
                draw_objects(frames_of(image)[0], read_objects(answer))
                for image, answer in zip(inputs["images"], answers, strict=True)
            ]
            # Boxes are drawn, so their tokens are left out of the text.
            words = [
                re.sub(r"<(loc|seg)\d+>", "", answer).strip()
                for answer in answers
            ]
            sheet = contact_sheet(pictures, words)
            sheet.save(self.directory / f"epoch_{epoch + 1:04}.png")
