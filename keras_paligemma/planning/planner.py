"""Find whether a job fits, its best layout, and the smallest machine."""

import contextlib
import dataclasses
import difflib
from typing import Any

from keras_paligemma.layers.remat import REMATS
from keras_paligemma.planning import machines
from keras_paligemma.planning.compiled import Compiler
from keras_paligemma.planning.compiled import has_compiler
from keras_paligemma.planning.generation import Generation
from keras_paligemma.planning.job import Job
from keras_paligemma.planning.job import layouts_of
from keras_paligemma.planning.training import Training
from keras_paligemma.sharding.layouts import check_batch

GIB = 2**30
# Fraction of a chip's memory that an estimate may fill; the rest is for what
# compilers need and the estimate does not include.
ESTIMATE_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether one candidate fits, and its memory and time.

    Args:
        layout: str, such as "weights 1x8".
        remat: str, "none" for none; `None` if nothing is trained.
        fits: bool.
        source: str, "compiler" or "estimate".
        hbm_gib: float, GiB per chip.
        split_gib: dict of purposes to floats, GiB per chip.
        bounds_s: dict of names to floats, lower bounds of time in seconds.
        flops: float, FLOP of one step on all chips, or `None`.
    """

    layout: str
    remat: str | None
    fits: bool
    source: str
    hbm_gib: float
    split_gib: dict[str, float]
    bounds_s: dict[str, float]
    flops: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidates tried for a job on a machine, and the best of them.

    `str(plan)` is the text that the command line prints.

    Args:
        title: str, beginning of that text.
        job: `Job`.
        slice: str, name of the machine.
        hbm_limit_gib: float, GiB per chip.
        source: str, "compiler" or "estimate".
        tried: tuple of `Verdict`, lowest bound of time first.
        best: `Verdict`, the first of `tried` that fits, or `None`.
        details_gib: dict of names to floats, further memory of the best, GiB
            per chip.
        smallest: str, smallest machine on which the job fits, or `None`.
        code: str, Python code that uses the best, or `None`.
        advice: str, what would fit, or `None` if the job does.
    """

    title: str
    job: Job
    slice: str
    hbm_limit_gib: float
    source: str
    tried: tuple[Verdict, ...]
    best: Verdict | None
    details_gib: dict[str, float]
    smallest: str | None
    code: str | None
    advice: str | None

    @property
    def fits(self) -> bool:
        """Whether any candidate fits."""
        return self.best is not None

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain values, as `plan --json` prints them."""
        return {"fits": self.fits} | dataclasses.asdict(self)

    def __str__(self):
        decided = "by the TPU's compiler"
        if self.source != "compiler":
            decided = "by arithmetic, not a compiler: an estimate"
        lines = [
            f"{self.title} {self.slice}, {self.hbm_limit_gib} GiB a chip, "
            f"{decided}",
            "",
            *self._table(),
        ]
        if self.best is not None:
            lines += [
                "",
                f"fits: {self.best.hbm_gib} GiB a chip, of which",
                *(
                    f"  {name:<26}{size:>8.3f}"
                    for name, size in self.best.split_gib.items()
                ),
            ]
            if self.best.flops is not None:
                lines.append(f"{self.best.flops / 1e12:.1f} TFLOP a step")
            lines += [
                f"the {name} alone: {size} GiB"
                for name, size in self.details_gib.items()
            ]
        else:
            lines += ["", f"does not fit. {self.advice}"]
        if self.smallest:
            lines.append(f"smallest that fits: {self.smallest}")
        if self.fits:
            lines += ["", self.code]
        return "\n".join(lines)

    def _table(self):
        names = list(self.tried[0].bounds_s)
        remat = self.tried[0].remat is not None
        yield (
            f"{'layout':<14}"
            + (f"{'remat':<7}" if remat else "")
            + f"{'GiB':>8}"
            + "".join(f"{name:>13}" for name in names)
            + "   bounds in ms, not predictions"
        )
        for row in self.tried:
            marks = "fits" if row.fits else "does not fit"
            if row.source != self.source:
                marks += ", by arithmetic"
            yield (
                f"{row.layout:<14}"
                + (f"{row.remat:<7}" if remat else "")
                + f"{row.hbm_gib:>8.2f}"
                + "".join(
                    f"{1e3 * row.bounds_s[name]:>13.1f}" for name in names
                )
                + f"   {marks}"
            )


def make_plan(
    job: Job,
    machine: str,
    layout: str | None = None,
    remat: str = "any",
    compiler: bool | None = None,
    smallest: bool = True,
    generate: bool = False,
) -> Plan:
    """Find the fastest layout that fits, with the machine's own compiler.

    Candidates are tried in the order of their lower bounds of time, and the
    first that fits is the best. Those whose weights alone do not fit are not
    compiled. Without libtpu, and for GPUs, an estimate decides.

    Args:
        job: `Job`.
        machine: str, a slice such as "v5e-8", a GPU ("a100-40", "a100-80",
            "h100-80", "l4", "t4") or several of one, such as "l4x4".
        layout: str such as "weights 1x8", the only layout to try, or `None`.
        remat: str, the only `remat` to try: "none", "dots", "block" or "pair";
            "any" tries all. Ignored for generation.
        compiler: bool, whether to use the compiler; `None` uses it if it is
            installed. It is never used without libtpu or for GPUs.
        smallest: bool, whether to find the smallest machine too.
        generate: bool, plan `generate` instead of a step of `fit`.

    Returns:
        `Plan`.

    Raises:
        ValueError: a machine, layout or `remat` that does not exist.
        ImportError: the installed JAX does not match the compiler.

    Example:
        >>> job = Job("pali_gemma2_pt_3b_224")
        >>> make_plan(job, "v5e-8", compiler=False).best.layout
        'data 8x1'
    """
    hardware = machines.find(machine)
    usable = hardware.topology is not None and has_compiler()
    process = Compiler() if usable and compiler is not False else None
    workload = Generation(job) if generate else Training(job)
    known = workload.candidates(hardware)
    chosen = [
        candidate
        for candidate in known
        if layout in (None, str(candidate.layout))
        and (generate or remat in ("any", candidate.remat or "none"))
    ]
    if not chosen:
        raise _no_candidate(job, hardware, layout, remat, known)
    details, found = {}, None
    with process or contextlib.nullcontext():
        judge = _Judge(workload, process)
        best, tried = judge.first_that_fits(hardware, chosen)
        if best is not None and process:
            details = workload.details(process, best, hardware)
        if smallest:
            found = judge.smallest(hardware)
    verdict = tried[-1] if best is not None else None
    return Plan(
        title=workload.title(),
        job=job,
        slice=hardware.name,
        hbm_limit_gib=hardware.memory,
        source="compiler" if process else "estimate",
        tried=tuple(tried),
        best=verdict,
        details_gib=_in_gib(details),
        smallest=found,
        code=workload.code(best) if best is not None else None,
        advice=_advice(workload, tried, found) if best is None else None,
    )


class _Judge:
    """Decides whether candidates fit, and remembers each verdict."""

    def __init__(self, workload, compiler):
        self.workload = workload
        self.compiler = compiler
        self.verdicts = {}

    def first_that_fits(self, machine, candidates):
        """Return the first candidate that fits, or `None`, and all verdicts."""
        verdicts = []
        for candidate in candidates:
            key = machine.name, candidate
            if key not in self.verdicts:
                self.verdicts[key] = self._judge(machine, candidate)
            verdicts.append(self.verdicts[key])
            if verdicts[-1].fits:
                return candidate, verdicts
        return None, verdicts

    def smallest(self, machine):
        """Return the name of the smallest slice that fits, or `None`."""
        for other in machines.larger(machine):
            candidates = self.workload.thriftiest(other)
            if self.first_that_fits(other, candidates)[0] is not None:
                return other.name
        return None

    def _judge(self, machine, candidate):
        workload = self.workload
        split = workload.memory(candidate)
        limit = machine.memory * GIB
        # All are exact except the last, the activations.
        *exact, _ = split.values()
        together, source = sum(split.values()), "estimate"
        fits = together < ESTIMATE_SHARE * limit
        believed = together >= workload.believed_beyond * limit
        if self.compiler and sum(exact) < limit and not believed:
            found = workload.compile(self.compiler, candidate, machine)
            together, source = found["together"] or together, "compiler"
            # Some programs compile although they exceed the chip's memory.
            fits = found["fits"] and together <= limit
            if found["fits"]:
                rest = found["together"] - found["code"] - sum(exact)
                split["activations"] = max(0, rest)
                split["code"] = found["code"]
        return Verdict(
            layout=str(candidate.layout),
            remat=(candidate.remat or "none") if workload.trains else None,
            fits=fits,
            source=source,
            hbm_gib=round(together / GIB, 3),
            split_gib=_in_gib(split),
            bounds_s={
                name: round(seconds, 4)
                for name, seconds in workload.bounds(candidate, machine).items()
            },
            flops=workload.flops(candidate.remat),
        )


def _in_gib(sizes):
    return {name: round(size / GIB, 3) for name, size in sizes.items()}


def _advice(workload, tried, smallest):
    """Return advice on what would fit instead."""
    least = min(tried, key=lambda verdict: verdict.hbm_gib)
    remat = f" and remat {least.remat}" if least.remat else ""
    sentences = [
        f"The least is {least.hbm_gib} GiB a chip, with {least.layout}{remat}."
    ]
    if smallest:
        sentences.append(f"It fits on {smallest}.")
    return " ".join([*sentences, workload.advice()])


def _no_candidate(job, machine, layout, remat, known):
    """Return the error for a layout or `remat` that does not exist."""
    if remat is None or remat not in ("any", "none", *REMATS):
        return ValueError(
            f"Unknown remat. Received: {remat!r}. Expected: 'none', 'dots', "
            "'block' or 'pair'."
        )
    layouts = {candidate.layout for candidate in known}
    for other in layouts_of(machine.chips):
        if str(other) == layout and other not in layouts:
            check_batch(job.batch_size, other.replicas, other)
    names = sorted(map(str, layouts))
    near = difflib.get_close_matches(str(layout), names, 1, 0.0)
    return ValueError(
        f"There is no such layout of {machine.chips} chips. Received: "
        f"layout={layout!r}. Expected: {near[0]!r}, the nearest, or one of "
        f"{names}."
    )
