"""Data sets made by the libraries themselves, read into batches."""

import numpy as np
import pytest
from PIL import Image

from keras_paligemma import PaliGemmaCausalLMPreprocessor
from keras_paligemma import PaliGemmaImageConverter
from keras_paligemma import PaliGemmaTokenizer
from keras_paligemma.data import Batches
from keras_paligemma.data import ExampleError
from keras_paligemma.data import FieldSource
from tests.helpers.text_models import TOKENIZER
from tests.helpers.tiny_models import IMAGE_SIZE

COLOURS = [(250, 20, 30), (40, 240, 50), (60, 70, 230), (90, 80, 70)]
QUESTIONS = ["how many cat?", "how many dog?", "how many owl?", "what?"]
ANSWERS = [["1", "one"], ["2"], ["3", "three", "a few"], ["tree"]]


def pixels(number):
    """Return a picture of one colour, which every format preserves."""
    return np.full((20 + number, 30, 3), COLOURS[number], "uint8")


def batches_of(dataset):
    """Return the batches of a data set of images, questions and answers."""
    source = FieldSource(
        dataset,
        images="image",
        prompts="answer en {question}",
        responses="answers",
    )
    preprocessor = PaliGemmaCausalLMPreprocessor(
        PaliGemmaTokenizer(TOKENIZER.read_bytes()),
        PaliGemmaImageConverter(IMAGE_SIZE),
        prompt_length=16,
        response_length=6,
    )
    return source, Batches(source, preprocessor, 2, shuffle=False, epochs=1)


def assert_read(dataset):
    """Compare with the same examples as a list of dictionaries."""
    source, found = batches_of(dataset)
    _, wanted = batches_of(
        [
            {"image": pixels(n), "question": QUESTIONS[n], "answers": answers}
            for n, answers in enumerate(ANSWERS)
        ]
    )
    assert len(source) == 4
    assert source[2]["responses"] == ANSWERS[2]
    assert source[3]["prompts"] == "answer en what?"
    pairs = list(zip(found, wanted, strict=True))
    assert len(pairs) == 2
    for (x, y, weights), (x_of_list, y_of_list, weights_of_list) in pairs:
        assert x.keys() == x_of_list.keys()
        for key, value in x.items():
            np.testing.assert_array_equal(value, x_of_list[key], key)
        np.testing.assert_array_equal(y, y_of_list)
        np.testing.assert_array_equal(weights, weights_of_list)
    with pytest.raises(ExampleError, match="no field 'picture'"):
        FieldSource(dataset, images="picture", responses="answers")[0]


def test_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [Image.fromarray(pixels(number)) for number in range(4)],
        "question": QUESTIONS,
        "answers": ANSWERS,
    }
    dataset = datasets.Dataset.from_dict(rows).cast_column(
        "image", datasets.Image()
    )
    assert_read(dataset)
    # From disk, where a data set may be larger than memory.
    dataset.save_to_disk(tmp_path / "saved")
    assert_read(datasets.load_from_disk(tmp_path / "saved"))
    with pytest.raises(ValueError, match="by number.*streaming"):
        FieldSource(dataset.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"one of them.*\['train'\]"):
        FieldSource(datasets.DatasetDict({"train": dataset}))


def test_tensorflow_datasets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Questions(tfds.core.GeneratorBasedBuilder):
        """A local builder that downloads nothing."""

        # For a module within a package it imports `importlib_resources`, which
        # it does not require.
        __module__ = "builders"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(),
                        "question": tfds.features.Text(),
                        "answers": tfds.features.Sequence(tfds.features.Text()),
                    }
                ),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number, answers in enumerate(ANSWERS):
                yield (
                    number,
                    {
                        "image": pixels(number),
                        "question": QUESTIONS[number],
                        "answers": answers,
                    },
                )

    builder = Questions(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = builder.as_data_source(split="train")
    assert_read(source)
