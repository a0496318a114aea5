"""Average precision during `fit`, with a stand-in for a model."""

import types

import keras
import numpy as np
import pytest

from keras_paligemma.training import EvaluateObjects
from tests.training import killed_run

LEFT, RIGHT = (0.1, 0.1, 0.9, 0.4), (0.1, 0.6, 0.9, 0.9)
OBJECTS = [[(LEFT, "cat"), (RIGHT, "dog")], [(RIGHT, "cat")], []]


class Detecting(keras.Sequential):
    """A model that detects everything after one epoch; it counts its calls."""

    sizes = ()

    def detect(self, images, labels):
        self.sizes += (len(images),)
        assert labels == ["cat", "dog"]
        if len(self.sizes) <= 2:
            return [[] for _ in images]
        return [
            [
                types.SimpleNamespace(box=box, label=label, score=0.5)
                for box, label in OBJECTS[image]
            ]
            for image in images
        ]


def test_values_are_in_the_logs_of_each_epoch(capsys):
    model = Detecting([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    seen = EvaluateObjects([0, 1, 2], OBJECTS, batch_size=2)
    history = model.fit(
        np.zeros((2, 1)), np.zeros(2), epochs=2, verbose=0, callbacks=[seen]
    )
    assert model.sizes == (2, 1, 2, 1)
    assert history.history["val_map"] == pytest.approx([0, 1])
    assert seen.values[2]["map_75"] == pytest.approx(1)
    assert "val_map_50: 1.0000" in capsys.readouterr().out


def test_every_and_another_detector():
    seen = EvaluateObjects(
        *([0], [[(LEFT, "cat")]], ["cat", "owl"], 2),
        detect=lambda model, images, labels: [[(LEFT, labels[0], 0.9)]],
    )
    seen.on_epoch_end(0)
    seen.on_epoch_end(1)
    assert list(seen.values) == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], []), "1 pictures, 0 lists"),
        (([], []), "one or more"),
        (([0], [[]], None, 0), "every=0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvaluateObjects(*arguments)


def test_the_models_own_detect_in_a_fit():
    model, batches = killed_run.set_up()
    pictures = [np.zeros((9, 9, 3), "uint8")] * 2
    seen = EvaluateObjects(pictures, [[(LEFT, "cat")]] * 2)
    history = model.fit(batches, epochs=1, verbose=0, callbacks=[seen])
    # Random weights detect nothing, which raises no error.
    assert history.history["val_map"] == [0]
    assert seen.labels == ["cat"]
