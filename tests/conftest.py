"""Shared fixtures: goldens, and tiny models with unequal sizes."""

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
# Silence TensorFlow's start-up messages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.helpers.numpy_reference import load_arrays  # noqa: E402
from tests.helpers.programs import make_programs_quickly  # noqa: E402
from tests.helpers.programs import run_eagerly  # noqa: E402
from tests.helpers.tiny_models import FORMS_OF_BACKEND  # noqa: E402
from tests.helpers.tiny_models import GOLDEN  # noqa: E402
from tests.helpers.tiny_models import IMAGE_SIZE  # noqa: E402
from tests.helpers.tiny_models import TEXT  # noqa: E402
from tests.helpers.tiny_models import VISION  # noqa: E402
from tests.helpers.tiny_models import fill  # noqa: E402

# A garbage collection visits all living objects. There are millions once the
# libraries are imported, and tests spent a sixth of their time on it.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
    """Exclude imported objects from garbage collection."""
    gc.collect()
    gc.freeze()
    make_programs_quickly()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Drop the compiled programs of earlier tests before there are too many.

    Each XLA program holds memory mappings until JAX forgets it. Linux allows
    65,530 per process, and XLA crashes beyond that. One test file makes up to
    12,000.
    """
    yield
    mappings = Path("/proc/self/maps")
    if "jax" in sys.modules and mappings.exists():
        if mappings.read_bytes().count(b"\n") > 30_000:
            sys.modules["jax"].clear_caches()
            gc.collect()


@pytest.fixture(scope="session")
def arrays():
    """The golden checkpoint in float32, by big_vision's names."""
    return load_arrays(GOLDEN / "tiny_headdim.npz")


@pytest.fixture(scope="session")
def expected():
    """The original's inputs and outputs for the golden checkpoint."""
    with np.load(GOLDEN / "tiny_headdim.expected.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def golden_backbone(arrays):
    """Return a function that builds a backbone with the golden weights."""

    def build(**changes):
        from keras_paligemma import PaliGemmaBackbone

        text = TEXT | changes.pop("text", {})
        changes.setdefault("form", FORMS_OF_BACKEND[0])
        backbone = PaliGemmaBackbone(
            changes.pop("image_size", IMAGE_SIZE),
            VISION | changes.pop("vision", {}),
            text,
            **changes,
        )
        fill(backbone, arrays)
        return backbone

    return build


@pytest.fixture(scope="session")
def tiny_model():
    """Return a function that builds a random model with a preprocessor."""
    from tests.helpers.text_models import build_tiny_model

    return build_tiny_model


@pytest.fixture(scope="session")
def random_preset(tmp_path_factory):
    """The folder of a preset of random floats, with a preprocessor."""
    from tests.helpers.text_models import write_random_preset

    folder = tmp_path_factory.mktemp("presets") / "floats"
    write_random_preset(folder)
    return folder


@pytest.fixture
def eager():
    """Run without graphs on TensorFlow, for tests of arithmetic.

    Tracing a train step takes longer than the one or two steps of such a test.
    Not for what a graph could keep between steps: accumulated gradients,
    moments and switches of adapters.
    """
    with run_eagerly():
        yield


@pytest.fixture
def examples():
    """Four examples for `fit`, of different sizes and lengths."""
    random = np.random.default_rng(0)
    return {
        "images": list(random.integers(0, 256, (4, 50, 40, 3), "uint8")),
        "prompts": ["caption en", "detect cat", "answer en how many dog?", "a"],
        "responses": ["a cat and a dog", "cat", "2", "an owl"],
    }


@pytest.fixture(scope="module")
def wide():
    """Store int4 as in published models, whose layers are wide."""
    from keras_paligemma.quantization import storage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "SMALL", 1)
        yield
