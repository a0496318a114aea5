"""Load the golden checkpoint on eight virtual devices; run by its test."""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
)

import jax
import keras
import numpy as np

from keras_paligemma import PaliGemmaBackbone
from keras_paligemma import compat
from keras_paligemma.layers import weight
from tests.helpers.checks import check
from tests.helpers.tiny_models import GOLDEN
from tests.helpers.tiny_models import NOT_IN_SHAPES
from tests.helpers.tiny_models import golden_inputs
from tests.helpers.tiny_models import run

mesh = keras.distribution.DeviceMesh((1, 8), ["batch", "model"])
layout = keras.distribution.LayoutMap(mesh)
layout[".*token_embedding.*table"] = ("model", None)
layout[".*text_decoder.*mlp.*up.*kernel"] = (None, "model")
layout[".*text_decoder.*mlp.*gate.*kernel"] = (None, "model")
layout[".*text_decoder.*mlp.*down.*kernel"] = ("model", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
)

fill = compat.fill


def watched(variable, value):
    """Check that each shard is copied from the host, one at a time."""
    put, seen = jax.device_put, []

    def device_put(array, device, may_alias=None):
        assert type(array) is np.ndarray, variable.path
        assert array.dtype == variable.dtype, variable.path
        seen.append((array.shape, device))
        return put(array, device, may_alias=may_alias)

    jax.device_put = device_put
    try:
        fill(variable, value)
    finally:
        jax.device_put = put
    shards = variable._value.addressable_shards
    assert sorted(seen, key=str) == sorted(
        ((shard.data.shape, shard.device) for shard in shards), key=str
    ), variable.path
    assert len(seen) == 8


weight.fill = watched
with check("copies"):
    backbone = PaliGemmaBackbone.from_preset(
        GOLDEN / "tiny_headdim.npz", form="unrolled", **NOT_IN_SHAPES
    )
with check("bytes"):
    sharded = 0
    for variable in backbone.variables:
        shard = variable._value.addressable_shards[0].data
        if any(word in variable.path for word in ("token_embedding", "mlp")):
            if "text_decoder" in variable.path and "norm" not in variable.path:
                assert shard.nbytes * 8 == variable._value.nbytes, variable.path
                sharded += 1
                continue
        assert shard.nbytes == variable._value.nbytes, variable.path
    assert sharded == 1 + 3 * 3, sharded
with check("logits"):
    expected = dict(np.load(GOLDEN / "tiny_headdim.expected.npz"))
    logits = run(
        lambda inputs: backbone.logits(backbone(inputs)),
        golden_inputs(expected),
    )
    wanted = expected["f32/llm/logits"]
    error = np.abs(np.asarray(logits) - wanted).max() / np.abs(wanted).max()
    assert error < 2e-5, error
