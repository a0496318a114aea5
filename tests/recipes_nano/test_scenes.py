"""Tests of the nano preset's data. They need no network and no emoji."""

import json
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece as spm
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from recipes.nano import card
from recipes.nano import evaluate
from recipes.nano import fetch
from recipes.nano import languages
from recipes.nano import lettering
from recipes.nano import scenes
from recipes.nano import variants

CLASSES = ["apple", "bus", "car", "drum", "fish", "house", "key", "star"]
STYLES = ["one", "two"]
TOKENIZER = (
    Path(__file__).parents[2] / "presets/pali_gemma2_nano_112/tokenizer.model"
)


def make_sprites():
    sprites = {}
    for i, style in enumerate(STYLES):
        sprites[style] = {}
        for j, name in enumerate(CLASSES):
            width, height = 128, 40 + 12 * j
            picture = Image.new("RGBA", (width, height))
            draw = ImageDraw.Draw(picture)
            shape = draw.ellipse if j % 2 else draw.rectangle
            colour = (255 - 20 * j, 30 * j, 200 * i, 255)
            shape([0, 0, width - 1, height - 1], fill=colour)
            pixels = scenes.premultiplied(np.asarray(picture))
            sprites[style][name] = [scenes.Sprite(pixels)]
    return sprites


@pytest.fixture(scope="module")
def sprites():
    return make_sprites()


@pytest.fixture
def font(monkeypatch):
    """Write with the font that Pillow contains."""
    monkeypatch.setattr(
        lettering, "font_of", lambda path, size: ImageFont.load_default(size)
    )


@pytest.fixture(scope="module")
def tokenizer():
    return spm.SentencePieceProcessor(model_file=str(TOKENIZER))


def samples(sprites, count, **arguments):
    return [
        scenes.sample(
            np.random.default_rng([2, i]), sprites, CLASSES, STYLES, **arguments
        )
        for i in range(count)
    ]


def test_same_seed_same_scene(sprites):
    first, second = (
        scenes.sample(np.random.default_rng([3, 1]), sprites, CLASSES, STYLES)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.pop("image"), second.pop("image"))
    for scene, other in zip(
        first.pop("objects"), second.pop("objects"), strict=True
    ):
        assert scene[:2] == other[:2]
        np.testing.assert_array_equal(scene.mask, other.mask)
    assert first == second


def test_other_seed_other_scene(sprites):
    first, second = samples(sprites, 2)
    assert not np.array_equal(first["image"], second["image"])


@pytest.mark.parametrize("size", [56, 112])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_layout(sprites, size, count):
    for seed in range(20):
        image, objects, _ = scenes.compose(
            np.random.default_rng([4, seed]),
            sprites,
            STYLES,
            CLASSES[:count],
            size=size,
        )
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert sorted(name for name, *_ in objects) == CLASSES[:count]
        for i, (_, box, *_) in enumerate(objects):
            y1, x1, y2, x2 = box
            assert 0 <= y1 < y2 <= size
            assert 0 <= x1 < x2 <= size
            for _, other, *_ in objects[i + 1 :]:
                assert scenes.overlap(box, other) < 0.05
                distance = (other[1] + other[3] - x1 - x2) / 2
                assert distance >= size * 10 / 112


@pytest.mark.parametrize("size", [56, 112])
@pytest.mark.parametrize("name", CLASSES)
def test_box_is_where_the_object_is_drawn(sprites, monkeypatch, name, size):
    monkeypatch.setattr(
        scenes,
        "background",
        lambda rng, size: np.full((size, size, 3), 128, "uint8"),
    )
    # A white shape stays far from the surrounding grey, whatever the jitter.
    # More than half the way to its colour therefore means an alpha above half.
    (sprite,) = sprites["one"][name]
    array = np.asarray(sprite.picture.convert("RGBA")).copy()
    array[..., :3] = 255
    white = {"one": {name: [scenes.Sprite(scenes.premultiplied(array))]}}
    for seed in range(5):
        image, [(_, box, *_)], _ = scenes.compose(
            np.random.default_rng([5, seed]), white, ["one"], [name], size
        )
        shade = image[..., 0].astype(float)
        seen = shade - 128 > (shade.max() - 128) / 2
        rows = np.flatnonzero(seen.any(axis=1))
        columns = np.flatnonzero(seen.any(axis=0))
        drawn = (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
        np.testing.assert_allclose(box, drawn, atol=1)


def test_alpha_box_takes_more_than_half():
    alpha = np.zeros((6, 7), "uint8")
    alpha[1:5, 2:4] = 128
    alpha[0] = 127
    assert scenes.alpha_box(alpha, y=10, x=20) == (11, 22, 15, 24)


@pytest.mark.parametrize(
    ("names", "caption"),
    [
        (["cat"], "a cat"),
        (["apple"], "an apple"),
        (["cat", "dog"], "a cat and a dog"),
        (["cat", "apple", "dog"], "a cat, an apple and a dog"),
    ],
)
def test_caption_grammar(names, caption):
    objects = [scenes.Placed(name, (0, 0, 1, 1)) for name in names]
    example = scenes.caption_example(None, objects, names, 112)
    assert example == ("caption en", caption)


@pytest.mark.parametrize(
    ("language", "wanted"),
    [
        ("de", "ein Hund, eine Katze und ein Löwe"),
        ("fr", "un chien, un chat et un lion"),
        ("es", "un perro, un gato y un león"),
        ("ja", "犬、猫とライオン"),
    ],
)
def test_captions_in_other_languages(language, wanted):
    names = ["dog", "cat", "lion"]
    assert languages.caption(names, language) == wanted
    first = wanted.split(", ")[0].split("、")[0]
    assert languages.caption(names[:1], language) == first


def test_every_class_has_a_noun_in_every_language():
    assert list(languages.NOUNS) == list(fetch.CLASSES)
    for nouns in languages.NOUNS.values():
        assert len(nouns) == len(languages.TRANSLATED)


def test_variants_have_the_codes_of_their_own_outlines():
    pixels = np.zeros((60, 100, 4), "uint8")
    pixels[:, :40] = pixels[40:] = 255
    sprite = scenes.Sprite(scenes.premultiplied(pixels))
    found = variants.all_variants({"one": {"bus": [sprite]}})
    pictures = found["one"]["bus"]
    assert len(pictures) == 2 * len(variants.ANGLES)
    plain, turned, mirrored = (pictures[i] for i in (0, 1, 3))
    np.testing.assert_array_equal(plain.picture, pixels)
    np.testing.assert_array_equal(mirrored.picture, pixels[:, ::-1])
    # What is turned is higher, and has another outline in its box.
    assert turned.picture.height > plain.picture.height
    assert len({plain.codes, turned.codes, mirrored.codes}) == 3
    assert all(
        re.fullmatch(r"(<seg\d{3}>){16}", sprite.codes) for sprite in pictures
    )


def test_only_varied_scenes_have_variants():
    plain, other = (
        scenes.Sprite(
            scenes.premultiplied(np.full((9, 9 * n, 4), 255, "uint8")), f"{n}"
        )
        for n in (1, 2)
    )
    sprites = {"one": {"bus": [plain, other]}}
    codes = [
        {
            scenes.compose(
                np.random.default_rng(seed), sprites, ["one"], ["bus"], 112, on
            )
            .objects[0]
            .codes
            for seed in range(12)
        }
        for on in (False, True)
    ]
    assert codes == [{"1"}, {"1", "2"}]


def test_other_colours_keep_greys_and_alpha():
    pixels = np.full((2, 2, 4), 200, "uint8")
    pixels[0, 0] = (90, 20, 0, 100)
    changed = scenes.other_colours(np.random.default_rng(0), pixels)
    np.testing.assert_allclose(changed[1], 200, atol=0.1)
    np.testing.assert_array_equal(changed[..., 3], pixels[..., 3])
    assert np.abs(changed[0, 0, :3] - pixels[0, 0, :3]).max() > 1
    assert changed.min() >= 0 and changed[0, 0].max() <= 100


@pytest.mark.parametrize("share", [0, 1])
def test_a_share_of_other_colours_has_any_hue(monkeypatch, share):
    monkeypatch.setattr(scenes, "RECOLOURED_SHARE", share)
    # A medium red, which no turn clips.
    pixels = np.full((1, 1, 4), (140, 110, 110, 255), "uint8")
    angles, factors = [], []
    for seed in range(60):
        changed = scenes.other_colours(np.random.default_rng(seed), pixels)
        red, green, blue = changed[0, 0, :3]
        angles.append(
            np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue)
        )
        factors.append(np.std(changed[0, 0, :3]) / np.std(pixels[0, 0, :3]))
    angles, factors = np.abs(np.rad2deg(angles)), np.array(factors)
    if share:
        assert angles.max() > 150 and factors.min() < 0.3
    else:
        assert 15 < angles.max() < scenes.HUE_TURN + 0.1
        assert factors.min() > scenes.SATURATION[0] - 0.01
    assert factors.max() < scenes.SATURATION[1] + 0.01


def test_words_stand_beside_objects_and_differ_from_them(sprites, font):
    written = 0
    for seed in range(40):
        rng = np.random.default_rng([6, seed])
        scene = scenes.compose(rng, sprites, STYLES, CLASSES[:1])
        before = scene.image.copy()
        scene = lettering.write(rng, scene, ["boot"], ["a font"])
        changed = (scene.image != before).any(-1)
        if not scene.letters:
            assert not changed.any()
            continue
        written += 1
        boxes = np.array([letter.box for letter in scene.letters])
        assert np.all(np.diff(boxes[:, 1]) > 0)
        y1, x1, y2, x2 = scene.objects[0].box
        assert not changed[y1:y2, x1:x2].any()
        rows, columns = np.nonzero(changed)
        assert boxes[0, 0] <= rows.min() and rows.max() < boxes[0, 2]
        assert boxes[0, 1] - 3 <= columns.min()
        assert columns.max() <= boxes[-1, 3] + 3
    assert written > 20


def test_several_texts_stand_beside_one_another(sprites, font):
    rng = np.random.default_rng(7)
    scene = scenes.compose(rng, sprites, STYLES, CLASSES[:2])
    counts = [0]
    for _ in range(8):
        scene = lettering.write(rng, scene, ["boot"], ["a font"])
        counts.append(len(scene.letters))
    assert np.count_nonzero(np.diff(counts)) > 1
    for number, letter in enumerate(scene.letters):
        for other in [*scene.objects, *scene.letters[number + 2 :]]:
            assert scenes.overlap(letter.box, other.box) == 0


def test_words_of_evaluation_are_not_trained(tmp_path):
    words = [f"w{number}" for number in range(30)]
    (tmp_path / "words.txt").write_text("\n".join(words))
    trained, held_out = lettering.load_words(tmp_path)
    assert not set(trained) & set(held_out)
    assert sorted(trained + held_out) == sorted(words)
    assert len(held_out) == 3


def test_groups_are_of_what_was_not_trained(tmp_path):
    (tmp_path / "words.txt").write_text("boot\ncat\nknot")
    groups = evaluate.load_groups(tmp_path)
    trained, held_out = groups["trained"], groups["held-out"]
    assert trained.words == held_out.words == ["boot"]
    assert not set(trained.fonts) & set(held_out.fonts)
    assert not set(trained.styles) & set(held_out.styles)


def test_drawn_texts_are_short_and_of_known_characters():
    rng = np.random.default_rng(0)
    texts = {lettering.draw_text(rng, ["boot"]) for _ in range(200)}
    assert "boot" in texts and any(text.isdigit() for text in texts)
    for text in texts:
        assert 1 <= len(text) <= lettering.LONGEST
        assert set(text) <= set(lettering.CHARACTERS)


def test_short_words_of_labels():
    labels = ["Red apple", "T-shirt", "kiss: man, man", "ab"]
    assert fetch.short_words(labels) == (
        ["ab", "apple", "kiss", "man", "red", "shirt"]
    )


def test_a_style_without_a_class_is_not_drawn_for_it(sprites):
    one = {"one": sprites["one"], "two": {}}
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scene = scenes.compose(rng, one, STYLES, ["bus"])
        assert scene.objects[0].name == "bus"
    _, size = fetch.crop(None)
    assert size == (0, 0)


def test_captions_name_distinct_objects_from_left_to_right(sprites):
    for example in samples(sprites, 50, tasks=("caption",)):
        names = re.findall(r"\ban? (\w+)", example["response"])
        assert names == [name for name, *_ in example["objects"]]
        assert 1 <= len(set(names)) == len(names) <= 3


def test_location_tokens():
    tokens = scenes.location_tokens((0, 28, 56, 112), 112)
    assert tokens == "<loc0000><loc0256><loc0512><loc1023>"
    tokens = scenes.location_tokens((-1, 0, 1, 113), 112)
    assert tokens == "<loc0000><loc0000><loc0009><loc1023>"


def test_detections_give_all_boxes_of_a_class(sprites):
    numbers = set()
    for example in samples(sprites, 100, tasks=("detect",)):
        asked = example["prompt"].removeprefix("detect ")
        boxes = [box for name, box, *_ in example["objects"] if name == asked]
        parts = example["response"].split(" ; ")
        assert parts == [
            f"{scenes.location_tokens(box, 112)} {asked}" for box in boxes
        ]
        numbers.add(len(boxes))
    assert numbers == {1, 2}


def test_counts(sprites):
    answers = []
    for example in samples(sprites, 300, tasks=("count",), size=56):
        asked = re.fullmatch(
            r"answer en how many (\w+)\?", example["prompt"]
        ).group(1)
        names = [name for name, *_ in example["objects"]]
        assert example["response"] == str(names.count(asked))
        answers.append(example["response"])
    assert set(answers) == set("012345")
    assert 0.08 < answers.count("0") / len(answers) < 0.25


def test_max_objects(sprites):
    for example in samples(sprites, 30, max_objects=1, size=56):
        assert len(example["objects"]) == 1


def test_load_sprites(tmp_path):
    pixels = np.zeros((1, 2, 128, 128, 4), "uint8")
    pixels[0, 0, :50, :128] = (200, 100, 0, 255)
    np.savez(
        tmp_path / "sprites.npz",
        sprites=pixels,
        sizes=[[[50, 128], [0, 0]]],
        classes=["bar", "a class that the style lacks"],
        styles=["plain"],
    )
    loaded = scenes.load_sprites(tmp_path)
    assert set(loaded["plain"]) == {"bar"}
    (sprite,) = loaded["plain"]["bar"]
    assert sprite.picture.size == (128, 50)
    assert sprite.picture.getpixel((127, 49)) == (200, 100, 0, 255)


def test_crop_is_tight():
    picture = Image.new("RGBA", (256, 256))
    picture.paste((10, 20, 30, 255), (30, 100, 230, 200))
    sprite, size = fetch.crop(picture)
    assert size == (64, 128)
    assert sprite.shape == (128, 128, 4)
    assert (sprite[:64, :, 3] == 255).all()
    assert not sprite[64:].any()


def test_classes_are_distinct():
    assert len(set(fetch.CLASSES.values())) == len(fetch.CLASSES) == 50
    assert all(re.fullmatch("[a-z]+", name) for name in fetch.CLASSES)


def test_missing_npm_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="`npm` is needed"):
        fetch.fetch_package("some-package@1.0.0", tmp_path)


def test_failing_npm_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: "false")
    with pytest.raises(RuntimeError, match="npm pack some-package@1.0.0"):
        fetch.fetch_package("some-package@1.0.0", tmp_path)


def test_kept_packages_need_no_npm(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    tarball = tmp_path / "emojibase-data-17.0.0.tgz"
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"label": "red apple"}]))
    with tarfile.open(tarball, "w:gz") as archive:
        archive.add(data, "package/en/data.json")
    assert fetch.read_labels(tmp_path) == ["red apple"]


def test_special_pieces(tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in range(5)]
    assert pieces == ["<pad>", "<eos>", "<bos>", "<unk>", "\n"]
    assert tokenizer.pad_id() == 0
    assert tokenizer.eos_id() == 1
    assert tokenizer.bos_id() == 2
    assert tokenizer.unk_id() == 3


def test_location_and_segment_pieces_are_last(tokenizer):
    assert tokenizer.get_piece_size() == 2048
    locations = [f"<loc{i:04d}>" for i in range(1024)]
    segments = [f"<seg{i:03d}>" for i in range(128)]
    assert tokenizer.encode("".join(locations + segments)) == list(
        range(896, 2048)
    )


@pytest.mark.parametrize("name", fetch.CLASSES)
def test_class_names_are_single_pieces(tokenizer, name):
    assert len(tokenizer.encode(name)) == 1
    assert len(tokenizer.encode(f" {name}")) == 1


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("caption en\n", ["caption", "▁en", "\n"]),
        ("detect cat\n", ["detect", "▁cat", "\n"]),
        (
            "answer en how many owl?\n",
            ["answer", "▁en", "▁how", "▁many", "▁owl", "?", "\n"],
        ),
        (
            "<loc0001> cat ; <loc0002> cat",
            ["<loc0001>", "▁cat", "▁;", "▁", "<loc0002>", "▁cat"],
        ),
    ],
)
def test_pieces_of_the_tasks(tokenizer, text, pieces):
    assert tokenizer.encode(text, out_type=str) == pieces


@pytest.mark.parametrize(
    "text",
    ["  two  spaces ", "Grüße, 漢字 and 🙂!", "line\nline\n\n", "year 2024"],
)
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id() not in ids
    assert tokenizer.decode(ids) == text


def test_digits_are_split(tokenizer):
    assert tokenizer.encode("123", out_type=str) == ["1", "2", "3"]


def test_perfect_and_useless_models(sprites, font):
    answers = {}
    sprites = variants.with_codes(sprites)
    group = evaluate.Group(STYLES, ["boot", "knot"], ["a font"])
    for measure in evaluate.MEASURES:
        for example in evaluate.held_out_scenes(
            sprites, CLASSES, group, measure, seed=0, count=8
        ):
            key = example["image"].tobytes(), example["prompt"]
            answers[key] = example["response"]

    def perfect(inputs, max_new_tokens):
        return [
            answers[image.tobytes(), prompt]
            for image, prompt in zip(
                inputs["images"], inputs["prompts"], strict=True
            )
        ]

    def useless(inputs, max_new_tokens):
        return ["<loc0001> ; nothing" for _ in inputs["prompts"]]

    groups = {"all": group}
    good, bad = (
        evaluate.evaluate(
            generate,
            sprites,
            CLASSES,
            groups,
            count=8,
            measures=list(evaluate.MEASURES),
        )["all"]
        for generate in (perfect, useless)
    )
    # The codec was not trained on ellipses, and is a little less accurate on
    # them.
    assert good.pop("segment iou") > 0.8
    overlaps = {key: good.pop(key) for key in list(good) if "iou" in key}
    assert len(overlaps) == 5 and min(overlaps.values()) > 0.98
    assert set(good.values()) == {1.0}
    assert set(bad.values()) == {0.0}


def test_a_mask_in_another_place_is_wrong():
    mask = np.ones((20, 30), bool)
    placed = scenes.Placed("cat", (10, 10, 30, 40), mask=mask)
    example = {
        "image": np.zeros((112, 112, 3), "uint8"),
        "prompt": "segment cat",
        "objects": [placed],
        "task": "segment",
    }
    codes = "".join("<seg000>" for _ in range(16))
    box = scenes.location_tokens((60, 60, 90, 90), 112)
    assert evaluate.score(example, f"{box}{codes} cat") == {"iou": [0.0]}
    assert evaluate.score(example, f"{box}<seg000> cat") == {"iou": [0.0]}


def test_a_box_on_another_object_is_not_right():
    objects = [
        scenes.Placed("cat", (0, 0, 40, 40)),
        scenes.Placed("dog", (60, 60, 100, 100)),
    ]
    example = {
        "image": np.zeros((112, 112, 3), "uint8"),
        "prompt": "detect dog ; cat",
        "response": "",
        "objects": objects,
        "task": "detect_several",
    }
    dog, cat = (scenes.location_tokens(o.box, 112) for o in objects[::-1])
    example["response"] = f"{dog} dog ; {cat} cat"
    right = evaluate.score(example, f"{dog} dog ; {cat} cat")
    assert right["right"] == [1.0, 1.0] and right["labels"] == [1.0]
    assert min(right["iou"]) > 0.98
    swapped = evaluate.score(example, f"{cat} cat ; {cat} dog")
    assert swapped["right"] == [0.0, 1.0] and swapped["labels"] == [0.0]


def test_boxes_are_matched_once():
    box = [0, 0, 10, 10]
    assert evaluate.match_boxes([box, box], [box]) == [1.0, 0.0]


def test_boxes_of_other_classes_do_not_count():
    text = "<loc0000><loc0000><loc1023><loc1023> cat ; <loc0000> dog"
    assert evaluate.read_boxes(text, "cat", 112) == [[0, 0, 112, 112]]
    assert evaluate.read_boxes(text, "dog", 112) == []


def test_the_card_and_its_sheet(sprites, monkeypatch):
    monkeypatch.setattr(card, "CLASSES", dict.fromkeys(CLASSES))
    answers = iter(["a gem", "1 of them"])

    def generate(inputs, max_new_tokens):
        return [next(answers, "") for _ in inputs["prompts"]]

    monkeypatch.setattr(card, "SHOWN", {"caption": 1, "count": 1})
    model = SimpleNamespace(generate=generate)
    picture = card.sheet(model, sprites, evaluate.Group(STYLES))
    assert picture.size == (2 * 456 + 8, 508)
    scores = {"trained": {"several iou": 0.5}, "held-out": {"several iou": 0.2}}
    assert card.table(scores) == "| several labels: mean IoU | 0.500 | 0.200 |"
