"""Read format and size from image headers, in a graph.

Files are uint8 tensors of their bytes, padded with zeros, so that reading the
header of a truncated file stays within the tensor.
"""

from typing import Any

import tensorflow as tf

JPEG, PNG, GIF, WEBP, UNKNOWN = range(5)
# Chunks beyond these are not searched.
MOST_CHUNKS = 1000
ROOM = 64


def open_bytes(content):
    """Return the bytes of a string tensor, padded with zeros, as uint8."""
    return tf.pad(tf.io.decode_raw(content, tf.uint8), [[0, ROOM]])


def kind_of(data):
    """Detect the format from the first bytes: int32, one of the five above."""
    kinds = [
        (JPEG, starts(data, 0, b"\xff\xd8\xff")),
        (PNG, starts(data, 0, b"\x89PNG\r\n\x1a\n")),
        (GIF, starts(data, 0, b"GIF87a") | starts(data, 0, b"GIF89a")),
        (WEBP, starts(data, 0, b"RIFF") & starts(data, 8, b"WEBP")),
    ]
    found = tf.constant(UNKNOWN)
    for kind, is_kind in kinds:
        found = tf.where(is_kind, kind, found)
    return found


def size_of(kind, content, data):
    """Read height and width, in pixels, from a header.

    Args:
        kind: int32 tensor, not `UNKNOWN`.
        content: string tensor, the file.
        data: uint8 tensor, as `open_bytes` returns it.

    Returns:
        int64 tensors, height and width; 0 if there is no header.
    """

    def jpeg():
        height, width, _ = tf.unstack(
            tf.image.extract_jpeg_shape(content, tf.int64)
        )
        return height, width

    def png():
        return integer(data, 20, 4, big=True), integer(data, 16, 4, big=True)

    def gif():
        return integer(data, 8, 2), integer(data, 6, 2)

    def webp():
        start = webp_frame(data)
        lossless = starts(data, start, b"VP8L")
        bits = integer(data, start + 9, 4)
        mask = tf.constant(0x3FFF, tf.int64)
        width = tf.where(
            lossless, bits & mask, integer(data, start + 14, 2) & mask
        )
        height = tf.where(
            lossless,
            tf.bitwise.right_shift(bits, 14) & mask,
            integer(data, start + 16, 2) & mask,
        )
        more = tf.cast(lossless, tf.int64)
        is_there = tf.cast(start > 0, tf.int64)
        return (height + more) * is_there, (width + more) * is_there

    return tf.switch_case(kind, [jpeg, png, gif, webp])


def gif_frames(data, most):
    """Read the frames of a GIF, which TensorFlow decodes all.

    Args:
        data: uint8 tensor, as `open_bytes` returns it.
        most: int, pixels of all frames after which no more are read.

    Returns:
        int64 tensors: the largest height and width of a frame, and the pixels
        of the frames that were read.
    """
    end = tf.size(data, tf.int64) - ROOM

    def table(at):
        """Return the length of the colour table that flags describe."""
        flags: Any = integer(data, at, 1)
        length = tf.bitwise.left_shift(tf.constant(6, tf.int64), flags & 7)
        return tf.where(flags >= 128, length, tf.constant(0, tf.int64))

    def step(at, inside, height, width, pixels):
        # Parts of a frame or extension have a length each; the last has none.
        byte: Any = integer(data, at, 1)
        is_frame = ~inside & (byte == 0x2C)
        is_extension = ~inside & (byte == 0x21)
        following = tf.where(is_frame, at + 11 + table(at + 9), end)
        following = tf.where(is_extension, at + 2, following)
        following = tf.where(inside, at + 1 + byte, following)
        found = tf.cast(is_frame, tf.int64)
        wide, high = (found * integer(data, at + n, 2) for n in (5, 7))
        return (
            following,
            tf.where(inside, byte > 0, is_frame | is_extension),
            tf.maximum(height, high),
            tf.maximum(width, wide),
            pixels + wide * high,
        )

    zero = tf.constant(0, tf.int64)
    _, _, *found = tf.while_loop(
        lambda at, inside, height, width, pixels: (at < end) & (pixels <= most),
        step,
        (13 + table(10), tf.constant(False), zero, zero, zero),
    )
    return found


def scans(data):
    """Return the number of scans of a JPEG: each is a pass over its pixels."""
    # Other bytes 255 of its data are followed by a zero.
    starts_ = (data[:-1] == 0xFF) & (data[1:] == 0xDA)
    return tf.reduce_sum(tf.cast(starts_, tf.int64))


def webp_frame(data):
    """Return the offset of a WebP's first frame chunk; 0 if there is none.

    In an animation, that chunk is inside the first ANMF chunk.
    """

    def found(at):
        return starts(data, at, b"VP8 ") | starts(data, at, b"VP8L")

    def following(at):
        # ANMF contains chunks: skip its head only. Skip others as a whole.
        inside = tf.constant(24, tf.int64)
        moves = starts(data, at, b"ANMF")
        return at + tf.where(moves, inside, riff_size(data, at))

    return walk(data, 12, found, following)


def starts(data, at, expected):
    """Return whether the expected bytes are at an offset: a bool tensor."""
    return tf.reduce_all(_bytes(data, at, len(expected)) == list(expected))


def integer(data, at, count, big=False):
    """Return an unsigned integer of `count` bytes: an int64 tensor."""
    powers = [256**power for power in range(count)]
    weights = tf.constant(powers[::-1] if big else powers, tf.int64)
    digits = tf.cast(_bytes(data, at, count), tf.int64)
    return tf.reduce_sum(digits * weights)


def _bytes(data, at, count):
    last = tf.size(data, tf.int64) - count
    at = tf.clip_by_value(tf.cast(at, tf.int64), 0, last)
    return tf.slice(data, [at], [count])


def riff_size(data, at):
    """Return the bytes of a WebP's chunk at an offset, its head included."""
    size: Any = integer(data, at + 4, 4)
    return 8 + size + size % 2


def walk(data, start, found, following, count=MOST_CHUNKS):
    """Search for a chunk; return its offset, or 0 if there is none."""
    end = tf.size(data, tf.int64) - ROOM
    count = tf.minimum(tf.cast(count, tf.int64), MOST_CHUNKS)

    def go_on(at, number):
        return (at < end) & (number < count) & ~found(at)

    def step(at, number):
        return following(at), number + 1

    start = tf.cast(start, tf.int64)
    at, number = tf.while_loop(go_on, step, (start, tf.constant(0, tf.int64)))
    return at * tf.cast((at < end) & (number < count), tf.int64)
