"""Packing rows of tokens into arrays; see the preprocessor for the layout."""

import warnings

import numpy as np

from keras_paligemma.preprocessing.inputs import to_integer

# Gemma's context length: the maximum length of an answer.
LONGEST_RESPONSE = 8192


def part_lengths(
    sequence_length: int | None,
    prompt_length: int | None = None,
    response_length: int | None = None,
) -> tuple[int, int]:
    """Complete the lengths of prompt and response.

    Args:
        sequence_length: int, tokens of both parts, or `None`.
        prompt_length: int, or `None` for the rest of the sequence.
        response_length: int, or `None` for the rest; if both are `None`, half
            of the sequence, rounded down. Without a sequence length, parts
            that are `None` are 64.

    Returns:
        Two ints: `prompt_length`, `response_length`.

    Raises:
        ValueError: a part is too short, or the parts do not add up.

    Example:

    >>> part_lengths(9)
    (5, 4)
    """
    if sequence_length is None:
        prompt_length = 64 if prompt_length is None else prompt_length
        response_length = 64 if response_length is None else response_length
    else:
        sequence_length = to_integer(
            sequence_length, "sequence_length", least=4
        )
        if prompt_length is None:
            if response_length is None:
                response_length = sequence_length // 2
                response_length = min(response_length, sequence_length - 3)
            prompt_length = sequence_length - response_length
        elif response_length is None:
            response_length = sequence_length - prompt_length
    prompt_length = to_integer(prompt_length, "prompt_length", least=3)
    response_length = to_integer(response_length, "response_length")
    if sequence_length not in (None, prompt_length + response_length):
        raise ValueError(
            "The parts do not make up the whole. Received: "
            f"sequence_length={sequence_length}, "
            f"prompt_length={prompt_length}, "
            f"response_length={response_length}. Expected: two of them."
        )
    return prompt_length, response_length


def fit_prompts(
    texts: list[list[int]],
    start: list[int],
    separator: list[int],
    length: int,
    on_long: str,
) -> list[list[int]]:
    """Add start and separator to prompts, and limit their length.

    Args:
        texts: list of lists of ids.
        start: list of ids, put first.
        separator: list of ids, put last.
        length: int, maximum number of tokens in a row.
        on_long: str, `"error"`, or `"truncate"` to drop the end of the text.

    Returns:
        list of lists of at most `length` ids.

    Raises:
        ValueError: a prompt does not fit and `on_long` is `"error"`.

    Example:

    >>> fit_prompts([[7, 8, 9]], [2], [5], 4, "truncate")
    [[2, 7, 8, 5]]
    """
    room = length - len(start) - len(separator)
    needed = length - room + max(map(len, texts))
    if needed > length and on_long == "error":
        raise ValueError(
            "A prompt does not fit. Expected: at most "
            f"`prompt_length={length}` tokens, bos and separator included. "
            f"Received: {needed}. Raise `prompt_length`, or pass "
            "`on_long_prompt='truncate'`."
        )
    return [start + text[:room] + separator for text in texts]


def fit_responses(
    rows: list[list[int]], length: int, on_long: str
) -> list[list[int]]:
    """Limit the length of responses.

    Args:
        rows: list of lists of ids, each with its eos.
        length: int, maximum number of tokens in a row.
        on_long: str, `"warn"` to truncate with a warning, `"keep_eos"` to
            truncate and keep the eos, or `"error"`.

    Returns:
        list of lists of at most `length` ids.

    Raises:
        ValueError: a response does not fit and `on_long` is `"error"`.

    Example:

    >>> fit_responses([[7, 8, 9, 1]], 3, "keep_eos")
    [[7, 8, 1]]
    """
    long = [len(row) for row in rows if len(row) > length]
    if not long:
        return rows
    message = (
        f"{len(long)} of {len(rows)} responses do not fit. Expected: at most "
        f"`response_length={length}` tokens, eos included. Received: "
        f"{max(long)}. "
    )
    if on_long == "error":
        raise ValueError(
            f"{message}Raise `response_length`, or cut with "
            "`on_long_response='warn'` or 'keep_eos'."
        )
    if on_long == "warn":
        warnings.warn(
            f"{message}They were cut and have no eos. Raise "
            "`response_length`, or choose with `on_long_response`.",
            stacklevel=2,
        )
        return [row[:length] for row in rows]
    return [
        row if len(row) <= length else row[: length - 1] + row[-1:]
        for row in rows
    ]


def pack(
    prompts: list[list[int]],
    responses: list[list[int]],
    prompt_length: int,
    response_length: int,
    pad: int,
) -> dict[str, np.ndarray]:
    """Pack right-aligned prompts and left-aligned responses into arrays.

    Args:
        prompts: list of lists of at most `prompt_length` ids.
        responses: list of lists of at most `response_length` ids.
        prompt_length: int, tokens of the prompt part.
        response_length: int, tokens of the response part.
        pad: int, the id of padding.

    Returns:
        dict of arrays (rows, prompt + response): `token_ids` int32,
        `padding_mask` and `response_mask` bool, `True` on tokens.

    Example:

    >>> pack([[2, 7, 5]], [[8, 1]], 4, 3, pad=0)["token_ids"]
    array([[0, 2, 7, 5, 8, 1, 0]], dtype=int32)
    """
    shape = (len(prompts), prompt_length + response_length)
    token_ids = np.full(shape, pad, "int32")
    padding_mask = np.zeros(shape, bool)
    rows = zip(prompts, responses, strict=True)
    for i, (prompt, response) in enumerate(rows):
        start = prompt_length - len(prompt)
        end = prompt_length + len(response)
        token_ids[i, start:end] = prompt + response
        padding_mask[i, start:end] = True
    response_mask = padding_mask.copy()
    response_mask[:, :prompt_length] = False
    return {
        "token_ids": token_ids,
        "padding_mask": padding_mask,
        "response_mask": response_mask,
    }
