"""Merging adapters into kernels, and unmerging them."""

from keras import ops

from keras_paligemma.lora_config import TARGETS


def check_kernels_take_up(backbone, lora):
    """Raise `ValueError` if an adapter cannot be merged into the model.

    Args:
        backbone: `PaliGemmaBackbone`.
        lora: `LoraConfig` of the adapter's variables.

    Raises:
        ValueError: quantised kernels, or a bias where the model has none.
    """
    if backbone.quantization is not None:
        raise ValueError(
            "Kernels of few bits cannot take an adapter up: most of it is "
            "smaller than their steps. Received: a model of "
            f"{backbone.quantization}. Load the preset without `quantize`, "
            "add the adapter with `load_adapter`, and merge."
        )
    weights = backbone.weights_by_name()
    bare = [
        target
        for target in lora.targets
        if lora.bias and f"{TARGETS[target]}/bias" not in weights
    ]
    if bare:
        raise ValueError(
            "The adapter has biases, and Gemma's projections have none that "
            f"could take them up. Received: {bare}. Keep it as an adapter."
        )


def add(weights, lora):
    """Add an adapter to the kernels, and its biases to the model's biases.

    Args:
        weights: dict of name to `Weight`, the adapter's included.
        lora: `LoraConfig` of the adapter's variables.
    """
    _change(weights, lora, "kernel", with_adapter)
    if lora.bias:
        _change(weights, lora, "bias", _with_bias)


def subtract(weights, lora):
    """Subtract an adapter from the kernels; see `add`."""
    _change(weights, lora, "kernel", _without_adapter)
    if lora.bias:
        _change(weights, lora, "bias", _without_bias)


def _change(weights, lora, name, function):
    """Update the kernels or biases of all targets.

    Args:
        weights, lora: see `add`.
        name: str, "kernel" or "bias".
        function: function of one layer's weight and a dict of its adapter's
            tensors that returns the new weight.
    """
    pieces = (*lora.pieces, "adapter_scale")

    def changed(tensor, *others):
        return function(tensor, dict(zip(pieces, others, strict=True)))

    for target in lora.targets:
        place = TARGETS[target]
        others = (weights[f"{place}/{piece}"] for piece in pieces)
        weights[f"{place}/{name}"].update(changed, *others)


def with_adapter(kernel, pieces):
    """Return the kernel with its adapter merged.

    Args:
        kernel: tensor of one layer.
        pieces: dict of "adapter_a", "adapter_b", "adapter_scale" and
            optionally "adapter_gain" to tensors.

    Returns:
        Tensor of the kernel's dtype; the sum is rounded once.
    """
    gain = 1 + pieces["adapter_scale"] * pieces.get("adapter_gain", 0.0)
    whole = (ops.cast(kernel, "float32") + _product(kernel, pieces)) * gain
    return ops.cast(whole, kernel.dtype)


def _without_adapter(kernel, pieces):
    gain = 1 + pieces["adapter_scale"] * pieces.get("adapter_gain", 0.0)
    whole = ops.cast(kernel, "float32") / gain - _product(kernel, pieces)
    return ops.cast(whole, kernel.dtype)


def _product(kernel, pieces):
    """Return scale · A · B in the kernel's shape."""
    a, b = pieces["adapter_a"], pieces["adapter_b"]
    rank = a.shape[-1]
    product = ops.matmul(ops.reshape(a, (-1, rank)), ops.reshape(b, (rank, -1)))
    return ops.reshape(product * pieces["adapter_scale"], kernel.shape)


def _with_bias(bias, pieces, sign=1):
    added = sign * pieces["adapter_scale"] * pieces["adapter_bias"]
    return ops.cast(ops.cast(bias, "float32") + added, bias.dtype)


def _without_bias(bias, pieces):
    return _with_bias(bias, pieces, -1)
