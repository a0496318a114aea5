"""The examples in docstrings run."""

import pathlib
import re
import shutil
import textwrap

import numpy as np
import pytest
from PIL import Image

from keras_paligemma.preprocessing import image_converter
from keras_paligemma.preprocessing import preprocessor
from keras_paligemma.preprocessing import tokenizer

TOY = pathlib.Path(__file__).parents[1] / "golden" / "toy_sp.model"


@pytest.mark.parametrize(
    "documented",
    [
        image_converter.PaliGemmaImageConverter,
        preprocessor.PaliGemmaCausalLMPreprocessor,
        tokenizer.PaliGemmaTokenizer,
        tokenizer.append_location_and_segment_pieces,
    ],
)
def test_classes(documented, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A toy model: the published tokenizers may not be redistributed.
    for name in ("paligemma_tokenizer.model", "tokenizer.model"):
        shutil.copy(TOY, name)
    for name in ("cat.jpg", "dog.png", "a.jpg", "b.jpg"):
        Image.fromarray(np.zeros((8, 9, 3), "uint8")).save(name)
    (example,) = re.findall(r"```python\n(.*?)```", documented.__doc__, re.S)
    names = {
        **vars(image_converter),
        **vars(tokenizer),
        **vars(preprocessor),
    }
    exec(textwrap.dedent(example), names)
