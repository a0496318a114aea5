"""Fixtures of applications with a tiny model and with a stand-in."""

import numpy as np
import pytest
from starlette.testclient import TestClient

from keras_paligemma.serve.app import make_app
from keras_paligemma.serve.preset_model import PresetModel
from keras_paligemma.serve.requests import Limits
from tests.helpers.text_models import build_tiny_model
from tests.serve.plain_model import PlainModel


@pytest.fixture(scope="package")
def model():
    """Return a tiny model with an adapter, "styled", that changes answers."""
    model = build_tiny_model()
    model.backbone.enable_lora(2, name="styled", targets="decoder")
    random = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(random.normal(size=variable.shape))
    model.adapters.select(None)
    return model


class OnUse(PresetModel):
    """A model without warm-up: programs are compiled on first use."""

    def warm_ups(self):
        return [], []


@pytest.fixture(scope="package")
def client(model):
    with TestClient(make_app(OnUse(model, largest=4), "tiny")) as client:
        yield client


@pytest.fixture(scope="package")
def plain():
    """Return a client of a model that answers with the prompt."""
    app = make_app(PlainModel(), "plain", limits=Limits(body=65_536))
    with TestClient(app) as client:
        yield client
