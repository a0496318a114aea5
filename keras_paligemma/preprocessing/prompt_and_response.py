"""The two parts of a text, prompt and response: split and concatenated."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_paligemma.preprocessing.inputs import to_integer
from keras_paligemma.preprocessing.layout import LONGEST_RESPONSE
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

        >>> from keras_paligemma.preprocessing.layout import pack
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
        length = to_integer(
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
        more = end + length - array.shape[1]
        if more > 0:
            array = np.pad(array, ((0, 0), (0, more)))
        return array[:, end : end + length]

    text = PromptAndResponse(
        ids[:, :end], valid[:, :end], resized(ids), resized(response)
    )
    others = {name: arrays[name] for name in arrays if name not in WHOLE_NAMES}
    return others | text.arrays()
