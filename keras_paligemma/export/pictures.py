"""Decode and resize pictures in a graph, exactly as `preprocessing` does."""

from typing import Any

import numpy as np
import tensorflow as tf

from keras_paligemma.export import headers
from keras_paligemma.export.orientation import orientation_of
from keras_paligemma.preprocessing.images import MOST_SCANS

# Above this, Pillow warns of a decompression bomb.
MOST_PIXELS = 89_478_485
# The pixels of a GIF's frames take a byte each, those of a picture three.
MOST_OF_FRAMES = 3 * MOST_PIXELS
AT_A_TIME = 4
BITS = 22
UNREADABLE = (
    "The picture could not be read. Expected: a whole JPEG, PNG, WebP or GIF. "
    "Received: a file that is damaged or cut off."
)


def read_pictures(contents, size, rule):
    """Decode, rotate and resize pictures; a bad one does not affect others.

    A decoder that fails stops the whole graph, except in a `tf.data` pipeline,
    which can ignore errors. So each file is an element of a pipeline, and the
    rows that are missing afterwards are the bad files.

    Args:
        contents: string tensor (N,), encoded files.
        size: tuple of ints, height and width of the result in pixels.
        rule: str, one of `preprocessing.resize.RULES`.

    Returns:
        float32 tensor (N, *size, 3) in [-1, 1], zeros for bad files, and
        string tensor (N,) of error messages, "" for good files.

    Source: `preprocessing.images.read_image`, whose pixels these equal, except
    around a GIF's first frame that is smaller than its picture: here black.
    """
    resize = RULES[rule]

    def read(index, content):
        pixels, error = _read(content, lambda image: resize(image, size))
        return index, tf.ensure_shape(pixels, (*size, 3)), error

    count = tf.size(contents, tf.int64)
    numbered = tf.data.Dataset.from_tensor_slices((tf.range(count), contents))
    good = numbered.map(read, num_parallel_calls=AT_A_TIME).ignore_errors()
    # An extra row, since a batch needs at least one row.
    blank = tf.zeros((*size, 3), tf.uint8)
    last = tf.data.Dataset.from_tensors((count, blank, ""))
    rows = good.concatenate(last).batch(count + 1).get_single_element()
    index, pixels, errors = rows
    shape = tf.concat([[count + 1], tf.constant((*size, 3), tf.int64)], 0)
    pixels = tf.scatter_nd(index[:, None], pixels, shape)[:-1]
    unreadable = tf.fill([count + 1], UNREADABLE)
    errors = tf.tensor_scatter_nd_update(unreadable, index[:, None], errors)
    # A lookup table: graph optimisation would turn the division into an
    # inexact multiplication.
    values = np.arange(256, dtype="float32") / np.float32(127.5) - np.float32(1)
    pixels = tf.gather(tf.constant(values), tf.cast(pixels, tf.int32))
    good = errors[:-1] == ""
    pixels *= tf.cast(good, tf.float32)[:, None, None, None]
    return tf.ensure_shape(pixels, (None, *size, 3)), errors[:-1]


def _read(content, resize):
    """Read one file; return uint8 pixels and an error message."""
    data = headers.open_bytes(content)
    kind = headers.kind_of(data)

    def known():
        height, width = headers.size_of(kind, content, data)
        high, wide, pixels = tf.cond(
            kind == headers.GIF,
            lambda: headers.gif_frames(data, MOST_OF_FRAMES),
            lambda: [tf.constant(0, tf.int64)] * 3,
        )
        height, width = tf.maximum(height, high), tf.maximum(width, wide)
        text = tf.strings.join([tf.as_string(width), tf.as_string(height)], "×")
        # Each on its own first: the product can overflow 64 bits.
        limit = tf.constant(MOST_PIXELS, tf.int64)
        fits = (height < limit) & (width < limit) & (height * width <= limit)
        fits &= pixels <= MOST_OF_FRAMES
        fits &= (kind != headers.JPEG) | (headers.scans(data) <= MOST_SCANS)

        def decoded():
            number = orientation_of(kind, content, data)
            image = _turned(_decoded(kind, content, data), number)
            return resize(image), ""

        def too_large():
            return resize(tf.zeros((1, 1, 3), tf.uint8)), tf.strings.join(
                [
                    "The picture is too large. Expected: at most "
                    f"{MOST_PIXELS:,} pixels, {MOST_OF_FRAMES:,} in all frames "
                    f"of a GIF, and {MOST_SCANS} scans of a JPEG. Received: ",
                    text,
                    " pixels, or more frames or scans.",
                ]
            )

        return tf.cond(fits, decoded, too_large)

    def unknown():
        return resize(tf.zeros((1, 1, 3), tf.uint8)), (
            "This is not a picture. Expected: the bytes of a JPEG, PNG, WebP "
            "or GIF. Received: something else."
        )

    return tf.cond(kind == headers.UNKNOWN, unknown, known)


def _decoded(kind, content, data):
    """Decode to uint8 (height, width, 3); transparency is dropped."""

    def jpeg():
        return tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE")

    def png():
        # As in Pillow, 16-bit grey is rounded to 8 bits, and 16-bit colours
        # lose their low byte.
        is_grey_16 = (data[24] == 16) & (data[25] == 0)

        def grey_16():
            image = tf.cast(tf.io.decode_png(content, 3, tf.uint16), tf.int32)
            return tf.cast((image + 128) // 257, tf.uint8)

        return tf.cond(
            is_grey_16, grey_16, lambda: tf.io.decode_png(content, 3)
        )

    def gif():
        return tf.io.decode_image(content, 3, expand_animations=False)

    def webp():
        return tf.io.decode_webp(_still(content, data))[0, ..., :3]

    image = tf.switch_case(kind, [jpeg, png, gif, webp])
    return tf.ensure_shape(image, (None, None, 3))


def _still(content, data):
    """Wrap the first frame of a WebP as a file of its own.

    TensorFlow's decoder crashes on some animations. The transparency chunk is
    left out, which does not change the colours.
    """
    start = headers.webp_frame(data)
    size: Any = headers.integer(data, start + 4, 4)
    frame = tf.strings.substr(content, start, 8 + size)
    digits = tf.bitwise.right_shift(
        12 + size + size % 2, tf.constant([0, 8, 16, 24], tf.int64)
    )
    every_byte = tf.constant([bytes([value]) for value in range(256)])
    length = tf.strings.reduce_join(tf.gather(every_byte, digits & 255))
    padding = tf.where(size % 2 == 1, b"\0", b"")
    return tf.strings.join([b"RIFF", length, b"WEBP", frame, padding])


def _turned(image, number):
    """Rotate or flip a picture by its orientation, 1 to 8."""
    image = tf.cond(
        number >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image
    )

    def reversed_where(numbers, image, axis):
        return tf.cond(
            tf.reduce_any(number == numbers),
            lambda: tf.reverse(image, [axis]),
            lambda: image,
        )

    numbers = tf.constant([[3, 4, 7, 8], [2, 3, 6, 7]], tf.int64)
    image = reversed_where(numbers[0], image, 0)
    return reversed_where(numbers[1], image, 1)


def _bilinear(image, size):
    return tf.cast(tf.image.resize(image, size), tf.uint8)


def _bilinear_antialias(image, size):
    return tf.cast(tf.image.resize(image, size, antialias=True), tf.uint8)


def _bicubic(image, size):
    """Resize by Pillow's filter, in integers, rounded between the two axes.

    Widths are resized first, except in tall pictures, whose height Pillow 13
    reduces first; this rule was derived from its pixels.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    shorter = height - size[0]
    is_tall = (shorter > 0) & (shorter > 2 * (width - size[1]))

    def resized(first, second):
        once = _convolved(image, first, size[first])
        return _convolved(once, second, size[second])

    return tf.cond(is_tall, lambda: resized(0, 1), lambda: resized(1, 0))


def _convolved(image, axis, size):
    """Resize one axis by Pillow's bicubic filter for 8-bit pictures."""
    source = tf.shape(image)[axis]
    scale = tf.cast(source, tf.float64) / size
    stretch = tf.maximum(scale, 1.0)
    centre = (tf.range(size, dtype=tf.float64) + 0.5) * scale
    first = tf.maximum(tf.cast(centre - 2 * stretch + 0.5, tf.int32), 0)
    last = tf.cast(centre + 2 * stretch + 0.5, tf.int32)
    last = tf.minimum(last, source)
    taps = tf.range(tf.reduce_max(last - first))[:, None]
    place = tf.cast(first + taps, tf.float64)
    x = tf.abs((place - centre + 0.5) / stretch)
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weights = tf.where(x < 1, near, tf.where(x < 2, far, 0.0))
    weights = tf.where(first + taps < last, weights, 0.0)
    weights /= tf.reduce_sum(weights, 0)
    weights *= 1 << BITS
    # Rounded half away from zero, as in Pillow's C code.
    weights = tf.cast(weights + tf.sign(weights) * 0.5, tf.int32)
    index = tf.minimum(first + taps, source - 1)
    shape = (-1, 1, 1) if axis == 0 else (-1, 1)

    def add(tap, total):
        part = tf.cast(tf.gather(image, index[tap], axis=axis), tf.int32)
        return tap + 1, total + part * tf.reshape(weights[tap], shape)

    start = tf.zeros_like(tf.gather(image, index[0], axis=axis), tf.int32)
    _, total = tf.while_loop(
        lambda tap, total: tap < tf.shape(taps)[0],
        add,
        (0, start + (1 << (BITS - 1))),
    )
    total = tf.bitwise.right_shift(total, BITS)
    return tf.cast(tf.clip_by_value(total, 0, 255), tf.uint8)


RULES = {
    "bilinear": _bilinear,
    "bilinear_antialias": _bilinear_antialias,
    "bicubic": _bicubic,
}
