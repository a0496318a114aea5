"""Encode masks as 16 `<seg>` codes and back: the VQ-VAE, in NumPy."""

import dataclasses
import functools
import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from keras_paligemma.checksums import read_checked
from keras_paligemma.preprocessing.resize import resample
from keras_paligemma.presets import locate

# Masks are cropped to their box and resized to a square of this many pixels.
SIDE = 64

# Codes per mask, one for each cell of a 4 × 4 grid; size of the codebook.
CODES, BOOK = 16, 128

# Masks per batch: the last layers need some megabytes for each.
_PART = 32

_BOOK = "_vq_vae._embedding"
_DOWN = ("encoder.0", "encoder.2", "encoder.4", "encoder.6")
_UP = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")
_BLOCKS = ("encoder.8", "encoder.9", "decoder.2", "decoder.3")


def layout(
    widths: tuple[int, int, int, int] = (16, 32, 64, 128), features: int = 512
) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a codec's weights, in PyTorch's layout.

    Args:
        widths: channels after each of the four downsampling layers.
        features: length of a codebook entry.

    Returns:
        dict of name to shape: (out, in, height, width) for convolutions, (in,
        out, height, width) for transposed convolutions. The defaults are those
        of the published file, whose training state, `_vq_vae._ema_*`, is not
        needed.

    Example:

    >>> layout()["decoder.4.weight"]
    (128, 128, 4, 4)

    Source: big_vision, `pp/proj/paligemma/segmentation.py` and
    `evaluators/proj/paligemma/transfers/segmentation.py`.
    """
    width = widths[-1]
    shapes: dict[str, tuple[int, ...]] = {_BOOK: (BOOK, features)}
    for name, source, target in zip(_DOWN, (1, *widths), widths, strict=False):
        shapes[f"{name}.weight"] = (target, source, 4, 4)
    for block in _BLOCKS:
        for number, side in ((0, 3), (2, 3), (4, 1)):
            shapes[f"{block}.net.{number}.weight"] = (width, width, side, side)
    shapes["encoder.10.weight"] = (features, width, 1, 1)
    shapes["decoder.0.weight"] = (width, features, 1, 1)
    targets = widths[::-1]
    for name, source, target in zip(
        _UP, (width, *targets), targets, strict=False
    ):
        shapes[f"{name}.weight"] = (source, target, 4, 4)
    shapes["decoder.12.weight"] = (1, widths[0], 1, 1)
    for name, shape in list(shapes.items()):
        if name.endswith(".weight"):
            outputs = shape[name.removesuffix(".weight") in _UP]
            shapes[name.replace("weight", "bias")] = (outputs,)
    return shapes


@dataclasses.dataclass(frozen=True, eq=False)
class MaskCodec:
    """A VQ-VAE that converts masks of 64 × 64 values to 16 codes and back.

    A model learns the `<seg>` tokens of one codec, and its answers can only be
    decoded with that codec. Published models use `vae-oid.npz` (`load`), the
    nano preset uses the embedded codec (`embedded`).

    Args:
        weights: dict of name to float array, of the shapes of `layout`;
            other names are ignored.

    Raises:
        ValueError: if weights are missing or do not fit together.

    Example:

    >>> codec = MaskCodec.embedded()
    >>> disc = np.hypot(*np.mgrid[-20:21, -30:31]) < 20
    >>> codes = codec.encode_mask(disc)
    >>> len(codes), codec.decode([codes]).shape
    (16, (1, 64, 64))
    """

    weights: Mapping[str, np.ndarray] = dataclasses.field(repr=False)

    def __post_init__(self):
        wanted = _fitting(self.weights)
        weights = {
            name: np.asarray(self.weights[name], "float32") for name in wanted
        }
        object.__setattr__(self, "weights", weights)

    @classmethod
    def load(cls, path: str | Path) -> "MaskCodec":
        """Load a codec from a file, such as the published `vae-oid.npz`.

        Args:
            path: path of the `.npz` file, which Google publishes at
                `gs://big_vision/paligemma/vae-oid.npz`.

        Raises:
            ValueError: if the file is damaged, or holds another model.
        """
        content = read_checked(path)
        try:
            with np.load(io.BytesIO(content)) as file:
                weights = {name: file[name] for name in file.files}
        except (
            # A TypeError if it is a single array, of an .npy file.
            *(OSError, ValueError, TypeError, AttributeError, EOFError),
            *(zipfile.BadZipFile, zlib.error),
        ) as error:
            raise ValueError(
                f"{path} holds no arrays. Expected: a codec's `.npz` file, "
                f"such as `vae-oid.npz`. Received: {error}."
            ) from error
        return cls(weights)

    @classmethod
    @functools.cache
    def embedded(cls) -> "MaskCodec":
        """Load the small codec that belongs to the nano preset.

        It was trained on silhouettes of emoji by `recipes/mask_codec.py`; its
        codes differ from those of the published codec.
        """
        return cls.load(locate("pali_gemma2_nano_112") / "mask_codec.npz")

    def encode(self, squares: np.ndarray) -> np.ndarray:
        """Encode masks that fill their boxes.

        Args:
            squares: array (masks, 64, 64), from 0 outside the object to 1
                inside.

        Returns:
            int array (masks, 16), 0 to 127, the 4 × 4 cells row by row.

        Raises:
            ValueError: if the masks have another shape, or values outside 0 to
                1.
        """
        squares = np.asarray(squares, "float32")
        if squares.shape[1:] != (SIDE, SIDE):
            raise ValueError(
                "Masks are encoded as squares. Expected: shape (masks, "
                f"{SIDE}, {SIDE}). Received: {squares.shape}. A mask of "
                "another size goes to `encode_mask`."
            )
        if not len(squares):
            return np.zeros((0, CODES), "int64")
        # Resizing adds rounding errors.
        if not np.all(np.abs(squares - 0.5) <= 0.5 + 1e-4):
            raise ValueError(
                "Masks are encoded from values of 0 to 1. Received: "
                f"{squares.min()} to {squares.max()}."
            )
        return _in_parts(self._encode, squares)

    def encode_mask(self, mask: np.ndarray) -> list[int]:
        """Encode one mask of any size.

        Args:
            mask: bool array (height, width), the mask within its box, at the
                picture's resolution.

        Returns:
            16 integers from 0 to 127.

        Raises:
            ValueError: if the mask is not such an array, or empty.
        """
        return self.encode(square(mask)[None])[0].tolist()

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Decode codes to masks that fill their boxes.

        Args:
            codes: int array (masks, 16), 0 to 127.

        Returns:
            float32 array (masks, 64, 64), about -1 to 1; above 0 is inside the
            object. `masks.paste` resizes one into a picture.

        Raises:
            ValueError: if there are not 16 codes per mask, or a code is
                invalid.
        """
        codes = np.asarray(codes, "int64")
        if codes.size == 0:
            return np.zeros((0, SIDE, SIDE), "float32")
        if codes.shape[1:] != (CODES,):
            raise ValueError(
                f"A mask has {CODES} codes. Received: shape {codes.shape}."
            )
        if not np.all((codes >= 0) & (codes < BOOK)):
            raise ValueError(
                f"Codes are 0 to {BOOK - 1}. Received: {codes.min()} to "
                f"{codes.max()}."
            )
        return _in_parts(self._decode, codes)

    def _encode(self, squares_BHW):
        x_BHWC = 2 * (squares_BHW[..., None] - np.float32(0.5))
        for name in _DOWN:
            x_BHWC = _relu(self._convolve(x_BHWC, name, stride=2))
        for block in _BLOCKS[:2]:
            x_BHWC = self._residual(x_BHWC, block)
        x_BHWC = self._convolve(x_BHWC, "encoder.10")
        x_NC, book_KC = x_BHWC.reshape(-1, x_BHWC.shape[-1]), self._book
        distances_NK = (
            (x_NC**2).sum(1, keepdims=True)
            + (book_KC**2).sum(1)
            - 2 * (x_NC @ book_KC.T)
        )
        return distances_NK.argmin(1).reshape(len(squares_BHW), CODES)

    def _decode(self, codes_BN):
        x_BHWC = self._book[codes_BN].reshape(len(codes_BN), 4, 4, -1)
        x_BHWC = _relu(self._convolve(x_BHWC, "decoder.0"))
        for block in _BLOCKS[2:]:
            x_BHWC = self._residual(x_BHWC, block)
        for name in _UP:
            x_BHWC = _relu(self._double(x_BHWC, name))
        return self._convolve(x_BHWC, "decoder.12")[..., 0]

    @property
    def _book(self):
        return self.weights[_BOOK]

    def _residual(self, x_BHWC, block):
        y_BHWC = _relu(self._convolve(x_BHWC, f"{block}.net.0"))
        y_BHWC = _relu(self._convolve(y_BHWC, f"{block}.net.2"))
        return x_BHWC + self._convolve(y_BHWC, f"{block}.net.4")

    def _convolve(self, x_BHWC, name, stride=1):
        """Convolve; the size is kept, or halved with a stride of 2."""
        kernel_OCHW = self.weights[f"{name}.weight"]
        side = kernel_OCHW.shape[-1]
        pad = (side - 1) // 2
        x_BHWC = np.pad(x_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(
            x_BHWC, (side, side), (1, 2)
        )[:, ::stride, ::stride]
        products = np.tensordot(windows, kernel_OCHW, ((3, 4, 5), (1, 2, 3)))
        return products + self.weights[f"{name}.bias"]

    def _double(self, x_BHWC, name):
        """Apply a transposed 4 × 4 convolution of stride 2: double the size.

        Each pixel contributes to 4 × 4 pixels around it; contributions beyond
        the edge are dropped.
        """
        kernel_COHW = self.weights[f"{name}.weight"]
        batch, height, width, _ = x_BHWC.shape
        spread = np.tensordot(x_BHWC, kernel_COHW, ((3,), (0,)))
        shape = (batch, 2 * height + 2, 2 * width + 2, kernel_COHW.shape[1])
        sums_BHWO = np.zeros(shape, "float32")
        for y in range(4):
            for x in range(4):
                place = np.s_[:, y : y + 2 * height : 2, x : x + 2 * width : 2]
                sums_BHWO[place] += spread[..., y, x]
        return sums_BHWO[:, 1:-1, 1:-1] + self.weights[f"{name}.bias"]


def square(mask: np.ndarray) -> np.ndarray:
    """Resize a mask to the square that a codec encodes.

    Args:
        mask: bool array (height, width), the mask within its box.

    Returns:
        float32 array (64, 64), the fraction of each pixel inside the object.

    Raises:
        ValueError: if the mask is not such an array, or empty.

    Example:

    >>> square(np.eye(2, dtype=bool)).shape
    (64, 64)
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != bool or not mask.any():
        raise ValueError(
            "This is no mask to encode. Expected: bool array (height, width) "
            "of one pixel or more within the object. Received: "
            f"{mask.dtype} {mask.shape}, {np.count_nonzero(mask)} pixels."
        )
    # Resized as bytes, as in the original, where masks are pictures.
    pixels = resample((mask * np.uint8(255))[..., None], (SIDE, SIDE))
    return pixels[..., 0] / 255


def _relu(x):
    return np.maximum(x, 0)


def _in_parts(function, x):
    """Apply a function to batches of rows."""
    parts = [function(x[i : i + _PART]) for i in range(0, len(x), _PART)]
    return np.concatenate(parts)


def _fitting(weights):
    """Return the layout of the weights' widths; raise if they do not fit."""
    try:
        widths = tuple(weights[f"{name}.bias"].shape[0] for name in _DOWN)
        wanted = layout(widths, weights[_BOOK].shape[1])
    except (KeyError, IndexError):
        wanted = layout()
    wrong = [
        f"{name}: expected {shape}, received "
        f"{weights[name].shape if name in weights else 'nothing'}"
        for name, shape in wanted.items()
        if name not in weights or weights[name].shape != shape
    ]
    if wrong:
        raise ValueError(
            f"These are not the weights of a codec of masks; {len(wrong)} do "
            f"not fit. {'; '.join(wrong[:5])}."
        )
    return wanted
