"""Choosing the trained weights by patterns of names, and listing them."""

import difflib
import fnmatch

import keras

from keras_paligemma.layers.weight import dequantized


def set_trainable(backbone, patterns, value):
    """Freeze or unfreeze the weights whose names match.

    Args:
        backbone: `PaliGemmaBackbone`.
        patterns: list of str, or of lists of them, such as "vision_encoder/*"
            or "*/mlp/*", matched with the names of `weights_by_name`; "*"
            matches "/" too.
        value: bool, the new value of `trainable`.

    Raises:
        ValueError: a pattern matches nothing, or a quantised weight would be
            trained; no weight is changed then.
    """
    weights = backbone.weights_by_name()
    chosen = []
    for pattern in keras.tree.flatten(patterns):
        names = [
            name
            for name in fnmatch.filter(weights, pattern)
            if not _is_constant(name, weights)
        ]
        if not names:
            near = difflib.get_close_matches(pattern, weights, 3, 0.3)
            raise ValueError(
                f"No weight matches. Received: {pattern!r}. Expected: a "
                "pattern of names such as 'vision_encoder/*'. Near it are: "
                f"{near or list(weights)[:3]}."
            )
        chosen += names
    for name in chosen:
        if value and "int" in weights[name].dtype:
            raise ValueError(
                "Weights in low bits cannot be trained. Received: "
                f"{name!r} of dtype {weights[name].dtype}. Train adapters, or "
                "load the preset without quantize=."
            )
    for name in chosen:
        weights[name].set_trainable(value)


def _is_constant(name, weights):
    """Return whether a weight is never learned.

    These are the switch of an adapter, and the scales of a quantised weight,
    whose products define no gradient of them.
    """
    if name.endswith("/adapter_scale"):
        return True
    scaled = weights.get(name.removesuffix("_scale"))
    return (
        name.endswith("_scale") and scaled is not None and "int" in scaled.dtype
    )


def check_trainable(backbone, trained=None):
    """Raise `ValueError` if training would fail or damage an adapter.

    Args:
        backbone: `PaliGemmaBackbone`.
        trained: str, the adapter that the optimizer has trained before, or
            `None`.

    Returns:
        str, name of the adapter to be trained; `None` without adapters.

    Raises:
        ValueError: quantised kernels without adapters; adapters that are
            merged or off, which the optimizer's moments would still change;
            or another adapter than the one whose moments the optimizer has.
    """
    adapters = backbone.adapters
    if adapters.capacity is None:
        if backbone.quantization:
            raise ValueError(
                f"A model of {backbone.quantization} kernels has no gradients "
                "of them: they are frozen integers. Received: a model without "
                "adapters to train. Call `enable_lora` and compile again, or "
                "load it without `quantize`."
            )
        return None
    if adapters.active is None or adapters.merged is not None:
        state = "off" if adapters.active is None else "merged"
        raise ValueError(
            f"An adapter that takes no part is not trained. Received: adapters "
            f"that are {state}. Call `adapters.select({adapters.loaded!r})`, "
            "or `adapters.unmerge()`, first."
        )
    if trained not in (None, adapters.loaded):
        raise ValueError(
            "The optimizer's moments are another adapter's. Received: "
            f"{adapters.loaded!r} to train, after {trained!r}. Compile with "
            "a new optimizer first."
        )
    return adapters.loaded


def table(backbone):
    """Return a table of the trained layers and their parameters.

    Args:
        backbone: `PaliGemmaBackbone`.

    Returns:
        str to print: a line for each layer and dtype, and the total.
    """
    parts, trained, total = {}, 0, 0
    for name, weight in dequantized(backbone.weights_by_name()).items():
        total += weight.size
        if not weight.trainable:
            continue
        trained += weight.size
        place = name.rsplit("/", 1)[0]
        key = place, weight.dtype
        parts[key] = parts.get(key, 0) + weight.size
    width = max([len(place) for place, _ in parts] + [len("trained")])
    lines = [f"{'trained':<{width}}  dtype      parameters"]
    for (place, dtype), count in parts.items():
        lines.append(f"{place:<{width}}  {dtype:<9}  {count:>11,}")
    share = 100 * trained / total
    lines.append(
        f"{'together':<{width}}  {'':<9}  {trained:>11,}  of {total:,} "
        f"({share:.3g} %)"
    )
    return "\n".join(lines)
