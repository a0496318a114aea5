"""Which weights are trained: by patterns of names, and shown as a table."""

import difflib
import fnmatch
import math

from keras_paligemma.checkpoints import engine
from keras_paligemma.quantization.dequantized_views import dequantized_views


def set_trainable(backbone, patterns, value):
    """Freeze or unfreeze the weights whose names match.

    Args:
        backbone: `PaliGemmaBackbone`.
        patterns: strs such as "vision_encoder/*" or "*/mlp/*", matched with
            the names of `weights_by_name`; "*" goes across "/".
        value: bool, what `trainable` becomes.

    Raises:
        ValueError: a pattern that matches nothing: nothing has changed then.
    """
    weights = backbone.weights_by_name()
    chosen = []
    for pattern in patterns:
        names = [
            name
            for name in fnmatch.filter(weights, pattern)
            # A number that adapters are switched with, never learned.
            if not name.endswith("/adapter_scale")
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
        for variable in _variables(weights[name]):
            if value and "int" in variable.dtype:
                raise ValueError(
                    "Weights in low bits cannot be trained. Received: "
                    f"{name!r} of dtype {variable.dtype}. Train adapters, or "
                    "load the preset without quantize=."
                )
            variable.trainable = value


def check_trainable(backbone, trained=None):
    """Refuse to train what would be damaged, or cannot be trained.

    Args:
        backbone: `PaliGemmaBackbone`.
        trained: str, the adapter that the optimizer has trained before, or
            `None`.

    Returns:
        The name of the adapter to be trained; `None` without adapters.

    Raises:
        ValueError: kernels of few bits without adapters; adapters that are
            merged or off, which the optimizer's moments would move all the
            same; another adapter than the optimizer has the moments of.
    """
    adapters = backbone.adapters
    if adapters.slots is not None and (
        adapters.active is None or adapters.merged is not None
    ):
        state = "off" if adapters.active is None else "merged"
        raise ValueError(
            f"An adapter that takes no part is not trained. Received: adapters "
            f"that are {state}. Call `adapters.select({adapters.live!r})`, or "
            "`adapters.unmerge()`, first."
        )
    if adapters.slots is not None and trained not in (None, adapters.live):
        raise ValueError(
            "The optimizer's moments are another adapter's. Received: "
            f"{adapters.live!r} to train, after {trained!r}. Compile with "
            "a new optimizer first."
        )
    if backbone.quantization and backbone.adapters.slots is None:
        raise ValueError(
            f"A model of {backbone.quantization} kernels has no gradients of "
            "them: they are frozen integers. Received: a model without "
            "adapters to train. Call `enable_lora` and compile again, or load "
            "it without `quantize`."
        )
    return None if adapters.slots is None else adapters.live


def table(backbone):
    """Tell what is trained, a line for each part, and how many parameters.

    Args:
        backbone: `PaliGemmaBackbone`.

    Returns:
        str, a table to print.
    """
    parts, trained, total = {}, 0, 0
    for name, weight in dequantized_views(backbone.weights_by_name()).items():
        size = math.prod(engine.shape_of(weight))
        total += size
        first = _variables(weight)[0]
        if not getattr(first, "trainable", False):
            continue
        trained += size
        place = name.rsplit("/", 1)[0]
        key = place, first.dtype
        parts[key] = parts.get(key, 0) + size
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


def _variables(weight):
    return weight if isinstance(weight, list) else [weight]
