"""Parse and write answers to `detect` and `segment`."""

import bisect
import dataclasses
import itertools
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_paligemma.tasks import scores
from keras_paligemma.tasks.locations import LAST
from keras_paligemma.tasks.locations import from_locations
from keras_paligemma.tasks.locations import to_locations
from keras_paligemma.tasks.mask_codec import BOOK
from keras_paligemma.tasks.mask_codec import CODES
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.objects import Object
from keras_paligemma.tasks.objects import Objects
from keras_paligemma.tasks.objects import Skipped
from keras_paligemma.tasks.prompts import SEPARATOR
from keras_paligemma.tasks.prompts import check_label

# One part of an answer: locations, mask codes, and words up to the next part.
# Invalid tokens such as <loc1024> match too, so that they are reported instead
# of read as another number. Some decoders put spaces between tokens.
_PART = re.compile(
    r"(?P<locations>(?:<loc\w*>\s*)*)"
    r"(?P<codes>(?:<seg\w*>\s*)*)"
    r"(?P<label>(?:(?!<loc\w*>|<seg\w*>)[^;])*)"
    r";?"
)
_NUMBER = re.compile(r"<(?:loc([0-9]{4})|seg([0-9]{3}))>")
_TOKEN = re.compile(r"<(?:loc|seg)\w*>")

Score = Callable[[np.ndarray, np.ndarray], float]


def read_objects(
    answer: str | Sequence[str],
    codec: MaskCodec | None = None,
    labels: str | Iterable[str] | None = None,
    image: Any = None,
    log_probabilities: Sequence[float] | None = None,
    score: Score = scores.box_and_label,
    scale: int = LAST,
) -> Objects:
    """Parse the objects of an answer to `detect` or `segment`.

    A model may generate anything. A part that is not exactly an object is
    listed in `skipped`, with the reason; no answer raises an error.

    - A box is four valid locations in a row, with ordered edges.
    - A mask is 16 valid codes after a box. If the codes are invalid, or there
      is no codec to decode them, the object has only its box.
    - A label is the words after that; it may be missing, as in RefCOCO's
      answers.

    Args:
        answer: str, or the list of its tokens as text, without the end token;
            joined they are the answer. The first byte token of a multi-byte
            character holds the character, the others are empty.
        codec: `MaskCodec` that the model was trained with, to decode masks.
            `None` decodes no masks.
        labels: requested labels; objects with others are skipped. `None` takes
            any.
        image: the picture, displayed by notebooks.
        log_probabilities: float per token of `answer`, which is then a list;
            objects get scores.
        score: function from the log-probabilities of locations and label to
            a score; see `tasks.scores`. The default is the best of them.
        scale: divisor of locations, 1023 or 1024; see `tasks.locations`.

    Returns:
        `Objects`.

    Raises:
        ValueError: if log-probabilities do not match the tokens.

    Example:

    >>> box = "<loc0000><loc0000><loc1023><loc1023>"
    >>> found = read_objects(f"{box} cat ; <loc0001> dog")
    >>> found[0]
    Object(box=(0.0, 0.0, 1.0, 1.0), label='cat', score=None)
    >>> found.skipped
    (Skipped(text='<loc0001> dog', reason='1 location, not 4'),)
    """
    text = answer if isinstance(answer, str) else "".join(answer)
    if labels is not None:
        labels = [labels] if isinstance(labels, str) else labels
        labels = {label.strip() for label in labels}
    parts, skipped = [], []
    for part in _parts(text):
        reason = _refuse(part, labels)
        if reason is None:
            parts.append(part)
            reason = _refuse_mask(part, codec)
        if reason is not None:
            skipped.append(Skipped(part.text, reason))
    boxes = from_locations([part.locations for part in parts], scale)
    values = [None] * len(parts)
    if log_probabilities is not None:
        values = _score(parts, answer, log_probabilities, score)
    masks = _decode(parts, codec)
    objects = [
        Object(tuple(box), part.label, value, mask)
        for part, box, value, mask in zip(
            parts, boxes.tolist(), values, masks, strict=True
        )
    ]
    return Objects(objects, skipped, text, image)


def read_requested(
    answer: str | Sequence[str],
    labels: str | Iterable[str],
    codec: MaskCodec | None = None,
    log_probabilities: Sequence[float] | None = None,
    score: Score = scores.box_and_label,
) -> Objects:
    """Parse the objects of an answer to a prompt that asked for labels.

    Unlike `read_objects`, it keeps objects without a label, as in RefCOCO's
    answers: if one label was asked for, they have that one.

    Args, Returns and Raises are those of `read_objects`.

    Example:

    >>> read_requested("<loc0000><loc0000><loc1023><loc1023>", "cat")[0].label
    'cat'
    """
    labels = [labels] if isinstance(labels, str) else list(labels)
    objects = read_objects(
        answer, codec, [*labels, ""], None, log_probabilities, score
    )
    if len(labels) > 1:
        return objects
    named = [
        dataclasses.replace(item, label=labels[0].strip()) for item in objects
    ]
    return dataclasses.replace(objects, items=named)


def write_objects(
    objects: Iterable[Object], codec: MaskCodec | None = None, scale: int = LAST
) -> str:
    """Write objects as the answer that a model is trained on.

    Args:
        objects: `Object`s, in the order of the answer.
        codec: `MaskCodec` that encodes masks, which all objects must then
            have; `None` writes only boxes.
        scale: factor of fractions to locations; see `tasks.locations`.

    Returns:
        `"<loc…>×4 label ; …"`, or with `<seg…>` × 16 before each label.

    Raises:
        ValueError: if a mask is missing or empty, or a label contains a
            separator of labels.

    Example:

    >>> write_objects([Object((0, 0, 0.5, 1), "cat")])
    '<loc0000><loc0000><loc0512><loc1023> cat'
    """
    return SEPARATOR.join(
        write_object(item, _codes(item, codec), scale) for item in objects
    )


def write_object(
    item: Object, codes: Iterable[int] | None = None, scale: int = LAST
) -> str:
    """Write one object as a part of an answer.

    Args:
        item: `Object`; its mask is ignored.
        codes: array or other iterable of 16 integers, 0 to 127, of its mask;
            `None` writes none.
        scale: factor of fractions to locations; see `tasks.locations`.

    Returns:
        `"<loc…>×4 label"`, with `<seg…>` × 16 before the label.

    Raises:
        ValueError: if the label contains a separator of labels, or the codes
            are not those of a mask.

    Example:

    >>> write_object(Object((0, 0, 0.5, 1)))
    '<loc0000><loc0000><loc0512><loc1023>'
    """
    locations = to_locations(item.box, scale).tolist()
    text = "".join(f"<loc{number:04d}>" for number in locations)
    if codes is not None:
        text += "".join(f"<seg{code:03d}>" for code in _check_codes(codes))
    return f"{text} {check_label(item.label)}" if item.label else text


def _codes(item, codec):
    if codec is None:
        return None
    if item.mask is None:
        raise ValueError(
            "An object has no mask to encode. Expected: `mask`, or no "
            f"`codec`, which writes boxes alone. Received: {item}."
        )
    return codec.encode_mask(item.mask > 0)


def _check_codes(codes):
    """Return the codes of a mask as ints; raise if they are none."""
    codes = np.asarray([*codes])
    whole = np.issubdtype(codes.dtype, np.integer)
    inside = whole and np.all((codes >= 0) & (codes < BOOK))
    if codes.shape != (CODES,) or not inside:
        raise ValueError(
            f"These are not the codes of a mask. Expected: {CODES} whole "
            f"numbers of 0 to {BOOK - 1}. Received: {codes.tolist()}."
        )
    return codes.tolist()


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of an answer; numbers are `None` for invalid tokens."""

    text: str
    locations: tuple[int | None, ...]
    codes: tuple[int | None, ...]
    label: str
    # Spans in the answer without surrounding spaces, which belong to other
    # tokens.
    locations_span: tuple[int, int]
    label_span: tuple[int, int]


def _parts(answer):
    """Split an answer at separators, and where locations begin."""
    for match in _PART.finditer(answer):
        text = match[0].rstrip(";").strip()
        if text:
            yield _Part(
                text,
                _numbers(match["locations"], LAST),
                _numbers(match["codes"], BOOK - 1),
                match["label"].strip(),
                _span(match, "locations"),
                _span(match, "label"),
            )


def _span(match, group):
    words = match[group]
    start = match.start(group) + len(words) - len(words.lstrip())
    return start, start + len(words.strip())


def _numbers(tokens, last):
    """Return the numbers of tokens; `None` for invalid ones."""
    found = [_NUMBER.fullmatch(token) for token in _TOKEN.findall(tokens)]
    numbers = [int(match[1] or match[2]) if match else None for match in found]
    return tuple(
        None if number is None or number > last else number
        for number in numbers
    )


def _refuse(part, labels):
    """Return why a part is not an object; `None` if it is one."""
    count = len(part.locations)
    if not count:
        return "a mask without a box" if part.codes else "words without a box"
    if count != 4:
        return f"{count} location{'s' if count > 1 else ''}, not 4"
    if None in part.locations:
        return "a location that does not exist"
    y1, x1, y2, x2 = part.locations
    if y1 > y2 or x1 > x2:
        return "a box upside down"
    if labels is not None and part.label not in labels:
        return "a label that was not asked for"
    return None


def _refuse_mask(part, codec):
    """Return why the codes of an object are not a mask; `None` if they are."""
    if not part.codes:
        return None
    if len(part.codes) != CODES:
        return f"a mask of {len(part.codes)} codes, not {CODES}"
    if None in part.codes:
        return "a mask with a code that does not exist"
    return "a mask, and no codec to decode it" if codec is None else None


def _decode(parts, codec):
    """Return the mask of each part; `None` if it has none."""
    has_mask = [
        bool(part.codes) and not _refuse_mask(part, codec) for part in parts
    ]
    codes = [
        part.codes for part, has in zip(parts, has_mask, strict=True) if has
    ]
    decoded = iter(codec.decode(codes) if codes else ())
    return [next(decoded) if has else None for has in has_mask]


def _score(parts, tokens, log_probabilities, score):
    """Return the score of each part, from the tokens of its box and label."""
    values = np.asarray(log_probabilities, "float64")
    if isinstance(tokens, str) or len(tokens) != len(values):
        raise ValueError(
            "Scores need one log-probability a token. Expected: `answer` as a "
            "list of tokens, as many as `log_probabilities`. Received: "
            f"{type(tokens).__name__} of {len(tokens)}, and {len(values)}."
        )
    if not np.all(values <= 0):  # Also false for NaN.
        raise ValueError(
            "Log-probabilities are 0 or less. Received: "
            f"{values.min()} to {values.max()}."
        )
    ends = list(itertools.accumulate(len(token) for token in tokens))
    starts = [0, *ends[:-1]]

    def of(span):
        """Return the values of all tokens with a character in the span."""
        if span[0] == span[1]:  # It may lie within the token of a separator.
            return values[:0]
        first = bisect.bisect_right(ends, span[0])
        last = bisect.bisect_left(starts, span[1])
        while first < last < len(tokens) and not tokens[last]:
            last += 1  # The other bytes of the last character.
        return values[first:last]

    return [
        score(of(part.locations_span), of(part.label_span)) for part in parts
    ]
