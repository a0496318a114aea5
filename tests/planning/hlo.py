"""How many bytes a compiled program reads and writes, from its text."""

import re
from typing import NamedTuple

import numpy as np

BITS = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s4", "u4"), 4),
    **dict.fromkeys(("bf16", "s16", "u16"), 16),
    **dict.fromkeys(("f32", "s32", "u32"), 32),
}
# They move nothing; a `while` is what its body moves.
FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "iota", "partition-id"),
)


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    size: int
    operation: str
    operands: list
    called: list
    source: str


def read(text):
    """Return a dict of names of computations to their instructions."""
    computations, body = {}, []
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            body = computations[header[1]] = []
        found = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line)
        if not found:
            continue
        # Layouts may hold parentheses, types of tuples do.
        rest = re.sub(r"\{[^{}]*\}", "", found[2].split(", metadata=")[0])
        kind = re.match(r"(\([^()]*\)|\S+) ([\w-]+)\(([^()]*)\)", rest)
        source = re.search(r'op_name="([^"]*)"', line)
        body.append(
            Instruction(
                found[1],
                size_of(kind[1]),
                kind[2],
                # Of a parameter its number, of others the names.
                re.findall(r"%([\w.-]+)", kind[3]) or [kind[3]],
                re.findall(r"(?:calls|body|condition)=%([\w.-]+)", rest),
                source[1] if source else "",
            )
        )
    return computations


def is_over_layers(instruction):
    """Return whether an instruction is the loop over a stack's layers."""
    return instruction.operation == "while" and instruction.source.endswith(
        "/blocks/while"
    )


def size_of(type_text):
    """Return the bytes of a type, or of all types of a tuple."""
    return sum(
        int(np.prod([int(n) for n in dims.split(",") if n], dtype="int64"))
        * BITS[kind]
        // 8
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", type_text)
        if kind in BITS
    )


def moved(computations, name, layers):
    """Return the bytes that a computation reads and writes.

    Of an operand that is sliced only, the slice counts; what is written in
    place counts as what is written.

    Args:
        computations: dict of `read`.
        name: str, one of its keys.
        layers: int, how often the loop over layers runs; others count once.
    """
    total, sizes = 0, {}
    for one in computations[name]:
        sizes[one.name] = one.size
        if one.operation in FREE:
            continue
        if one.operation in ("while", "conditional", "call"):
            parts = [moved(computations, two, layers) for two in one.called]
            total += sum(parts) * (layers if is_over_layers(one) else 1)
        elif one.operation == "dynamic-update-slice":
            total += 2 * sizes[one.operands[1]]
        elif one.operation == "dynamic-slice":
            total += 2 * one.size
        else:
            total += one.size
            fused = one.called and computations[one.called[0]]
            for place, operand in enumerate(one.operands):
                read_bytes = sizes.get(operand, 0)  # None, or a literal.
                if fused:
                    sliced = _read_of(computations, fused, place)
                    read_bytes = min(read_bytes, sliced)
                total += read_bytes
    return total


def _read_of(computations, fused, place):
    """Return the bytes that a fusion reads of its parameter."""
    views, total = _views(computations, fused, place)
    return np.inf if _outputs(fused) & views else total


def _views(computations, fused, place):
    """Follow a parameter through a fusion, where nothing is written.

    What only changes shape or tiling, by itself or in a fusion within the
    fusion, is a view: what reads it decides how much of it is read.

    Returns:
        Set of the names of the views, and the bytes that others read of them.
    """
    views = {
        one.name
        for one in fused
        if one.operation == "parameter" and one.operands == [str(place)]
    }
    total = 0
    for one in fused:
        if not views & set(one.operands):
            continue
        if one.operation in ("bitcast", "copy"):
            views.add(one.name)
        elif one.operation == "dynamic-slice":
            total += one.size
        elif one.operation == "gather" and one.operands[1] not in views:
            total += one.size
        elif one.operation == "fusion":
            inner = computations[one.called[0]]
            for number, operand in enumerate(one.operands):
                if operand in views:
                    seen, read_bytes = _views(computations, inner, number)
                    total += read_bytes
                    if _outputs(inner) & seen:
                        views.add(one.name)
        elif one.operation != "tuple":
            total = np.inf
    return views, total


def _outputs(fused):
    """Return the names of what a fusion writes; its root is its last line."""
    root = fused[-1]
    return set(root.operands if root.operation == "tuple" else [root.name])


def copied(computations, name):
    """Return the bytes of the largest copy in a computation and its loops."""
    sizes = [0]
    for one in computations[name]:
        if one.operation.startswith("copy"):
            sizes.append(one.size)
        elif one.operation == "fusion":
            fused = computations[one.called[0]]
            sizes += [
                two.size
                for two in fused
                if two.operation == "copy" and two.name in _outputs(fused)
            ]
        else:
            sizes += [copied(computations, called) for called in one.called]
    return max(sizes)
