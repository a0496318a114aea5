"""Does generating fit, how is it best laid out, and on how few chips?"""

import contextlib
import math

from keras_paligemma.distribution import machines
from keras_paligemma.distribution.job import GIB
from keras_paligemma.distribution.job import layouts_of
from keras_paligemma.distribution.layouts import Layout
from keras_paligemma.distribution.layouts import chip_bytes
from keras_paligemma.distribution.plan import ROOM
from keras_paligemma.distribution.plan import compiler_for
from keras_paligemma.distribution.plan import loading
from keras_paligemma.distribution.plan import none_left
from keras_paligemma.distribution.plan import outcome
from keras_paligemma.distribution.plan import source_of
from keras_paligemma.distribution.plan import split_lines


def make_generation_plan(
    job, machine, layout=None, compiler=None, smallest=True
):
    """Find the fastest layout in which `generate` fits.

    Prefill and decoding are one program, which is compiled as `generate` runs
    it, of the whole batch and the longest answers.

    Args:
        job: `Job`; `batch_size` prompts are answered at a time.
        machine: str, see `machines.find`.
        layout: str such as "tensor 1x8" to ask of that one alone.
        compiler: bool, ask the compiler; where there is one if `None`.
        smallest: bool, look for the smallest slice too.

    Returns:
        Dict as of `make_plan`; `best` has `prefill_gib`, what the first token
        alone needs, beside `hbm_gib`, and bounds of prefill and decoding.

    Raises:
        ValueError: a machine or layout that does not exist.
    """
    machine = machines.find(machine)
    compiler = compiler_for(machine, compiler)
    backbone, _ = job.model()
    layouts = candidates(job, machine, backbone)
    chosen = [one for one in layouts if layout in (None, str(one))]
    if not chosen:
        raise none_left(job, machine, layout, "none", layouts)
    tried, best, found = [], None, None
    with compiler or contextlib.nullcontext():
        for one in chosen:
            tried.append(_row(job, machine, one, backbone, compiler))
            if tried[-1]["fits"]:
                best = tried[-1]
                if compiler:
                    best["prefill_gib"] = _prefill(compiler, job, machine, one)
                break
        for other in machines.larger(machine) if smallest else ():
            least = min(
                candidates(job, other, backbone),
                key=lambda one: sum(memory(job, one, backbone).values()),
            )
            if _row(job, other, least, backbone, compiler)["fits"]:
                found = other.name
                break
    result = outcome(job, machine, compiler, best, tried, found)
    if best is not None:
        used = next(one for one in chosen if str(one) == best["layout"])
        lines = loading(job, used, None)
        lines += [
            "model.generate(",
            '    {"images": pictures, "prompts": prompts}',
            ")",
        ]
        result["code"] = "\n".join(lines)
    return result


def candidates(job, machine, backbone):
    """List the layouts that a machine allows, the fastest bound first."""

    def slowness(layout):
        return sum(bounds(job, layout, machine, backbone).values())

    return sorted(layouts_of(machine.chips), key=slowness)


def memory(job, layout, backbone):
    """Split the memory of a chip, by arithmetic.

    Weights and the cache are exact, what one block holds is rough.

    Args:
        job: `Job`.
        layout: `Layout`.
        backbone: `PaliGemmaBackbone` without values.

    Returns:
        Dict of "weights", "cache" and "activations" to bytes.
    """
    text = backbone.text_config
    patches = backbone.vision_config.num_image_tokens(backbone.image_size)
    tokens = patches + job.prompt_length
    split = layout.group if layout.strategy in ("tensor", "both") else 1
    heads = text.num_key_value_heads
    heads //= split if heads % split == 0 else 1
    cached = tokens + job.response_length - 1
    cache = 2 * text.num_layers * cached * heads * text.head_dim * 2
    wide = 2 * text.hidden_dim + 2 * text.num_query_heads * text.head_dim
    wide += 2 * text.intermediate_dim
    # Of one block: what goes through it, and its attention's logits.
    block = 2 * tokens * wide + 4 * text.num_query_heads * tokens**2
    logits = 2 * 4 * text.vocabulary_size
    return {
        "weights": chip_bytes(layout, backbone.variables),
        "cache": job.batch_size * cache,
        "activations": job.batch_size * (block + logits) // split,
    }


def bounds(job, layout, machine, backbone):
    """Bound the time of a batch of answers from below.

    Args:
        job: `Job`.
        layout: `Layout`.
        machine: `machines.Machine`.
        backbone: `PaliGemmaBackbone` without values.

    Returns:
        Dict of str to seconds: "prefill", by arithmetic alone, and "decode",
        by the weights that each token reads or receives.
    """
    patches = backbone.vision_config.num_image_tokens(backbone.image_size)
    kernels = [
        math.prod(one.shape)
        for one in backbone.text_decoder.blocks.variables
        if one.path.endswith("kernel")
    ]
    work = 2 * (patches + job.prompt_length) * sum(kernels)
    whole = chip_bytes(Layout("data"), backbone.variables)
    split = layout.group if layout.strategy in ("tensor", "both") else 1
    sharers = {"weights": layout.group, "both": layout.groups}
    sharing = sharers.get(layout.strategy, 1)
    reads = whole / split / machine.bandwidth
    receives = whole / split * (1 - 1 / sharing) / machine.link
    return {
        "prefill": job.batch_size * work / (machine.chips * machine.flops),
        "decode": job.response_length * max(reads, receives),
    }


def _row(job, machine, layout, backbone, compiler):
    """Judge one layout: a dict of plain values."""
    split = memory(job, layout, backbone)
    together, limit = sum(split.values()), machine.memory * GIB
    fits, source = together < ROOM * limit, "estimate"
    if compiler and split["weights"] + split["cache"] < limit:
        found = compiler.compile(
            job, layout, None, machine.topology, job.response_length
        )
        together, source = found["together"] or together, "compiler"
        fits = found["fits"] and together <= limit
        if found["fits"]:
            rest = found["together"] - found["code"] - split["weights"]
            split["activations"] = max(0, rest - split["cache"])
            split["code"] = found["code"]
    return {
        "fits": fits,
        "layout": str(layout),
        "hbm_gib": round(together / GIB, 3),
        "source": source,
        "split_gib": {
            name: round(size / GIB, 3) for name, size in split.items()
        },
        "bounds_s": {
            name: round(seconds, 4)
            for name, seconds in bounds(job, layout, machine, backbone).items()
        },
    }


def _prefill(compiler, job, machine, layout):
    found = compiler.compile(job, layout, None, machine.topology, 1)
    return round(found["together"] / GIB, 3)


def show(result):
    """Write a plan as text: a str to print."""
    job = result["job"]
    lines = [
        f"{job['preset']} answers {job['batch_size']} prompts on "
        f"{result['slice']}, {result['hbm_limit_gib']} GiB a chip, by "
        f"{source_of(result)}",
        "",
        f"{'layout':<14}{'GiB':>8}{'prefill':>10}{'decode':>9}"
        "   bounds in ms, not predictions",
    ]
    for row in result["tried"]:
        prefill, decode = (1e3 * one for one in row["bounds_s"].values())
        fits = "fits" if row["fits"] else "does not fit"
        lines.append(
            f"{row['layout']:<14}{row['hbm_gib']:>8.2f}{prefill:>10.1f}"
            f"{decode:>9.1f}   {fits}"
        )
    best = result["best"]
    if best:
        lines += split_lines(best)
        if "prefill_gib" in best:
            lines.append(f"the first token alone: {best['prefill_gib']} GiB")
    else:
        lines += ["", "does not fit. Expected: fewer prompts, or low bits."]
    if result["smallest"]:
        lines.append(f"smallest that fits: {result['smallest']}")
    if best:
        lines += ["", result["code"]]
    return "\n".join(lines)
