#!/usr/bin/env bash
# The tests that need JAX and the package's own extras, not every peer that
# `make test` compares with: for versions other than those of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
export KERAS_BACKEND=jax JAX_PLATFORMS=cpu OMP_NUM_THREADS=1
# Not all that the Makefile sets: XLA ends on flags that it does not know, and
# JAX 0.12 knows no xla_cpu_use_fusion_emitters.
export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_enable_concurrency_optimized_scheduler=false"
# Warnings of libraries that are older than others: not ours to mend.
python -m pytest -n "${PROCESSES:-2}" \
    -W "ignore:Protobuf gencode:UserWarning" \
    -W "ignore:'click:DeprecationWarning" \
    tests/test_import.py tests/test_config.py tests/test_presets.py \
    tests/test_downloads.py tests/test_cli.py tests/test_demo.py \
    tests/test_docs.py tests/test_examples.py tests/test_wheel.py \
    tests/layers tests/quantization tests/tuning tests/data tests/tasks \
    tests/preprocessing tests/training tests/models/test_backbone.py \
    tests/models/test_causal_lm.py tests/models/test_quantized.py \
    tests/checkpoints tests/sharding/test_layouts.py \
    --ignore=tests/data/test_other_libraries.py \
    --ignore=tests/tasks/test_detections.py -k "not pytorch" "$@"
