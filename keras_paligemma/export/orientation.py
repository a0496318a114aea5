"""Read the orientation of a picture from EXIF or XMP, in a graph."""

from typing import Any

import tensorflow as tf

from keras_paligemma.export.headers import integer
from keras_paligemma.export.headers import riff_size
from keras_paligemma.export.headers import starts
from keras_paligemma.export.headers import walk

# Bytes of XMP beyond these, which a JPEG cannot have, are not searched.
MOST_XMP = 1 << 16


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
        return at, riff_size(data, at)

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

    return walk(data, 2, found, following)


def _chunk(data, name):
    """Return the offset of a PNG's chunk that begins so; 0 if it has none."""
    return walk(
        data,
        8,
        lambda at: starts(data, at + 4, name),
        lambda at: at + 12 + integer(data, at, 4, big=True),
    )


def _riff_chunk(data, name):
    """Return the offset of a WebP's chunk; 0 if it has none."""
    return walk(
        data,
        12,
        lambda at: starts(data, at, name),
        lambda at: at + riff_size(data, at),
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
    at = walk(
        data,
        table + 2,
        lambda at: number(at, 2) == 0x0112,
        lambda at: at + 12,
        count,
    )
    # Of type SHORT, in the first two bytes of the value field, or LONG.
    kind: Any = number(at + 2, 2)
    value = tf.where(kind == 4, number(at + 8, 4), number(at + 8, 2))
    good = ((kind == 3) | (kind == 4)) & (value >= 1) & (value <= 8)
    value = tf.where(good, value, tf.constant(1, tf.int64))
    return value * tf.cast(valid & (at > 0), tf.int64)
