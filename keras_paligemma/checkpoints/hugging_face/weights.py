"""Table of names and folders of transformers (`config.json`, safetensors)."""

import dataclasses
from pathlib import Path

import numpy as np

from keras_paligemma import atomic
from keras_paligemma.checked import shown
from keras_paligemma.checkpoints.engine import Row
from keras_paligemma.checkpoints.finite import cast
from keras_paligemma.checkpoints.hugging_face.config import EXTRA_ROWS
from keras_paligemma.checkpoints.hugging_face.config import from_transformers
from keras_paligemma.checkpoints.hugging_face.config import to_json
from keras_paligemma.checkpoints.hugging_face.config import to_transformers
from keras_paligemma.checkpoints.hugging_face.config import weight_dtype
from keras_paligemma.checkpoints.hugging_face.tokenizer import added_tokens
from keras_paligemma.checkpoints.hugging_face.tokenizer import tokenizer_files
from keras_paligemma.checkpoints.storage.safetensors import SHARD_SIZE
from keras_paligemma.checkpoints.storage.safetensors import write_safetensors
from keras_paligemma.config import ModelConfig
from keras_paligemma.config import read_json

# Prefixes in published files. Those of the hub come first and are written,
# since every version reads them. Version 4.52 moved all three below `model`,
# version 5 removed a level of the vision tower; mixtures exist.
VISION = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.",
)
PROJECTOR = (
    "multi_modal_projector.linear.",
    "model.multi_modal_projector.linear.",
)
TEXT = ("language_model.model.", "model.language_model.", "language_model.")
HEADS = ("lm_head.weight", "language_model.lm_head.weight")
PATCHES = "embeddings.patch_embedding.weight"
EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
QUERY_KEY_VALUE = {"query": "q", "key": "k", "value": "v"}
# Rows of the embedding and of a head that are compared at a time.
COMPARED_ROWS = 4096


def rows(config, shapes=None, most_extra_rows=EXTRA_ROWS):
    """List the rows of the format.

    Args:
        config: `BackboneConfig`.
        shapes: dict of the checkpoint's keys to shapes, from which the layout
            of the names and the number of rows that the embedding has beyond
            the vocabulary are inferred; `None` for the layout of `write`.
        most_extra_rows: int, maximum number of such rows.

    Returns:
        list of `Row`.

    Raises:
        ValueError: the keys match none of the layouts.

    Source: transformers, `models/{paligemma,siglip,gemma,gemma2}`.
    """
    vision, projector, text = VISION[0], PROJECTOR[0], TEXT[0]
    extra = EXTRA_ROWS
    if shapes is not None:
        vision = _prefix(VISION, PATCHES, shapes)
        projector = _prefix(PROJECTOR, "weight", shapes)
        text = _prefix(TEXT, EMBEDDING, shapes)
        extra = (
            shapes[text + EMBEDDING][0] - config.text_decoder.vocabulary_size
        )
        if not 0 <= extra <= most_extra_rows:
            extra = 0  # The engine reports the error.
    return [
        *_linear("projector", projector, "d v -> v d"),
        Row(
            "vision_encoder/position_embedding",
            vision + "embeddings.position_embedding.weight",
        ),
        *_linear(
            "patch_embedding",
            vision + "embeddings.patch_embedding.",
            "d c h w -> h w c d",
        ),
        *_norm("final_norm", vision + "post_layernorm."),
        *_vision_blocks(vision + "encoder.layers.{layer}."),
        _text("token_embedding/table", text + EMBEDDING, extra=extra),
        _text("final_norm/scale", text + FINAL_NORM),
        *_text_blocks(config, text + "layers.{layer}."),
    ]


def _text_blocks(config, block):
    attention = block + "self_attn."
    table = [
        _text(
            f"blocks/attention/{name}/kernel",
            f"{attention}{key}_proj.weight",
            axes="(n h) d -> d n h",
        )
        for name, key in QUERY_KEY_VALUE.items()
    ]
    table.append(
        _text(
            "blocks/attention/output/kernel",
            attention + "o_proj.weight",
            axes="d (n h) -> n h d",
        )
    )
    table += [
        _text(
            f"blocks/mlp/{name}/kernel",
            f"{block}mlp.{name}_proj.weight",
            axes="o i -> i o",
        )
        for name in ("gate", "up", "down")
    ]
    return table + [
        _text(f"blocks/{name}_norm/scale", f"{block}{key}_layernorm.weight")
        for name, key in _norm_names(config).items()
    ]


def _norm_names(config):
    if config.text_decoder.use_post_norms:
        return {
            "pre_attention": "input",
            "post_attention": "post_attention",
            "pre_ffw": "pre_feedforward",
            "post_ffw": "post_feedforward",
        }
    # Gemma's second norm, after attention, is the MLP's pre-norm.
    return {"pre_attention": "input", "pre_ffw": "post_attention"}


def _vision_blocks(block):
    table = []
    for name, key in QUERY_KEY_VALUE.items():
        table += _linear(
            f"blocks/attention/{name}",
            f"{block}self_attn.{key}_proj.",
            "(n h) d -> d n h",
            "(n h) -> n h",
        )
    return table + [
        *_linear(
            "blocks/attention/output",
            block + "self_attn.out_proj.",
            "d (n h) -> n h d",
        ),
        *_linear("blocks/mlp/up", block + "mlp.fc1.", "f d -> d f"),
        *_linear("blocks/mlp/down", block + "mlp.fc2.", "d f -> f d"),
        *_norm("blocks/attention_norm", block + "layer_norm1."),
        *_norm("blocks/mlp_norm", block + "layer_norm2."),
    ]


def _linear(name, key, kernel, bias=None):
    return [
        Row(f"vision_encoder/{name}/kernel", key + "weight", kernel),
        Row(f"vision_encoder/{name}/bias", key + "bias", bias),
    ]


def _norm(name, key):
    return [
        Row(f"vision_encoder/{name}/gamma", key + "weight"),
        Row(f"vision_encoder/{name}/beta", key + "bias"),
    ]


def _text(name, key, **how):
    return Row(f"text_decoder/{name}", key, **how)


def _prefix(prefixes, name, shapes):
    for prefix in prefixes:
        if prefix + name in shapes:
            return prefix
    examples = sorted(shapes)[:3]
    raise ValueError(
        f"The checkpoint has no PaliGemma of transformers: no key "
        f"{prefixes[0] + name!r}, nor under {list(prefixes[1:])}. Received: "
        f"{len(shapes)} keys, such as {examples}. An adapter has to be merged "
        "into its model and saved with it."
    )


class _Tied:
    """The tensors of a checkpoint without its heads; see `engine`.

    When the embedding is read, it is compared with the heads.

    Args:
        tensors: see `engine`.
        heads: list of str, keys of the heads.
        table: str, key of the embedding.
    """

    def __init__(self, tensors, heads, table):
        self._tensors, self._heads, self._table = tensors, heads, table
        self.shapes = {
            key: shape
            for key, shape in tensors.shapes.items()
            if key not in heads
        }
        self.dtypes = {key: tensors.dtypes[key] for key in self.shapes}

    def read(self, key):
        array = self._tensors.read(key)
        if key == self._table:
            for head in self._heads:
                self._compare(head, array)
        return array

    def _compare(self, head, table):
        shape = self._tensors.shapes[head]
        equal = shape == table.shape and all(
            _equal(
                self._tensors.read_rows(head, start, start + COMPARED_ROWS),
                table[start : start + COMPARED_ROWS],
            )
            for start in range(0, len(table), COMPARED_ROWS)
        )
        if not equal:
            raise ValueError(
                f"The head {head!r} {shape} differs from the embedding "
                f"{self._table!r} {table.shape}. Expected: one table for "
                "both, as in every published PaliGemma. A model whose head "
                "was trained apart cannot be expressed."
            )


def _equal(array, other):
    # NaN may be allowed, but the comparison with `equal_nan` is slower.
    return np.array_equal(array, other) or np.array_equal(
        array, other, equal_nan=True
    )


class _HeadAsTable:
    """The tensors of a checkpoint that stores its embedding as its head.

    Args:
        tensors: see `engine`.
        head: str, key of the head.
        table: str, the key that an embedding would have.
    """

    def __init__(self, tensors, head, table):
        self._tensors, self._keys = tensors, {table: head}
        names = {head: table}
        self.shapes, self.dtypes = (
            {names.get(key, key): value for key, value in values.items()}
            for values in (tensors.shapes, tensors.dtypes)
        )

    def read(self, key):
        return self._tensors.read(self._keys.get(key, key))


def tied(tensors):
    """Present one table for embedding and head, if one or both are stored.

    If both are stored, they are compared when the embedding is read, a few
    thousand rows at a time; reading raises a `ValueError` if they differ.
    safetensors' `save_model` stores shared tensors once, under the first name:
    the head's.

    Args:
        tensors: `storage.safetensors.Tensors`.

    Returns:
        The tensors without a head, for `rows` and `engine.load`.
    """
    heads = [key for key in HEADS if key in tensors.shapes]
    if not heads:
        return tensors
    table = _prefix(TEXT, FINAL_NORM, tensors.shapes) + EMBEDDING
    if table not in tensors.shapes:
        head, *others = heads
        tensors = _HeadAsTable(tensors, head, table)
        return _Tied(tensors, others, table) if others else tensors
    return _Tied(tensors, heads, table)


@dataclasses.dataclass(frozen=True)
class Description:
    """The content of a folder without its weights.

    Args:
        config: `ModelConfig`; `preprocessor` is `None` if the folder has none.
        added_tokens: dict of id to str, tokens that the tokenizer has in
            addition to its pieces.
        num_rows: int, rows of the embedding, including unused ones.
    """

    config: ModelConfig
    added_tokens: dict
    num_rows: int


def read_config(folder):
    """Read the configuration of a model, its tokenizer and its preprocessor.

    Args:
        folder: str or path, written by transformers' `save_pretrained` or by
            `write`.

    Returns:
        `Description`.

    Raises:
        ValueError: another model, or a configuration that is not supported.
    """
    folder = Path(folder)
    config = _read_object(folder / "config.json")
    processor = None
    if (folder / "preprocessor_config.json").is_file():
        processor = _read_object(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        # The file of transformers 5's processor.
        whole = _read_object(folder / "processor_config.json")
        processor = whole.get("image_processor")
        if not isinstance(processor, dict | None):
            raise ValueError(
                f"{folder / 'processor_config.json'} has an image_processor "
                f"that is no JSON object. Received: {shown(processor)}. "
                "Copy it again."
            )
    added = added_tokens(folder)
    found = from_transformers(config, processor, folder, added)
    num_rows = config["text_config"].get("vocab_size", 0)
    return Description(found, added or {}, num_rows)


def _read_object(path):
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object. Copy it again.")
    return value


def write(folder, config, arrays, tokenizer=None, max_shard_size=SHARD_SIZE):
    """Write a folder that transformers loads, atomically.

    Weights, configs and tokenizer appear together; see `atomic.whole_folder`.

    Args:
        folder: str or path that does not exist or is empty.
        config: `ModelConfig`, whose dtype is that of the file.
        arrays: iterable of pairs of key and array, from `engine.write` with
            `rows(config.backbone)`; consumed one at a time.
        tokenizer: bytes of the SentencePiece model, or `None` for a model
            without a tokenizer.
        max_shard_size: float, maximum bytes of weights in a file.

    Raises:
        ValueError: the folder is in use, transformers lacks a feature of the
            model or the tokenizer, or arrays are missing.
    """
    atomic.refuse_in_use(folder)
    backbone = config.backbone
    size = backbone.text_decoder.vocabulary_size
    # Checked before the weights are written.
    files = to_transformers(config, size + EXTRA_ROWS)
    files = {name: to_json(value) for name, value in files.items()}
    dtype = weight_dtype(backbone)
    if tokenizer is not None:
        files |= tokenizer_files(tokenizer, size)
    with atomic.whole_folder(folder, "config.json") as draft:
        for name, content in files.items():
            (draft / name).write_bytes(content)
        arrays = ((key, cast(key, array, dtype)) for key, array in arrays)
        written = write_safetensors(draft, arrays, max_shard_size)
        _check_keys(written, backbone)


def _check_keys(written, backbone):
    expected = set()
    for row in rows(backbone):
        tower = row.name.split("/")[0]
        expected.update(row.keys(getattr(backbone, tower).num_layers))
    missing = sorted(expected - set(written))
    unknown = sorted(set(written) - expected)
    if missing or unknown:
        raise ValueError(
            f"The arrays are not those of the model. Missing: {missing}. "
            f"Unknown: {unknown}. Expected: what `engine.write` makes with "
            "`rows(config.backbone)`."
        )
