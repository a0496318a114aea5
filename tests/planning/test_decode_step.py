"""A decoding step reads the weights once and does not copy the cache."""

import json
import os
import subprocess
import sys

import keras
import pytest

from keras_paligemma.planning.compiled import ENVIRONMENT
from keras_paligemma.planning.compiled import has_compiler
from tests.planning import hlo

MODULE = """
%fused (p: bf16[2,8,4], i: s32[], x: bf16[8]) -> bf16[4] {
  %i = s32[] parameter(1)
  %p = bf16[2,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[8]{0} parameter(2)
  %one = bf16[1,8,4]{2,1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,8,4}
  ROOT %y = bf16[4]{0} custom-call(%one, %x)
}

%layer (t: (s32[], bf16[2,8,4], bf16[2,8])) -> (s32[], bf16[2,8,4]) {
  %t = (s32[], bf16[2,8,4]{2,1,0}, bf16[2,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%t), index=0
  %w = bf16[2,8,4]{2,1,0} get-tuple-element(%t), index=1
  %c = bf16[2,8]{1,0} get-tuple-element(%t), index=2
  %x.1 = bf16[8]{0} copy(%i.1)
  %u = bf16[1,8]{1,0} bitcast(%x.1)
  %d = bf16[2,8]{1,0} dynamic-update-slice(%c, %u, %i.1)
  ROOT %f = bf16[4]{0} fusion(%w, %i.1, %x.1), kind=kLoop, calls=%fused
}

%body (s: s32[]) -> s32[] {
  %s = s32[] parameter(0)
  %loop = (s32[], bf16[2,8,4]{2,1,0}) while(%s), body=%layer, METADATA
}
""".replace("METADATA", 'metadata={op_name="a/blocks/while"}')


def test_what_is_moved_is_counted_from_the_text():
    computations = hlo.read(MODULE)
    # The copy reads 4 bytes and writes 16. The update writes and reads 16. The
    # fusion reads 64 bytes of the stack, 4 and 16, and writes 8.
    each = 4 + 16 + 2 * 16 + 64 + 4 + 16 + 8
    assert hlo.moved(computations, "layer", 2) == each
    assert hlo.moved(computations, "body", 26) == 26 * each
    assert hlo.copied(computations, "body") == 16


# Fusions that view integers in tiles of another height, as on a TPU. The same
# operation as a fusion of its own is a copy.
TILES = """
%tiled (p: s8[4,32,128]) -> s8[4,32,128] {
  %p = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = s8[4,32,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%viewed (p: s8[4,32,128]) -> s8[4,32,128] {
  %p = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %c = s8[4,32,128]{2,1,0:T(8,128)(4,1)} fusion(%p), ALIASED, calls=%tiled
  ROOT %b = s8[4,32,128]{2,1,0} bitcast(%c)
}

%product (p: s8[4,32,128], i: s32[], x: bf16[128]) -> bf16[32] {
  %p = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[128]{0} parameter(2)
  %c = s8[4,32,128]{2,1,0} fusion(%p), kind=kLoop, calls=%viewed
  %one = s8[1,32,128]{2,1,0} dynamic-slice(%c, %i)
  ROOT %y = bf16[32]{0} custom-call(%one, %x)
}

%rows (p: s8[4,32,128], i: s32[2]) -> s8[2,32,128] {
  %p = s8[4,32,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[2] parameter(1)
  ROOT %g = s8[2,32,128]{2,1,0} gather(%p, %i)
}

%reads (p: s8[4,32,128], i: s32[], x: bf16[128], j: s32[2]) -> bf16[32] {
  %p = s8[4,32,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[128]{0} parameter(2)
  %j = s32[2] parameter(3)
  %r = s8[2,32,128]{2,1,0} fusion(%p, %j), kind=kCustom, calls=%rows
  ROOT %y = bf16[32]{0} fusion(%p, %i, %x), kind=kLoop, calls=%product
}

%copies (p: s8[4,32,128]) -> s8[4,32,128] {
  %p = s8[4,32,128]{2,1,0} parameter(0)
  ROOT %c = s8[4,32,128]{2,1,0} fusion(%p), kind=kLoop, calls=%tiled
}
""".replace("ALIASED", "output_to_operand_aliasing={{}: (0, {})}")


def test_another_tiling_within_a_fusion_moves_nothing():
    computations = hlo.read(TILES)
    # Two rows of the table, read and written, and their indices.
    rows = 2 * 2 * 32 * 128 + 8
    # One layer, its index, the tokens, and the output.
    product = 32 * 128 + 4 + 2 * 128 + 2 * 32
    assert hlo.moved(computations, "reads", 4) == rows + product
    assert hlo.copied(computations, "reads") == 0
    assert hlo.moved(computations, "copies", 4) == 2 * 4 * 32 * 128
    assert hlo.copied(computations, "copies") == 4 * 32 * 128


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="JAX's program is compiled"
)
@pytest.mark.skipif(
    not has_compiler(), reason="libtpu is not installed: no TPU compiler"
)
@pytest.mark.parametrize(
    ("quantize", "most"), [((), 1.05), (("int8",), 1.15)], ids=["bf16", "int8"]
)
def test_a_step_reads_the_weights_once(quantize, most):
    program = [sys.executable, "-m", "tests.planning.decode_step"]
    done = subprocess.run(
        [*program, "pali_gemma2_pt_3b_224", "1", *quantize],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] < found["moved"] <= most * found["weights"]
    # A layer's keys are 1/52 of the cache. No copy is nearly as large, so
    # neither the cache nor the embedding table is copied.
    assert found["copied"] < found["cached"] / 200
