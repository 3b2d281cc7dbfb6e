"""Builder of basic blocks and integer arithmetic: sizes, offsets, conditions, and how a range is shared among threads.

Integers that are known while the text is written are Python's, and folded: ``f.mul(row, 0)`` writes nothing. Address
arithmetic is emitted once per scope: LLVM would find such common values too, but in a pass that takes longer than
writing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fusecell.compiler.codegen.llvm_text import TRUE, Integer, TextBuilder, Value, type_of, typed

__all__ = ["IntegerBuilder", "phi_operands"]


class IntegerBuilder(TextBuilder):
    """Basic blocks of a function and what they compute of integers; the arguments are those of a text builder."""

    def __init__(self, arguments: Iterable[Value], declares: set[str]) -> None:
        super().__init__(arguments, declares)
        self._scopes: list[dict[str, Any]] = [{}]

    # Value numbering: an instruction without side effects is not emitted again where its result is available.

    def _pure(self, name: str, instruction: str, type: str = "i64", once: bool = True) -> Value:
        """Append an instruction without side effects; ``once``: unless its result is available already."""
        if not once:
            return self.let(name, instruction, type)
        result: Value = self._once(instruction, lambda: self.let(name, instruction, type))
        return result

    def _once(self, key: str, emit: Callable[[], Any]) -> Any:
        for scope in self._scopes:
            if key in scope:
                return scope[key]
        result = self._scopes[-1][key] = emit()
        return result

    @contextmanager
    def _scope(self) -> Iterator[None]:
        """Enter code that doesn't always run: its results dominate, and so are available to, nothing outside."""
        self._scopes.append({})
        yield
        self._scopes.pop()

    # Integer arithmetic, folded where it is known. Offsets and counts never overflow (nsw), which LLVM may use.

    def add(self, a: Integer, b: Integer, name: str = "i") -> Integer:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self._pure(name, f"add nsw i64 {a}, {b}")

    def sub(self, a: Integer, b: Integer, name: str = "i") -> Integer:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self._pure(name, f"sub nsw i64 {a}, {b}")

    def mul(self, a: Integer, b: Integer, name: str = "i") -> Integer:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1 or b == 1:
            return b if a == 1 else a
        return self._pure(name, f"mul nsw i64 {a}, {b}")

    def udiv(self, a: Integer, b: Integer, name: str, *, once: bool = False) -> Value:
        return self._pure(name, f"udiv i64 {a}, {b}", once=once)

    def urem(self, a: Integer, b: Integer, name: str, *, once: bool = False) -> Value:
        return self._pure(name, f"urem i64 {a}, {b}", once=once)

    def exact_div(self, a: Integer, b: int, name: str, *, once: bool = False) -> Value:
        """Divide by a number, without a remainder."""
        return self._pure(name, f"sdiv exact i64 {a}, {b}", once=once)

    def lshr(self, a: Integer, bits: int, name: str) -> Value:
        return self.let(name, f"lshr i64 {a}, {bits}")

    def minimum(self, a: Integer, b: Integer, name: str = "min") -> Value:
        return self.select(self._icmp("slt", a, b, "is_less", once=True), a, b, name, once=True)

    def maximum(self, a: Integer, b: Integer, name: str = "max") -> Value:
        return self.select(self._icmp("sgt", a, b, "is_greater", once=True), a, b, name, once=True)

    def align_up(self, size: Integer, multiple: int, name: str = "aligned") -> Integer:
        """Round up to a multiple, a power of two."""
        up = self.add(size, multiple - 1)
        return up & -multiple if isinstance(up, int) else self.and_(up, -multiple, name)

    def divide(self, a: Integer, b: Integer, name: str) -> Value:
        """Divide numbers that aren't negative; by one, the most frequent divisor, it costs a branch and no division."""
        label, before = self.fresh("division"), self.current()
        is_one = self.eq(b, 1, "is_one", once=True)
        self.branch_if(is_one, f"{label}.done", f"{label}.divide")
        self.begin(f"{label}.divide")
        quotient = self.udiv(a, b, f"{name}.quotient")
        self.branch(f"{label}.done")
        self.begin(f"{label}.done")
        return self.phi([(a, before), (quotient, f"{label}.divide")], name)

    def lookup(self, index: Integer, table: Sequence[int], name: str) -> Integer:
        """Return ``table[index]``, its last entry beyond its end, by selects."""
        # Tables have a few entries, most of them equal: selects need no memory.
        result: Integer = table[-1]
        for position in reversed(range(len(table) - 1)):
            if table[position] != result:
                is_position = self.eq(index, position, "is_position", once=True)
                result = self.select(is_position, table[position], result, name, once=True)
        return result

    def partition(self, count: Integer, thread_id: Integer, threads: Integer) -> tuple[Integer, Integer]:
        """Return this thread's range [from, to) of ``count`` items; a team of one takes all without a division."""
        key = f"partition {count}, {thread_id}, {threads}"
        bounds: tuple[Integer, Integer] = self._once(key, lambda: self._partition(count, thread_id, threads))
        return bounds

    def _partition(self, count: Integer, thread_id: Integer, threads: Integer) -> tuple[Value, Value]:
        label, before = self.fresh("range"), self.current()
        # A division of 64 bits takes tens of cycles on older CPUs, and most calls run on one thread.
        is_single = self.eq(threads, 1, "is_single_thread", once=True)
        self.branch_if(is_single, f"{label}.all", f"{label}.part")
        self.begin(f"{label}.part")
        first = self.udiv(self.let("range.scaled", f"mul i64 {count}, {thread_id}"), threads, "from")
        next_thread = self.let("next_thread", f"add i64 {thread_id}, 1")
        last = self.udiv(self.let("range.scaled", f"mul i64 {count}, {next_thread}"), threads, "to")
        self.branch(f"{label}.all")
        self.begin(f"{label}.all")
        return (
            self.phi([(0, before), (first, f"{label}.part")], "from"),
            self.phi([(count, before), (last, f"{label}.part")], "to"),
        )

    # Conditions, of integers and addresses.

    def eq(self, a: Integer, b: Integer, name: str, *, once: bool = False) -> Value:
        return self._icmp("eq", a, b, name, once)

    def ne(self, a: Integer, b: Integer, name: str) -> Value:
        return self._icmp("ne", a, b, name)

    def lt(self, a: Integer, b: Integer, name: str) -> Value:
        return self._icmp("slt", a, b, name)

    def le(self, a: Integer, b: Integer, name: str) -> Value:
        return self._icmp("sle", a, b, name)

    def gt(self, a: Integer, b: Integer, name: str) -> Value:
        return self._icmp("sgt", a, b, name)

    def ge(self, a: Integer, b: Integer, name: str) -> Value:
        return self._icmp("sge", a, b, name)

    def _icmp(self, predicate: str, a: Integer, b: Integer, name: str, once: bool = False) -> Value:
        return self._pure(name, f"icmp {predicate} {type_of(a, b)} {a}, {b}", "i1", once)

    def select(self, condition: Value, a: Integer, b: Integer, name: str, *, once: bool = False) -> Value:
        """Return ``a`` where ``condition`` holds, else ``b``; lane by lane for a mask."""
        type = type_of(a, b)
        return self._pure(name, f"select {typed(condition)}, {type} {a}, {type} {b}", type, once)

    def and_(self, a: Integer, b: Integer, name: str) -> Value:
        return self._bitwise("and", a, b, name)

    def or_(self, a: Integer, b: Integer, name: str) -> Value:
        return self._bitwise("or", a, b, name)

    def xor(self, a: Integer, b: Integer, name: str) -> Value:
        return self._bitwise("xor", a, b, name)

    def not_(self, a: Value, name: str) -> Value:
        """Negate a condition, or every lane of a mask."""
        return self.xor(a, TRUE if a.type == "i1" else Value("splat (i1 true)", a.type), name)

    def _bitwise(self, opcode: str, a: Integer, b: Integer, name: str) -> Value:
        type = type_of(a, b)
        return self.let(name, f"{opcode} {type} {a}, {b}", type)

    def zext(self, condition: Value, name: str) -> Value:
        """Return 1 for true and 0 for false."""
        return self.let(name, f"zext {typed(condition)} to i64")

    def sext(self, a: Value, name: str) -> Value:
        """Return a shorter integer as an i64."""
        return self.let(name, f"sext {typed(a)} to i64")

    # Basic blocks.

    def begin(self, label: str) -> None:
        """Begin a basic block."""
        self.lines.append(f"{label}:")

    def branch(self, label: str) -> None:
        self.do(f"br label %{label}")

    def branch_if(self, condition: Value, then: str, otherwise: str) -> None:
        self.do(f"br i1 {condition}, label %{then}, label %{otherwise}")

    def phi(self, incoming: Sequence[tuple[Integer, str]], name: str) -> Value:
        """Return the value of the predecessor block that control came from."""
        type = type_of(*(value for value, _ in incoming))
        return self.let(name, f"phi {type} {phi_operands(incoming)}", type)

    def forward(self, name: str) -> Value:
        """Return the name of an i64 for a phi to use before the code that defines it, by `define_sum`."""
        return Value(f"%{self.fresh(name)}", "i64")

    def define_sum(self, result: Value, a: Integer, b: Integer) -> None:
        """Define a value that `forward` has named."""
        self.do(f"{result} = add i64 {a}, {b}")

    def current(self) -> str:
        """Return the label of the basic block that is being written."""
        return next(line[:-1] for line in reversed(self.lines) if line.endswith(":") and not line.startswith(" "))


def phi_operands(values: Sequence[tuple[Integer, str]]) -> str:
    """Spell what a phi gets from each predecessor block."""
    return ", ".join(f"[ {value}, %{label} ]" for value, label in values)
