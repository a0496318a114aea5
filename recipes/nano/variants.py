"""Variants of the sprites, mirrored and turned, with codes of their outlines.

A model that sees each class in a few drawings learns the drawings. Variants
make it look for what a class's drawings have in common, which a style that it
has not seen has too.
"""

import numpy as np
from PIL import Image

from keras_paligemma.tasks.mask_codec import MaskCodec
from recipes.nano import scenes

# Each picture is turned by each of these angles, in degrees, mirrored or not.
ANGLES = (0, -9, 9)


def outline_codes(codec, picture):
    """Encode the outline of a picture at its full size.

    A sprite has the same codes at every size, so that a model only has to
    recognise the sprite.

    Args:
        codec: `MaskCodec`.
        picture: RGBa `PIL.Image.Image`, cropped to its alpha box.

    Returns:
        str of 16 `<seg>` tokens.
    """
    mask = np.asarray(picture.getchannel("a")) > scenes.ALPHA_THRESHOLD
    return "".join(f"<seg{code:03d}>" for code in codec.encode_mask(mask))


def changed(picture, mirrored, angle):
    """Mirror and turn a picture, and crop it to its alpha box."""
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    alpha = np.asarray(picture.getchannel("a"))
    y1, x1, y2, x2 = scenes.alpha_box(alpha, 0, 0)
    return picture.crop((x1, y1, x2, y2))


def with_codes(sprites, angles=(0,), mirrors=(False,)):
    """Add the codes of their outlines to sprites, and variants of them.

    Args:
        sprites: dict, from `scenes.load_sprites`.
        angles: sequence of int, in degrees.
        mirrors: sequence of bool.

    Returns:
        Dict like `sprites`, with a `scenes.Sprite` for each angle and mirror.
    """
    codec = MaskCodec.embedded()
    return {
        style: {
            name: [
                scenes.Sprite(picture, outline_codes(codec, picture))
                for mirrored in mirrors
                for angle in angles
                for picture in [changed(plain.picture, mirrored, angle)]
            ]
            for name, (plain,) in classes.items()
        }
        for style, classes in sprites.items()
    }


def all_variants(sprites):
    """Return six variants of each sprite: three angles, mirrored or not."""
    return with_codes(sprites, ANGLES, (False, True))
