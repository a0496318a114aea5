"""Memory of training steps and answers on a v5e chip, by its compiler.

`python -m tests.planning.hbm_budgets` writes the table that tests compare with,
`hbm_budgets.json`. Run it after a change that needs less memory, or after one
that is meant to need more. It needs `keras_paligemma[plan]` on Linux x86-64,
and takes a minute.
"""

import json
import math
from pathlib import Path

from keras_paligemma.planning import machines
from keras_paligemma.planning.compiled import Compiler
from keras_paligemma.planning.job import Job
from keras_paligemma.planning.planner import GIB
from keras_paligemma.sharding.layouts import Layout

TABLE = Path(__file__).with_suffix(".json")
ATTENTION = ("query", "value")
# Job, slice, layout, and remat or "answers". The plans cover one chip, sharded
# weights, and quantized weights. The large batches of pictures run their
# prefill in groups, one with each cache dtype.
PLANS = (
    (
        Job("pali_gemma2_pt_3b_224", lora_targets=ATTENTION),
        *("v5e-1", Layout("data"), "block"),
    ),
    (
        Job("pali_gemma2_pt_3b_448", lora_targets=ATTENTION),
        *("v5e-8", Layout("weights", 1, 8), "block"),
    ),
    (
        Job("pali_gemma2_pt_10b_224", batch_size=1, quantize="int4"),
        *("v5e-1", Layout("data"), "block"),
    ),
    (
        Job("pali_gemma2_pt_3b_448", batch_size=32, response_length=32),
        *("v5e-1", Layout("data"), "answers"),
    ),
    (
        Job(
            "pali_gemma2_pt_3b_448",
            batch_size=64,
            response_length=32,
            cache_dtype="int8",
        ),
        *("v5e-1", Layout("data"), "answers"),
    ),
)


def compile_plans():
    """Compile all plans; return a dict of description to GiB per chip."""
    found = {}
    with Compiler() as compiler:
        for job, slice_name, layout, remat in PLANS:
            topology = machines.find(slice_name).topology
            answers = remat == "answers"
            responses = job.response_length if answers else None
            step = compiler.compile(job, layout, remat, topology, responses)
            words = [job.preset, slice_name, str(layout)]
            words += ["answers" if answers else f"remat {remat}"]
            words += [f"batch {job.batch_size}"]
            words += [job.quantize] if job.quantize else []
            words += [f"cache {job.cache_dtype}"] if job.cache_dtype else []
            found[", ".join(words)] = (
                step["together"] / GIB if step["fits"] else math.inf
            )
    return found


def main():
    # Rounded up to the next hundredth, so that the measured value fits.
    table = {
        name: math.ceil(gib * 100) / 100
        for name, gib in compile_plans().items()
    }
    TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
