"""Read a decoded batch: from arrays of tokens to `Answer` objects."""

import dataclasses

import numpy as np

from keras_paligemma.generation.answer import Alternative
from keras_paligemma.generation.answer import Answer
from keras_paligemma.generation.answer import Finish
from keras_paligemma.generation.beams import LEAST_SCORE
from keras_paligemma.generation.texts import cut
from keras_paligemma.generation.texts import settled


def answers_of(model, asked, found):
    """Convert arrays to answers, a list of `copies` for each prompt.

    Args:
        model: `PaliGemmaCausalLM`.
        asked: `Asked`.
        found: dict that `run` returned.

    Returns:
        list of lists of `Answer`.
    """
    width = asked.plan.beams or asked.plan.copies
    begun = np.repeat(asked.begun, width, axis=0)
    rows = len(begun)
    ids = found["ids"][:rows, : asked.length]
    counts, stopped = ends_of(ids, begun, asked.stops)
    finishes: list[Finish] = [
        "stop_token" if is_stopped else "length" for is_stopped in stopped
    ]
    texts = [""] * rows
    if model.preprocessor is not None:
        texts, given = _texts(model, asked, ids, begun)
        for row, text in enumerate(texts):
            texts[row] = cut(text, asked.stop_strings, given[row])
            if texts[row] != text:
                finishes[row] = "stop_string"
                counts[row] = tokens_until(
                    model, ids[row], asked.stop_strings, given[row]
                )
    answers = [
        Answer(
            texts[row],
            tuple(ids[row, : counts[row]].tolist()),
            tuple(found["log_probabilities"][row, : counts[row]].tolist()),
            finishes[row],
            _alternatives(model, found, row, counts[row]),
            score=float(found["scores"][row]) if "scores" in found else None,
            hidden_states=_hidden_states(found, row, counts[row]),
        )
        for row in range(rows)
    ]
    groups = [answers[first : first + width] for first in range(0, rows, width)]
    if asked.plan.beams:
        return [[_with_beams(group)] for group in groups]
    return groups


def ends_of(
    ids: np.ndarray,
    begun: np.ndarray,
    stop_token_ids: tuple[int, ...] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Count each row's tokens, and return whether a stop token ended it.

    Args:
        ids: int array (B, R).
        begun: bool array (B, R), True on the given start of an answer. A stop
            token there does not end it.
        stop_token_ids: tuple of ints or `None`.

    Returns:
        int array (B,), the stop token included, and bool array (B,).
    """
    stops = _are_stops(ids, stop_token_ids) & ~begun
    stopped = np.asarray(stops.any(axis=1))
    counts = np.where(stopped, stops.argmax(axis=1) + 1, ids.shape[1])
    return counts, stopped


def _are_stops(ids, stop_token_ids):
    """Return which ids are stop tokens."""
    stops = stop_token_ids or ()
    # Most often the end token alone, which `np.isin` would compare slowly.
    return ids == stops[0] if len(stops) == 1 else np.isin(ids, stops)


def texts_so_far(model, asked, found):
    """Return the part of each text that later tokens do not change."""
    rows = len(asked.begun)
    ids = found["ids"][:rows, : asked.length]
    return [
        (cut if finished else settled)(text, asked.stop_strings, given)
        for text, given, finished in zip(
            *_texts(model, asked, ids, asked.begun),
            found["finished"][:rows],
            strict=True,
        )
    ]


def has_stop_string(model, asked, found, count):
    """Return which rows hold a stop string in their first `count` tokens.

    One within the given start of an answer does not end it.
    """
    stopped = np.zeros(len(found["ids"]), bool)
    begun = np.repeat(asked.begun, asked.plan.copies, axis=0)[:, :count]
    ids = found["ids"][: len(begun), : asked.length][:, :count]
    for row, (text, given) in enumerate(
        zip(*_texts(model, asked, ids, begun), strict=True)
    ):
        stopped[row] = cut(text, asked.stop_strings, given) != text
    return stopped


def _texts(model, asked, ids, begun):
    """Return the texts of answers, without the tokens that ended them.

    Args:
        model: `PaliGemmaCausalLM`.
        asked: `Asked`.
        ids: int array (rows, tokens).
        begun: bool array (rows, tokens), True on given tokens.

    Returns:
        list of str, and list of int, how many characters of each were given;
        0 where nothing depends on them.
    """
    pad = model.preprocessor.tokenizer.pad_token_id

    def texts_at(wanted):
        return model.preprocessor.generate_postprocess(
            {"token_ids": np.where(wanted, ids, pad)}
        )

    texts = texts_at(begun | ~_are_stops(ids, asked.stops))
    if not (asked.stop_strings and begun.any()):
        return texts, [0] * len(texts)
    return texts, [len(text) for text in texts_at(begun)]


def tokens_until(model, ids, stop_strings, given=0):
    """Count the tokens up to the first that completes a stop string.

    Args:
        model: `PaliGemmaCausalLM` with a preprocessor.
        ids: int array (tokens,) whose text has a stop string.
        stop_strings: strs.
        given: int, see `texts.cut`.
    """
    for count in range(1, len(ids) + 1):
        text = model.preprocessor.generate_postprocess(
            {"token_ids": ids[:count]}
        )
        if cut(text, stop_strings, given) != text:
            break
    return count


def _with_beams(beams):
    """Return the best beam; its `beams` are those that are answers."""
    beams = [beam for beam in beams if beam.score > LEAST_SCORE] or beams[:1]
    return dataclasses.replace(beams[0], beams=tuple(beams))


def _hidden_states(found, row, count):
    """Return the hidden states of a row's tokens, or `None`."""
    if "hidden_states" not in found:
        return None
    return found["hidden_states"][row, :count]


def _alternatives(model, found, row, count):
    """Return the likeliest tokens at each position of a row."""
    if "alternative_ids" not in found:
        return ()

    def text(token):
        if model.preprocessor is None:
            return ""
        piece = model.preprocessor.tokenizer.id_to_token(token)
        return piece.replace("\u2581", " ")  # SentencePiece's blank.

    return tuple(
        tuple(
            Alternative(token, text(token), value)
            for token, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        for ids, values in zip(
            found["alternative_ids"][row, :count],
            found["alternative_log_probabilities"][row, :count],
            strict=True,
        )
    )
