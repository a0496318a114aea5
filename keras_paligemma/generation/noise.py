"""Random numbers that are a function of seed, position and token.

Generators of the backends draw for a whole batch, so that a row's numbers
depend on the number of rows. An integer hash does not.
"""

from keras import ops


def gumbel(seed_B, place, count):
    """Return Gumbel noise, which added to logits samples from the softmax.

    Args:
        seed_B: int32 tensor (B,), a seed per row.
        place: int32 tensor, the position of the draw in a row.
        count: int V.

    Returns:
        float32 tensor (B, V), equal on all backends up to rounding.
    """
    row_B = _mixed(_mixed(seed_B) + ops.cast(place, "int32"))
    column_V = _mixed(ops.arange(count, dtype="int32"))
    bits_BV = _mixed(ops.bitwise_xor(row_B[:, None], column_V[None]))
    # 23 bits plus a half: exact in float32, never 0 and never 1.
    whole_BV = ops.bitwise_and(_shifted(bits_BV, 9), 0x7FFFFF)
    uniform_BV = (ops.cast(whole_BV, "float32") + 0.5) / 2.0**23
    return -ops.log(-ops.log(uniform_BV))


def _mixed(x):
    """Mix the bits of int32 bijectively.

    Source: https://github.com/skeeto/hash-prospector, "lowbias32".
    """
    x = ops.bitwise_xor(x, _shifted(x, 16)) * 0x7FEB352D
    x = ops.bitwise_xor(x, _shifted(x, 15)) * (0x846CA68B - 2**32)
    return ops.bitwise_xor(x, _shifted(x, 16))


def _shifted(x, bits):
    """Shift right and fill with zeros, although int32 is signed."""
    bits_left = ops.right_shift(x, bits)
    return ops.bitwise_and(bits_left, (1 << (32 - bits)) - 1)
