"""Compiled HLO to what devices send each other. Called by `pod_compile`."""

import collections
import math
import re

KINDS = (
    *("all-gather", "all-reduce", "all-to-all", "collective-permute"),
    *("ragged-all-to-all", "reduce-scatter"),
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8}


def count(text: str) -> dict[str, tuple[int, int]]:
    """What a chip gets from others in a step, by kind: how often, and bytes.

    Loops count as often as the compiler knows them to run; rounds of exchange, which hang on the data, once.

    Args:
        text: the compiled module's HLO.
    """
    bodies = {}
    for block in re.split(r"\n(?=\S)", text):
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", block):
            bodies[header[1]] = block
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)[1]
    total = collections.defaultdict(lambda: [0, 0])
    kinds = "|".join(KINDS)

    def visit(name, times):
        for line in bodies[name].splitlines()[1:]:
            if found := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
                total[found[2]][0] += times
                total[found[2]][1] += times * _bytes(found[1], bool(found[3]))
            again = _trips(line, bodies)
            called = re.findall(
                r"(?:body|to_apply|calls|_computation)=%?([\w.\-]+)", line
            )
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                called += re.findall(r"[\w.\-]+", branches)
            for callee in called:
                if callee in bodies:
                    visit(callee, times * again)

    visit(entry, 1)
    return {kind: tuple(total[kind]) for kind in sorted(total)}


def _trips(line, bodies):
    """How often a loop runs: what the compiler says, or the only number that its condition compares with; else 1."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
    limits = re.findall(
        r"= s32\[\]\S* constant\((\d+)\)", bodies[condition[1]] if condition else ""
    )
    return int(limits[0]) if len(limits) == 1 else 1


def _bytes(shape, is_start):
    """Of the result; a start's result holds its operands first, and is as long as those and the result."""
    parts = [
        BYTES[dtype] * math.prod(int(n) for n in sizes.split(",") if n)
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in BYTES
    ]
    return max(parts, default=0) if is_start else sum(parts)
