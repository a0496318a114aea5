"""Texts packed to the left, as by KerasHub: rearranged for training."""

import numpy as np

from keras_paligemma.preprocessing.layout import pack


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
