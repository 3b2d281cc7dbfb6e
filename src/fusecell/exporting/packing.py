"""Packed weights as a target's kernel reads them: its own text packs them, run on this machine.

So there is one definition of the layout, the compiler's, whatever panels and tiles it chooses for a target.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable

import numpy as np

from fusecell.compiler.backend.jit import load
from fusecell.compiler.backend.target import Target, host_target
from fusecell.compiler.codegen import Emitted
from fusecell.compiler.codegen.kernel_abi import Size
from fusecell.compiler.ir.sizes import ALIGNMENT, align_up
from fusecell.compiler.runtime.argument_block import ArgumentBlock, Slots
from fusecell.errors import CompilerError
from fusecell.exporting.denormals import denormal_mode
from fusecell.streaming.bound_step import Part, View

__all__ = ["packed_buffers", "without_threads"]


def packed_buffers(part: Part, emitted: Emitted, target: Target) -> dict[str, bytes]:
    """Return the contents of those of a kernel's buffers that depend on weights alone, by name.

    Arguments:
        part: the cell and its weights.
        emitted: its kernel for the target.
    """
    run = _runner(emitted, target)
    rows = max((value.shape[0] for value in part.start), default=1)
    states = [value.copy() for value in part.start]
    x, y = np.zeros((1, rows, part.input_size), part.dtype), np.zeros((1, rows, part.output_size), part.dtype)
    slots = Slots.of_kernel(part.plan, emitted)
    block = ArgumentBlock(slots)
    views = [View(value) for value in states]
    inputs = [View(x[:, :, first:last]) for first, last in part.input_ranges.values()]
    block.bind(inputs=inputs, outputs=[View(y)], weights=map(View, part.weights), first=views, last=views)
    values = block.values
    memory = np.zeros(emitted.scratch.bytes(rows, 1) + ALIGNMENT * (len(emitted.buffers) + 1), np.uint8)
    values[slots.steps] = values[slots.chunk_steps] = 1
    values[slots.rows], values[slots.scratch] = rows, align_up(memory.ctypes.data)
    values[slots.packed] = 2  # pack, for the steps to come
    run(block.address)
    fixed = {name: size.fixed - emitted.slack for name, size in emitted.buffers.items() if size == Size(size.fixed)}
    first = {name: _contents(slots, values, name, size) for name, size in fixed.items()}
    values[slots.packed] = 1
    x[...] = 0.75
    for value in states:
        value[...] = 0.5
    run(block.address)
    changed = [name for name, size in fixed.items() if _contents(slots, values, name, size) != first[name]]
    if changed:
        raise CompilerError(f"a step writes to packed weights: {', '.join(changed)}")
    return first


def _contents(slots: Slots, values: array[int], name: str, size: int) -> bytes:
    return ctypes.string_at(values[slots.indices[f"at.{name}"]], size)


def without_threads(text: str, target: Target) -> str:
    """Return a kernel's text without the hint that a thread is waiting, which other CPUs don't know."""
    for line in target.isa.spin_hint or ():
        text = text.replace(f"  {line}\n", "").replace(f"{line}\n", "")
    return text


def _without_byte_dots(text: str, target: Target, host: Target) -> str:
    """Return a kernel's text with a function in the place of an instruction that multiplies bytes, unless it's here."""
    dot = target.byte_dot
    if dot is None or dot == host.byte_dot:
        return text
    declared = f"declare {dot.sums} @llvm.{dot.intrinsic}({dot.sums}, {dot.operand}, {dot.operand})"
    if declared not in text:
        return text
    count = dot.bits // 8
    to_words = {"numbers": "sext" if dot.signed else "zext", "weights": "sext"}
    lines = [f"define {dot.sums} @dot_bytes({dot.sums} %sum.0, {dot.operand} %numbers, {dot.operand} %weights) {{"]
    for name, extend in to_words.items():
        lines.append(f"  %{name}.bytes = bitcast {dot.operand} %{name} to {dot.bytes}")
        lines.append(f"  %{name}.words = {extend} {dot.bytes} %{name}.bytes to <{count} x i32>")
    lines.append(f"  %products = mul <{count} x i32> %numbers.words, %weights.words")
    for place in range(4):
        lanes = ", ".join(f"i32 {byte}" for byte in range(place, count, 4))
        kind = f"<{count} x i32>"
        lines.append(f"  %part.{place} = shufflevector {kind} %products, {kind} poison, <{count // 4} x i32> <{lanes}>")
        lines.append(f"  %sum.{place + 1} = add {dot.sums} %sum.{place}, %part.{place}")
    lines += [f"  ret {dot.sums} %sum.4", "}"]
    return text.replace(declared, "\n".join(lines)).replace(f"@llvm.{dot.intrinsic}(", "@dot_bytes(")


def _runner(emitted: Emitted, target: Target) -> Callable[[int], None]:
    """Load a target's kernel on this machine, with denormals treated as the target treats them."""
    host = host_target()
    control = host.isa.denormals if target.isa.flushes_denormals else None
    before, after, declarations = denormal_mode(control)
    text = _without_byte_dots(without_threads(emitted.text, target), target, host)
    text += "\n".join(sorted(declarations - set(emitted.text.splitlines())))
    text += f"\ndefine void @pack(ptr %args) noinline {{\n  {before}call void @run(ptr %args)\n  {after}ret void\n}}\n"
    code = load(text, ["pack"], host)
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(code.address("pack"))

    def run(address: int, _mapped: object = code) -> None:  # the code is mapped as long as this function lives
        function(address)

    return run
