import doctest
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_paligemma import checksums
from keras_paligemma.tasks import mask_codec
from keras_paligemma.tasks import masks
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.mask_codec import layout
from keras_paligemma.tasks.mask_codec import square

# All sizes differ, so that swapped axes are detected.
UNEQUAL = (3, 5, 7, 11), 13


def random_weights(widths, features):
    """Draw weights that keep values near 1, with no dominating bias."""
    random = np.random.default_rng(0)
    weights = {}
    for name, shape in layout(widths, features).items():
        is_bias = len(shape) == 1
        scale = 0.1 if is_bias else np.sqrt(2 / np.prod(shape[1:]))
        weights[name] = (scale * random.normal(size=shape)).astype("float32")
    return weights


def test_examples_of_the_docstrings_run():
    result = doctest.testmod(mask_codec)
    assert result.attempted and not result.failed


def test_the_layout_is_that_of_the_published_file():
    """The size in bytes is known; names and shapes determine it."""
    shapes = layout() | {
        "_vq_vae._ema_cluster_size": (128,),
        "_vq_vae._ema_w": (128, 512),
    }
    file = io.BytesIO()
    np.savez(file, **{k: np.zeros(v, "float32") for k, v in shapes.items()})
    (size,) = (
        size
        for size, (name, _) in checksums.KNOWN.items()
        if "vae-oid.npz" in name
    )
    assert len(file.getvalue()) == size == 8_479_556


@pytest.mark.parametrize("sizes", [UNEQUAL, ((16, 32, 64, 128), 512)])
def test_equals_pytorch(sizes):
    """Compare with PyTorch's own layers with the same weights."""
    import torch

    from recipes.mask_codec import Autoencoder

    weights = random_weights(*sizes)
    codec, model = MaskCodec(weights), Autoencoder(*sizes)
    state = {
        name.replace("_vq_vae._embedding", "book"): torch.from_numpy(weight)
        for name, weight in weights.items()
    }
    model.load_state_dict(state, strict=True)
    random = np.random.default_rng(1)
    squares = random.random((3, 8, 8)).round().repeat(8, 1).repeat(8, 2)
    squares = squares.astype("float32")
    codes = random.integers(0, 128, (3, 16))
    with torch.no_grad():
        encoded = model.encoder(torch.from_numpy(2 * squares[:, None] - 1))
        wanted_codes = model.codes(encoded).flatten(1).numpy()
        near = model.quantized(torch.from_numpy(codes).view(3, 4, 4))
        wanted = model.decoder(near)[:, 0].numpy()
    found = codec.encode(squares)
    assert len(np.unique(found)) > 5
    np.testing.assert_array_equal(found, wanted_codes)
    assert 0.1 < np.abs(wanted).max() < 100
    np.testing.assert_allclose(codec.decode(codes), wanted, atol=1e-5)


def test_many_masks_are_encoded_as_one_by_one():
    codec = MaskCodec(random_weights(*UNEQUAL))
    squares = np.random.default_rng(0).random((70, 64, 64))
    codes = codec.encode(squares)
    one_by_one = [codec.encode(square[None])[0] for square in squares]
    np.testing.assert_array_equal(codes, one_by_one)
    decoded = codec.decode(codes)
    np.testing.assert_allclose(
        decoded[67], codec.decode(codes[67:68])[0], atol=1e-5
    )
    assert codec.encode(squares[:0]).shape == (0, 16)
    assert codec.decode([]).shape == (0, 64, 64)


def test_a_square_is_the_share_of_each_pixel():
    mask = np.random.default_rng(0).random((64, 64)) < 0.4
    np.testing.assert_array_equal(square(mask), mask)
    assert square(mask).dtype == np.float32
    # Above 64 × 64, each pixel averages its neighbours with a triangle filter.
    stripes = np.tile([True, False], (50, 64))
    np.testing.assert_allclose(square(stripes)[:, 1:-1], 0.5, atol=1e-6)
    assert square(np.ones((1, 1), bool)).min() > 0.999


def true_masks():
    """Return the nano preset's alpha masks, at sizes as in its scenes.

    `recipes/mask_codec.py` wrote them: one of each class and style.
    """
    with np.load(Path(__file__).parent / "nano_masks.npz") as file:
        styles, sizes = file["styles"].tolist(), file["sizes"]
        bits = np.unpackbits(file["bits"]).astype(bool)
    for style, of_style in zip(styles, sizes, strict=True):
        for height, width in of_style.tolist():
            mask, bits = bits[: height * width], bits[height * width :]
            yield style, mask.reshape(height, width)


def test_the_ceiling_of_the_embedded_codec():
    """Codes of true masks decode to most of their pixels, in every style."""
    codec, overlaps = MaskCodec.embedded(), {}
    for style, mask in true_masks():
        (part,) = codec.decode([codec.encode_mask(mask)])
        found = masks.paste(part, (0, 0, *mask.shape), mask.shape)
        overlap = (found & mask).sum() / (found | mask).sum()
        overlaps.setdefault(style, []).append(overlap)
    assert {style: len(some) for style, some in overlaps.items()} == {
        "fluent-3d": 50,
        "noto-v1": 50,
        "fluent-flat": 50,
        "noto": 50,
    }
    for some in overlaps.values():
        assert np.mean(some) >= 0.85


def test_the_embedded_codec_is_small():
    from keras_paligemma.presets import locate

    file = locate("pali_gemma2_nano_112") / "mask_codec.npz"
    assert file.stat().st_size <= 1_000_000
    assert MaskCodec.embedded() is MaskCodec.embedded()


def test_needs_numpy_alone():
    code = (
        "from keras_paligemma.tasks import answers, masks, prompts;"
        "from keras_paligemma.tasks.mask_codec import MaskCodec;"
        "text = '<loc0000>' * 4 + '<seg000>' * 16;"
        "found = answers.read_objects(text, MaskCodec.embedded());"
        "found[0].mask_in((5, 5));"
        "import sys;"
        "print({'keras', 'keras_hub', 'torch', 'jax', 'tensorflow', 'scipy',"
        " 'pycocotools'} & set(sys.modules), len(found))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "set() 1"


def test_damaged_and_other_files_are_refused(tmp_path, monkeypatch):
    weights = random_weights(*UNEQUAL)
    np.savez(tmp_path / "codec.npz", **weights, other=np.zeros(3))
    again = MaskCodec.load(tmp_path / "codec.npz")
    assert set(again.weights) == set(weights)
    content = (tmp_path / "codec.npz").read_bytes()
    monkeypatch.setattr(
        checksums, "KNOWN", {len(content): ("vae-oid.npz", "0" * 64)}
    )
    with pytest.raises(ValueError, match="codec.npz is damaged.*vae-oid"):
        MaskCodec.load(tmp_path / "codec.npz")
    middle = len(content) // 2
    for other in (
        b"no arrays",
        b"",
        content[:middle],
        content[:middle] + b"x" * 40 + content[middle + 41 :],
    ):
        (tmp_path / "other.npz").write_bytes(other)
        with pytest.raises(ValueError, match="other.npz holds no arrays"):
            MaskCodec.load(tmp_path / "other.npz")
    with open(tmp_path / "single.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="single.npz holds no arrays"):
        MaskCodec.load(tmp_path / "single.npz")
    with pytest.raises(FileNotFoundError):
        MaskCodec.load(tmp_path / "missing.npz")


def test_weights_that_do_not_fit_are_listed():
    weights = random_weights(*UNEQUAL)
    weights["decoder.4.weight"] = weights["decoder.4.weight"][:, :2]
    del weights["encoder.10.bias"]
    with pytest.raises(ValueError) as error:
        MaskCodec(weights)
    message = str(error.value)
    assert "2 do not fit" in message
    assert (
        "decoder.4.weight: expected (11, 11, 4, 4), received (11, 2" in message
    )
    assert "encoder.10.bias: expected (13,), received nothing" in message
    with pytest.raises(ValueError, match=r"encoder.0.weight: expected \(16"):
        MaskCodec({})


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((3, 3), bool),
        np.ones((3, 3)),
        np.ones((3, 3, 1), bool),
        np.ones((0, 3), bool),
    ],
)
def test_what_is_no_mask_is_refused(wrong):
    with pytest.raises(ValueError, match="no mask to encode"):
        MaskCodec.embedded().encode_mask(wrong)


def test_what_are_no_squares_or_codes_is_refused():
    codec = MaskCodec.embedded()
    for wrong in (np.zeros((64, 64)), np.zeros((1, 64, 32))):
        with pytest.raises(ValueError, match="encoded as squares"):
            codec.encode(wrong)
    for value in (-0.1, 1.1, np.nan, 255):
        with pytest.raises(ValueError, match="values of 0 to 1"):
            codec.encode(np.full((1, 64, 64), value))
    with pytest.raises(ValueError, match="has 16 codes"):
        codec.decode([[0] * 15])
    for value in (-1, 128):
        with pytest.raises(ValueError, match="Codes are 0 to 127"):
            codec.decode([[value] * 16])
