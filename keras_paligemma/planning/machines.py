"""Specifications of chips: memory, arithmetic, and interconnect."""

import dataclasses
import difflib
import re


@dataclasses.dataclass(frozen=True)
class Machine:
    """A number of chips of one kind.

    Args:
        name: str, such as "v5e-8" or "l4x4".
        chips: int, number of chips.
        memory: float, GiB per chip that a program can use.
        flops: float, 16-bit FLOP/s per chip.
        bandwidth: float, bytes/s between a chip and its memory.
        link: float, bytes/s that a chip receives from others.
        topology: str, name for the TPU compiler, or `None`.
    """

    name: str
    chips: int
    memory: float
    flops: float
    bandwidth: float
    link: float
    topology: str | None = None


# Number of chips to the shape of a v5e slice.
V5E = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}
# GiB, FLOP/s, bytes/s of memory, bytes/s received, from vendors' data sheets.
# The v5e's compiler allows 15.75 of 16 GiB.
_CHIPS = {
    "v5e": (15.75, 197e12, 819e9, 200e9),
    "a100-40": (39.5, 312e12, 1555e9, 300e9),
    "a100-80": (79.1, 312e12, 2039e9, 300e9),
    "h100-80": (79.1, 989e12, 3350e9, 450e9),
    "l4": (22.0, 121e12, 300e9, 32e9),
    "t4": (14.6, 65e12, 320e9, 16e9),
}


def find(name):
    """Return the machine with a name.

    Args:
        name: str, such as "v5e-8" or "a100-40"; "l4x4" is four L4 GPUs.

    Returns:
        `Machine`.

    Raises:
        ValueError: the name is unknown; the message has the nearest.

    Example:
        >>> find("v5e-8").topology
        'v5e:2x4'
    """
    slice_of = re.fullmatch(r"v5e-(\d+)", name)
    if slice_of:
        chips = int(slice_of[1])
        if chips not in V5E:
            nearest = min(V5E, key=lambda size: (abs(size - chips), size))
            raise ValueError(
                f"There is no such slice. Received: {name!r}. Expected: "
                f"'v5e-{nearest}', the nearest, or one of "
                f"{[f'v5e-{size}' for size in V5E]}."
            )
        return Machine(name, chips, *_CHIPS["v5e"], f"v5e:{V5E[chips]}")
    gpus = re.fullmatch(r"(.+?)(?:x([1-9][0-9]{0,3}))?", name)
    if gpus and gpus[1] in _CHIPS and gpus[1] != "v5e":
        return Machine(name, int(gpus[2] or 1), *_CHIPS[gpus[1]])
    known = [f"v5e-{size}" for size in V5E] + list(_CHIPS)[1:]
    near = difflib.get_close_matches(name, known, 1, 0.0)
    raise ValueError(
        f"Unknown machine. Received: {name!r}. Expected: {near[0]!r}, the "
        f"nearest, or one of {known}; 'l4x4' are four of a GPU."
    )


def larger(machine):
    """Return all slices by size, or 1, 2, 4, … 64 of a GPU and as many."""
    if machine.topology:
        return [find(f"v5e-{chips}") for chips in V5E]
    kind = machine.name.partition("x")[0]
    counts = sorted({2**i for i in range(7)} | {machine.chips})
    return [find(f"{kind}x{n}" if n > 1 else kind) for n in counts]


# JAX's `device_kind` to GiB per chip.
MEMORY = {
    "TPU v2": 8,
    "TPU v3": 16,
    "TPU v4": 32,
    "TPU v5 lite": 15.75,
    "TPU v5e": 15.75,
    "TPU v5": 95,
    "TPU v5p": 95,
    "TPU v6 lite": 31.25,
    "TPU v6e": 31.25,
}
