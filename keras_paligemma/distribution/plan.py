"""Does a fine-tune fit, how is it best laid out, and on how few chips?"""

import contextlib
import dataclasses
import difflib

from keras_paligemma.distribution import machines
from keras_paligemma.distribution.compiled import Compiler
from keras_paligemma.distribution.compiled import has_compiler
from keras_paligemma.distribution.job import GIB
from keras_paligemma.distribution.job import bounds
from keras_paligemma.distribution.job import candidates
from keras_paligemma.distribution.job import chip_memory
from keras_paligemma.distribution.job import flops
from keras_paligemma.distribution.job import layouts_of
from keras_paligemma.distribution.layouts import check_batch
from keras_paligemma.layers.remat import REMATS

# Of what arithmetic says, the share of the memory that it may fill: compilers
# need room that it does not see.
ROOM = 0.9


def make_plan(
    job, machine, layout=None, remat="any", compiler=None, smallest=True
):
    """Find the fastest layout that fits, by the machine's own compiler.

    Layouts and remats are tried in the order of their bounds of time, so that
    the first that fits is the one to use. What cannot fit by its weights alone
    is not compiled. Without libtpu, and for GPUs, arithmetic decides.

    Args:
        job: `Job`.
        machine: str, see `machines.find`.
        layout: str such as "weights 1x8" to ask of that one alone.
        remat: one of `layers.remat.REMATS` to ask of that one alone.
        compiler: bool, ask the compiler; where there is one if `None`.
        smallest: bool, look for the smallest slice too.

    Returns:
        Dict of plain values: `fits`, `source` ("compiler" or "estimate"),
        `best` with `layout`, `remat`, `hbm_gib`, `split_gib`, `flops`,
        `bounds_s`; `tried`; `smallest`; `code`; `advice`.

    Raises:
        ValueError: a machine or layout that does not exist.
    """
    machine = machines.find(machine)
    compiler = compiler_for(machine, compiler)
    models = {one: job.model(one) for one in REMATS}
    pairs = candidates(job, machine, models["block"])
    if layout is not None:
        pairs = [pair for pair in pairs if str(pair[0]) == layout]
    if remat != "any":
        kept = None if remat == "none" else remat
        pairs = [pair for pair in pairs if pair[1] == kept]
    if not pairs:
        known = candidates(job, machine, models["block"])
        raise none_left(job, machine, layout, remat, [one for one, _ in known])
    with compiler or contextlib.nullcontext():
        judge = _Judge(job, models, compiler)
        best, tried = judge.first_that_fits(machine, pairs)
        found = judge.smallest(machine) if smallest else None
    result = outcome(job, machine, compiler, best, tried, found)
    if best is not None:
        chosen = next(one for one, _ in pairs if str(one) == best["layout"])
        result["code"] = paste(job, chosen, best["remat"])
    else:
        result["advice"] = advice(job, tried, found)
    return result


def compiler_for(machine, wanted=None):
    """Give the machine's own compiler, or `None`: arithmetic is to decide.

    Args:
        machine: `Machine`.
        wanted: bool; where there is one if `None`.
    """
    there = machine.topology is not None and has_compiler()
    return Compiler() if there and wanted is not False else None


def outcome(job, machine, compiler, best, tried, smallest):
    """Put what all plans tell into a dict of plain values."""
    return {
        "fits": best is not None,
        "source": "compiler" if compiler else "estimate",
        "job": dataclasses.asdict(job),
        "slice": machine.name,
        "hbm_limit_gib": machine.memory,
        "best": best,
        "tried": tried,
        "smallest": smallest,
    }


def none_left(job, machine, layout, remat, known):
    """Make the error of a wish that no layout meets: names the nearest."""
    if remat not in ("any", "none", *REMATS):
        return ValueError(
            f"Unknown remat. Received: {remat!r}. Expected: 'none', 'dots', "
            "'block' or 'pair'."
        )
    for one in layouts_of(machine.chips):
        if str(one) == layout and one not in known:
            check_batch(job.batch_size, one.replicas, one)
    known = sorted({str(one) for one in known})
    near = difflib.get_close_matches(str(layout), known, 1, 0.0)
    return ValueError(
        f"There is no such layout of {machine.chips} chips. Received: "
        f"layout={layout!r}. Expected: {near[0]!r}, the nearest, or one of "
        f"{known}."
    )


class _Judge:
    """Says of layouts whether they fit, and remembers."""

    def __init__(self, job, models, compiler):
        self.job = job
        self.models = models
        self.compiler = compiler
        self.known = {}

    def first_that_fits(self, machine, pairs):
        """Go through layouts; the first that fits, and all rows so far."""
        rows = []
        for layout, remat in pairs:
            rows.append(self.row(machine, layout, remat))
            if rows[-1]["fits"]:
                return rows[-1], rows
        return None, rows

    def smallest(self, machine):
        """Name the smallest slice on which the job fits, or `None`."""
        for one in machines.larger(machine):
            thrifty = candidates(self.job, one, self.models["pair"])
            thrifty = [pair for pair in thrifty if pair[1] == "pair"]
            # The least memory: all chips share the weights.
            thrifty = sorted(
                thrifty, key=lambda pair: sum(self.estimate(*pair).values())
            )
            if self.first_that_fits(one, thrifty[:2])[0]:
                return one.name
        return None

    def estimate(self, layout, remat):
        return chip_memory(self.job, layout, self.models[remat])

    def row(self, machine, layout, remat):
        """Judge one layout: a dict of plain values."""
        key = machine.name, str(layout), remat
        if key not in self.known:
            self.known[key] = self._judge(machine, layout, remat)
        return self.known[key]

    def _judge(self, machine, layout, remat):
        split = self.estimate(layout, remat)
        limit = machine.memory * GIB
        fixed = sum(list(split.values())[:2])
        together = sum(split.values())
        fits, source = together < ROOM * limit, "estimate"
        # Activations are rough: only what is far from fitting is taken at
        # its word.
        if self.compiler and fixed < limit and together < 1.6 * limit:
            found = self.compiler.compile(
                self.job, layout, remat, machine.topology
            )
            together, source = found["together"] or together, "compiler"
            # Some steps compile that would fill more than the chip has.
            fits = found["fits"] and together <= limit
            if found["fits"]:
                split["activations"] = max(
                    0, found["together"] - fixed - found["code"]
                )
                split["code"] = found["code"]
        model = self.models[remat]
        return {
            "fits": fits,
            "layout": str(layout),
            "remat": remat or "none",
            "hbm_gib": round(together / GIB, 3),
            "source": source,
            "split_gib": {
                name: round(size / GIB, 3) for name, size in split.items()
            },
            "flops": flops(self.job, model[0], remat),
            "bounds_s": {
                name: round(seconds, 4)
                for name, seconds in bounds(
                    self.job, layout, machine, model, remat
                ).items()
            },
        }


def paste(job, layout, remat):
    """Write the settings as code."""
    lines = loading(job, layout, remat)
    lines += [
        "model.compile()",
        f"model.fit(examples, batch_size={job.batch_size})",
    ]
    return "\n".join(lines)


def loading(job, layout, remat):
    """Write as lines of code how the model is loaded."""
    remat = None if remat == "none" else remat
    lines = ["import keras", "import keras_paligemma as kp"]
    if layout.chips > 1:
        lines += [
            "from keras_paligemma.distribution import distribute",
            "",
            "keras.distribution.set_distribution(",
            f'    distribute("{layout.strategy}", '
            f"({layout.groups}, {layout.group}))",
            ")",
        ]
    quantize = f'    quantize="{job.quantize}",\n' if job.quantize else ""
    lines += [
        "model = kp.PaliGemmaCausalLM.from_preset(",
        f'    "{job.preset}",',
        f'    dtype="{job.dtype}",',
        '    form="stacked",',
        f"    remat={remat!r},".replace("'", '"'),
        *quantize.splitlines(),
        f"    prompt_length={job.prompt_length},",
        f"    response_length={job.response_length},",
        ")",
    ]
    if job.lora_rank:
        targets = ""
        if job.lora_targets:
            named = ", ".join(f'"{one}"' for one in job.lora_targets)
            targets = f", targets=[{named}]"
        lines.append(f"model.enable_lora(rank={job.lora_rank}{targets})")
    return lines


def advice(job, tried, smallest):
    """Say what would fit in place of what does not."""
    least = min(tried, key=lambda row: row["hbm_gib"])
    lines = [
        f"The least is {least['hbm_gib']} GiB a chip, with "
        f"{least['layout']} and remat {least['remat']}."
    ]
    if smallest:
        lines.append(f"It fits on {smallest}.")
    if not job.lora_rank:
        lines.append("Adapters (lora_rank=8) need less than a full fine-tune.")
    elif job.quantize != "int4":
        better = "int8" if job.quantize is None else "int4"
        lines.append(f"quantize={better!r} needs less.")
    if job.batch_size > 1:
        lines.append("So does a smaller batch.")
    return " ".join(lines)


def source_of(result):
    """Name who decided: a str for the headline of a plan."""
    if result["source"] == "compiler":
        return "the TPU's compiler"
    return "arithmetic, not a compiler: an estimate"


def split_lines(best):
    """Write how a chip's memory is split, as lines."""
    return [
        "",
        f"fits: {best['hbm_gib']} GiB a chip, of which",
        *(
            f"  {name:<26}{size:>8.3f}"
            for name, size in best["split_gib"].items()
        ),
    ]


def show(result):
    """Write a plan as text: a str to print."""
    lines = [
        f"{result['job']['preset']} on {result['slice']}, "
        f"{result['hbm_limit_gib']} GiB a chip, by {source_of(result)}",
        "",
        f"{'layout':<14}{'remat':<7}{'GiB':>8}{'compute':>10}{'memory':>9}"
        f"{'links':>9}   bounds in ms, not predictions",
    ]
    for row in result["tried"]:
        seconds = [1e3 * one for one in row["bounds_s"].values()]
        marks = "fits" if row["fits"] else "does not fit"
        if row["source"] != result["source"]:
            marks += ", by arithmetic"
        lines.append(
            f"{row['layout']:<14}{row['remat']:<7}{row['hbm_gib']:>8.2f}"
            f"{seconds[0]:>10.1f}{seconds[1]:>9.1f}{seconds[2]:>9.1f}   {marks}"
        )
    if result["best"]:
        best = result["best"]
        lines += split_lines(best)
        lines.append(f"{best['flops'] / 1e12:.1f} TFLOP a step")
    else:
        lines += ["", "does not fit. " + result["advice"]]
    if result["smallest"]:
        lines.append(f"smallest that fits: {result['smallest']}")
    if result["best"]:
        lines += ["", result["code"]]
    return "\n".join(lines)
