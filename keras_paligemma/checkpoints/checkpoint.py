"""What is known of a checkpoint before any of its values is read."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from keras_paligemma import presets
from keras_paligemma.checked import shown
from keras_paligemma.checkpoints import engine
from keras_paligemma.checkpoints.finite import Finite
from keras_paligemma.config import ModelConfig

# Dtype of computation for dtypes that are only stored. The largest float16 is
# 65,504, and activations beyond that become NaN.
COMPUTED = {"float16": "bfloat16", "float64": "float32"}
FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass
class Checkpoint:
    """The description of a checkpoint, before any of its values is read.

    Args:
        format: str, one of `FORMATS`, or `None` for a published configuration
            alone.
        config: `ModelConfig`.
        rows: list of `engine.Row`, or `None` for names of this package.
        files: list of `pathlib.Path`, the files of the weights.
        tokenizer: `pathlib.Path` of a SentencePiece model or a
            `tokenizer.json`, or `None`.
        open_files: function that returns a context manager of the tensors;
            `None` for a configuration alone.
        published: str or `None`, the published model that its source names.
        added_tokens: dict of id to str, tokens that are not in the
            SentencePiece model.
        assumed: dict of an argument of `from_preset` to a sentence about the
            value that was assumed, since the checkpoint lacks it.
        stored_dtype: str or `None`, the dtype of most of the values in the
            files, if it is known.
    """

    format: str | None
    config: ModelConfig
    rows: list | None = None
    files: list = dataclasses.field(default_factory=list)
    tokenizer: Path | None = None
    open_files: Callable | None = None
    published: str | None = None
    added_tokens: dict = dataclasses.field(default_factory=dict)
    assumed: dict = dataclasses.field(default_factory=dict)
    stored_dtype: str | None = None

    @property
    def variant(self):
        """Name of the published model of these sizes, or `None`."""
        return self.published or presets.variant(self.config.backbone.to_dict())

    @property
    def has_preprocessor(self):
        """Whether it says itself how pictures and text are prepared."""
        return (
            self.config.preprocessor is not None
            and "resize" not in self.assumed
        )

    def rows_for(self, weights):
        """Return the rows; our own names map to themselves."""
        if self.rows is not None:
            return self.rows
        return [engine.Row(name, name) for name in weights]

    def say_assumed(self, argument, stacklevel=4):
        """Warn if the value of an argument was assumed.

        Args:
            argument: str, its name.
            stacklevel: int, the place of the user's call, as `warnings.warn`
                counts it.
        """
        if argument in self.assumed:
            warnings.warn(
                f"{self.assumed[argument]} Pass `{argument}=` for another.",
                stacklevel=stacklevel,
            )

    @contextlib.contextmanager
    def open(self, allow_nonfinite=False, dtype=None):
        """Open the tensors, see `engine`.

        Args:
            allow_nonfinite: bool; if `False`, reading a tensor with NaN or
                infinite values raises a `ValueError`.
            dtype: str, the dtype that they are cast to later; values that it
                cannot hold are refused, too.
        """
        if self.open_files is None:
            raise ValueError(
                "This checkpoint is a configuration alone. Expected: one that "
                "was found with `load_weights=True`."
            )
        with self.open_files() as tensors:
            if not allow_nonfinite:
                source = (
                    self.files[0].parent if self.files else "The checkpoint"
                )
                tensors = Finite(tensors, source, dtype)
            yield tensors

    def set_dtype(self, tensors, source):
        """Set the config's dtype to that of most of the values.

        float16 and float64 are replaced, see `COMPUTED`.

        Args:
            tensors: the opened tensors, see `engine`; `None` without weights,
                for the dtype that the configuration names.
            source: path, for messages.

        Raises:
            ValueError: a tensor is not of a float dtype.
        """
        sizes: dict[str, int]
        if tensors is not None:
            sizes = _sizes(tensors, source)
        else:
            named = self.config.backbone.dtype
            sizes = {} if named is None else {named: 1}
        if not sizes:
            return
        stored = max(sizes, key=lambda dtype: sizes[dtype])
        self.stored_dtype = stored
        dtype = COMPUTED.get(stored, stored)
        config = self.config
        backbone = replace(config.backbone, dtype=dtype)
        self.config = replace(config, backbone=backbone)
        if COMPUTED.keys() & sizes:
            self.assumed["dtype"] = (
                f"{source} holds {' and '.join(sorted(sizes))}. Taken: "
                f"dtype={dtype!r}."
            )


def _sizes(tensors, source):
    """Count the values of each dtype; raise if one is not of floats."""
    sizes = {}
    for key, dtype in tensors.dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"{source} holds {shown(key)} as {shown(dtype)}. Expected: "
                f"one of {FLOATS}. Save the weights as floats."
            )
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensors.shapes[key])
    return sizes
