"""Encoded pictures of every kind, and a process that answers with them."""

import io
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(height=50, width=70):
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 3 % 256, y * 5 % 256, (x + y) % 256], -1)
    pixels = pixels.astype("uint8")
    random = np.random.default_rng(0)
    pixels[::3] = random.integers(0, 256, pixels[::3].shape)
    return Image.fromarray(pixels)


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def long_turned(number, order):
    """Return EXIF whose orientation has four bytes, as some writers do.

    Args:
        number: int, from 1 to 8.
        order: "<" or ">", the order of bytes.
    """
    mark = b"II" if order == "<" else b"MM"
    tiff = struct.pack(f"{order}HIHHHIII", 42, 8, 1, 0x0112, 4, 1, number, 0)
    return b"Exif\0\0" + mark + tiff


def pictures():
    """Return a dict of name to file: formats, modes, sizes, rotations."""
    image = picture()
    clear = image.copy()
    clear.putalpha(image.convert("L"))
    grey_16 = Image.fromarray(
        np.arange(3500, dtype="uint16").reshape(50, 70) * 18
    )
    files = {
        "jpeg": encode(image, "JPEG"),
        "progressive": encode(image, "JPEG", progressive=True),
        "grey jpeg": encode(image.convert("L"), "JPEG"),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image, "PNG"),
        "rgba": encode(clear, "PNG"),
        "grey": encode(image.convert("L"), "PNG"),
        "grey alpha": encode(clear.convert("LA"), "PNG"),
        "grey 16": encode(grey_16, "PNG"),
        "palette": encode(image.convert("P"), "PNG", transparency=3),
        "one bit": encode(image.convert("1"), "PNG"),
        "gif": encode(image.convert("P"), "GIF", transparency=3),
        "webp": encode(image, "WEBP"),
        "lossless": encode(clear, "WEBP", lossless=True),
        "clear webp": encode(clear, "WEBP"),
        "1 by 1": encode(picture(1, 1), "PNG"),
        "wide": encode(picture(60, 300), "JPEG"),
    }
    for format in ("GIF", "WEBP"):
        files[f"moving {format}"] = encode(
            image,
            format,
            save_all=True,
            append_images=[picture().rotate(180)],
            duration=9,
        )
    for number in range(1, 9):
        exif = turned(number)
        files[f"turned {number}"] = encode(image, "JPEG", exif=exif)
    for order in ("<", ">"):
        exif = long_turned(6, order)
        files[f"turned by {order}long"] = encode(image, "JPEG", exif=exif)
    files["turned png"] = encode(image, "PNG", exif=turned(6))
    files["turned webp"] = encode(image, "WEBP", exif=turned(8))
    return files


def bomb(width=20_000, height=20_000):
    """Return a PNG whose header claims a large size, without the pixels."""
    content = bytearray(encode(picture(), "PNG"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(content)


def ask_alone(requests, home):
    """Run requests in a process with only TensorFlow and tensorflow-text.

    Args:
        requests: dict of name to folder, signature and inputs.
        home: path of a folder for requests and answers.

    Returns:
        Dict of name to a dict of outputs; after an error, to a dict of
        "raised" to its message.
    """
    with open(home / "requests", "wb") as file:
        pickle.dump(requests, file)
    program = ROOT / "tests" / "export" / "served.py"
    subprocess.run(
        [sys.executable, program, home / "requests", home / "answers"],
        # TensorFlow imports Keras, which must not import another backend.
        env=os.environ | {"KERAS_BACKEND": "tensorflow", "PYTHONPATH": ""},
        check=True,
        cwd=home,
    )
    with open(home / "answers", "rb") as file:
        return pickle.load(file)
