"""Conversion of pictures to the inputs of the vision encoder."""

from collections.abc import Sequence
from typing import Any
from typing import Self

import keras
import keras_hub
import numpy as np

from keras_paligemma import presets
from keras_paligemma.checkpoints import formats
from keras_paligemma.compat import classproperty
from keras_paligemma.preprocessing import parts
from keras_paligemma.preprocessing.images import read_image
from keras_paligemma.preprocessing.images import to_bytes
from keras_paligemma.preprocessing.images import to_rgb
from keras_paligemma.preprocessing.inputs import is_list
from keras_paligemma.preprocessing.inputs import to_numpy
from keras_paligemma.preprocessing.resize import RULES
from keras_paligemma.types import Config
from keras_paligemma.types import PathLike

# Arguments of the base class that PaliGemma determines.
NOT_FREE = {
    "scale",
    "offset",
    "interpolation",
    "antialias",
    "crop_to_aspect_ratio",
    "pad_to_aspect_ratio",
    "bounding_box_format",
    "data_format",
}


@keras.saving.register_keras_serializable(package="keras_paligemma")
class PaliGemmaImageConverter(keras_hub.layers.ImageConverter):
    """Convert pictures of any kind and size to float32 squares in [-1, 1].

    The whole picture is squeezed to `image_size`; nothing is cropped, so
    coordinates stay relative to the picture. Runs in NumPy and returns NumPy
    arrays. `read_image` documents which pictures are accepted, and how
    transparency, 16 bits and EXIF are handled.

    Args:
        image_size: int or `(height, width)`, in pixels.
        resize: str, the method that the checkpoint was trained with, exact to
            the pixel: `"bilinear"`, the default of big_vision's `resize`,
            without antialias; `"bilinear_antialias"`, as in big_vision's
            PaliGemma configurations; `"bicubic"`, as in transformers.

    Raises:
        ValueError: invalid argument; when called, a picture cannot be read,
            or examples differ in their number of frames.

    Example:

    ```python
    converter = PaliGemmaImageConverter(224)
    converter(np.zeros((480, 640, 3), "uint8")).shape  # (224, 224, 3)
    converter(["cat.jpg", "dog.png"]).shape  # (2, 224, 224, 3)
    converter([["a.jpg", "b.jpg"]]).shape  # 2 frames: (1, 2, 224, 224, 3)
    ```

    Source: big_vision `pp/ops_image.py`; transformers
    `SiglipImageProcessor`.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        resize: str = "bilinear",
        **kwargs: Any,
    ) -> None:
        refused = sorted(NOT_FREE & kwargs.keys())
        if refused:
            raise ValueError(
                f"Pictures are converted in one way. Received: {refused}. "
                "Expected: `image_size` and `resize`. The whole picture is "
                "squeezed, so that boxes stay relative to it, and 0…255 "
                "becomes [-1, 1]: what checkpoints were trained with. See "
                "docs/migrating_from_keras_hub.md."
            )
        is_pair = isinstance(image_size, (list, tuple))
        sides = tuple(image_size) if is_pair else (image_size, image_size)
        if len(sides) != 2 or not all(
            isinstance(s, int) and s > 0 for s in sides
        ):
            raise ValueError(
                "`image_size` must be a positive integer or two of them, "
                f"(height, width). Received: {sides}."
            )
        if resize not in RULES:
            raise ValueError(
                f"`resize` must be one of {tuple(RULES)}. Received: {resize!r}."
            )
        super().__init__(
            image_size=sides,
            scale=1 / 127.5,
            offset=-1.0,
            crop_to_aspect_ratio=False,
            data_format="channels_last",
            **kwargs,
        )
        self.resize = resize

    @classmethod
    def from_preset(cls, preset: PathLike, **kwargs: Any) -> Self:
        """Create the converter of a preset, without its weights.

        Args:
            preset: as in `PaliGemmaCausalLM.from_preset`, or a folder written
                by `save_to_preset` of a converter or preprocessor.
            **kwargs: arguments of the class that override the preset's.

        Returns:
            `PaliGemmaImageConverter`.

        Raises:
            ValueError: unknown preset, or one without a preprocessor.
        """
        config = parts.read(cls, preset, "image_converter.json")
        if config is not None:
            return cls.from_config(config | kwargs)
        config = formats.resolve(preset, load_weights=False).config
        if config.preprocessor is None:
            raise ValueError(
                f"{preset} does not say how pictures are resized: it was "
                "saved without a preprocessor. Make the converter yourself: "
                "`PaliGemmaImageConverter("
                f"{config.backbone.image_size}, resize=…)`."
            )
        known = {
            "image_size": config.backbone.image_size,
            "resize": config.preprocessor.resize,
        }
        return cls(**known | kwargs)

    def save_to_preset(self, preset_dir: PathLike) -> None:
        """Write the configuration to a folder.

        Args:
            preset_dir: path of the folder, for `from_preset`.

        Raises:
            ValueError: the folder holds a preset with a preprocessor, or
                another library's files.
        """
        super().save_to_preset(parts.folder_for(preset_dir))

    @classproperty
    def presets(cls) -> dict[str, Any]:
        """Descriptions of the presets, see `PaliGemmaBackbone.presets`."""
        return presets.describe_all()

    def __call__(self, inputs: Any) -> Any:
        # Keras's `__call__` raises on lists that mix tensors with paths or
        # Pillow images, and there is nothing to trace or build.
        return self.call(inputs)

    def call(self, inputs: Any) -> np.ndarray:
        """Convert a picture, a batch, or a batch of lists of frames.

        Args:
            inputs: a picture; an array (B, height, width, channels) or
                (B, frames, height, width, channels); or a list of pictures,
                of lists of frames, or of arrays of frames.

        Returns:
            float32 array (R, R, 3), (B, R, R, 3) or (B, frames, R, R, 3).
        """
        pixels = self._pixels(inputs, "images", depth=2)
        return pixels.astype("float32") / np.float32(127.5) - np.float32(1)

    def _pixels(self, image, name, depth):
        """Return pixels of a picture, or of pictures nested up to `depth`."""
        if hasattr(image, "shape"):
            image = to_numpy(image)
            if image.dtype.kind in "OSU":  # Paths, encoded files.
                image = image.tolist()
            elif image.ndim > 3:
                image = to_bytes(image, name)
        nesting = image.ndim - 3 if isinstance(image, np.ndarray) else 1
        if nesting < 1 or not (is_list(image) or isinstance(image, np.ndarray)):
            return self._resize(read_image(image, name))
        if nesting > depth:
            raise ValueError(
                f"`{name}` is nested too deep. Expected: a picture, a batch, "
                "or a batch of lists of frames; pictures as arrays, not as "
                f"lists of numbers. Received: {type(image).__name__} of "
                f"length {len(image)}."
            )
        if not len(image):
            raise ValueError(f"`{name}` is empty. Expected: pictures.")
        if (
            isinstance(image, np.ndarray)
            and image.shape[-3:-1] == self.image_size
        ):
            return to_rgb(image, name)
        parts = [
            self._pixels(part, f"{name}[{i}]", depth - 1)
            for i, part in enumerate(image)
        ]
        shapes = sorted({part.shape for part in parts})
        if len(shapes) > 1:
            raise ValueError(
                f"`{name}` cannot be one batch. Expected: the same number of "
                f"frames in all examples. Received: shapes {shapes} after "
                "resizing."
            )
        return np.stack(parts)

    def _resize(self, image):
        if image.shape[:2] == self.image_size:
            return image
        return RULES[self.resize](image, self.image_size)

    def get_config(self) -> Config:
        config = super().get_config()
        for key in NOT_FREE & config.keys():
            del config[key]
        config["resize"] = self.resize
        return config


def check_picture_size(preprocessor, image_size):
    """Raise on a preprocessor that makes pictures of another size.

    Args:
        preprocessor: `PaliGemmaCausalLMPreprocessor` or `None`.
        image_size: int, the backbone's, in pixels.

    Raises:
        ValueError: its image converter makes pictures of another size.
    """
    converter = getattr(preprocessor, "image_converter", None)
    if converter is not None and converter.image_size != (image_size,) * 2:
        raise ValueError(
            "The preprocessor makes pictures of another size than the "
            f"backbone takes. Received: {converter.image_size}. Expected: "
            f"{(image_size,) * 2}. Make its converter for that size, or load "
            "the model for the other: `from_preset(…, image_size=…)`."
        )
