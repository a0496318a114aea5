"""Metrics without golden numbers, compared with other implementations."""

import csv
import random

import numpy as np
import pytest

from keras_paligemma import metrics
from keras_paligemma.metrics.caption_tokens import caption_tokens
from keras_paligemma.metrics.kern import symbols
from keras_paligemma.metrics.referring import box_iou
from keras_paligemma.tasks.objects import Object
from tests.helpers.random_answers import captions_for
from tests.helpers.random_answers import objects_for
from tests.helpers.tiny_models import GOLDEN


def test_captions_equal_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found, right = captions_for(0)
    scores = metrics.captions(found, right, tokenize=False)
    values = scores.values()
    truth = dict(enumerate(right))
    answers = {row: [text] for row, text in enumerate(found)}
    cider, each = Cider().compute_score(truth, answers)
    np.testing.assert_allclose(values["cider"], cider, rtol=1e-12)
    np.testing.assert_allclose(scores.columns["cider"], each, atol=1e-12)
    rouge, each = Rouge().compute_score(truth, answers)
    assert values["rouge"] == pytest.approx(rouge, abs=1e-12)
    np.testing.assert_array_equal(scores.columns["rouge"], each)
    bleu, _ = Bleu(4).compute_score(truth, answers, verbose=0)
    assert [values[f"bleu-{n}"] for n in (1, 2, 3, 4)] == bleu
    for function in (metrics.cider, metrics.bleu, metrics.rouge):
        alone = function(found, right, tokenize=False).values()
        assert alone == {name: values[name] for name in alone}


def test_captions_that_share_no_words():
    """The last words are the predictions', the last reference is empty."""
    values = metrics.captions(["two owls", ""], [["a cat", ""], ["a dog"]])
    assert set(values.columns["cider"]) == set(values.columns["rouge"]) == {0}
    assert metrics.rouge([""], [["a", ""]]).values() == {"rouge": 1}
    # Without any 4-gram, and without any word.
    for text in ("a", ""):
        values = metrics.captions([text], [[text]]).values()
        assert (values["cider"], values["rouge"]) == (0, 1)


def test_captions_are_tokenized_unless_they_are():
    found, right = ["A cat."], [["a cat"]]
    assert metrics.rouge(found, right).values() == {"rouge": 1}
    assert metrics.rouge(found, right, False).values() == {"rouge": 0}


def test_caption_tokens_are_javas():
    """Compare with the Java tokens in `caption_tokens.tsv`.

    stanford-corenlp 3.4.1 made them, as pycocoevalcap ships and runs it, from
    sentences written for this test. The last column is COCO's, after COCO's
    punctuation list is removed.
    """
    with open(GOLDEN / "caption_tokens.tsv", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    differing = [
        text
        for text, wanted in rows
        if " ".join(caption_tokens(text)) != wanted
    ]
    assert len(rows) == 41
    assert differing == [
        "1/2 cup, 3rd place, 5'11\" tall, 7 ft. wide, etc.",
        ":) ;-) <3",
        "Un chat est assis sur l'herbe d'à côté.",
    ]


def test_captions_of_letters_alone_follow_the_rules():
    assert caption_tokens("we cannot see.") == ["we", "can", "not", "see"]
    assert caption_tokens("seen by dr.") == ["seen", "by", "dr."]
    assert caption_tokens("seen by j.") == ["seen", "by", "j."]
    assert caption_tokens("plan a. is it an a.") == [
        *("plan", "a.", "is", "it", "an", "a"),
    ]
    assert caption_tokens("") == caption_tokens(".") == []


def test_anls_equals_the_package():
    from anls import anls_score

    found, right = captions_for(1, least=1)
    for text, several in zip(found, right, strict=True):
        ours = max(metrics.anls(answer, text) for answer in several)
        assert ours == pytest.approx(anls_score(text, several), abs=1e-12)


def test_error_rates_equal_jiwer():
    import jiwer

    draw = random.Random(2)
    notes = "4c 8d 16e- [2f# .".split()

    def score():
        return "\n".join("\t".join(draw.choices(notes, k=2)) for _ in range(6))

    right = [score() for _ in range(8)]
    found = [
        text.replace("4c", "8d", 2).replace("\t", " ", 1) for text in right
    ]
    values = metrics.music(found, right).values()
    assert values["cer_characters"] == pytest.approx(
        jiwer.cer(right, found), abs=1e-12
    )
    joined = [
        [" ".join(symbols(text)) for text in texts] for texts in (right, found)
    ]
    assert values["ser"] == pytest.approx(jiwer.wer(*joined), abs=1e-12)
    lines = [
        [
            text.replace(" ", "_").replace("\t", "|").replace("\n", " ")
            for text in texts
        ]
        for texts in (right, found)
    ]
    assert values["ler"] == pytest.approx(jiwer.wer(*lines), abs=1e-12)


def test_published_character_rate_splits_marks_alone():
    scores = metrics.music(["16c\t4e"], ["16c\t4d"])
    values = scores.values()
    # "16c", "<", "t", ">", "4d": one of five symbols is wrong.
    assert values["cer"] == 1 / 5
    assert values["ser"] == 1 / 3
    assert values["ler"] == 1
    assert values["cer_characters"] == 1 / 6
    assert scores.quality.tolist() == [-1 / 3]


CELLS = (
    "<tr><td>a</td><td>b</td></tr><tr><td colspan='2'>wide</td></tr>",
    "<tr><td>a</td><td>c</td></tr><tr><td>wide</td><td></td></tr>",
    "<thead><tr><td><b>a</b></td></tr></thead><tbody><tr><td>b</td></tr></tbody>",
    "<tr><td>a</td></tr>",
    "<tr><td></td><td>b</td></tr>",
    "<tr>\n<td>é<!-- two --><b>a</b> or b</td>\n<td></td>\n</tr>",
)


def page(cells):
    return f"<html><body><table>{cells}</table></body></html>"


@pytest.mark.parametrize("structure_only", [False, True])
def test_teds_has_the_edits_of_the_package(structure_only):
    from table_recognition_metric import TEDS

    other = TEDS(structure_only=structure_only)
    for cells in CELLS:
        for two in CELLS:
            ours = metrics.teds(page(cells), page(two), structure_only)
            # The package divides by the number of tree nodes, PubTabNet by the
            # number of elements.
            nodes = max(text.count("<t") + 1 for text in (cells, two))
            elements = max(
                text.count("<t") + text.count("<b>") for text in (cells, two)
            )
            edits = (1 - other(page(cells), page(two))) * nodes
            assert ours == pytest.approx(1 - edits / elements, abs=1e-12)


def test_tables():
    from grits import grits_con
    from grits import grits_top
    from grits import html_to_grids

    found, right = [page(cells) for cells in CELLS[:3]], [page(CELLS[0])] * 3
    values = metrics.tables([*found, "no table"], [*right, right[0]]).values()
    for name, compare in (("top", grits_top), ("con", grits_con)):
        each = [
            compare(html_to_grids(b)[name], html_to_grids(a)[name])[0]
            for a, b in zip(found, right, strict=True)
        ]
        assert values[f"grits_{name}"] == sum(each) / 4
    assert values["teds"] < values["s_teds"] < 1
    # An answer that is no good table costs its own score alone.
    odd = "<table><tr><td colspan='100%' rowspan=''>\ud8001</td></tr></table>"
    worse = metrics.tables([*found, odd], [*right, right[0]]).values()
    assert 0 < worse["teds"] < 1
    cut = metrics.tables([*found, "<!--<body>"], [*right, right[0]])
    assert cut.values() == values
    bare = CELLS[0].join(["<table>", "</table>"])
    assert set(metrics.tables([bare], right[:1]).values().values()) == {1.0}
    none = metrics.tables(["no table"], right[:1]).values()
    assert set(none.values()) == {0} and metrics.teds(bare, "no table") == 0
    assert metrics.teds(page(""), page("")) == 1
    assert metrics.teds(f"<body>{bare}", right[0]) == 1


def test_smiles():
    scores = metrics.smiles(
        ["OCC", "c1ccccc1", "C[C@H](N)O", "none", "", "CCO it is"],
        ["CCO", "C1=CC=CC=C1", "C[C@@H](N)O", "C", "C", "CCO"],
    )
    assert scores.columns["full_match"].tolist() == [1, 1, 0, 0, 0, 0]
    assert scores.columns["valid"].tolist() == [1, 1, 1, 0, 0, 0]
    assert scores.columns["exact"].sum() == 0
    # Half of a character, as a model may write it.
    assert metrics.smiles(["C\ud800"], ["C"]).values()["valid"] == 0
    with pytest.raises(ValueError, match="row 1 is no SMILES"):
        metrics.smiles(["C", "C"], ["C", "what"])
    with pytest.raises(ValueError, match="molecules.*None"):
        metrics.smiles(["C"], [None])


def test_mean_average_precision_equals_faster_coco_eval():
    from faster_coco_eval import COCO
    from faster_coco_eval import COCOeval_faster

    found, right = objects_for(0)
    sizes = [(480, 640)] * 10
    ours = metrics.mean_average_precision(found, right, sizes)

    def xywh(box):
        y1, x1, y2, x2 = (
            e * s for e, s in zip(box, (480, 640) * 2, strict=True)
        )
        return [x1, y1, x2 - x1, y2 - y1]

    ids = {"cat": 1, "dog": 2}
    annotations = [
        {"image_id": image, "category_id": ids[name], "bbox": xywh(box)}
        for image, some in enumerate(right)
        for box, name in some
    ]
    for number, annotation in enumerate(annotations, 1):
        area = annotation["bbox"][2] * annotation["bbox"][3]
        annotation |= {"id": number, "area": area, "iscrowd": 0}
    data = COCO(
        {
            "images": [
                {"id": n, "height": 480, "width": 640} for n in range(10)
            ],
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
            "annotations": annotations,
        }
    )
    results = data.loadRes(
        [
            {
                "image_id": image,
                "category_id": ids[name],
                "bbox": xywh(box),
                "score": score,
            }
            for image, some in enumerate(found)
            for box, name, score in some
        ]
    )
    other = COCOeval_faster(data, results, "bbox", print_function=str)
    other.run()
    np.testing.assert_allclose(list(ours.values()), other.stats[:12], atol=1e-9)
    assert 0.1 < ours["map"] < ours["map_50"] < 1


def test_mean_average_precision_of_few():
    box = (0.1, 0.1, 0.5, 0.5)
    compute = metrics.mean_average_precision
    values = compute([[]], [[(box, "cat")]])
    assert (values["map"], values["map_large"], values["map_small"]) == (
        0,
        0,
        -1,
    )
    assert set(compute([[]], [[]]).values()) == {-1}
    assert compute([[(box, "cat", 0.5)]], [[]])["map"] == -1
    # A crowd counts neither as a match nor as a miss.
    assert compute([[(box, "cat", 0.5)]], [[(box, "cat", True)]])["map"] == -1
    with pytest.raises(ValueError, match="Received: nan of 'cat' in picture 0"):
        compute([[(box, "cat", float("nan"))]], [[(box, "cat")]])
    with pytest.raises(ValueError, match="Received: None of 'cat'"):
        compute([[(box, "cat")]], [[(box, "cat")]])
    lost = (float("nan"), 0, 1, 1)
    for found, right in ((lost, box), (box, lost)):
        with pytest.raises(ValueError, match="four finite edges"):
            compute([[(found, "cat", 0.5)]], [[(right, "cat")]])
    # pycocotools ignores objects of negative area.
    for turned in ((0.5, 0.1, 0.1, 0.5), (0.1, 0.5, 0.5, 0.1)):
        with pytest.raises(ValueError, match="y1 <= y2.*Received: .0.[15], 0."):
            compute([[]], [[(turned, "cat")]])
    for function in (compute, metrics.box_f1):
        with pytest.raises(ValueError, match="1 of predictions, 2 of right"):
            function([[]], [[], []])
        with pytest.raises(ValueError, match="Expected: one or more"):
            function([], [])
    with pytest.raises(ValueError, match="1 of right ones, 2 sizes"):
        compute([[]], [[]], [(9, 9)] * 2)
    sizes = np.array([[20, 10]])
    found = compute([[(box, "cat", 0.5)]], [[(box, "cat")]], sizes)
    assert found["map_small"] == pytest.approx(1)


def test_objects_are_compared_as_tuples_are():
    """A score of an object that is right is not the mark of a crowd."""
    some = [[Object((0.1, 0.1, 0.5, 0.5), "cat", score=0.5)]]
    found = metrics.mean_average_precision(some, some)
    assert found["map"] == pytest.approx(1)
    assert metrics.box_f1(some, some).values()["f1"] == 1


def test_box_f1():
    left, right = (0, 0, 1, 0.5), (0, 0.5, 1, 1)
    scores = metrics.box_f1(
        [[(left, "cat"), (left, "cat"), (right, "dog")], []],
        [[(left, "cat"), (right, "cat")], [(left, "cat")]],
    )
    values = scores.values()
    assert values == {
        "precision": 1 / 3,
        "recall": 1 / 3,
        "f1": 1 / 3,
        "iou": 1.0,
    }
    assert scores.quality.tolist() == [2 / 5, 0]
    of_labels = metrics.box_f1([[(left, "cat")]], [[(left, "dog")]], 0.0)
    assert of_labels.values()["f1"] == 0
    half = [[((0, 0, 1, 1), "cat")]], [[(left, "cat")]]
    assert metrics.box_f1(*half, threshold=0.5).values()["f1"] == 1
    assert metrics.box_f1(*half, threshold=0.51).values()["f1"] == 0
    assert metrics.box_f1([[]], [[]]).quality.tolist() == [1]
    assert np.isnan(box_iou((0, 0, 0, 1), (0.5, 0.5, 0.5, 0.5)))


def test_refcoco_equals_the_original():
    """The original's loop gave these numbers for the tokens of `seg.npz`.

    The file includes its decoder's masks. Tokens without a mask are invalid.
    """
    golden = dict(np.load(GOLDEN / "seg.npz"))
    masks = dict(
        zip(
            map(tuple, golden["decode/indices"].tolist()),
            golden["decode/masks"],
            strict=True,
        )
    )
    # In the original, locations start at id 500 and codes at 1600; 1 ends an
    # answer.
    texts = [
        "".join(f"<loc{token - 500:04d}>" for token in row[:4])
        + "".join(f"<seg{token - 1600:03d}>" for token in row[4:20])
        for row in golden["eval/tokens"]
    ]
    mask = golden["eval/gt_mask"][..., 0] > 0
    scores = metrics.refcoco(
        texts,
        [golden["eval/gt_bbox"]] * 6,
        [mask] * 6,
        lambda codes: np.stack([masks[tuple(row)] for row in codes.tolist()]),
    )
    assert scores.columns["miou"].tolist() == [
        *(0.05366726296958855, 0.14955640050697086, 0.0),
        *(0.0, 0.0, 0.11467889908256881),
    ]
    assert scores.columns["invalid"].sum() == 3
    values = scores.values()
    assert values["miou"] == 0.052983760426521365
    assert values["boxacc/0.5"] == values["boxacc/0.75"] == 1 / 6


def test_refcoco_reads_run_lengths():
    from pycocotools import mask as codec

    mask = np.zeros((40, 60), bool)
    mask[10:30, 15:45] = True
    runs = codec.encode(np.asfortranarray(mask, "uint8"))
    text = "<loc0256><loc0256><loc0767><loc0767>" + "<seg000>" * 16

    def ones(codes):
        return np.ones((len(codes), 64, 64), "float32")

    scores = metrics.refcoco(
        [text, text + " and more", "<loc0001>" + text],
        [(0.25, 0.25, 0.75, 0.75)] * 3,
        [runs, mask, mask],
        ones,
    )
    each = scores.columns["miou"]
    assert each[0] == each[1] > 0.9
    assert each[2] == 0
    # Both edges of a box are in one row of pixels, or in one column; or they
    # are the wrong way round.
    for y2, x2 in ((257, 767), (767, 257), (256, 767), (0, 767), (767, 0)):
        edges = f"<loc0256><loc0256><loc{y2:04}><loc{x2:04}>"
        thin = edges + text[len(edges) :]
        scores = metrics.refcoco([thin], [(0, 0, 1, 1)], [mask], ones)
        values = scores.values()
        assert values["invalid"] == 1
        assert values["miou"] == values["boxacc/0.5"] == 0
    for odd, kind in (([[1, 1, 99, 1]], "list"), (mask[..., None], "40, 60,")):
        with pytest.raises(ValueError, match=f"{kind}.*`from_polygons`"):
            metrics.refcoco([text], [(0, 0, 1, 1)], [odd], ones)
    with pytest.raises(ValueError, match=r"shape \(1, 64, 64\).*\(0,\)"):
        metrics.refcoco([text], [(0, 0, 1, 1)], [mask], lambda codes: [])


def spotted(match_text=True):
    """Score words and boxes of two pictures.

    In the first, one word has a box, one a box with another text, one is
    unreadable, and one has no area, as its box has none. In the second, one
    word has two boxes and one beside it, and two words have one box.
    """

    def square(x):
        return [(x, 10), (x + 20, 10), (x + 20, 30), (x, 30)]

    def box(x, word):
        edges = (10 / 100, x / 200, 30 / 100, (x + 20) / 200)
        return (
            "".join(f"<loc{round(e * 1023):04d}>" for e in edges) + f" {word}"
        )

    flat, dot = [(0, 0), (9, 0), (5, 0)], "<loc0000>" * 4 + " dot"
    first = [box(20, "EXIT"), box(60, "open"), box(100, "blur"), dot]
    other = [box(20, "more"), box(60, "more"), box(20, "more"), box(9, "less")]
    return metrics.text_detection(
        [" ; ".join(first), " ; ".join(other)],
        [
            [square(20), square(61), square(101), flat],
            [square(20), square(9), square(9)],
        ],
        [["EXIT", "OPEN", "###", "dot"], ["more", "less", "less"]],
        [(100, 200), (100, 200)],
        match_text,
    ).values()


def test_text_detection():
    assert spotted() == {"precision": 3 / 7, "recall": 1 / 2, "f1": 6 / 13}
    assert spotted(False) == {"precision": 4 / 7, "recall": 2 / 3, "f1": 8 / 13}
    with pytest.raises(ValueError, match="three or more corners"):
        metrics.text_detection([""], [[[(0, 0), (1, 0)]]], [["a"]], [(9, 9)])
    with pytest.raises(ValueError, match="2 polygons and 1 texts"):
        metrics.text_detection(
            [""], [[[(0, 0), (1, 0), (1, 1)]] * 2], [["a"]], [(9, 9)]
        )


def test_description_lengths():
    texts = ['He said "stop." It is 3.5 m... Then', "One", ""]
    scores = metrics.description_lengths(texts)
    assert scores.columns["avg_sent"].tolist() == [3, 1, 0]
    assert scores.values()["avg_char"] == sum(map(len, texts)) / 3


def test_judged_says_what_to_bring():
    for name in ("radgraph_f1", "nes", "toxicity"):
        with pytest.raises(ValueError, match=f"{name} is decided.*judge"):
            metrics.judged(name, ["text"], ["right"])
    with pytest.raises(ValueError, match="returned 1 numbers. Expected: 2"):
        metrics.judged("nes", ["a", "b"], judge=lambda *_: [1])
    values = metrics.judged("nes", ["a", "b"], judge=lambda *_: [1, 0]).values()
    assert values == {"nes": 0.5}
