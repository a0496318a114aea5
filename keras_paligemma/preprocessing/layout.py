"""Prompt and response: rows of tokens to arrays, and the parts of those."""

import dataclasses
import warnings

import numpy as np
from keras import ops

# Tokens that Gemma was trained on at once; no answer is meant to be longer.
LONGEST_RESPONSE = 8192


@dataclasses.dataclass(frozen=True)
class PromptAndResponse:
    """The two parts of a batch's text, each as long in every row.

    The shapes are static, so what reads them knows where the response begins
    without looking at a mask. `fit` hands the model these four arrays by the
    names of the fields, in place of `token_ids`, `padding_mask` and
    `response_mask`, which hold both parts side by side.

    Args:
        prompt_ids: Integers (B, P), aligned to the right.
        prompt_mask: Booleans (B, P), `True` on tokens.
        response_ids: Integers (B, R), aligned to the left.
        response_mask: Booleans (B, R), `True` on tokens.
    """

    prompt_ids: object
    prompt_mask: object
    response_ids: object
    response_mask: object

    @classmethod
    def cut(cls, arrays: dict, response_length: int) -> "PromptAndResponse":
        """Cuts arrays of whole texts where the responses begin.

        Args:
            arrays: Dictionary of `token_ids`, `padding_mask` and
                `response_mask` (B, P + R), of NumPy or of any backend. Without
                a response mask all valid tokens of the last R columns are
                response.
            response_length: Integer R, at least 1.

        Example:

        >>> arrays = pack([[2, 7, 5]], [[8, 1]], 4, 3, pad=0)
        >>> PromptAndResponse.cut(arrays, 3).response_ids
        array([[8, 1, 0]], dtype=int32)
        """
        ids, valid = arrays["token_ids"], arrays["padding_mask"]
        response = arrays.get("response_mask")
        response = valid if response is None else response
        start = -response_length
        return cls(
            prompt_ids=ids[:, :start],
            prompt_mask=valid[:, :start],
            response_ids=ids[:, start:],
            response_mask=response[:, start:],
        )

    @classmethod
    def among(cls, inputs: dict) -> "PromptAndResponse | None":
        """Finds the parts among a model's inputs.

        Args:
            inputs: Dictionary.

        Returns:
            `PromptAndResponse`; `None` where the inputs hold whole texts.
        """
        if "prompt_ids" not in inputs:
            return None
        return cls(**{name: inputs[name] for name in PART_NAMES})

    @property
    def response_length(self) -> int:
        """The number of columns of the response, R."""
        return self.response_ids.shape[1]

    def arrays(self) -> dict:
        """Returns the four arrays by name."""
        return {name: getattr(self, name) for name in PART_NAMES}

    def whole(self) -> dict:
        """Returns `token_ids`, `padding_mask` and `response_mask` as tensors.

        The inverse of `cut`.
        """
        parts = [self.prompt_mask, self.response_mask]
        return {
            "token_ids": ops.concatenate(
                [self.prompt_ids, self.response_ids], axis=1
            ),
            "padding_mask": ops.concatenate(parts, axis=1),
            "response_mask": ops.concatenate(
                [ops.zeros_like(parts[0]), parts[1]], axis=1
            ),
        }

    def predicting(self, hidden_BLD):
        """Returns the states (B, R, D), of all, that predict the response."""
        return hidden_BLD[:, -self.response_length - 1 : -1]


PART_NAMES = tuple(
    field.name for field in dataclasses.fields(PromptAndResponse)
)


def fit_prompts(
    texts: list[list[int]],
    start: list[int],
    separator: list[int],
    length: int,
    on_long: str,
) -> list[list[int]]:
    """Puts start and separator around prompts, and holds them to a length.

    Args:
        texts: List of lists of ids.
        start: List of ids that go first.
        separator: List of ids that go last.
        length: Integer, most tokens of a row.
        on_long: `"error"`, or `"truncate"`, which drops the end of the text.

    Returns:
        List of lists of at most `length` ids.

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
    """Holds responses to a length, and says so where one loses its end.

    Args:
        rows: List of lists of ids, each with its eos.
        length: Integer, most tokens of a row.
        on_long: `"warn"` cuts, `"keep_eos"` cuts before the eos, `"error"`.

    Returns:
        List of lists of at most `length` ids.

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
    """Lays prompts out to the right and responses to the left of one line.

    Args:
        prompts: List of lists of at most `prompt_length` ids.
        responses: List of lists of at most `response_length` ids.
        prompt_length: Integer, tokens of the prompt part.
        response_length: Integer, tokens of the response part.
        pad: Integer, the id of empty places.

    Returns:
        Dictionary of arrays (rows, prompt + response): `token_ids` int32,
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


def ends_at_one_index(arrays: dict, response_length: int) -> bool:
    """Tells whether all prompts end where the last columns begin.

    Args:
        arrays: Dictionary of NumPy arrays, as `PromptAndResponse.cut` takes it.
        response_length: Integer, the number of these columns.
    """
    if "response_mask" not in arrays:
        return True
    valid = arrays["padding_mask"].astype(bool)
    response = arrays["response_mask"].astype(bool)
    start = -response_length
    same = response[:, start:] == valid[:, start:]
    return bool(same.all() and not response[:, :start].any())


def realign(
    arrays: dict, targets: np.ndarray, weights: np.ndarray | None
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Lays texts out anew whose prompts end at different indices.

    The original and KerasHub pack prompt and response to the left. Positions
    count valid tokens, so the model's function is the same in any layout; its
    kernels and losses want one index. Each part gets room for all tokens, so
    the shapes are the same for each batch.

    Args:
        arrays: Dictionary of `token_ids`, `padding_mask`, `response_mask`
            (B, T), NumPy arrays.
        targets: Integers (B, R), the ids of the last R columns.
        weights: Floats (B, R), or `None` for 1 everywhere.

    Returns:
        Dictionary as `pack` makes it, with T tokens of prompt and T of
        response; its targets and weights (B, T), 0 where there are none.

    Raises:
        ValueError: a row that is no prompt followed by a response, or weights
            on a prompt's tokens, which see one another.
    """
    ids, valid = arrays["token_ids"], arrays["padding_mask"].astype(bool)
    response = arrays["response_mask"].astype(bool) & valid
    B, T = ids.shape
    first = np.where(response.any(1), response.argmax(1), T)
    late = (valid & ~response & (np.arange(T) > first[:, None])).any(1)
    if late.any():
        raise ValueError(
            "A text is a prompt followed by one response. Expected: "
            "`response_mask` False, then True, on the valid tokens of a row. "
            f"Received: tokens of a prompt behind the response's in row "
            f"{int(late.argmax())}."
        )
    unseen = ((0, 0), (T - targets.shape[1], 0))
    if weights is None:
        weights = response[:, -targets.shape[1] :]
    weights = np.pad(np.asarray(weights, "float32"), unseen)
    on_prompt = ((weights != 0) & valid & ~response).any(1)
    if on_prompt.any():
        raise ValueError(
            "Tokens of a prompt see one another and cannot be learned. "
            "Expected: `sample_weight` 0 outside of responses. Received: row "
            f"{int(on_prompt.argmax())} with weights on its prompt."
        )
    targets = np.pad(targets, unseen)
    rows = range(B)
    prompts = [ids[i, valid[i] & ~response[i]].tolist() for i in rows]
    packed = pack(
        prompts, [ids[i, response[i]].tolist() for i in rows], T, T, pad=0
    )
    moved = np.zeros((2, B, T))
    for i in rows:
        count = int(response[i].sum())
        moved[:, i, :count] = targets[i, response[i]], weights[i, response[i]]
    return packed, moved[0].astype("int32"), moved[1].astype("float32")
