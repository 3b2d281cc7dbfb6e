"""Test vectors: a stream's own numbers, bit by bit, and a C function that holds an artefact to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.isa import instruction_set
from fusecell.compiler.backend.target import Target, host_target, target_of
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.exporting.header import Interface
from fusecell.streaming.bound_step import Array, Part
from fusecell.streaming.row_layout import split_row
from fusecell.streaming.stream import Stream

__all__ = ["ReferenceNumbers", "reference_numbers", "selftest_source"]

STEPS, SINGLE_STEPS = 12, 5
"""Steps of a test vector, and how many of them are run one by one, before the rest at once."""


@dataclass(frozen=True)
class ReferenceNumbers:
    """Inputs and what a stream computes from them.

    Attributes:
        inputs, outputs: (steps, rows, size).
        state: all states after the last step, one after the other.
    """

    inputs: Array
    outputs: Array
    state: Array


def reference_numbers(parts: Sequence[Part], rows: int, *, fused: bool) -> ReferenceNumbers | None:
    """Run a stream's parts through :class:`fusecell.Stream`.

    Arguments:
        fused: whether multiply-adds are rounded once.

    Returns:
        The numbers; None if this machine can't compute them, as it has no multiply-add.
    """
    target = _reference_target(fused)
    if target is None:
        return None
    if target != host_target():
        parts = [replace(part, kernel=compile_graph(part.graph, target=target)) for part in parts]
    stream = Stream.of_parts(parts, rows)
    random = np.random.default_rng(0)
    inputs = random.standard_normal((STEPS, rows, parts[0].input_size)).astype(stream.dtype)
    layout = parts[0].row_shapes.input
    outputs = np.stack([_flat(stream.step(split_row(x, layout)), rows) for x in inputs])
    states = stream.state
    state = np.concatenate([value.ravel() for value in states]) if states else np.empty(0, stream.dtype)
    return ReferenceNumbers(inputs, outputs, state)


def _flat(outputs: Any, rows: int) -> Array:
    """Return an output's rows as artefacts have them: several are side by side."""
    several = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    return np.concatenate([value.reshape(rows, -1) for value in several], -1)


def _reference_target(fused: bool) -> Target | None:
    """Return a target of this machine that rounds multiply-adds once, or twice."""
    host = host_target()
    if host.fma == fused:
        return host
    machine = llvm.host()
    isa = instruction_set(machine.triple)
    for level in isa.levels:
        features = isa.features_of(level)
        if machine.features.issuperset(features):
            text = ",".join(f"+{feature}" for feature in features)
            target = target_of(level, text, machine.triple, frozenset(features))
            if target.fma == fused:
                return target
    return None


def selftest_source(interface: Interface, vector: ReferenceNumbers, header: str) -> str:
    """Write the C function ``<prefix>_selftest``; ``header`` is the name of the header's file."""
    p, m, real = interface.prefix, interface.macro, interface.scalar
    single = SINGLE_STEPS
    return f"""\
/* Test vector of {p}: what fusecell.Stream computes, bit by bit.
   {p}_selftest() returns how many values differ, 0 if none, and -1 if memory is not aligned.
   With -D{m}_SELFTEST_MAIN this file is a program whose exit status is 0 if none differ. */
#include "{header}"

#include <stdint.h>

int {p}_selftest(void);

{_table("input_bits", vector.inputs)}
{_table("output_bits", vector.outputs)}
{_table("state_bits", vector.state)}

static int differing(const {real} *values, const {_INTEGER[real]} *bits, size_t count)
{{
    const unsigned char *a = (const unsigned char *)values, *b = (const unsigned char *)bits;
    int different = 0;
    size_t i, byte;
    for (i = 0; i < count; i++) {{
        int same = 1;
        for (byte = 0; byte < sizeof(*values); byte++)
            same &= a[i * sizeof(*values) + byte] == b[i * sizeof(*values) + byte];
        different += !same;
    }}
    return different;
}}

int {p}_selftest(void)
{{
    enum {{ STEPS = {vector.inputs.shape[0]}, SINGLE = {single} }};
    enum {{ X = {m}_ROWS * {m}_INPUT_SIZE, Y = {m}_ROWS * {m}_OUTPUT_SIZE }};
    static {p}_stream stream, other;
    static {real} input[STEPS * X], output[(STEPS - SINGLE) * Y], state[{m}_STATE_SIZE + 1];
    const unsigned char *bytes = (const unsigned char *)input_bits;
    int different = 0, t;
    size_t i;
    for (i = 0; i < sizeof(input); i++)
        ((unsigned char *)input)[i] = bytes[i];
    if ({p}_init(&stream) != 0 || {p}_init(&other) != 0)
        return -1;
    for (t = 0; t < SINGLE; t++) {{
        {p}_step(&stream, input + t * X, output);
        different += differing(output, output_bits + t * Y, Y);
    }}
    /* The rest in another stream, which takes over the state. */
    {p}_get_state(&stream, state);
    {p}_set_state(&other, state);
    {p}_push(&other, STEPS - SINGLE, input + SINGLE * X, output);
    different += differing(output, output_bits + SINGLE * Y, (STEPS - SINGLE) * Y);
    {p}_get_state(&other, state);
    different += differing(state, state_bits, {m}_STATE_SIZE);
    /* And the first step again. */
    {p}_reset(&other);
    {p}_step(&other, input, output);
    return different + differing(output, output_bits, Y);
}}

#ifdef {m}_SELFTEST_MAIN
int main(void)
{{
    return {p}_selftest() != 0;
}}
#endif
"""


_INTEGER = {"float": "uint32_t", "double": "uint64_t"}


def _table(name: str, values: Array) -> str:
    """Write the bits of numbers as an array of integers."""
    kind = "uint32_t" if values.dtype.itemsize == 4 else "uint64_t"
    bits = np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").ravel().tolist() or [0]
    digits, suffix = 2 * values.dtype.itemsize, "u" if values.dtype.itemsize == 4 else "ull"
    lines = []
    for start in range(0, len(bits), 8):
        lines.append("    " + ", ".join(f"0x{value:0{digits}x}{suffix}" for value in bits[start : start + 8]))
    return f"static const {kind} {name}[{len(bits)}] = {{\n" + ",\n".join(lines) + "};\n"
