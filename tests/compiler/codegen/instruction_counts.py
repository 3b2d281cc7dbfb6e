"""Count executed instructions exactly, without a clock, by a counter in each basic block.

The text of a kernel is compiled to assembly for its target, each block is given an increment that leaves flags and
stack as they were, and the result is linked in the kernel's place. After a call, a block's count times what stands in
it is what was executed. Only the assembly is read, so it matters neither what functions are called nor how they nest.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import llvmlite.binding as binding

from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.target import Target

__all__ = ["KINDS", "Block", "Counted", "blocks_of"]

KINDS = ("instructions", "fma", "loads", "stores", "broadcasts", "divisions", "spills")
"""Of vector instructions but for the first and the last; a spill is what the register allocator saves or reloads."""

_TABLE = "fusecell.counts"
_LABEL = re.compile(r"([.\w$]+):")
_FALL_THROUGH = re.compile(r"# (%bb\.\d+):")
# Below the stack pointer there may be values of a function that calls none.
_COUNT = f"""\
leaq -128(%rsp), %rsp
pushfq
incq {_TABLE}+{{place}}(%rip)
popfq
leaq 128(%rsp), %rsp"""


@dataclass
class Block:
    """A basic block, with its number of instructions of each kind."""

    label: str
    kinds: Counter[str] = field(default_factory=Counter)
    repeats: bool = False
    """Whether it is all of a loop: it ends by jumping to itself."""

    def add(self, line: str) -> None:
        """Count an instruction; the register allocator's comment marks spills."""
        code, _, comment = line.partition("#")
        name, _, rest = code.strip().partition("\t")
        self.kinds["instructions"] += 1
        self.kinds["spills"] += "Spill" in comment or "Reload" in comment
        if name.startswith("j"):
            self.repeats = self.repeats or rest.strip() == self.label
        if name.startswith("v"):
            self.kinds.update(_of_vector(name, re.findall(r"[^,(]*(?:\([^)]*\))?[^,(]*", rest.strip())))


def _of_vector(name: str, operands: Sequence[str]) -> list[str]:
    """Return the kinds of a vector instruction; its last operand is the destination."""
    *sources, result = [operand for operand in operands if operand.strip()] or [""]
    loads = any("(" in operand for operand in sources)
    kinds = ["stores"] * ("(" in result) + ["loads"] * loads
    kinds += ["broadcasts"] * (loads and (name.startswith("vbroadcast") or "{1to" in "".join(sources)))
    kinds += ["fma"] * bool(re.match(r"vfn?m(add|sub)", name)) + ["divisions"] * name.startswith("vdiv")
    return kinds


def blocks_of(assembly: str) -> tuple[list[Block], str]:
    """The blocks of an assembly text with its compiler's comments, and the text with a counter in each."""
    blocks: list[Block] = []
    lines, head = [], ""
    for line in assembly.splitlines():
        code = line.partition("#")[0].strip()
        if label := _LABEL.match(code) or _FALL_THROUGH.match(line):
            head = label[1]
        elif code and not code.startswith("."):
            if head:
                lines.append(_COUNT.format(place=8 * len(blocks)))
                blocks.append(Block(head))
            head = "after a jump" if code.startswith("j") else ""
            blocks[-1].add(line.strip())
        if code:
            lines.append(code)
    table = f".bss\n{_TABLE}:\n.globl {_TABLE}\n.zero {8 * len(blocks)}\n.text"
    return blocks, "\n".join((table, *lines))


class Counted:
    """Machine code that counts; it takes the place of what :func:`fusecell.compiler.backend.jit.load` makes."""

    def __init__(self, text: str, names: Sequence[str], target: Target) -> None:
        aim = (target.cpu, target.features, target.triple, llvm.FULL_EFFORT)
        with llvm.lock, llvm._optimised(text, names, *aim) as (module, machine):
            machine.set_asm_verbosity(True)
            self.blocks, counting = blocks_of(machine.emit_assembly(module))
            quoted = (line.replace("\\", "\\5C").replace('"', "\\22") for line in counting.splitlines())
            wrapped = binding.parse_assembly("\n".join(f'module asm "{line}"' for line in quoted))
            wrapped.triple, wrapped.data_layout = target.triple, str(machine.target_data)
            code = machine.emit_object(wrapped)
        self._library = llvm.link(code, [*names, _TABLE])
        self._table = (ctypes.c_int64 * len(self.blocks)).from_address(self._library.addresses[_TABLE])
        # What a program tells of how it was made.
        self.llvm, self.target, self.from_cache, self.object_size = text, target, False, 0

    def address(self, name: str) -> int:
        """The address of a function."""
        return self._library.addresses[name]

    def take(self) -> Counter[str]:
        """Return the counts since the last call, and reset them."""
        total: Counter[str] = Counter()
        for block, times in zip(self.blocks, self._table, strict=True):
            total.update({kind: times * number for kind, number in block.kinds.items()})
        ctypes.memset(self._table, 0, ctypes.sizeof(self._table))
        return total

    def spilling_loops(self) -> list[str]:
        """The innermost loops around fused multiply-adds that move registers to the stack or back."""
        loops = [block for block in self.blocks if block.repeats and block.kinds["fma"] and block.kinds["spills"]]
        return [f"{block.label}: {dict(block.kinds)}" for block in loops]
