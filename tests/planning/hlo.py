"""Bytes that a compiled program reads and writes, computed from its text."""

import re
from typing import NamedTuple

import numpy as np

BITS = {
    **dict.fromkeys(("pred", "s8", "u8"), 8),
    **dict.fromkeys(("s4", "u4"), 4),
    **dict.fromkeys(("bf16", "s16", "u16"), 16),
    **dict.fromkeys(("f32", "s32", "u32"), 32),
}
# Operations that move no data.
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
    """Return a dict of the names of computations to their instructions."""
    computations, body = {}, []
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            body = computations[header[1]] = []
        found = re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line)
        if not found:
            continue
        # Layouts may contain parentheses, and tuple types do.
        rest = re.sub(r"\{[^{}]*\}", "", found[2].split(", metadata=")[0])
        kind = re.match(r"(\([^()]*\)|\S+) ([\w-]+)\(([^()]*)\)", rest)
        source = re.search(r'op_name="([^"]*)"', line)
        body.append(
            Instruction(
                found[1],
                size_of(kind[1]),
                kind[2],
                # The number of a parameter, or the names of operands.
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

    Of a sliced operand, only the slice counts. Of an operand that is updated in
    place, only the written part counts.

    Args:
        computations: dict, from `read`.
        name: str, one of its keys.
        layers: int, iterations of a loop over layers; other loops count once.
    """
    total, sizes = 0, {}
    for instruction in computations[name]:
        sizes[instruction.name] = instruction.size
        if instruction.operation in FREE:
            continue
        if instruction.operation in ("while", "conditional", "call"):
            parts = [
                moved(computations, two, layers) for two in instruction.called
            ]
            total += sum(parts) * (layers if is_over_layers(instruction) else 1)
        elif instruction.operation == "dynamic-update-slice":
            total += 2 * sizes[instruction.operands[1]]
        elif instruction.operation == "dynamic-slice":
            total += 2 * instruction.size
        else:
            total += instruction.size
            fused = instruction.called and computations[instruction.called[0]]
            for place, operand in enumerate(instruction.operands):
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
    """Follow a parameter through a fusion without counting views.

    An operation that only changes shape or tiling is a view, whether by itself
    or in a nested fusion. Only the bytes that the view's readers use count.

    Returns:
        Set of the names of the views, and the bytes that other operations read
        of them.
    """
    views = {
        instruction.name
        for instruction in fused
        if instruction.operation == "parameter"
        and instruction.operands == [str(place)]
    }
    total = 0
    for instruction in fused:
        if not views & set(instruction.operands):
            continue
        if instruction.operation in ("bitcast", "copy"):
            views.add(instruction.name)
        elif instruction.operation == "dynamic-slice":
            total += instruction.size
        elif (
            instruction.operation == "gather"
            and instruction.operands[1] not in views
        ):
            total += instruction.size
        elif instruction.operation == "fusion":
            inner = computations[instruction.called[0]]
            for number, operand in enumerate(instruction.operands):
                if operand in views:
                    seen, read_bytes = _views(computations, inner, number)
                    total += read_bytes
                    if _outputs(inner) & seen:
                        views.add(instruction.name)
        elif instruction.operation != "tuple":
            total = np.inf
    return views, total


def _outputs(fused):
    """Return the names of a fusion's outputs; its root is its last line."""
    root = fused[-1]
    return set(root.operands if root.operation == "tuple" else [root.name])


def copied(computations, name):
    """Return the bytes of the largest copy in a computation and its loops."""
    sizes = [0]
    for instruction in computations[name]:
        if instruction.operation.startswith("copy"):
            sizes.append(instruction.size)
        elif instruction.operation == "fusion":
            fused = computations[instruction.called[0]]
            sizes += [
                inner.size
                for inner in fused
                if inner.operation == "copy" and inner.name in _outputs(fused)
            ]
        else:
            sizes += [
                copied(computations, called) for called in instruction.called
            ]
    return max(sizes)
