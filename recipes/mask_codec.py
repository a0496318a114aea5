"""Train the small codec of masks: `python -m recipes.mask_codec`.

A VQ-VAE like the published one, but a third as wide, learns the silhouettes of
the nano preset's sprites. Needs the sprites of `python -m recipes.nano.fetch`,
and PyTorch. Writes the weights to the nano preset's folder, and true masks for
the test of the codec's best IoU. Prints the mean IoU of each style; the last
style is held out from training.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from keras_paligemma.tasks import masks
from keras_paligemma.tasks.mask_codec import BOOK
from keras_paligemma.tasks.mask_codec import MaskCodec
from keras_paligemma.tasks.mask_codec import square
from recipes.nano import scenes
from recipes.nano.fetch import ALPHA_THRESHOLD
from recipes.nano.fetch import DEFAULT_CACHE
from recipes.nano.fetch import HELD_OUT_STYLES

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "presets/pali_gemma2_nano_112/mask_codec.npz"
TRUE_MASKS = ROOT / "tests/tasks/nano_masks.npz"

WIDTHS, FEATURES = (8, 16, 32, 48), 32
# The styles that have every class.
STYLES = ("fluent-3d", "noto-v1", "fluent-flat")
# Masks to draw batches from, masks per step, steps, which take 8.5 minutes on
# one core, and learning rate.
POOL, BATCH, STEPS, RATE = 12_000, 64, 4_000, 2e-3

# Steps before the codebook is initialized from the encoder's outputs.
UNQUANTIZED_STEPS = 400

# Decay of the codebook's moving average, steps between revivals of unused rows,
# and the weight of the commitment loss.
DECAY, REVIVAL_STEPS, COMMITMENT = 0.99, 100, 0.25


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x):
        return x + self.net(x)


class Autoencoder(nn.Module):
    """The codec in PyTorch, with the names and layouts of its files.

    Args:
        widths: sequence of ints, channels after each of the four halvings.
        features: int, length of a row of the codebook.
    """

    def __init__(self, widths, features):
        super().__init__()
        width = widths[-1]
        down = [
            (nn.Conv2d(source, target, 4, stride=2, padding=1), nn.ReLU())
            for source, target in zip((1, *widths), widths, strict=False)
        ]
        targets = widths[::-1]
        up = [
            (nn.ConvTranspose2d(source, target, 4, 2, 1), nn.ReLU())
            for source, target in zip((width, *targets), targets, strict=False)
        ]
        self.encoder = nn.Sequential(
            *sum(down, ()),
            Residual(width),
            Residual(width),
            nn.Conv2d(width, features, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(features, width, 1),
            nn.ReLU(),
            Residual(width),
            Residual(width),
            *sum(up, ()),
            nn.Conv2d(widths[0], 1, 1),
        )
        self.register_buffer("book", torch.zeros(BOOK, features))

    def codes(self, encoded):
        """Return the index of the nearest codebook row at each position."""
        rows = encoded.movedim(1, -1).flatten(0, 2)
        return torch.cdist(rows, self.book).argmin(1).view(len(encoded), 4, 4)

    def quantized(self, codes):
        return self.book[codes].movedim(-1, 1)

    def weights(self):
        """Return the arrays of a codec's file, by name."""
        state = {key: value.numpy() for key, value in self.state_dict().items()}
        return {"_vq_vae._embedding": state.pop("book"), **state}


class Codebook:
    """A codebook whose rows follow the mean of the values assigned to them."""

    def __init__(self, model, encoded, rng):
        self.rows, self.rng = model.book, rng
        self.rows.copy_(self._some(encoded, BOOK))
        self.counts, self.sums = torch.ones(BOOK), self.rows.clone()

    def _some(self, encoded, count):
        flat = encoded.detach().movedim(1, -1).flatten(0, 2)
        return flat[self.rng.choice(len(flat), count, replace=False)]

    def follow(self, encoded, codes):
        flat = encoded.detach().movedim(1, -1).flatten(0, 2)
        chosen = nn.functional.one_hot(codes.flatten(), BOOK).float()
        self.counts.lerp_(chosen.sum(0), 1 - DECAY)
        self.sums.lerp_(chosen.T @ flat, 1 - DECAY)
        self.rows.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])

    def revive(self, encoded):
        """Move rarely used rows to outputs of the encoder."""
        dead = (self.counts < 0.05 * self.counts.mean()).nonzero()[:, 0]
        if len(dead):
            self.rows[dead] = self.sums[dead] = self._some(encoded, len(dead))
            self.counts[dead] = 1.0


def silhouette(rng, sprite, change):
    """Draw the true mask of a sprite within its box, as in scenes.

    Args:
        rng: `numpy.random.Generator`.
        sprite: premultiplied `PIL.Image.Image`.
        change: bool, whether to mirror and rotate it, which gives more shapes
            than there are sprites.

    Returns:
        bool array (height, width).
    """
    alpha = sprite.getchannel("a")
    if change:
        if rng.random() < 0.5:
            alpha = alpha.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.7:
            angle = rng.uniform(0, 360)
            alpha = alpha.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    low, high = scenes.SEVERAL_SCALE[0], scenes.SINGLE_SCALE[1]
    edge = rng.uniform(low, high) * 112 / max(alpha.size)
    size = [max(1, round(side * edge)) for side in alpha.size]
    small = alpha.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    seen = np.asarray(small) > ALPHA_THRESHOLD
    y1, x1, y2, x2 = masks.bounds(seen)
    return seen[y1:y2, x1:x2]


def train(pool):
    """Train on squares of masks.

    Args:
        pool: float32 array (masks, 64, 64).

    Returns:
        The trained `Autoencoder`.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = Autoencoder(WIDTHS, FEATURES)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    book = None
    for step in range(STEPS):
        chosen = pool[rng.integers(len(pool), size=BATCH)]
        wanted = 2 * torch.from_numpy(chosen)[:, None] - 1
        encoded = model.encoder(wanted)
        if step < UNQUANTIZED_STEPS:
            loss = 0
            seen = encoded
        else:
            if book is None:
                book = Codebook(model, encoded, rng)
            codes = model.codes(encoded)
            near = model.quantized(codes)
            loss = COMMITMENT * nn.functional.mse_loss(encoded, near)
            # Straight-through estimator: the decoder's gradient passes to the
            # encoder.
            seen = encoded + (near - encoded).detach()
        loss = loss + nn.functional.mse_loss(model.decoder(seen), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if book is not None:
            book.follow(encoded, codes)
            if step % REVIVAL_STEPS == 0 and step < 0.8 * STEPS:
                book.revive(encoded)
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return model


def pictures(sprites, style):
    """Return the plain pictures of all classes of a style."""
    return [plain.picture for (plain,) in sprites[style].values()]


def measure(codec, sprites):
    """Print the IoU of true masks and masks decoded from their codes.

    Args:
        codec: `MaskCodec`.
        sprites: dict, from `scenes.load_sprites`.
    """
    styles = (*STYLES, *HELD_OUT_STYLES)
    true = {
        style: [
            silhouette(np.random.default_rng([7, i]), picture, change=False)
            for i, picture in enumerate(pictures(sprites, style))
        ]
        for style in styles
    }
    for style in styles:
        ious = []
        for mask in true[style]:
            (part,) = codec.decode([codec.encode_mask(mask)])
            found = masks.paste(part, (0, 0, *mask.shape), mask.shape)
            ious.append((found & mask).sum() / (found | mask).sum())
        print(f"{style}: mean IoU {np.mean(ious):.3f}, least {min(ious):.3f}")
    np.savez_compressed(
        TRUE_MASKS,
        styles=styles,
        sizes=[[mask.shape for mask in true[style]] for style in styles],
        bits=np.packbits(
            np.concatenate([m.ravel() for s in styles for m in true[s]])
        ),
    )


def main(cache):
    """Train, write the weights and the true masks, and measure."""
    sprites = scenes.load_sprites(cache)
    rng = np.random.default_rng(0)
    trained = [picture for s in STYLES for picture in pictures(sprites, s)]
    pool = [
        square(silhouette(rng, trained[i % len(trained)], change=i % 3 > 0))
        for i in range(POOL)
    ]
    weights = train(np.stack(pool)).weights()
    half = {name: weight.astype("float16") for name, weight in weights.items()}
    np.savez_compressed(WEIGHTS, **half)
    print(f"{WEIGHTS.stat().st_size:,} bytes")
    measure(MaskCodec.load(WEIGHTS), sprites)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    main(parser.parse_args().cache)
