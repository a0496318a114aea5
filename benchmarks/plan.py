"""Compute HBM per chip by the TPU's compiler: `python -m benchmarks.plan`.

Compiles the step of `fit` for a TPU v5e, and prints a table with the target and
KerasHub 0.32. By default, LoRA has rank 8 on the decoder's q and v, in
bfloat16. No TPU is needed: `pip install "keras_paligemma[plan]"` on Linux
x86-64. Where remat "block" misses the target, "pair" is compiled too, which
stores half as much. A compilation takes about 15 s. `--only 28b` selects the
rows with that name.
"""

import argparse

from keras_paligemma.planning import machines
from keras_paligemma.planning.compiled import Compiler
from keras_paligemma.planning.job import Job
from keras_paligemma.planning.planner import GIB
from keras_paligemma.sharding.layouts import Layout

ATTENTION = ("query", "value")
# Model, batch, text tokens, chips, low bits or "full", target GiB, and
# KerasHub's measured GiB or the reason why there is no number. Cases without a
# target must fit.
CASES = (
    ("3b_224", 8, 128, 1, None, 6.9, "14.3"),
    ("3b_448", 8, 128, 1, None, 8.5, "does not fit"),
    ("3b_448", 32, 128, 1, None, None, ""),
    ("3b_224", 8, 128, 8, None, 1.25, "4.1"),
    ("3b_448", 32, 512, 8, None, 3.0, "does not fit"),
    ("10b_224", 8, 128, 4, None, 5.3, ""),
    ("10b_448", 8, 128, 4, None, 6.2, ""),
    ("10b_448", 8, 512, 8, None, 4.2, "does not fit"),
    ("28b_224", 8, 128, 4, None, 14.3, ""),
    ("28b_224", 8, 128, 8, None, 9.2, ""),
    ("28b_448", 8, 128, 8, None, 10.2, ""),
    ("10b_224", 8, 128, 1, "int8", 11.4, ""),
    ("28b_448", 8, 128, 4, "int8", 9.4, ""),
    ("10b_448", 4, 128, 1, "int4", 7.7, ""),
    ("28b_224", 8, 128, 4, "int4", 4.5, ""),
    ("28b_224", 1, 128, 1, "int4", 14.2, ""),
    ("28b_448", 1, 128, 1, "int4", 15.1, ""),
    ("3b_224", 32, 128, 8, "full", 5.4, ""),
)


def layouts(job, chips):
    """List ways to shard the weights over all chips."""
    if chips == 1:
        return [Layout("data")]
    # Each chip gets a part of the batch where possible. Otherwise the work of
    # each example is split.
    known = [Layout("weights", 1, chips), Layout("tensor", 1, chips)]
    return [layout for layout in known if job.batch_size % layout.replicas == 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    print("| step | chips | layout | remat | GiB a chip | target | KerasHub |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with Compiler() as compiler:
        for size, batch, tokens, chips, kind, target, theirs in CASES:
            name = f"{size}, batch {batch}, {tokens} tokens"
            name += {None: "", "full": ", all weights"}.get(kind, f", {kind}")
            if only not in name:
                continue
            # Half of 128 text tokens are response tokens, and also half of 512.
            job = Job(
                f"pali_gemma2_pt_{size}",
                batch,
                tokens // 2,
                tokens // 2,
                0 if kind == "full" else 8,
                None if kind == "full" else ATTENTION,
                None if kind == "full" else kind,
            )
            topology = machines.find(f"v5e-{chips}").topology
            memory = machines.find(f"v5e-{chips}").memory
            found = {}
            for remat in ("block", "pair"):
                for layout in layouts(job, chips):
                    told = compiler.compile(job, layout, remat, topology)
                    if told["fits"]:
                        found[layout, remat] = told["together"] / GIB
                if found and min(found.values()) <= (target or memory):
                    break
            layout, remat, shown = "none", "", "does not fit"
            if found:
                layout, remat = min(found, key=found.get)
                gib = found[layout, remat]
                shown = f"{gib:.2f}"
                if gib > memory:
                    shown += ", more than there is"
            wanted = "fits" if target is None else f"≤ {target}"
            print(
                f"| {name} | {chips} | {layout} | {remat} | {shown} | "
                f"{wanted} | {theirs} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
