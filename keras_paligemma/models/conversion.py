"""Convert checkpoints to another format, weight by weight."""

import dataclasses

from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints import writing
from keras_paligemma.checkpoints.lazy_tensors import lazy_tensors
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.models.exports import config_of
from keras_paligemma.models.files import check_tokenizer
from keras_paligemma.models.inspection import empty_weights
from keras_paligemma.preprocessing.image_converter import check_picture_size
from keras_paligemma.preprocessing.preprocessor import (
    PaliGemmaCausalLMPreprocessor,
)
from keras_paligemma.preprocessing.tokenizer import PaliGemmaTokenizer


def find(source, fields=None, tokenizer=None):
    """Find a checkpoint to convert.

    Args:
        source: str, as `from_preset` takes it.
        fields: dict of configuration that the files lack, see `formats.find`.
        tokenizer: str, path or handle of a SentencePiece model, instead of the
            source's own.

    Returns:
        `Checkpoint`, and a dict of its weights without values.
    """
    checkpoint = formats.resolve(
        source, fields=fields, tokenizer=tokenizer or False
    )
    if not checkpoint.has_preprocessor:
        # A backbone's preset may have a preprocessor saved beside it.
        saved = PaliGemmaCausalLMPreprocessor.saved_in(source)
        config = checkpoint.config
        check_picture_size(saved, config.backbone.image_size)
        if saved is not None:
            checkpoint.config = dataclasses.replace(
                config, preprocessor=config_of(saved)
            )
            checkpoint.assumed.pop("resize", None)
    return checkpoint, empty_weights(checkpoint)


def write(
    checkpoint,
    weights,
    target,
    to,
    on_read=None,
    dtype=None,
    piece_size=None,
    allow_nonfinite=False,
):
    """Write a checkpoint in another format, without holding it in memory.

    Args:
        checkpoint: `Checkpoint`; without a tokenizer no preprocessor
            is written, nor to big_vision's files.
        weights: dict of its weights without values.
        target: path.
        to: str, one of `formats.FORMATS`.
        on_read: function called with each array after it was read, such as
            for a progress bar, or `None`.
        dtype: str; the source's if `None`.
        piece_size: int, bytes of a piece of a .npz.
        allow_nonfinite: bool, whether to accept NaN and infinite weights.

    Returns:
        int, the number of parameters.
    """
    config, proto = checkpoint.config, None
    if checkpoint.tokenizer is None or to == "big_vision":
        config = dataclasses.replace(config, preprocessor=None)
    else:
        # Gemma's tokenizer is extended by PaliGemma's pieces.
        size = config.backbone.text_decoder.vocabulary_size
        tokenizer = PaliGemmaTokenizer.from_file(
            checkpoint.tokenizer, size, checkpoint.added_tokens
        )
        check_tokenizer(tokenizer, config.backbone)
        proto = tokenizer.proto
    stored = checkpoint.stored_dtype
    if dtype is None and to == "transformers" and stored in writing.DTYPES:
        # Its files have one dtype; float16 is not that of the configuration.
        dtype = stored
    with checkpoint.open(allow_nonfinite) as tensors:
        writing.write(
            target,
            to,
            config,
            lazy_tensors(
                weights, checkpoint.rows_for(weights), tensors, on_read
            ),
            proto,
            dtype=dtype,
            piece_size=piece_size,
        )
    return engine.count(dequantized(weights))
