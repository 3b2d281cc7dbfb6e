"""A small typed emitter of LLVM text: functions, loops, branches, and the vector type of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.vector_math import LANES, declarations, definitions, function_name
from fusecell.compiler.ir.graph import DType

__all__ = ["LANES", "MOST_INLINED", "Function", "Module", "Value"]

MOST_INLINED = 256
"""Calls of vector functions in a module, beyond which they stay calls: LLVM would take minutes for so much code."""

Value = str | int
"""An SSA name, or a number known now."""


@dataclass
class Module:
    """The text of one module: its functions, and the vector functions and intrinsics they call."""

    title: str
    dtype: DType
    target: Target
    functions: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    math: set[str] = field(default_factory=set)
    declares: set[str] = field(default_factory=set)
    made: set[str] = field(default_factory=set)
    calls: int = 0
    """How many calls of vector functions there are."""

    @property
    def scalar(self) -> str:
        return "float" if self.dtype == "f32" else "double"

    @property
    def vector(self) -> str:
        return f"<{LANES} x {self.scalar}>"

    @property
    def bytes(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "f32" else 8

    @property
    def block(self) -> int:
        """Bytes of a vector."""
        return LANES * self.bytes

    def padded(self, size: int) -> int:
        """Bytes of a row of ``size`` numbers in scratch memory: whole vectors."""
        return -(-size // LANES) * self.block

    def blocks(self, size: int) -> int:
        return -(-size // LANES)

    def table(self, name: str, functions: Sequence[str]) -> None:
        """Have a constant list of functions."""
        entries = ", ".join(f"ptr @{each}" if each else "ptr null" for each in functions)
        self.tables.append(f"@{name} = internal constant [{len(functions)} x ptr] [{entries}]\n")

    def numbers(self, name: str, values: Sequence[int]) -> str:
        """The address of a constant list of 64-bit numbers."""
        entries = ", ".join(f"i64 {value}" for value in values)
        self.tables.append(f"@{name} = internal constant [{len(values)} x i64] [{entries}]\n")
        return f"@{name}"

    def zeros(self, size: int) -> str:
        """The address of so many bytes of zeros."""
        name = f"@zeros.{size}"
        if name not in self.made:
            self.made.add(name)
            self.tables.append(f"{name} = internal constant [{size} x i8] zeroinitializer, align 64\n")
        return name

    def text(self) -> str:
        width = self.target.vector_bits
        head = f"; {self.title}, {self.dtype}, for {self.target.name}\n"
        declares = "\n".join(sorted(self.declares | declarations(self.math, self.dtype)))
        attributes = f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" "no-trapping-math"="true" }}\n'
        maths = definitions(self.math, self.dtype, inline=self.calls <= MOST_INLINED)
        parts = [head, declares, maths, *self.tables, *self.functions, attributes]
        return "\n".join(part for part in parts if part)


class Function:
    """One function, written line by line."""

    def __init__(
        self,
        module: Module,
        name: str,
        *params: str,
        exported: bool = False,
        moves_buffers: bool = False,
    ) -> None:
        self.module, self.moves_buffers = module, moves_buffers
        linkage = "" if exported else "internal "
        kind = "" if exported else "noinline "
        self._head = f"define {linkage}void @{name}({', '.join(params)}) {kind}#0 {{"
        self._lines = ["entry:"]
        self._used = {"entry", *(param.rpartition("%")[2] for param in params)}
        self._count: dict[str, int] = {}
        self._known: list[dict[str, Any]] = [{}]

    def end(self) -> None:
        """Close the function and add it to its module."""
        self._lines.append("  ret void")
        self.module.functions.append("\n".join([self._head, *self._lines, "}\n"]))

    def comment(self, text: str) -> None:
        self._lines.append(f"  ; {text}")

    def do(self, text: str) -> None:
        """An instruction without a result."""
        self._lines.append(f"  {text}")

    def raw(self, lines: list[str]) -> None:
        """Lines as they are: a loop written by hand."""
        self._lines += lines

    def let(self, name: str, text: str) -> str:
        """An instruction's result, under a name of its own."""
        value = self._fresh(name)
        self._lines.append(f"  %{value} = {text}")
        return f"%{value}"

    def same(self, name: str, text: str) -> str:
        """The result of an instruction that gives the same whenever it runs: where it has run, that is taken."""
        return str(self._once(text, lambda: self.let(name, text)))

    def _once(self, key: str, make: Callable[[], Any]) -> Any:
        for known in self._known:
            if key in known:
                return known[key]
        made = self._known[-1][key] = make()
        return made

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """A part that doesn't always run: what it computes is known in it only."""
        self._known.append({})
        yield
        self._known.pop()

    def _fresh(self, name: str) -> str:
        name = "".join(c if c.isalnum() or c in "._" else "_" for c in name)
        value, count = name, self._count.get(name, 0)
        while value in self._used:
            count += 1
            value = f"{name}.{count}"
        self._count[name] = count
        self._used.add(value)
        return value

    # Integers and addresses; what is known now is folded, so that the text stays readable.

    def add(self, a: Value, b: Value, name: str = "i") -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self.same(name, f"add nsw i64 {a}, {b}")

    def sub(self, a: Value, b: Value, name: str = "i") -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self.same(name, f"sub nsw i64 {a}, {b}")

    def mul(self, a: Value, b: Value, name: str = "i") -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 0 or b == 0:
            return 0
        if a == 1 or b == 1:
            return b if a == 1 else a
        return self.same(name, f"mul nsw i64 {a}, {b}")

    def minimum(self, a: Value, b: Value, name: str = "least") -> Value:
        less = self.same("less", f"icmp slt i64 {a}, {b}")
        return self.same(name, f"select i1 {less}, i64 {a}, i64 {b}")

    def maximum(self, a: Value, b: Value, name: str = "most") -> Value:
        more = self.same("more", f"icmp sgt i64 {a}, {b}")
        return self.same(name, f"select i1 {more}, i64 {a}, i64 {b}")

    def quotient(self, a: Value, b: Value, name: str) -> Value:
        """a / b of numbers that aren't negative, without a division where b is one."""
        label, before = self._fresh(name), self._here()
        self.do(f"br i1 {self.same('is.one', f'icmp eq i64 {b}, 1')}, label %{label}.done, label %{label}.divide")
        self._begin(f"{label}.divide")
        quotient = self.let(f"{name}.quotient", f"udiv i64 {a}, {b}")
        self.do(f"br label %{label}.done")
        self._begin(f"{label}.done")
        self._lines.append(f"  %{label} = phi i64 [ {a}, %{before} ], [ {quotient}, %{label}.divide ]")
        return f"%{label}"

    def choose(self, index: Value, among: Sequence[int], name: str) -> Value:
        """Of numbers known now the one at an index, the last where there are no more."""
        found: Value = among[-1]
        for position in reversed(range(len(among) - 1)):
            if among[position] != found:
                here = self.same("is.here", f"icmp eq i64 {index}, {position}")
                found = self.same(name, f"select i1 {here}, i64 {among[position]}, i64 {found}")
        return found

    def share(self, count: Value, me: Value, crew: Value) -> tuple[Value, Value]:
        """Of so many things those that are for one of a crew: from, to. All, without a division, where it is alone."""
        found: tuple[Value, Value] = self._once(f"share {count}, {me}, {crew}", lambda: self._share(count, me, crew))
        return found

    def _share(self, count: Value, me: Value, crew: Value) -> tuple[Value, Value]:
        label = self._fresh("share")
        before = self._here()
        self.do(f"br i1 {self.same('is.alone', f'icmp eq i64 {crew}, 1')}, label %{label}.all, label %{label}.part")
        self._begin(f"{label}.part")
        first = self.let("from", f"udiv i64 {self.let('mine', f'mul i64 {count}, {me}')}, {crew}")
        following = self.let("following", f"mul i64 {count}, {self.let('next', f'add i64 {me}, 1')}")
        last = self.let("to", f"udiv i64 {following}, {crew}")
        self.do(f"br label %{label}.all")
        self._begin(f"{label}.all")
        return (
            self.let("from", f"phi i64 [ 0, %{before} ], [ {first}, %{label}.part ]"),
            self.let("to", f"phi i64 [ {count}, %{before} ], [ {last}, %{label}.part ]"),
        )

    def at(self, pointer: str, offset: Value, name: str = "at") -> str:
        """A pointer some bytes further."""
        if offset == 0:
            return pointer
        return self.same(name, f"getelementptr i8, ptr {pointer}, i64 {offset}")

    def load_int(self, pointer: str, name: str) -> str:
        return self.let(name, f"load i64, ptr {pointer}")

    def store_int(self, value: Value, pointer: str) -> None:
        self.do(f"store i64 {value}, ptr {pointer}")

    def call(self, name: str, *args: str) -> None:
        """Call a function, by name or by its address."""
        self.do(f"call void {name if name.startswith('%') else f'@{name}'}({', '.join(args)})")

    # Control flow.

    @contextmanager
    def loop(self, name: str, start: Value, stop: Value, step: Value = 1, *, some: bool = False) -> Iterator[str]:
        """Repeat the block for an index from ``start`` below ``stop``; ``some``: there is one at least."""
        with self.loop_carrying(name, start, stop, [], step=step, some=some) as (index, _):
            yield index

    @contextmanager
    def loop_carrying(
        self,
        name: str,
        start: Value,
        stop: Value,
        vectors: list[str],
        *,
        step: Value = 1,
        some: bool = False,
        names: Sequence[str] = (),
    ) -> Iterator[tuple[str, list[str]]]:
        """A loop whose vectors stay in registers: the block replaces the list's entries by their next values.

        After the loop the list holds the last ones. The condition is at the end, as the processor wants it; so a
        loop that may be empty is asked for it before, too.
        """
        label, before = self._fresh(name), self._here()
        self._used |= {f"{label}.more", f"{label}.next"}
        phis = [f"%{self._fresh(name)}" for name in names or [f"{label}.carried"] * len(vectors)]
        some = some or (isinstance(start, int) and isinstance(stop, int) and start < stop)
        if some:
            self.do(f"br label %{label}.body")
        else:
            any_ = self.let(f"{label}.any", f"icmp slt i64 {start}, {stop}")
            self.do(f"br i1 {any_}, label %{label}.body, label %{label}.done")
        self._begin(f"{label}.body")
        at, carried = len(self._lines), list(phis)
        with self._inside():
            yield f"%{label}", carried
        last = self._here()
        self.do(f"%{label}.next = add nsw i64 %{label}, {step}")
        self.do(f"%{label}.more = icmp slt i64 %{label}.next, {stop}")
        self.do(f"br i1 %{label}.more, label %{label}.body, label %{label}.done")
        self._begin(f"{label}.done")
        # The phis can be written only now that the next values have names.
        kind = self.module.vector
        head = [f"  %{label} = phi i64 [ {start}, %{before} ], [ %{label}.next, %{last} ]"]
        for phi, first, following in zip(phis, vectors, carried, strict=True):
            head.append(f"  {phi} = phi {kind} [ {first}, %{before} ], [ {following}, %{last} ]")
        self._lines[at:at] = head
        if not some:
            for each, (first, following) in enumerate(zip(vectors, carried, strict=True)):
                ends = f"[ {first}, %{before} ], [ {following}, %{last} ]"
                carried[each] = self.let(f"{label}.last", f"phi {kind} {ends}")

    @contextmanager
    def when(self, name: str, condition: str) -> Iterator[None]:
        """Run the block if ``condition`` holds."""
        label = self._fresh(name)
        self.do(f"br i1 {condition}, label %{label}.then, label %{label}.end")
        self._begin(f"{label}.then")
        with self._inside():
            yield
        self.do(f"br label %{label}.end")
        self._begin(f"{label}.end")

    def _begin(self, label: str) -> None:
        self._lines.append(f"{label}:")

    def _here(self) -> str:
        return next(line[:-1] for line in reversed(self._lines) if line.endswith(":") and not line.startswith(" "))

    # Vectors.

    def load(self, pointer: str, name: str, align: int) -> str:
        return self.let(name, f"load {self.module.vector}, ptr {pointer}, align {align}")

    def store(self, value: str, pointer: str, align: int) -> None:
        self.do(f"store {self.module.vector} {value}, ptr {pointer}, align {align}")

    def prefetch(self, pointer: str) -> None:
        """Have memory brought into L2 that will be read later; an address that is nobody's does no harm."""
        self.module.declares.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.do(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 2, i32 1)")

    def splat(self, scalar: str, name: str) -> str:
        """A number in every lane."""
        vector, kind = self.module.vector, self.module.scalar
        first = self.let(f"{name}.lane", f"insertelement {vector} poison, {kind} {scalar}, i64 0")
        return self.let(name, f"shufflevector {vector} {first}, {vector} poison, <{LANES} x i32> zeroinitializer")

    def load_splat(self, pointer: str, name: str) -> str:
        module = self.module
        scalar = self.let(f"{name}.scalar", f"load {module.scalar}, ptr {pointer}, align {module.bytes}")
        return self.splat(scalar, name)

    def first_lanes(self, count: Value, name: str = "mask") -> str:
        """The mask of the first ``count`` lanes."""
        ids = ", ".join(f"i32 {lane}" for lane in range(LANES))
        if isinstance(count, int):
            return "<" + ", ".join(f"i1 {'true' if lane < count else 'false'}" for lane in range(LANES)) + ">"
        short = self.let("count", f"trunc i64 {count} to i32")
        one = self.let("count.lane", f"insertelement <{LANES} x i32> poison, i32 {short}, i64 0")
        kind = f"<{LANES} x i32>"
        every = self.let("count.all", f"shufflevector {kind} {one}, {kind} poison, {kind} zeroinitializer")
        return self.let(name, f"icmp slt {kind} <{ids}>, {every}")

    def load_masked(self, pointer: str, mask: str, name: str) -> str:
        vector, align = self.module.vector, self.module.bytes
        kind = f"v{LANES}{self.module.dtype}"
        self.module.declares.add(f"declare {vector} @llvm.masked.load.{kind}.p0(ptr, i32, <{LANES} x i1>, {vector})")
        args = f"ptr {pointer}, i32 {align}, <{LANES} x i1> {mask}, {vector} zeroinitializer"
        return self.let(name, f"call {vector} @llvm.masked.load.{kind}.p0({args})")

    def store_masked(self, value: str, pointer: str, mask: str) -> None:
        vector, align = self.module.vector, self.module.bytes
        kind = f"v{LANES}{self.module.dtype}"
        self.module.declares.add(f"declare void @llvm.masked.store.{kind}.p0({vector}, ptr, i32, <{LANES} x i1>)")
        args = f"{vector} {value}, ptr {pointer}, i32 {align}, <{LANES} x i1> {mask}"
        self.do(f"call void @llvm.masked.store.{kind}.p0({args})")

    def fma(self, a: str, b: str, c: str, name: str) -> str:
        """a*b + c: one rounding where the target has the instruction, else multiply and add."""
        vector = self.module.vector
        if not self.module.target.fma:
            product = self.let(f"{name}.product", f"fmul {vector} {a}, {b}")
            return self.let(name, f"fadd {vector} {product}, {c}")
        kind = f"v{LANES}{self.module.dtype}"
        self.module.declares.add(f"declare {vector} @llvm.fma.{kind}({vector}, {vector}, {vector})")
        return self.let(name, f"call {vector} @llvm.fma.{kind}({vector} {a}, {vector} {b}, {vector} {c})")

    def math(self, op: str, *args: str, name: str) -> str:
        """A vector function of the module's number format."""
        self.module.math.add(op)
        self.module.calls += 1
        vector = self.module.vector
        given = ", ".join(f"{vector} {arg}" for arg in args)
        return self.let(name, f"call {vector} {function_name(op, self.module.dtype)}({given})")
