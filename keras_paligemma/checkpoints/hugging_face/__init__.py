"""transformers' folders: configuration, tokenizer and table of weights."""

from keras_paligemma.checkpoints.hugging_face.weights import (
    read_config as read_config,
)
from keras_paligemma.checkpoints.hugging_face.weights import rows as rows
from keras_paligemma.checkpoints.hugging_face.weights import tied as tied
from keras_paligemma.checkpoints.hugging_face.weights import write as write
