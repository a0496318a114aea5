"""Fields of published data sets: fakes with the same dtypes and nesting.

The features are those of the original's TensorFlow Datasets builders and of
Hugging Face's data sets. The builders of NLVR2, MaRVL and OCR-VQA are not
public, so their features are those that the original's transfers name. The
values are synthetic.
"""

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds

from keras_paligemma.evaluation import benchmarks
from keras_paligemma.evaluation import find_benchmark
from keras_paligemma.evaluation import open_samples
from keras_paligemma.evaluation import training_samples
from keras_paligemma.evaluation.pictures import pick_frames
from keras_paligemma.evaluation.records import at_path
from keras_paligemma.evaluation.truth import truth_columns
from keras_paligemma.preprocessing.images import read_image

TEXT, INT, LONG = tfds.features.Text(), np.int32, np.int64
PICTURE = tfds.features.Image(encoding_format="png")
TEXTS = tfds.features.Sequence(TEXT)
REMOTE = {
    **{"question_id": INT, "filename": TEXT, "image": PICTURE},
    **{"question": TEXT, "question_type": TEXT},
    **{"answers": TEXTS, "raw_answers": TEXTS},
}
CAPTIONED = {"image_filepath": TEXT, "image": PICTURE, "texts": TEXTS}
DOCUMENT = {"question_id": INT, "filename": TEXT, "image": PICTURE}
DOCUMENT |= {"question": TEXT, "answers": TEXTS}
A_OKVQA = {
    **{"image": PICTURE, "image_id": LONG, "direct_answers": TEXTS},
    "direct_answer_is_difficult": np.bool_,
    "multiple_choice_possible_answers": TEXTS,
    "multiple_choice_correct_idx": INT,
    **{"answer_rationales": TEXTS, "question": TEXT, "question_id": TEXT},
}
TWO = {"example_id": TEXT, "image_left": PICTURE, "image_right": PICTURE}
TWO |= {"sentence": TEXT, "label": TEXT}
SPOKEN = {"image/id": TEXT, "image": PICTURE, "captions": TEXTS}
CHART = {"question_id": INT, "image/filename": TEXT, "image": PICTURE}
CHART |= {"question": TEXT, "answer": TEXT}

# By the names of the registry.
FEATURES = {
    "ai2d": {
        **{"id": TEXT, "question": TEXT, "label": INT, "answer": TEXT},
        **{"possible_answers": TEXTS, "abc_label": np.bool_},
        **{"image_name": TEXT, "image": PICTURE},
    },
    "aokvqa": A_OKVQA,
    "chartqa/augmented": CHART,
    "chartqa/human": CHART,
    "coco35l": SPOKEN | {"language": TEXT},
    "coco_captions": {
        **{"image": PICTURE, "image/filename": TEXT, "image/id": LONG},
        "captions": tfds.features.Sequence({"id": LONG, "text": TEXT}),
    },
    "countbenchqa": {
        **{"image": PICTURE, "image_id": INT, "question": TEXT},
        **{"text": TEXT, "image_url": TEXT, "number": INT},
    },
    "docvqa": DOCUMENT,
    "gqa": {
        **{"example_id": LONG, "image/id": TEXT, "image": PICTURE},
        **{"question": TEXT, "answer": TEXT, "full_answer": TEXT},
        "is_balanced": np.bool_,
    },
    "infovqa": DOCUMENT,
    "marvl": TWO,
    "nlvr2": TWO,
    "nocaps": CAPTIONED | {"image/id": LONG, "url": TEXT},
    "ocrvqa_id": {
        **{"int_id": INT, "image": PICTURE, "question": TEXT, "answer": TEXT}
    },
    "okvqa": {
        **{"image": PICTURE, "image_id": LONG, "answer_type": TEXT},
        **{"answers": TEXTS, "question": TEXT, "question_id": LONG},
    },
    "rsvqa_hr/nonum": REMOTE,
    "rsvqa_lr/nonum": REMOTE,
    "science_qa": {
        **{"question": TEXT, "choices": TEXTS, "answer": INT, "hint": TEXT},
        **{"image": PICTURE, "indexed_choices": TEXT, "indexed_answer": TEXT},
    },
    "scicap/first_sentence_subfig_no": {
        **{"image/id": TEXT, "image": PICTURE},
        "caption/lowercase_and_token_and_remove_figure_index": TEXT,
    },
    "screen2_words": {"image/id": INT, "image": PICTURE, "summary": TEXTS},
    "stvqa": DOCUMENT,
    "tallyqa": {
        **{"image": PICTURE, "image_id": INT, "image_source": TEXT},
        **{"question": TEXT, "question_id": INT, "answer": INT},
        "issimple": INT,
    },
    "text_caps": CAPTIONED | {"image/id": TEXT},
    "textvqa": {
        **{"image/id": INT, "image_filepath": TEXT, "image": PICTURE},
        **{"question_id": INT, "question": TEXT, "answers": TEXTS},
    },
    "vizwizvqa": {
        **{"question": TEXT, "image/filename": TEXT, "image": PICTURE},
        **{"answers": TEXTS, "answerable": INT, "question_id": INT},
    },
    "vqa": {
        **{"image/id": INT, "image": PICTURE, "question_id": INT},
        **{"question_text": TEXT, "answer_type": TEXT, "answers": TEXTS},
    },
    "widgetcap": {
        **{"image/id": TEXT, "image": PICTURE, "texts": TEXTS},
        "bbox": tfds.features.BBoxFeature(),
    },
    "xgqa": {
        **{"example_id": TEXT, "image/id": TEXT, "image": PICTURE},
        **{"question": TEXT, "answer": TEXT},
    },
    "xm3600": SPOKEN | {"captions/tokenized": TEXTS, "language": TEXT},
}
VALUES = {"answer_type": b"other", "question_type": b"comp"}


def fake(feature, name, number, languages=("en",)):
    """Return a value as `tfds.data_source` gives it."""
    if isinstance(feature, dict):
        return {k: fake(v, k, number, languages) for k, v in feature.items()}
    if isinstance(feature, tfds.features.Sequence):
        if isinstance(feature.feature, tfds.features.FeaturesDict):
            inner = {"id": np.array([1, 2]), "text": [b"a cat", b"cats"]}
            return inner
        return np.array([b"yes"] * (10 if "answers" in name else 3), object)
    if isinstance(feature, tfds.features.Image):
        return np.full((6, 8, 3), number, "uint8")
    if isinstance(feature, tfds.features.BBoxFeature):
        return np.array([0.1, 0.2, 0.5, 0.6], "float32")
    if isinstance(feature, tfds.features.Text):
        language = languages[number % len(languages)].encode()
        text = VALUES.get(name, b"text %d" % number)
        return language if name == "language" else text
    return np.dtype(feature).type(number % 2)


def distinct(example, path, number):
    """Set an example's own id, as in published data sets."""
    old = example[path]
    text = b"%d" % number
    return example | {
        path: text if isinstance(old, bytes) else type(old)(number)
    }


@pytest.mark.parametrize(
    "benchmark",
    [benchmark for benchmark in benchmarks().values() if benchmark.tfds],
    ids=lambda one: one.name,
)
def test_features_of_the_original(benchmark):
    features = FEATURES[benchmark.tfds]
    languages = benchmark.languages or ("en",)
    count = max(3, len(languages))
    examples = [fake(features, "", n, languages) for n in range(count)]
    id = benchmark.fields.get("id")
    if id is not None:
        examples = [
            distinct(example, id, n) for n, example in enumerate(examples)
        ]
    samples = open_samples(benchmark, examples)
    if benchmark.average_over and "language" not in benchmark.fields:
        with pytest.raises(ValueError, match="each 'language', which samples"):
            truth_columns(benchmark, samples)
    else:
        truth_columns(benchmark, samples)
    assert samples.ids == [str(number) for number in range(count)]
    sample = samples[1]
    assert "{" not in sample.prompt and "b'" not in sample.prompt
    answers = sample.truth.get("answers", ["text"])
    assert all(isinstance(a, str) for a in np.ravel(answers))
    pictures = sample.images
    pictures = pictures if isinstance(pictures, list) else [pictures]
    assert len(pictures) == benchmark.pictures
    if benchmark.name == "widgetcap":
        assert (np.asarray(pictures[0]) == (255, 0, 0)).all(-1).any()
    else:
        assert pictures[0].shape == (6, 8, 3)


def test_every_name_has_its_features():
    assert {benchmark.tfds for benchmark in benchmarks().values()} - {
        None
    } == set(FEATURES)


def test_languages_in_memory_are_those_of_the_benchmark():
    features = FEATURES["xm3600"]
    examples = [fake(features, "", n, ("en", "de")) for n in range(4)]
    examples = [
        distinct(each, "image/id", n) for n, each in enumerate(examples)
    ]
    english = open_samples(find_benchmark("xm3600_en"), examples)
    assert english.ids == ["0", "2"]
    assert english.truth(1)["language"] == "en"
    with pytest.raises(ValueError, match=r"list lacks .*Missing: \['ar', 'bn'"):
        open_samples(find_benchmark("xm3600"), examples)


def test_multiple_choice_answers_with_the_text_of_the_choice():
    example = fake(A_OKVQA, "", 1)
    example["multiple_choice_possible_answers"] = np.array([b"a", b"b", b"c"])
    sample = open_samples(find_benchmark("aokvqa_mc"), [example])[0]
    assert sample.truth["answers"] == "b"
    assert sample.prompt == "answer en  text 1 choose from: a \t b \t c"


def test_hugging_face_from_disk(tmp_path):
    picture = np.zeros((6, 8, 3), "uint8")
    made = datasets.Dataset.from_dict(
        {
            "example_id": ["test_1", "test_2"],
            "image": [picture, picture],
            "description": ["A cat. It sits.", "A dog."],
        },
        features=datasets.Features(
            {
                "example_id": datasets.Value("string"),
                "image": datasets.Image(),
                "description": datasets.Value("string"),
            }
        ),
    )
    made.save_to_disk(tmp_path / "docci")
    docci = find_benchmark("docci")
    for source in (tmp_path / "docci", made):
        samples = open_samples(docci, source)
        assert samples.ids == ["test_1", "test_2"]
        assert samples[0].truth["descriptions"] == "A cat. It sits."
        assert isinstance(samples[0].images, bytes)
        assert read_image(samples[0].images).shape == (6, 8, 3)
        with pytest.raises(ValueError, match="one split.*Received: 'dev'"):
            open_samples(docci, source, "dev")
    with pytest.raises(ValueError, match="Received: dict"):
        open_samples(docci, {"test": made})


def test_labels_become_words():
    example = {"image": "1.jpg", "caption": "The cat is on it.", "label": 1}
    # A picture has several captions.
    samples = open_samples(find_benchmark("vsr_random"), [example] * 2)
    assert samples.ids == ["0", "1"]
    sample = samples[0]
    assert sample.truth["answers"] == "true"
    assert sample.prompt == "answer en The cat is on it."


@pytest.mark.parametrize("name", ["nlvr2", "marvl"])
@pytest.mark.parametrize("label", [True, "True", 1])
def test_labels_of_pairs_are_the_words_of_nlvr2(name, label):
    """MaRVL's official files have true and false, NLVR2's the words."""
    example = {"example_id": "1", "image_left": "1", "image_right": "2"}
    example |= {"sentence": "One.", "label": label}
    samples = open_samples(find_benchmark(name), [example])
    assert samples.truth(0)["answers"] == "True"
    no = [example | {"label": False}]
    assert open_samples(find_benchmark(name), no).truth(0)["answers"] == "False"


def test_paths():
    listed = {"a": [{"b": [b"x"]}, {"b": [b"y"]}]}
    assert at_path(listed, "a.b") == [["x"], ["y"]]
    nested = {"caption": {"string": np.array([b"x", b"y"])}}
    assert at_path(nested, "caption/string") == ["x", "y"]
    # A whole name may hold a slash, and a value may be of several fields.
    assert at_path({"a/b": {"c": {"d": 1}}}, "a/b.c") == {"d": 1}
    with pytest.raises(
        ValueError, match=r"no field 'c'. Expected: one of \['a"
    ):
        at_path(listed, "c")


def test_frames(tmp_path):
    video = np.arange(7)[:, None, None, None] * np.ones((1, 2, 2, 3), "uint8")
    first = [int(frame[0, 0, 0]) for frame in pick_frames(video, 3, 3)]
    assert first == [0, 3, 6]
    # The original repeats frames of a short video in the same way.
    assert pick_frames(list("abcde"), 5, 2) == list("aceac")
    from PIL import Image

    frames = [Image.new("RGB", (4, 4), (60 * n, 0, 0)) for n in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    found = pick_frames(tmp_path / "x.gif", 2, 2)
    assert [picture.getpixel((0, 0))[0] // 60 for picture in found] == [
        0,
        2,
    ]
    (tmp_path / "film.mp4").write_bytes(b"film")
    with pytest.raises(ValueError, match="ffmpeg"):
        pick_frames(tmp_path / "film.mp4", 2, 2)
    with pytest.raises(ValueError, match="no frames"):
        pick_frames([], 2, 2)


def test_both_kinds_of_charts_are_learned_from(tmp_path, monkeypatch):
    """Each is a data set of its own, whose ids begin at 0."""
    rows = {"chartqa/human": 2, "chartqa/augmented": 3}

    def read(name, split, **options):
        assert split == "train"
        return [
            distinct(fake(CHART, "", n), "question_id", n)
            | {"question": f"{name} {n}?".encode()}
            for n in range(rows[name])
        ]

    monkeypatch.setattr(tfds, "data_source", read)
    (tmp_path / "chartqa").mkdir()
    samples = training_samples(find_benchmark("chartqa_human"), tmp_path)
    assert [samples.unopened(n).prompt for n in range(len(samples))] == [
        *(f"chartqa/human {n}?" for n in range(2)),
        *(f"chartqa/augmented {n}?" for n in range(3)),
    ]


def test_captions_are_learned_from_karpathys_restval_too(tmp_path, monkeypatch):
    def read(name, split, **options):
        example = fake(FEATURES[name], "", 0)
        return [
            distinct(example, "image/id", n)
            for n, _ in enumerate(split.split("+"))
        ]

    monkeypatch.setattr(tfds, "data_source", read)
    (tmp_path / "coco_captions").mkdir()
    benchmark = find_benchmark("coco_captions")
    assert len(training_samples(benchmark, tmp_path)) == 2
    assert len(open_samples(benchmark, tmp_path)) == 1


def test_tensorflow_datasets_from_disk(tmp_path):
    """TensorFlow Datasets itself writes and reads a set of two languages."""

    class Xgqa(tfds.core.GeneratorBasedBuilder):
        """Synthetic questions."""

        # For a module within a package it imports `importlib_resources`, which
        # it does not require.
        __module__ = "builders"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(FEATURES["xgqa"]),
            )

        def _split_generators(self, manager):
            codes = find_benchmark("xgqa").languages
            return {
                f"test_zs_{code}": self._generate_examples(code)
                for code in codes
            }

        def _generate_examples(self, language):
            yield (
                language,
                {
                    **{"example_id": f"1_{language}", "image/id": "1"},
                    "image": np.full((6, 8, 3), 9, "uint8"),
                    **{"question": f"In {language}?", "answer": "yes"},
                },
            )

    builder = Xgqa(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    samples = open_samples(find_benchmark("xgqa"), tmp_path)
    assert len(samples) == 7
    assert samples[1].prompt == "answer en In de?"
    assert samples[1].truth["language"] == "de"
    assert isinstance(samples[1].images, bytes)
    assert read_image(samples[1].images).shape == (6, 8, 3)
    assert samples.first(2).ids == ["1_bn", "1_de"]
    both = open_samples(
        find_benchmark("xgqa"), tmp_path, "test_zs_bn+test_zs_de"
    )
    assert both.ids == ["1_bn", "1_de"]
