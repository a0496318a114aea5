"""KerasHub's presets: configuration and table of weights."""

from keras_paligemma.checkpoints.keras_hub.weights import rows as rows
from keras_paligemma.checkpoints.keras_hub.weights import write as write
