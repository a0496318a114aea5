"""Conversion of the pictures of examples, or of their embeddings."""

from typing import Any

import numpy as np

from keras_paligemma.preprocessing.inputs import to_numpy


def convert_images(
    x: dict, image_converter: Any, num_prompts: int, batched: bool
) -> dict[str, np.ndarray]:
    """Convert the pictures of examples, and match them with the prompts.

    Args:
        x: dict with `"images"`: a picture or a list of frames for each prompt,
            or `None` for text alone; or with `"image_embeddings"`.
        image_converter: `PaliGemmaImageConverter`, or `None` for text alone.
        num_prompts: int.
        batched: bool, whether the prompts are a list.

    Returns:
        dict of `"images"` or `"image_embeddings"`; empty for text alone.

    Raises:
        ValueError: pictures without a converter, a converter without pictures,
            pictures and embeddings, or another number of either than of
            prompts.
    """
    images = x.get("images")
    embeddings = x.get("image_embeddings")
    if images is not None and embeddings is not None:
        raise ValueError(
            "Embeddings stand for pictures. Received: 'images' and "
            "'image_embeddings'. Expected: one of them."
        )
    if embeddings is not None:
        embeddings = to_numpy(embeddings)
        # Embeddings of one picture are used for all prompts.
        if batched and embeddings.ndim == 2:
            shape = (num_prompts, *embeddings.shape)
            embeddings = np.broadcast_to(embeddings, shape)
        if embeddings.ndim - batched != 2 or (
            batched and len(embeddings) != num_prompts
        ):
            raise ValueError(
                "Image embeddings and prompts do not match. Expected: shape "
                f"({f'{num_prompts}, ' if batched else ''}image tokens, hidden "
                f"dim). Received: {embeddings.shape}."
            )
        return {"image_embeddings": embeddings}
    # A missing key may be a mistake: text alone needs "images": None.
    if images is None and (image_converter is None or "images" in x):
        return {}
    if images is None or image_converter is None:
        raise ValueError(
            "Images and the image converter go together. Expected: both, "
            "or neither for text alone, or 'images': None. Received: keys "
            f"{sorted(x)}, image_converter={image_converter}."
        )
    images = image_converter(images)
    # One picture has rank 3, frames add one, and so does the batch.
    if images.ndim - batched not in (3, 4) or (
        batched and len(images) != num_prompts
    ):
        raise ValueError(
            "Images and prompts do not match. Expected: one image, or one "
            f"list of frames, a prompt. Received: {num_prompts} prompts"
            f"{'' if batched else ' (one string)'} and images of shape "
            f"{images.shape} after conversion."
        )
    return {"images": images}
