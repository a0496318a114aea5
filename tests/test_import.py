"""Importing the package is cheap, and its imports have one direction."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def run(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_is_lazy():
    heavy = run(
        "import sys, keras_paligemma;"
        "names = ('keras', 'keras_hub', 'tensorflow', 'jax', 'torch', 'numpy');"
        "print([name for name in names if name in sys.modules])"
    )
    assert heavy == "[]"


@pytest.mark.parametrize(
    "module",
    [
        "layers.stack",
        "checkpoints.big_vision",
        "checkpoints.keras_hub",
        "tasks.answers",
    ],
)
def test_ground_floor_needs_no_keras_hub(module):
    heavy = run(
        f"import sys, keras_paligemma.{module};"
        "names = ('keras_hub', 'tensorflow_text');"
        "print([name for name in names if name in sys.modules])"
    )
    assert heavy == "[]"


def test_keras_hub_finds_our_classes_once_the_package_is_imported():
    preset = Path(__file__).parents[1] / "presets" / "pali_gemma2_nano_112"
    found = run(
        "import keras_hub, keras_paligemma;"
        f"part = keras_hub.models.Tokenizer.from_preset({str(preset)!r});"
        "print(type(part) is keras_paligemma.PaliGemmaTokenizer)"
    )
    assert found == "True"


def test_data_needs_no_keras_before_it_reads():
    heavy = run(
        "import sys;"
        "from keras_paligemma.data import *;"
        "names = ('keras', 'tensorflow', 'jax', 'torch', 'grain',"
        " 'pycocotools');"
        "print([name for name in names if name in sys.modules], Batches)"
    )
    assert heavy.startswith("[]") and "Batches" in heavy


def test_metrics_and_benchmarks_need_no_keras():
    heavy = run(
        "import sys;"
        "from keras_paligemma import metrics, evaluation;"
        "metrics.vqav2, metrics.refcoco, metrics.captions, metrics.tables;"
        "evaluation.open_samples, evaluation.settings_of;"
        "names = ('keras', 'tensorflow', 'jax', 'torch', 'rdkit', 'shapely',"
        " 'lxml', 'rapidfuzz', 'pycocotools', 'datasets');"
        "print([name for name in names if name in sys.modules],"
        " len(evaluation.benchmarks()))"
    )
    assert heavy == "[] 58"


def test_names_are_listed_and_unknown_ones_refused():
    import keras_paligemma

    assert set(keras_paligemma.__all__) <= set(dir(keras_paligemma))
    for name in keras_paligemma.__all__:
        assert getattr(keras_paligemma, name) is not None
    with pytest.raises(AttributeError, match="PaliGemma3"):
        _ = keras_paligemma.PaliGemma3


def test_imports_point_down():
    linter = shutil.which("lint-imports", path=Path(sys.executable).parent)
    result = subprocess.run(
        [linter, "--config", Path(__file__).parents[1] / "pyproject.toml"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stdout
