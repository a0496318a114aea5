"""An application around a tiny model, and around one that computes nothing."""

import pytest
from starlette.testclient import TestClient

from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.preset_model import PresetModel
from tests.helpers.text_models import build_tiny_model
from tests.serve.plain_model import PlainModel


@pytest.fixture(scope="package")
def model():
    return build_tiny_model()


@pytest.fixture(scope="package")
def client(model):
    served = PresetModel(model, largest=1)
    app = make_app(served, "tiny")
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def plain():
    """Give a client of a model that answers with its prompt."""
    with TestClient(make_app(PlainModel(), "plain")) as client:
        yield client
