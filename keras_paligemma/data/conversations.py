"""Conversations about pictures, as LLaVA and ms-swift write them."""

import os
import re
from pathlib import Path
from typing import Any

from keras_paligemma.config import parse_json
from keras_paligemma.data.examples import frames_of
from keras_paligemma.data.examples import located
from keras_paligemma.data.fields import check_numbered
from keras_paligemma.data.jsonl import JSONLSource
from keras_paligemma.data.jsonl import starts_array
from keras_paligemma.preprocessing.images import picture_path

_ROLES = {
    "human": "question",
    "user": "question",
    "gpt": "answer",
    "assistant": "answer",
    "model": "answer",
}
_IMAGE = "<image>"
# Placeholders that other loaders replace before the model reads the text.
_PLACEHOLDER = re.compile(r"<(?:bbox|ref-object|video|audio)>")


class ConversationSource:
    """Examples of conversations with one question and one answer.

    | | pictures | turns | one turn |
    |---|---|---|---|
    | LLaVA | `image` | `conversations` | `{"from": "human", "value": …}` |
    | ms-swift | `images` | `messages` | `{"role": "user", "content": …}` |

    `<image>` at either end of a question is dropped, since the model reads
    pictures before the prompt. PaliGemma is trained on single turns, so a
    conversation of several turns raises an error with their number; so does a
    system prompt. For JSONL only line offsets are kept in memory; an array is
    read whole.

    Args:
        data: str or path of a JSONL file or of a JSON array; or a data set
            with a length and `[index]`, such as a list of dictionaries.
        image_folder: str or path that pictures are relative to; the file's
            own folder if `None`.
        turns: str, the field of the turns; `None` uses `conversations` or
            `messages`, whichever exists.
        images: str, the field of the picture or pictures; `image` or
            `images` if `None`.
        allow_empty: bool, whether an answer may be empty.

    Raises:
        ValueError: if the file does not exist or is not JSON.
        ExampleError: on `source[index]`, with its place, if a field is missing,
            there are several turns, or the numbers of `<image>` and pictures
            differ.

    Example:

    ```python
    source = ConversationSource("llava.json", image_folder="pictures")
    source[0]
    # {"images": "pictures/cat.jpg", "prompts": "What is this?",
    #  "responses": "A cat."}
    ```

    Source: https://github.com/haotian-liu/LLaVA, "Finetune LLaVA on Custom
    Datasets"; https://swift.readthedocs.io, "Custom Dataset".
    """

    def __init__(
        self,
        data: Any,
        image_folder: str | os.PathLike[str] | None = None,
        turns: str | None = None,
        images: str | None = None,
        allow_empty: bool = False,
    ) -> None:
        if isinstance(data, (str, os.PathLike)):
            path = Path(data)
            image_folder = image_folder or path.parent
            self._records = (
                _Records(_read_array(path), os.fspath(path))
                if starts_array(path)
                else JSONLSource(path)
            )
        else:
            check_numbered(data)
            self._records = _Records(data, type(data).__name__)
        self.image_folder = os.fspath(image_folder or "")
        self.turns = turns
        self.images = images
        self.allow_empty = allow_empty

    def __len__(self):
        return len(self._records)

    def where(self, index: int) -> str:
        """Return file and line, or data set and index from 0."""
        return self._records.where(index)

    def __getitem__(self, index):
        with located(self.where(index)):
            record = self._records.record(index)
            turns = _field(record, self.turns, ("conversations", "messages"))
            question, answer = _single_turn(turns)
            if not self.allow_empty and not answer.strip():
                raise ValueError(
                    "The answer is empty. Expected: text. Received: "
                    f"{answer!r:.80}. Where an empty answer is meant, pass "
                    "`allow_empty=True`."
                )
            pictures = frames_of(
                _field(record, self.images, ("image", "images"))
            )
            pictures = [
                picture_path(picture, self.image_folder)
                if isinstance(picture, (str, os.PathLike))
                else picture
                for picture in pictures
            ]
            return {
                "images": pictures if len(pictures) > 1 else pictures[0],
                "prompts": _without_tags(question, len(pictures)),
                "responses": answer,
            }


class _Records:
    """The records of a list or data set, by index, with their places."""

    def __init__(self, rows, name):
        self.rows, self.name = rows, name

    def __len__(self):
        return len(self.rows)

    def where(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no example {index} of {len(self)}.")
        return f"{self.name}[{index}]"

    def record(self, index):
        return self.rows[int(index)]


def _read_array(path):
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _field(record, name, usual):
    """Return a field's value, by the given name or a usual one."""
    names = usual if name is None else (name,)
    for key in names:
        if isinstance(record, dict) and record.get(key) is not None:
            return record[key]
    received = sorted(record) if isinstance(record, dict) else record
    raise ValueError(
        f"A field is missing. Expected: {' or '.join(names)}; other names are "
        f"given by `turns=` and `images=`. Received: {received!r:.80}."
    )


def _single_turn(turns):
    """Return question and answer of a single-turn conversation."""
    if hasattr(turns, "tolist"):  # As pandas reads parquet.
        turns = turns.tolist()
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) for turn in turns
    ):
        raise ValueError(
            "The turns are no list of dictionaries. Expected: "
            '[{"from": "human", "value": …}, {"from": "gpt", "value": …}]. '
            f"Received: {turns!r:.80}."
        )
    texts, roles = [], []
    for turn in turns:
        role = turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise ValueError(
                "A turn has no text. Expected: a string in 'value' or "
                f"'content'. Received: {turn!r:.80}."
            )
        found = _PLACEHOLDER.search(text)
        if found:
            raise ValueError(
                "A turn has a placeholder, which nothing here replaces. "
                f"Expected: boxes as <loc…> text. Received: {found[0]}."
            )
        texts.append(text)
        roles.append(_ROLES.get(role, role))
    if roles != ["question", "answer"]:
        raise ValueError(
            f"The conversation has {len(turns)} turns, "
            f"{roles.count('question')} questions and {roles.count('answer')} "
            "answers. Expected: one question of human or user, and one answer "
            f"of gpt or assistant. Received, in this order: {roles!r:.200}. "
            "Make each question and its answer an example, with what came "
            "before in its prompt."
        )
    return texts


def _without_tags(question, pictures):
    """Drop `<image>` at the ends of a question: one per picture, or none."""
    text, tags = question, question.count(_IMAGE)
    if tags not in (0, pictures):
        raise ValueError(
            f"The question has {tags} {_IMAGE} and the example {pictures} "
            f"pictures. Expected: as many, or none. Received: {question!r:.80}."
        )
    while (text := text.strip()).startswith(_IMAGE):
        text = text.removeprefix(_IMAGE)
    while (text := text.strip()).endswith(_IMAGE):
        text = text.removesuffix(_IMAGE)
    if _IMAGE in text:
        raise ValueError(
            f"The question has {_IMAGE} within its text. Expected: at its "
            "beginning or end, since the model reads pictures before the "
            f"prompt. Received: {question!r:.80}."
        )
    return text
