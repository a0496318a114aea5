"""Build models from checkpoints of any format."""

from dataclasses import replace

import keras

from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints import formats
from keras_paligemma.checkpoints.lazy_tensors import lazy_tensors
from keras_paligemma.checkpoints.positions import Resampled
from keras_paligemma.compat import initialize_seeds
from keras_paligemma.compat import without_values
from keras_paligemma.config import TOWER_OF
from keras_paligemma.layers.weight import dequantized
from keras_paligemma.quantization import calibration as calibrating

POSITIONS = "vision_encoder/position_embedding"
BACKBONE_KEYS = (
    "form",
    "remat",
    "dropout",
    "image_size",
    "quantize",
    "calibration",
    "allow_nonfinite",
)
TASK_KEYS = ("compile", "name", "preprocessor")
QUANTIZE = (
    "A model in memory is not quantised: its weights are quantised as they are "
    "read, so that they are never whole as floats. Save it with "
    "`save_to_preset(folder)`, then load it with `from_preset(folder, "
    "quantize='int8')` or 'int4'."
)


def split_fields(kwargs):
    """Split the configuration's fields off a call's keyword arguments."""
    return {key: kwargs.pop(key) for key in TOWER_OF.keys() & kwargs.keys()}


def load_backbone(
    cls,
    checkpoint,
    load_weights=True,
    dtype=None,
    image_size=None,
    quantize=None,
    calibration=None,
    allow_nonfinite=False,
    **kwargs,
):
    """Build a backbone from a checkpoint and load its weights.

    Args:
        cls: the backbone's class.
        checkpoint: `Checkpoint`.
        load_weights: bool; `False` initialises at random.
        dtype: dtype policy. `None` is the global policy if the user set one, by
            `keras.config.set_dtype_policy` or `set_floatx`, otherwise the
            file's.
        image_size: int, another image size than the checkpoint's: positions
            are resampled. `None` is the checkpoint's.
        quantize: "int8" or "int4": each weight is quantised while it is
            loaded. `None` keeps the file's storage.
        calibration: list of preprocessed batches to calibrate "int4" on, see
            `quantization.calibration`.
        allow_nonfinite: bool, whether to accept NaN and infinite weights.
        **kwargs: `form`, `remat`, `dropout`, `name`.

    Returns:
        Instance of `cls`.
    """
    config = checkpoint.config.backbone
    if image_size is not None:
        config = replace(config, image_size=image_size)
    dtype = dtype or _global_policy()
    if dtype is None:
        checkpoint.say_assumed("dtype")
    fields = config.to_dict() | {"dtype": dtype or config.dtype} | kwargs
    stored = config.quantization
    fields["quantization"] = quantization_of(config, quantize)
    if calibration is not None:
        calibrating.check_can_calibrate(stored, quantize, load_weights)
    if not load_weights:
        return cls(**fields)
    # Weights are cast and placed as they are read, without a random
    # initialisation first.
    with without_values():
        backbone = cls(**fields)
    initialize_seeds(backbone)
    weights = backbone.weights_by_name()
    if stored is None:
        weights = dequantized(weights)
    rows = checkpoint.rows_for(weights)
    with checkpoint.open(allow_nonfinite, backbone.variable_dtype) as tensors:
        if image_size is not None:
            (key,) = [row.key for row in rows if row.name == POSITIONS]
            count = weights[POSITIONS].shape[0]
            tensors = Resampled(tensors, key, count)
        engine.load(weights, rows, tensors)
        if calibration is not None:
            floats = lazy_tensors(weights, rows, tensors)
            calibrating.calibrate(backbone, floats, calibration)
    return backbone


def quantization_of(config, quantize):
    """Return how weights are stored once they are loaded, `None` for floats.

    Args:
        config: `BackboneConfig` of the checkpoint.
        quantize: "int8", "int4" or `None`.

    Raises:
        ValueError: the checkpoint is quantised in another way.
    """
    stored = config.quantization
    if stored is not None and quantize not in (None, stored):
        raise ValueError(
            f"The checkpoint is quantised already: {stored}. Received: "
            f"quantize={quantize!r}. Expected: none, or a checkpoint of floats."
        )
    return stored or quantize


def _global_policy():
    """Return the dtype policy that the user set, or `None` for the default."""
    policy = keras.config.dtype_policy()
    if policy.name == "float32":
        # Created from floatx at first access, perhaps before floatx was set.
        policy = keras.config.floatx()
    return None if policy == "float32" else policy


def load_task(cls, preset, load_weights, dtype, kwargs):
    """Build a task with its backbone and preprocessor from a preset."""
    kwargs = dict(kwargs)
    tokenizer = kwargs.pop("tokenizer", False)
    checkpoint = formats.resolve(
        preset, load_weights, split_fields(kwargs), tokenizer
    )
    backbone = {key: kwargs.pop(key) for key in BACKBONE_KEYS if key in kwargs}
    task = {key: kwargs.pop(key) for key in TASK_KEYS if key in kwargs}
    if "preprocessor" not in task:
        # First, so that missing files are found before weights are read.
        preprocessor = _load_preprocessor(
            cls.preprocessor_cls,
            preset,
            checkpoint,
            load_weights,
            backbone.get("image_size"),
            kwargs,
            tokenizer,
        )
        if preprocessor is not None:
            task["preprocessor"], kwargs = preprocessor, {}
    if kwargs:
        raise TypeError(f"Unknown arguments: {sorted(kwargs)}.")
    if backbone.get("calibration") is not None:
        backbone["calibration"] = calibrating.batches_of(
            backbone["calibration"], task.get("preprocessor")
        )
    return cls(
        backbone=load_backbone(
            cls.backbone_cls, checkpoint, load_weights, dtype, **backbone
        ),
        **task,
    )


def _load_preprocessor(
    cls, preset, checkpoint, load_weights, image_size, options, tokenizer
):
    """Build the preprocessor of a preset; `None` if it has none."""
    config = checkpoint.config
    if image_size is not None:
        backbone = replace(config.backbone, image_size=image_size)
        config = replace(config, backbone=backbone)
    preprocessor = None
    if not checkpoint.has_preprocessor:
        # A backbone's preset may have a preprocessor saved beside it.
        given = {"tokenizer": tokenizer} if tokenizer else {}
        preprocessor = _saved_beside(
            cls, preset, image_size, **options, **given
        )
    has_files = load_weights or checkpoint.tokenizer is not None
    if preprocessor is None and config.preprocessor is not None and has_files:
        if "resize" not in options:
            checkpoint.say_assumed("resize", stacklevel=5)
        preprocessor = cls.from_files(
            config, checkpoint.tokenizer, checkpoint.added_tokens, **options
        )
    if preprocessor is not None:
        check_tokenizer(preprocessor.tokenizer, config.backbone)
    return preprocessor


def _saved_beside(cls, preset, image_size, resize=None, **options):
    """Read the preprocessor that was saved beside a backbone, if any.

    Args:
        cls: the preprocessor's class.
        preset: argument of `from_preset`.
        image_size: int, another size of pictures, or `None`.
        resize: str, another rule, or `None`.
        **options: as `cls.saved_in` takes them.
    """
    preprocessor = cls.saved_in(preset, **options)
    converter = getattr(preprocessor, "image_converter", None)
    if converter is not None and (image_size or resize):
        preprocessor.image_converter = cls.image_converter_cls(
            image_size or converter.image_size, resize or converter.resize
        )
    return preprocessor


def check_tokenizer(tokenizer, config):
    """Raise on a tokenizer whose size is not the embedding table's."""
    pieces, rows = (
        tokenizer.vocabulary_size(),
        config.text_decoder.vocabulary_size,
    )
    if pieces != rows:
        raise ValueError(
            f"The tokenizer has {pieces} pieces, {abs(pieces - rows)} "
            f"{'more' if pieces > rows else 'fewer'} than the {rows} tokens of "
            "the model. Expected: one for each. Pass the tokenizer that the "
            "model was trained with as `tokenizer=`, or `preprocessor=None` "
            "to do without strings."
        )
