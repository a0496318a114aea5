"""Read format, size and orientation from image headers, in a graph.

Files are uint8 tensors of their bytes, padded with zeros, so that reading the
header of a truncated file stays within the tensor.
"""

from typing import Any

import tensorflow as tf

JPEG, PNG, GIF, WEBP, UNKNOWN = range(5)
# Chunks beyond these are not searched.
MOST_CHUNKS = 1000
# Nor bytes of XMP beyond those that a JPEG can have.
MOST_XMP = 1 << 16
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
        return at + tf.where(moves, inside, _riff_size(data, at))

    return _walk(data, 12, found, following)


def orientation_of(kind, content, data):
    """Return the EXIF orientation, 1 to 8, else that of XMP, else 1.

    Args:
        kind: int32 tensor, not `UNKNOWN`.
        content: string tensor, the file.
        data: uint8 tensor, as `open_bytes` returns it.

    Returns:
        int64 tensor.
    """
    number = _exif_orientation(kind, data)
    return tf.cond(
        number > 0,
        lambda: number,
        lambda: _xmp_orientation(kind, content, data),
    )


def _exif_orientation(kind, data):
    """Return the EXIF orientation; 0 if the file has none."""

    def jpeg():
        return _segment(data, b"Exif\0\0") + 10

    def png():
        return _chunk(data, b"eXIf") + 8

    def gif():
        return tf.constant(0, tf.int64)

    def webp():
        at = _riff_chunk(data, b"EXIF")
        has_prefix = starts(data, at + 8, b"Exif\0\0")
        return at + 8 + 6 * tf.cast(has_prefix, tf.int64)

    return _orientation(data, tf.switch_case(kind, [jpeg, png, gif, webp]))


def _xmp_orientation(kind, content, data):
    """Return the orientation that XMP has; 1 if it has none.

    Pillow searches XMP for this pattern too, and only without one of EXIF.
    """

    def jpeg():
        at = _segment(data, b"http://ns.adobe.com/xap/1.0/\0")
        return at, 2 + integer(data, at + 2, 2, big=True)

    def png():
        at = _chunk(data, b"iTXtXML:com.adobe.xmp\0")
        return at, 8 + integer(data, at, 4, big=True)

    def gif():
        return (tf.constant(0, tf.int64),) * 2

    def webp():
        at = _riff_chunk(data, b"XMP ")
        return at, _riff_size(data, at)

    at, size = tf.switch_case(kind, [jpeg, png, gif, webp])
    size = tf.where(at > 0, tf.minimum(size, MOST_XMP), 0)
    packet = tf.strings.substr(content, at, size)
    # Of bytes, since a dot is a whole character.
    pattern = r"\C*?tiff:Orientation(?:=\"|>)([0-9])\C*"
    digit = tf.where(
        tf.strings.regex_full_match(packet, pattern),
        tf.strings.regex_replace(packet, pattern, r"\1"),
        "1",
    )
    value: Any = tf.strings.to_number(digit, tf.int64)
    return tf.where(value <= 8, value, tf.constant(1, tf.int64))


def _segment(data, name):
    """Return the offset of a JPEG's segment of this name; 0 if it has none."""

    def found(at):
        return starts(data, at, b"\xff\xe1") & starts(data, at + 4, name)

    def following(at):
        # No segments follow the start of scan.
        ended = ~starts(data, at, b"\xff") | starts(data, at, b"\xff\xda")
        step = 2 + tf.maximum(integer(data, at + 2, 2, big=True), 2)
        return tf.where(ended, tf.size(data, tf.int64), at + step)

    return _walk(data, 2, found, following)


def _chunk(data, name):
    """Return the offset of a PNG's chunk that begins so; 0 if it has none."""
    return _walk(
        data,
        8,
        lambda at: starts(data, at + 4, name),
        lambda at: at + 12 + integer(data, at, 4, big=True),
    )


def _riff_chunk(data, name):
    """Return the offset of a WebP's chunk; 0 if it has none."""
    return _walk(
        data,
        12,
        lambda at: starts(data, at, name),
        lambda at: at + _riff_size(data, at),
    )


def _orientation(data, start):
    """Return the orientation in a TIFF block; 0 if it has none."""
    little = starts(data, start, b"II*\0")
    valid = little | starts(data, start, b"MM\0*")

    def number(at, count):
        return tf.where(
            little,
            integer(data, at, count),
            integer(data, at, count, big=True),
        )

    table = start + number(start + 4, 4)
    count: Any = number(table, 2)
    at = _walk(
        data,
        table + 2,
        lambda at: number(at, 2) == 0x0112,
        lambda at: at + 12,
        count,
    )
    # Of type SHORT: the first two bytes of the value field.
    value = number(at + 8, 2)
    good = (number(at + 2, 2) == 3) & (value >= 1) & (value <= 8)
    value = tf.where(good, value, tf.constant(1, tf.int64))
    return value * tf.cast(valid & (at > 0), tf.int64)


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


def _riff_size(data, at):
    size: Any = integer(data, at + 4, 4)
    return 8 + size + size % 2


def _walk(data, start, found, following, count=MOST_CHUNKS):
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
