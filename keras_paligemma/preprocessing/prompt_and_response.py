"""Prompt and response: split, concatenated, and realigned."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_paligemma.preprocessing.inputs import to_length
from keras_paligemma.preprocessing.layout import LONGEST_RESPONSE
from keras_paligemma.preprocessing.layout import pack
from keras_paligemma.types import Tensor

# The arrays that hold prompt and response, concatenated.
WHOLE_NAMES = ("token_ids", "padding_mask", "response_mask")


@dataclasses.dataclass(frozen=True)
class PromptAndResponse:
    """The two parts of a batch's text, with static shapes.

    The shapes determine where the response begins, so no mask is needed for
    it. `fit` passes the model these four arrays, named like the fields, in
    place of `token_ids`, `padding_mask` and `response_mask`, in which both
    parts are concatenated.

    Args:
        prompt_ids: ints (B, P), aligned to the right.
        prompt_mask: bools (B, P), `True` on tokens.
        response_ids: ints (B, R), aligned to the left.
        response_mask: bools (B, R), `True` on tokens.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor

    @classmethod
    def cut(cls, arrays: dict, response_length: int) -> "PromptAndResponse":
        """Split arrays of whole texts where the responses begin.

        Args:
            arrays: dict of `token_ids`, `padding_mask` and
                `response_mask` (B, P + R), of NumPy or of any backend. Without
                a response mask, all valid tokens of the last R columns are
                the response.
            response_length: int R, at least 1.

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
        """Return the parts that a model's inputs hold.

        Args:
            inputs: dict of the model's inputs.

        Returns:
            `PromptAndResponse`; `None` if the inputs hold whole texts.
        """
        if "prompt_ids" not in inputs:
            return None
        return cls(**{name: inputs[name] for name in PART_NAMES})

    @property
    def response_length(self) -> int:
        """R, the number of columns of the response."""
        return self.response_ids.shape[1]

    def arrays(self) -> dict:
        """Return the four arrays by name."""
        return {name: getattr(self, name) for name in PART_NAMES}

    def whole(self) -> dict:
        """Return `token_ids`, `padding_mask` and `response_mask` as tensors.

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
        """Return the hidden states (B, R, D) that predict the response."""
        return hidden_BLD[:, -self.response_length - 1 : -1]


PART_NAMES = tuple(
    field.name for field in dataclasses.fields(PromptAndResponse)
)


def split_prompt(
    arrays: dict[str, Any], max_new_tokens: int | None = None
) -> dict[str, Any]:
    """Split texts where the prompts end, which is one index for all rows.

    Args:
        arrays: dict of NumPy arrays `token_ids`, `padding_mask`,
            `response_mask` (B, P + R) and other inputs of the backbone.
        max_new_tokens: int, length that the response part is cut or padded
            to; `None` keeps its length.

    Returns:
        dict: the arrays of `PromptAndResponse` in place of the three, and the
        other inputs.

    Raises:
        ValueError: prompts end at different indices, or there is no room for
            an answer.
    """
    ids, valid = arrays["token_ids"], arrays["padding_mask"]
    response = arrays["response_mask"]
    prompt = valid & ~response
    ends = {int(row.nonzero()[0][-1]) + 1 if row.any() else 0 for row in prompt}
    if len(ends) != 1 or 0 in ends:
        raise ValueError(
            "Prompts must end at one index in every row: align them to the "
            f"right. Received: prompts ending at {sorted(ends)}. "
            "PaliGemmaCausalLMPreprocessor lays them out so."
        )
    end = ends.pop()
    length = ids.shape[1] - end
    if max_new_tokens is not None:
        length = to_length(
            max_new_tokens, "max_new_tokens", most=LONGEST_RESPONSE
        )
    if not length:
        raise ValueError(
            "The arrays have no room for a response. Received: "
            f"{end} tokens, all of them prompt. Expected: "
            "max_new_tokens, or arrays with a response part."
        )
    if response[:, end + length :].any():
        raise ValueError(
            "A begun answer leaves no room to go on. Expected: at most "
            f"{length} tokens. Received: more. Raise `max_new_tokens`."
        )

    def resized(array):
        more = max(end + length - array.shape[1], 0)
        return np.pad(array, ((0, 0), (0, more)))[:, end : end + length]

    text = PromptAndResponse(
        ids[:, :end], valid[:, :end], resized(ids), resized(response)
    )
    others = {name: arrays[name] for name in arrays if name not in WHOLE_NAMES}
    return others | text.arrays()


def ends_at_one_index(arrays: dict, response_length: int) -> bool:
    """Return whether all prompts end where the response columns begin.

    Args:
        arrays: dict of NumPy arrays, as in `PromptAndResponse.cut`.
        response_length: int, number of response columns.
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
    """Realign texts whose prompts end at different indices.

    The original and KerasHub pack prompt and response to the left. Positions
    count valid tokens, so the model's function does not depend on the layout,
    but its kernels and losses need one index for all rows. Each part gets T
    columns, so that shapes are the same for each batch.

    Args:
        arrays: dict of `token_ids`, `padding_mask`, `response_mask`
            (B, T), NumPy arrays.
        targets: ints (B, R), the ids of the last R columns.
        weights: floats (B, R), or `None` for 1 on all response tokens.

    Returns:
        dict as in `pack`, with T columns of prompt and T of response; targets
        and weights (B, T), 0 on padding.

    Raises:
        ValueError: a row is not a prompt followed by a response, or a prompt's
            tokens, which see one another, have weights.
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
