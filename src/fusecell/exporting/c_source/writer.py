"""Writer of the C file: constants, one function per cell, and the functions that callers see."""

from __future__ import annotations

import re

import numpy as np

from fusecell.compiler.ir.sizes import ALIGNMENT, DType, align_up
from fusecell.compiler.ir.storage import Storage
from fusecell.exporting.c_source.cell import CellWriter
from fusecell.exporting.c_source.functions import c_function, c_number
from fusecell.exporting.c_source.parts import FIXED_PARTS, REDUCTIONS, STORED_NUMBERS, reduction_function
from fusecell.streaming.bound_step import Array
from fusecell.streaming.stream import Stream

__all__ = ["SourceWriter"]


class SourceWriter:
    """Writer of a stream's C file.

    Attributes:
        memory_bytes, state_bytes, weight_bytes: sizes of a stream's memory, of the states in it, and of constants.
        external: the functions of the C library that it calls.
    """

    def __init__(self, stream: Stream, prefix: str) -> None:
        self.stream, self.prefix, self.dtype = stream, prefix, stream.parts[0].graph.dtype
        self.real = "float" if self.dtype.itemsize == 4 else "double"
        self.weight_bytes = 0
        self._functions: dict[str, str] = {}
        states = stream.state
        self._taken = sum(value.size for value in states)
        self.state_bytes = self._taken * self.dtype.itemsize
        rows = stream.batch_size
        self._between = [self.take(rows * part.output_size) for part in stream.parts[:-1]]
        cells: list[str] = []
        at = 0
        for place, part in enumerate(stream.parts):
            cells.append(CellWriter(self, place, part, at).text())
            at += sum(value.size for value in part.start)
        self._cells: list[str] = cells
        self.memory_bytes = align_up(self._taken * self.dtype.itemsize)

    def take(self, count: int) -> int:
        """Return the position of the next numbers in a stream's memory."""
        self._taken += count
        return self._taken - count

    def needs(self, op: str) -> None:
        """Add the function of a primitive."""
        if op in REDUCTIONS:
            if op in ("amax", "amin"):
                self.needs("maximum" if op == "amax" else "minimum")
            self._functions.setdefault(op, reduction_function(op, self.dtype, self.real))
        else:
            self._functions.setdefault(op, c_function(op, self.dtype))

    def constant(self, name: str, values: Array) -> str:
        """Write a constant array, in rows of 8 numbers."""
        return self._constant(name, values, self.real)

    def stored_constant(self, name: str, values: Array, storage: Storage) -> str:
        """Write a constant array in another format, and the function that reads it."""
        if text := STORED_NUMBERS[storage]:
            self._functions.setdefault(storage.value, text)
        encoded = storage.encode(values)
        integers = encoded.view(np.uint16) if storage is Storage.F16 else encoded
        return self._constant(name, integers, f"{integers.dtype}_t")

    def _constant(self, name: str, values: Array, kind: str) -> str:
        self.weight_bytes += values.nbytes
        shape = "".join(f"[{size}]" for size in values.shape)
        return f"static const {kind} {name}{shape} = {_braced(values, self.dtype)};\n"

    @property
    def external(self) -> tuple[str, ...]:
        """The C library's functions in the text."""
        text = "\n".join([*self._functions.values(), *self._cells])
        called = set(re.findall(r"\b(sqrtf?|floorf?|fabsf?|copysignf?|sin|cos|pow|fmaf?)\(", text))
        return tuple(sorted(called | ({f"fma{'f' if self.real == 'float' else ''}"} if "FMA(" in text else set())))

    def source(self, header: str, numbers: str) -> str:
        """Return the whole file."""
        stream, p = self.stream, self.prefix
        about = f"{p}: {', '.join(part.kind for part in stream.parts)}, {stream.input_size} -> {stream.output_size}"
        head = f'/* {about}, {stream.dtype}.\n   {numbers} */\n#include "{header}"\n'
        fused = "fmaf" if self.real == "float" else "fma"
        parts = FIXED_PARTS.replace("@FMA@", fused).replace("@P@", self.prefix.upper())
        return "\n".join([head, parts, *self._functions.values(), *self._cells, self._callable()])

    def _callable(self) -> str:
        """Write the functions that callers see."""
        stream, p, real = self.stream, self.prefix, self.real
        m, last = p.upper(), len(stream.parts) - 1
        run = []
        for place in range(last + 1):
            source = "input" if place == 0 else f"stream->memory + {self._between[place - 1]}"
            sink = "output" if place == last else f"stream->memory + {self._between[place]}"
            run.append(f"    cell_{place}(stream->memory, {source}, {sink});")
        states = [value for part in stream.parts for value in part.start]
        initial, assigned = "", "0"
        if any(value.any() for value in states):
            values = np.concatenate([value.ravel() for value in states])
            initial, assigned = self.constant("initial_state", values) + "\n", "initial_state[i]"
        copy = f"    size_t i;\n    for (i = 0; i < {m}_STATE_SIZE; i++)\n"
        if not states:
            copy, initial = "", ""
        return f"""\
{initial}int {p}_init({p}_stream *stream)
{{
    if ((uintptr_t)stream % {ALIGNMENT} != 0)
        return 1;
    {p}_reset(stream);
    return 0;
}}

void {p}_reset({p}_stream *stream)
{{
{copy + f"        stream->memory[i] = {assigned};" if copy else "    (void)stream;"}
}}

static NOINLINE void run_cells({p}_stream *stream, const {real} *input, {real} *output)
{{
{chr(10).join(run)}
}}

void {p}_step({p}_stream *stream, const {real} *input, {real} *output)
{{
    const denormal_mode mode = flush_denormals();
    run_cells(stream, input, output);
    restore_denormals(mode);
}}

void {p}_push({p}_stream *stream, size_t steps, const {real} *input, {real} *output)
{{
    const denormal_mode mode = flush_denormals();
    size_t t;
    for (t = 0; t < steps; t++)
        run_cells(stream, input + t * {m}_ROWS * {m}_INPUT_SIZE, output + t * {m}_ROWS * {m}_OUTPUT_SIZE);
    restore_denormals(mode);
}}

void {p}_get_state(const {p}_stream *stream, {real} *state)
{{
{copy + "        state[i] = stream->memory[i];" if copy else "    (void)stream, (void)state;"}
}}

void {p}_set_state({p}_stream *stream, const {real} *state)
{{
{copy + "        stream->memory[i] = state[i];" if copy else "    (void)stream, (void)state;"}
}}
"""


def _braced(values: Array, dtype: DType) -> str:
    """Write numbers in braces, nested as their shape."""
    if values.ndim > 1:
        return "{" + ",\n ".join(_braced(each, dtype) for each in values) + "}"
    is_real = values.dtype.kind == "f"
    numbers = [c_number(float(value), dtype) if is_real else str(value) for value in values]
    lines = [", ".join(numbers[start : start + 8]) for start in range(0, len(numbers), 8)]
    return "{" + ",\n  ".join(lines) + "}"
