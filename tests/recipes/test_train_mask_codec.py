"""The recipe on discs and rings, without sprites and in little time."""

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.tasks.mask_codec import MaskCodec
from recipes import mask_codec as recipe


def sprite(inner):
    y, x = np.mgrid[-40:40, -60:60]
    distance = np.hypot(y, x / 1.5)
    pixels = np.zeros((80, 120, 4), "uint8")
    pixels[..., 3] = 255 * ((distance < 39) & (distance >= inner))
    return Image.fromarray(pixels).convert("RGBa")


@pytest.mark.parametrize("change", [False, True])
def test_silhouettes_fill_their_box(change):
    sizes = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mask = recipe.silhouette(rng, sprite(15), change)
        for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
            assert side.any()
        assert not mask[mask.shape[0] // 2, mask.shape[1] // 2]
        sizes.add(mask.shape)
    assert len(sizes) > 10


def test_training_learns_shapes_and_uses_codes(monkeypatch):
    for name, value in {
        "WIDTHS": (4, 4, 8, 8),
        "FEATURES": 8,
        "BATCH": 8,
        "STEPS": 200,
        "RATE": 8e-3,
        "UNQUANTIZED_STEPS": 120,
        "REVIVAL_STEPS": 10,
    }.items():
        monkeypatch.setattr(recipe, name, value)
    rng = np.random.default_rng(0)
    pool = np.stack(
        [
            recipe.square(recipe.silhouette(rng, sprite(inner), change=True))
            for inner in (0, 10, 20, 25) * 8
        ]
    )
    codec = MaskCodec(recipe.train(pool).weights())
    codes = codec.encode(pool)
    assert len(np.unique(codes)) > 30
    # A constant grey would have an error of 0.92, and the mean shape 0.47.
    assert np.square(codec.decode(codes) - (2 * pool - 1)).mean() < 0.3
