"""The C header of an artefact, and its C++ wrapper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusecell.compiler.ir.sizes import ALIGNMENT

__all__ = ["Field", "Interface", "c_header", "cpp_wrapper"]


class Field(NamedTuple):
    """An input or an output in a row of all of them.

    Attributes:
        name: the cell's.
        span: its first number in the row, and the one behind its last.
        shape: as the cell has it.
    """

    name: str
    span: tuple[int, int]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What callers of an artefact need to know.

    Attributes:
        prefix: of every symbol.
        scalar: C's name of the numbers.
        rows: rows of the batch.
        inputs, outputs: what is side by side in a row, in order.
        state_size: numbers of all states of all rows.
        memory_bytes: of a stream.
        about: what it is, in a line.
        numbers: what its bits are equal to, in a sentence.
    """

    prefix: str
    scalar: str
    rows: int
    inputs: Sequence[Field]
    outputs: Sequence[Field]
    state_size: int
    memory_bytes: int
    about: str
    numbers: str

    @property
    def input_size(self) -> int:
        """Numbers of a row of the input."""
        return self.inputs[-1].span[1]

    @property
    def output_size(self) -> int:
        """Numbers of a row of the output."""
        return self.outputs[-1].span[1]

    @property
    def macro(self) -> str:
        """The prefix of constants."""
        return self.prefix.upper()

    def constants(self, what: str, fields: Sequence[Field]) -> str:
        """Define where each of several inputs or outputs begins in a row; empty where there is one."""
        if len(fields) == 1:
            return ""
        lines = [f"/* Side by side in a row of the {what.lower()}: */"]
        names: set[str] = set()
        for name, (first, last), shape in fields:
            plain = re.sub(r"\W", "_", name, flags=re.ASCII).upper()
            while plain in names:
                plain += "_"
            names.add(plain)
            count = "1 number" if last - first == 1 else f"{last - first} numbers"
            form = ", " + "".join(f"[{dim}]" for dim in shape) if len(shape) > 1 else ""
            lines.append(f"#define {self.macro}_{what}_{plain}_AT {first} /* {count}{form} */")
        return "\n".join([*lines, ""])


def c_header(interface: Interface) -> str:
    """Write the C header."""
    p, m, real = interface.prefix, interface.macro, interface.scalar
    return f"""\
/* {interface.about}
   {interface.numbers}

   Memory belongs to the caller: a {p}_stream has a constant size and nothing is allocated. Streams are independent of
   each other; use each in one thread at a time. Input and output must not overlap. */
#ifndef {m}_H
#define {m}_H

#include <stddef.h>

#define {m}_ROWS {interface.rows} /* of the batch */
#define {m}_INPUT_SIZE {interface.input_size} /* numbers of a row */
#define {m}_OUTPUT_SIZE {interface.output_size}
{interface.constants("INPUT", interface.inputs)}{interface.constants("OUTPUT", interface.outputs)}\
#define {m}_STATE_SIZE {interface.state_size} /* numbers of the states of all rows */
#define {m}_MEMORY_BYTES {interface.memory_bytes} /* of a stream: states, then scratch memory */
#define {m}_ALIGNMENT {ALIGNMENT}

#if defined(__cplusplus) && __cplusplus >= 201103L
#define {m}_ALIGNED alignas({ALIGNMENT})
#elif defined(_MSC_VER)
#define {m}_ALIGNED __declspec(align({ALIGNMENT}))
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
#define {m}_ALIGNED _Alignas({ALIGNMENT})
#elif defined(__GNUC__)
#define {m}_ALIGNED __attribute__((aligned({ALIGNMENT})))
#else
#define {m}_ALIGNED /* {p}_init tells whether a stream's address is a multiple of {ALIGNMENT} */
#endif

#ifdef __cplusplus
extern "C" {{
#endif

/* The memory of one stream. */
typedef struct {{
    {m}_ALIGNED {real} memory[{m}_MEMORY_BYTES / sizeof({real})];
}} {p}_stream;

/* Set the initial state. Returns 0; 1 and does nothing if the stream's address is no multiple of {m}_ALIGNMENT. */
int {p}_init({p}_stream *stream);

/* Set the initial state again. */
void {p}_reset({p}_stream *stream);

/* Run one step: input[{m}_ROWS][{m}_INPUT_SIZE], output[{m}_ROWS][{m}_OUTPUT_SIZE]. */
void {p}_step({p}_stream *stream, const {real} *input, {real} *output);

/* Run several steps: input[steps][{m}_ROWS][{m}_INPUT_SIZE], output[steps][{m}_ROWS][{m}_OUTPUT_SIZE]. */
void {p}_push({p}_stream *stream, size_t steps, const {real} *input, {real} *output);

/* Copy the states, {m}_STATE_SIZE numbers: cell by cell from the bottom, each state as [{m}_ROWS][size]. */
void {p}_get_state(const {p}_stream *stream, {real} *state);
void {p}_set_state({p}_stream *stream, const {real} *state);

#ifdef __cplusplus
}}
#endif

#endif
"""


def cpp_wrapper(interface: Interface, header: str) -> str:
    """Write a C++11 class around the C functions; ``header`` is the name of the C header's file."""
    p, m, real = interface.prefix, interface.macro, interface.scalar
    return f"""\
// {interface.about}
#ifndef {m}_HPP
#define {m}_HPP

#include <array>
#include <cstddef>
#include <stdexcept>

#include "{header}"

namespace {p} {{

// A stream with its own state. Inputs and outputs are arrays of [rows][size], as of the C functions.
class Stream {{
public:
    using Real = {real};
    static constexpr std::size_t rows = {m}_ROWS;
    static constexpr std::size_t input_size = {m}_INPUT_SIZE;
    static constexpr std::size_t output_size = {m}_OUTPUT_SIZE;
    static constexpr std::size_t state_size = {m}_STATE_SIZE;
    using Input = std::array<Real, rows * input_size>;
    using Output = std::array<Real, rows * output_size>;
    using State = std::array<Real, state_size>;

    // Throws where memory is not aligned: before C++17, new doesn't align what it allocates.
    Stream() {{
        if ({p}_init(&stream_) != 0) throw std::runtime_error("{p}::Stream is not aligned to {ALIGNMENT} bytes");
    }}

    void reset() noexcept {{ {p}_reset(&stream_); }}

    Output step(const Input &input) noexcept {{
        Output output;
        {p}_step(&stream_, input.data(), output.data());
        return output;
    }}
    void step(const Real *input, Real *output) noexcept {{ {p}_step(&stream_, input, output); }}
    void push(std::size_t steps, const Real *input, Real *output) noexcept {{
        {p}_push(&stream_, steps, input, output);
    }}

    State state() const noexcept {{
        State state;
        {p}_get_state(&stream_, state.data());
        return state;
    }}
    void set_state(const State &state) noexcept {{ {p}_set_state(&stream_, state.data()); }}

private:
    {p}_stream stream_;
}};

}}  // namespace {p}

#endif
"""
