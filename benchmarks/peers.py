"""Models of the same sizes in this package, KerasHub and transformers.

Benchmarks import this module for sizes, builders, and measurements of the
machine.
"""

import os
import subprocess
import sys
import time

WIDE = {
    "patch": 14,
    "vision": {"layers": 4, "width": 1152, "heads": 16, "hidden": 4304},
    "text": {
        "vocabulary": 257_152,
        "layers": 4,
        "width": 2304,
        "hidden": 9216,
        "queries": 8,
        "keys": 4,
        "head": 256,
    },
}
# As deep as 3b, but so narrow that compilation takes most of the time.
DEEP = {
    "patch": 14,
    "vision": {"layers": 27, "width": 64, "heads": 4, "hidden": 96},
    "text": {
        "vocabulary": 1024,
        "layers": 26,
        "width": 64,
        "hidden": 96,
        "queries": 4,
        "keys": 2,
        "head": 16,
    },
}


def ours(sizes, image_size, **options):
    """Build this package's backbone with random weights."""
    from keras_paligemma import PaliGemmaBackbone

    vision, text = sizes["vision"], sizes["text"]
    return PaliGemmaBackbone(
        image_size,
        {
            "patch_size": sizes["patch"],
            "num_layers": vision["layers"],
            "hidden_dim": vision["width"],
            "num_heads": vision["heads"],
            "intermediate_dim": vision["hidden"],
        },
        {
            "vocabulary_size": text["vocabulary"],
            "num_layers": text["layers"],
            "hidden_dim": text["width"],
            "intermediate_dim": text["hidden"],
            "num_query_heads": text["queries"],
            "num_key_value_heads": text["keys"],
            "head_dim": text["head"],
            "query_pre_attention_scalar": text["head"],
        },
        **options,
    )


def keras_hub(sizes, image_size):
    """Build KerasHub's backbone with random weights."""
    import keras_hub

    vision, text = sizes["vision"], sizes["text"]
    return keras_hub.models.PaliGemmaBackbone(
        vocabulary_size=text["vocabulary"],
        image_size=image_size,
        num_layers=text["layers"],
        num_query_heads=text["queries"],
        num_key_value_heads=text["keys"],
        hidden_dim=text["width"],
        intermediate_dim=2 * text["hidden"],
        head_dim=text["head"],
        vit_patch_size=sizes["patch"],
        vit_num_heads=vision["heads"],
        vit_hidden_dim=vision["width"],
        vit_num_layers=vision["layers"],
        vit_intermediate_dim=vision["hidden"],
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50,
        final_logit_soft_cap=30,
    )


def transformers(sizes, image_size):
    """Build transformers' model with random weights."""
    import torch
    import transformers as hf

    vision, text = sizes["vision"], sizes["text"]
    config = hf.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": image_size,
            "patch_size": sizes["patch"],
            "hidden_size": vision["width"],
            "intermediate_size": vision["hidden"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "vision_use_head": False,
        },
        text_config={
            "model_type": "gemma2",
            "vocab_size": text["vocabulary"],
            "hidden_size": text["width"],
            "intermediate_size": text["hidden"],
            "num_hidden_layers": text["layers"],
            "head_dim": text["head"],
            "num_attention_heads": text["queries"],
            "num_key_value_heads": text["keys"],
            "query_pre_attn_scalar": text["head"],
        },
        image_token_index=3,
        vocab_size=text["vocabulary"],
        hidden_size=text["width"],
        projection_dim=text["width"],
    )
    torch.set_num_threads(os.cpu_count())
    return hf.PaliGemmaForConditionalGeneration._from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )


def resident():
    """Return the resident bytes of this process."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    raise OSError("This system does not report VmRSS.")


def in_new_process(module, *arguments):
    """Run the measuring part of a benchmark; return its last line of output."""
    process = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(process.stderr[-3000:])
    return process.stdout.splitlines()[-1]


def multiplications_a_second():
    """Measure the highest rate of float32 products by XLA here."""
    import jax

    a = jax.numpy.ones((4096, 4096), "float32")
    return a.shape[0] ** 3 / _least_seconds(jax.numpy.matmul, a, a)


def bytes_a_second():
    """Measure the highest rate at which XLA reads memory here."""
    import jax

    # With one row, only reading the matrix limits the product.
    a = jax.numpy.ones((1, 8192), "float32")
    b = jax.numpy.ones((8192, 16384), "float32")
    return b.nbytes / _least_seconds(jax.numpy.matmul, a, b)


def _least_seconds(function, *arguments):
    import jax

    compiled = jax.jit(function)
    compiled(*arguments).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        compiled(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
