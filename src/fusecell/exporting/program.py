"""The program of a stream for a target: the kernels of its cells as LLVM text, packed weights, memory, functions.

::

    int  <prefix>_init(stream)                     0, or 1 if the memory isn't aligned
    void <prefix>_reset(stream)                    the initial state
    void <prefix>_step(stream, input, output)      one step
    void <prefix>_push(stream, steps, ...)         several
    void <prefix>_get_state(stream, state), <prefix>_set_state(stream, state)

A kernel takes an argument block and knows nothing of how it is called. Here every argument is a constant or an address
in one piece of memory, so LLVM specialises the kernel to one thread, one step, so many rows, and packed weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusecell.compiler.backend import llvm
from fusecell.compiler.codegen import Emitted, emit
from fusecell.compiler.codegen.kernel_abi import SLOT_BYTES
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.errors import CompilerError
from fusecell.exporting.arm_attributes import for_both_conventions
from fusecell.exporting.denormals import denormal_mode
from fusecell.exporting.known_slots import with_known_slots
from fusecell.exporting.memory_functions import MEMORY_FUNCTIONS, memory_functions
from fusecell.exporting.object_file import read_object
from fusecell.exporting.packing import packed_buffers, without_threads
from fusecell.exporting.soft_fma import with_soft_fma
from fusecell.exporting.targets import ExportTarget
from fusecell.streaming.bound_step import Array, Part

__all__ = ["FUNCTIONS", "Memory", "Program", "build_program"]

FUNCTIONS = ("init", "reset", "step", "push", "get_state", "set_state")
"""What an artefact exports, after its prefix and an underscore."""
MOST_INLINED_BYTES = 4_000_000
"""Bytes of a kernel's text up to which its functions are inlined: LLVM's time grows with the square of a function."""


@dataclass(frozen=True)
class Memory:
    """Sizes of an artefact's memory, in bytes.

    Attributes:
        state: the states of all cells, one after the other; at the start of the caller's memory.
        scratch: the rest of the caller's memory.
        weights: the constants: packed weights, and what is computed from weights alone.
    """

    state: int
    scratch: int
    weights: int

    @property
    def bytes(self) -> int:
        """The caller's memory."""
        return self.state + self.scratch


@dataclass(frozen=True)
class Program:
    """An object file and its sizes.

    Attributes:
        text: the optimised LLVM text.
    """

    code: bytes
    text: str
    memory: Memory


class _Layout:
    """Offsets of buffers in a piece of memory."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int, alignment: int = ALIGNMENT) -> int:
        """Return the offset of the next ``size`` bytes."""
        start = align_up(self.size, alignment)
        self.size = start + size
        return start


def build_program(parts: Sequence[Part], prefix: str, target: ExportTarget) -> Program:
    """Compile the parts of a stream, bottom first, to an object file for a target.

    Raises:
        CompilerError: if LLVM refuses a text, or a kernel asks for an argument that an artefact can't give.
    """
    machine = target.machine
    emitted = [emit(part.plan, machine) for part in parts]
    writer = _Writer(parts, emitted, prefix, target)
    text, memory = writer.write()
    kernels = {
        f"kernel.{place}": _adapted(with_known_slots(each.text, writer.known[place]), target, writer.rows)
        for place, each in enumerate(emitted)
    }

    def compiled(main: str) -> tuple[bytes, str]:
        return llvm.program_object(
            main,
            kernels,
            [f"{prefix}_{name}" for name in FUNCTIONS],
            cpu=target.cpu,
            features=target.features,
            triple=target.triple,
            abi=target.abi,
            static=target.small or target.is_wasm,
        )

    code, optimised = compiled(text)
    # LLVM clears and copies memory by calls. Of the C library only memcpy is asked for, and that where there is one.
    needed = MEMORY_FUNCTIONS.intersection(read_object(code).undefined)
    if not target.small:
        needed -= {"memcpy"}
    if needed:
        code, optimised = compiled(text + memory_functions(needed, target.pointer_bits))
    if target.small:
        code = for_both_conventions(code)
    return Program(code, optimised, memory)


def _adapted(text: str, target: ExportTarget, rows: int) -> str:
    """Adapt a kernel's text to being part of a program for a target, for so many rows."""
    text = without_threads(text, target.machine)
    if len(text) <= MOST_INLINED_BYTES:
        text = text.replace(") noinline #0 {", ") alwaysinline #0 {").replace(") #0 {", ") alwaysinline #0 {")
    if target.small:
        text = text.replace(") alwaysinline nounwind {", ") noinline nounwind {")
    if target.pointer_bits == 32:
        text = _with_wide_tables(text)
    # Tables of tiles have some for more rows than there ever are.
    text = re.sub(r"ptr @tile\.(\d+)x[\w.]*", lambda tile: tile[0] if int(tile[1]) <= rows else "ptr null", text)
    # Loops that copy or clear must not become calls of a C library that may be missing.
    text = text.replace("attributes #0 = { nounwind", 'attributes #0 = { nounwind "no-builtins"')
    return text if target.machine.fma else with_soft_fma(text)


def _with_wide_tables(text: str) -> str:
    """Give each address in a table of addresses eight bytes, by which kernels count them."""

    def widened(match: re.Match[str]) -> str:
        entries = [entry for each in match[2].split(", ") for entry in (each, "ptr null")]
        return f"constant [{2 * int(match[1])} x ptr] [{', '.join(entries)}]"

    return re.sub(r"constant \[(\d+) x ptr\] \[([^\]]*)\]", widened, text)


class _Writer:
    """Writer of the program's own text: constants, and the functions that callers see."""

    def __init__(self, parts: Sequence[Part], emitted: Sequence[Emitted], prefix: str, target: ExportTarget) -> None:
        self.parts, self.emitted, self.prefix, self.target = parts, emitted, prefix, target
        self.memory, self.constants = _Layout(), bytearray()
        self.known: list[dict[int, int]] = []
        """For each kernel the slots of its argument block that are numbers, by their offsets."""
        self.rows = max((value.shape[0] for part in parts for value in part.start), default=1)
        self.size_type = f"i{target.pointer_bits}"
        self.itemsize = parts[0].dtype.itemsize

    def write(self) -> tuple[str, Memory]:
        """Return the text and the sizes of memory."""
        states = [value for part in self.parts for value in part.start]
        self.state_bytes = sum(value.nbytes for value in states)
        self.memory.take(self.state_bytes)
        between = [self.memory.take(self.rows * part.output_size * self.itemsize) for part in self.parts[:-1]]
        calls, offset = [], 0
        for place, (part, emitted) in enumerate(zip(self.parts, self.emitted, strict=True)):
            calls.append(self._call(place, part, emitted, offset))
            offset += sum(value.nbytes for value in part.start)
        # Behind the last buffer, for vectors that are read past a row's end.
        slack = max(emitted.slack for emitted in self.emitted)
        self.memory.take(slack)
        self.constants += bytes(slack)
        weights = len(self.constants)
        memory = Memory(self.state_bytes, align_up(self.memory.size) - self.state_bytes, weights)
        return "\n".join([*calls, *self._functions(between, states), self._data(states), ""]), memory

    def _call(self, place: int, part: Part, emitted: Emitted, state_at: int) -> str:
        """Write the function that runs one cell: it fills an argument block, which LLVM then dissolves."""
        lines = [f"%args = alloca [{len(emitted.slots)} x i64], align 8"]
        values = self._slots(part, emitted, state_at)
        numbers = {name: values.get(name, 0) for name in emitted.slots if not name.endswith(".ptr")}
        self.known.append(
            {
                SLOT_BYTES * emitted.slots.index(name): value
                for name, value in numbers.items()
                if isinstance(value, int) and not name.startswith("weight.")
            }
        )
        for index, name in enumerate(emitted.slots):
            slot = f"%slot.{index}"
            lines.append(f"{slot} = getelementptr i8, ptr %args, i64 {SLOT_BYTES * index} ; {name}")
            value = values.get(name, 0)
            lines.append(f"store i64 {value if isinstance(value, int) else 0}, ptr {slot}")
            if isinstance(value, tuple):
                base, offset = value
                lines.append(f"%at.{index} = getelementptr i8, ptr {base}, i64 {offset}")
                lines.append(f"store ptr %at.{index}, ptr {slot}")
        body = "\n  ".join([*lines, f"call void @kernel.{place}(ptr %args)", "ret void"])
        parameters = "ptr noalias %memory, ptr noalias %weights, ptr noalias %x, ptr noalias %y"
        head = f"define internal void @cell.{place}({parameters})"
        return f"declare void @kernel.{place}(ptr)\n{head} noinline nounwind {{\n  {body}\n}}\n"

    def _slots(self, part: Part, emitted: Emitted, state_at: int) -> dict[str, int | tuple[str, int]]:
        """Return the slots that aren't zero: numbers, and addresses as a base and an offset."""
        item, rows = self.itemsize, self.rows
        values: dict[str, int | tuple[str, int]] = {"steps": 1, "rows": rows, "chunk_steps": 1, "packed": 1}
        for name, (first, _) in part.input_ranges.items():
            values[f"in.{name}.ptr"], values[f"in.{name}.row"] = ("%x", first * item), part.input_size * item
        values["out.output.ptr"], values["out.output.row"] = ("%y", 0), part.output_size * item
        for state, start in zip(part.plan.states, part.start, strict=True):
            for kind in ("first", "last"):
                values[f"{kind}.{state}.ptr"] = ("%memory", state_at)
                values[f"{kind}.{state}.row"] = start.shape[1] * item
            state_at += start.nbytes
        packed = packed_buffers(part, emitted, self.target.machine)
        for buffer, size in emitted.buffers.items():
            if buffer in packed:
                self.constants += bytes(-len(self.constants) % ALIGNMENT)
                values[f"at.{buffer}"] = ("%weights", len(self.constants))
                self.constants += packed[buffer]
            else:
                values[f"at.{buffer}"] = ("%memory", self.memory.take(size.bytes(rows, 1) - emitted.slack))
        missing = [slot for slot in emitted.pointers if slot not in values and not slot.startswith("weight.")]
        if missing or any(slot.startswith("at.") and slot not in values for slot in emitted.slots):
            raise CompilerError(f"an exported step would be called without {', '.join(missing) or 'a buffer'}")
        return values

    def _functions(self, between: Sequence[int], states: Sequence[Array]) -> list[str]:
        """Write what callers see."""
        last = len(self.parts) - 1
        x_bytes, y_bytes = (
            self.rows * size * self.itemsize for size in (self.parts[0].input_size, self.parts[-1].output_size)
        )
        run = []
        for place in range(len(self.parts)):
            if place < last:
                run.append(f"%between.{place} = getelementptr i8, ptr %memory, i64 {between[place]}")
            source = "%x" if place == 0 else f"%between.{place - 1}"
            sink = "%y" if place == last else f"%between.{place}"
            run.append(f"call void @cell.{place}(ptr %memory, ptr %weights, ptr {source}, ptr {sink})")
        before, after, declarations = denormal_mode(self.target.machine.isa.denormals)
        size, name = self.size_type, self.prefix
        mask = ALIGNMENT - 1
        copy = f"call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %from, i64 {self.state_bytes}, i1 false)"
        start = "@initial" if any(value.any() for value in states) else None
        if not self.state_bytes:
            copy = ""
        initial = copy.replace("%to", "%memory").replace("%from", "@initial")
        if start is None:
            initial = f"call void @llvm.memset.p0.i64(ptr %memory, i8 0, i64 {self.state_bytes}, i1 false)"
        run_all = "\n  ".join(run)
        return [
            "declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)",
            "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
            *sorted(declarations),
            # The mode of the caller is restored by another function than the one that computes: LLVM knows nothing of
            # the mode, and could move arithmetic past it.
            f"define internal void @cells(ptr %memory, ptr %weights, ptr %x, ptr %y) noinline nounwind {{\n"
            f"  {run_all}\n  ret void\n}}\n",
            f"define i32 @{name}_init(ptr %memory) nounwind {{\n"
            f"  %address = ptrtoint ptr %memory to {size}\n  %low = and {size} %address, {mask}\n"
            f"  %misaligned = icmp ne {size} %low, 0\n  br i1 %misaligned, label %done, label %reset\n"
            f"reset:\n  call void @{name}_reset(ptr %memory)\n  br label %done\n"
            f"done:\n  %status = zext i1 %misaligned to i32\n  ret i32 %status\n}}\n",
            f"define void @{name}_reset(ptr %memory) noinline nounwind {{\n  {initial}\n  ret void\n}}\n",
            f"define void @{name}_step(ptr %memory, ptr %x, ptr %y) nounwind {{\n"
            f"  {before}call void @cells(ptr %memory, ptr @weights, ptr %x, ptr %y)\n  {after}ret void\n}}\n",
            f"define void @{name}_push(ptr %memory, {size} %steps, ptr %x, ptr %y) nounwind {{\n"
            f"entry:\n  {before}%any = icmp ne {size} %steps, 0\n  br i1 %any, label %loop, label %done\n"
            f"loop:\n  %t = phi {size} [ 0, %entry ], [ %t.next, %loop ]\n"
            f"  %x.t = phi ptr [ %x, %entry ], [ %x.next, %loop ]\n"
            f"  %y.t = phi ptr [ %y, %entry ], [ %y.next, %loop ]\n"
            f"  call void @cells(ptr %memory, ptr @weights, ptr %x.t, ptr %y.t)\n"
            f"  %x.next = getelementptr i8, ptr %x.t, i64 {x_bytes}\n"
            f"  %y.next = getelementptr i8, ptr %y.t, i64 {y_bytes}\n"
            f"  %t.next = add {size} %t, 1\n  %more = icmp ne {size} %t.next, %steps\n"
            f"  br i1 %more, label %loop, label %done\ndone:\n  {after}ret void\n}}\n",
            f"define void @{name}_get_state(ptr %from, ptr %to) nounwind {{\n  {copy}\n  ret void\n}}\n",
            f"define void @{name}_set_state(ptr %to, ptr %from) nounwind {{\n  {copy}\n  ret void\n}}\n",
        ]

    def _data(self, states: Sequence[Array]) -> str:
        """Write the constants."""
        initial = b"".join(np.ascontiguousarray(value).tobytes() for value in states)
        lines = [_constant("weights", bytes(self.constants))]
        if any(initial):
            lines.append(_constant("initial", initial))
        return "\n".join(lines)


_ESCAPED = [f"\\{byte:02X}" for byte in range(256)]


def _constant(name: str, data: bytes) -> str:
    """Write bytes as a constant."""
    text = "".join([_ESCAPED[byte] for byte in data])
    return f'@{name} = internal constant [{len(data)} x i8] c"{text}", align {ALIGNMENT}'
