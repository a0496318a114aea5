"""Download the emoji pictures, fonts and words of the nano preset.

They come from public npm packages (see `NOTICE.md` for the licences).
`npm pack` downloads the packages into a cache folder. This script then writes
into the folder `words.txt`, `fonts/*.ttf`, and `sprites.npz` with these arrays:

- `sprites`: uint8 `(styles, classes, 128, 128, 4)`, RGBA, not premultiplied.
  Each picture is cropped to its alpha box, scaled so that its longer side is
  128 pixels, and padded to the right and below with full transparency.
- `sizes`: int `(styles, classes, 2)`, the height and width inside the padding;
  0 where a style lacks a class.
- `classes`, `styles`: the names along the first two axes.

Run it from the repository's root:
`python -m recipes.nano.fetch [--cache FOLDER]`.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from keras_paligemma.atomic import draft_folder

DEFAULT_CACHE = Path("~/.cache/keras_paligemma/nano").expanduser()

SPRITE_SIZE = 128

# Size in pixels at which vector pictures are drawn before cropping.
RENDER_SIZE = 256

# Pixels with an alpha above this value belong to the object.
ALPHA_THRESHOLD = 127

# Style -> npm package. The last style is held out from training.
STYLES = {
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "noto": "@iconify-json/noto@1.2.9",
}
TRAINED_STYLES = ("fluent-3d", "noto-v1", "fluent-flat", "fxemoji")
HELD_OUT_STYLES = ("noto",)

# Font -> npm package and file. The last font is held out from training.
FONTS = {
    "DejaVuSans": ("dejavu-fonts-ttf@2.37.3", "ttf/DejaVuSans.ttf"),
    "DejaVuSans-Bold": ("dejavu-fonts-ttf@2.37.3", "ttf/DejaVuSans-Bold.ttf"),
    "DejaVuSerif": ("dejavu-fonts-ttf@2.37.3", "ttf/DejaVuSerif.ttf"),
    "DejaVuSansMono-Bold": (
        "dejavu-fonts-ttf@2.37.3",
        "ttf/DejaVuSansMono-Bold.ttf",
    ),
    "Roboto_500Medium": (
        "@expo-google-fonts/roboto@0.4.3",
        "500Medium/Roboto_500Medium.ttf",
    ),
    "Roboto_900Black": (
        "@expo-google-fonts/roboto@0.4.3",
        "900Black/Roboto_900Black.ttf",
    ),
    "Lora_700Bold": (
        "@expo-google-fonts/lora@0.4.2",
        "700Bold/Lora_700Bold.ttf",
    ),
    "OpenSans_600SemiBold": (
        "@expo-google-fonts/open-sans@0.4.2",
        "600SemiBold/OpenSans_600SemiBold.ttf",
    ),
}
TRAINED_FONTS = tuple(FONTS)[:-1]
HELD_OUT_FONTS = tuple(FONTS)[-1:]

# The English labels that the tokenizer is trained on, and the words to read.
LABELS_PACKAGE = "emojibase-data@17.0.0"

# Class -> Unicode code point of its emoji.
CLASSES = {
    "cat": "1f431",
    "dog": "1f436",
    "pig": "1f437",
    "frog": "1f438",
    "panda": "1f43c",
    "lion": "1f981",
    "elephant": "1f418",
    "penguin": "1f427",
    "owl": "1f989",
    "duck": "1f986",
    "crab": "1f980",
    "turtle": "1f422",
    "snail": "1f40c",
    "bee": "1f41d",
    "butterfly": "1f98b",
    "fish": "1f41f",
    "apple": "1f34e",
    "banana": "1f34c",
    "pear": "1f350",
    "strawberry": "1f353",
    "watermelon": "1f349",
    "pineapple": "1f34d",
    "carrot": "1f955",
    "pizza": "1f355",
    "hamburger": "1f354",
    "cake": "1f382",
    "donut": "1f369",
    "mushroom": "1f344",
    "cactus": "1f335",
    "tree": "1f333",
    "sunflower": "1f33b",
    "car": "1f697",
    "bus": "1f68c",
    "bicycle": "1f6b2",
    "rocket": "1f680",
    "helicopter": "1f681",
    "sailboat": "26f5",
    "tractor": "1f69c",
    "house": "1f3e0",
    "umbrella": "2602",
    "key": "1f511",
    "guitar": "1f3b8",
    "drum": "1f941",
    "clock": "23f0",
    "bell": "1f514",
    "star": "2b50",
    "crown": "1f451",
    "balloon": "1f388",
    "robot": "1f916",
    "anchor": "2693",
}


def fetch_package(spec, cache):
    """Return the path of an npm package's tarball, downloading it if missing.

    Args:
        spec: str, package and version, `name@version`.
        cache: `pathlib.Path`, the folder for tarballs.

    Returns:
        The `pathlib.Path` of the tarball.
    """
    # npm names the file of "@scope/name@1.0.0" "scope-name-1.0.0.tgz".
    name, version = spec.rsplit("@", 1)
    name = name.removeprefix("@").replace("/", "-")
    tarball = cache / f"{name}-{version}.tgz"
    if tarball.exists():
        return tarball
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"`npm` is needed to fetch the package {spec!r} and was not "
            "found. Install Node.js (https://nodejs.org), or put the "
            f"package's tarball at {tarball}."
        )
    cache.mkdir(parents=True, exist_ok=True)
    # A draft: npm leaves a part of the file where it is killed.
    with draft_folder(cache, f".{tarball.name}.draft-") as draft:
        done = subprocess.run(
            [npm, "pack", spec, "--pack-destination", str(draft)],
            capture_output=True,
            check=False,
            text=True,
        )
        if done.returncode != 0 or not (draft / tarball.name).exists():
            raise RuntimeError(
                f"`npm pack {spec}` did not give {tarball.name}. npm said:\n"
                f"{done.stderr.strip()}"
            )
        (draft / tarball.name).replace(tarball)
    return tarball


def read_member(tarball, name):
    """Return the bytes of one file of an npm tarball."""
    with tarfile.open(tarball) as archive:
        return archive.extractfile(f"package/{name}").read()


def read_labels(cache):
    """Return the English labels of all emoji as a list of str."""
    tarball = fetch_package(LABELS_PACKAGE, cache)
    entries = json.loads(read_member(tarball, "en/data.json"))
    return [entry["label"] for entry in entries]


def short_words(labels):
    """Return the words of two to five letters of labels, in order."""
    words = re.findall(r"\b[a-z]{2,5}\b", " ".join(labels).lower())
    return sorted(set(words))


def read_bitmaps(tarball):
    """Return the classes' pictures from the package of webp files."""
    pictures = []
    with tarfile.open(tarball) as archive:
        names = set(archive.getnames())
        for code_point in CLASSES.values():
            # Some emoji need a variation selector in their file name.
            path = f"package/assets/{code_point}.webp"
            if path not in names:
                path = f"package/assets/{code_point}-fe0f.webp"
            picture = Image.open(archive.extractfile(path))
            pictures.append(picture.convert("RGBA"))
    return pictures


def read_icons(tarball, names):
    """Return the classes' pictures of an icon set, drawn from its SVGs.

    Args:
        tarball: path, an icon set's package.
        names: dict of code points to names of icons.

    Returns:
        list of RGBA pictures in the order of `CLASSES`, `None` for those that
        the set lacks.
    """
    from resvg_py import svg_to_bytes

    icons = json.loads(read_member(tarball, "icons.json"))
    pictures = []
    for code_point in CLASSES.values():
        icon = icons["icons"].get(names.get(code_point))
        if icon is None:
            pictures.append(None)
            continue
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            'xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        png = svg_to_bytes(
            svg_string=svg, width=RENDER_SIZE, height=RENDER_SIZE
        )
        pictures.append(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    return pictures


def crop(picture):
    """Crop a picture to its alpha box and scale it to a sprite.

    Args:
        picture: RGBA `PIL.Image.Image`, or `None`.

    Returns:
        tuple of the sprite, uint8 `(128, 128, 4)`, and its `(height,
        width)` inside the padding, `(0, 0)` without a picture.
    """
    sprite = np.zeros((SPRITE_SIZE, SPRITE_SIZE, 4), "uint8")
    if picture is None:
        return sprite, (0, 0)
    mask = picture.getchannel("A").point(lambda a: a > ALPHA_THRESHOLD)
    picture = picture.crop(mask.getbbox())
    scale = SPRITE_SIZE / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    sprite[:height, :width] = np.asarray(picture)
    return sprite, (height, width)


def build_sprites(cache):
    """Write `sprites.npz` in the cache folder and return its path."""
    tarballs = {s: fetch_package(p, cache) for s, p in STYLES.items()}
    # The icon sets share names, but not all of them list the code points.
    names = json.loads(read_member(tarballs["noto"], "chars.json"))
    sprites, sizes = [], []
    for style, tarball in tarballs.items():
        if style == "fluent-3d":
            pictures = read_bitmaps(tarball)
        else:
            own = json.loads(read_member(tarball, "chars.json"))
            pictures = read_icons(tarball, own or names)
        cropped = [crop(picture) for picture in pictures]
        sprites.append([sprite for sprite, _ in cropped])
        sizes.append([size for _, size in cropped])
    path = cache / "sprites.npz"
    draft = cache / ".sprites.npz"
    np.savez_compressed(
        draft,
        sprites=np.array(sprites, "uint8"),
        sizes=np.array(sizes),
        classes=np.array(list(CLASSES)),
        styles=np.array(list(STYLES)),
    )
    draft.replace(path)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    cache = parser.parse_args().cache
    words = short_words(read_labels(cache))
    (cache / "words.txt").write_text("\n".join(words))
    (cache / "fonts").mkdir(exist_ok=True)
    for name, (package, member) in FONTS.items():
        data = read_member(fetch_package(package, cache), member)
        (cache / "fonts" / f"{name}.ttf").write_bytes(data)
    print(build_sprites(cache))


if __name__ == "__main__":
    main()
