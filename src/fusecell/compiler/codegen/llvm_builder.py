"""Typed builder of a kernel's LLVM text: functions, arithmetic, memory, loops, and the vector type of a kernel.

A method per instruction appends its line and returns its result, whose type follows from its operands. Integers that
are known while the text is written are Python's, and folded: ``f.mul(row, 0)`` writes nothing. Address arithmetic is
emitted once per scope: LLVM would find such common values too, but in a pass that takes longer than writing them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.llvm_text import FALSE, TRUE, Integer, TextBuilder, Value, literal, type_of, typed
from fusecell.compiler.codegen.vector_math import declarations, definitions, function_name
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.sizes import DType, ceil_div, padded

__all__ = ["Function", "Module"]


MOST_INLINED = 256
"""Calls of vector functions in a module up to which they are inlined; LLVM would take minutes for more."""


@dataclass
class Module:
    """Module of LLVM text: its functions, and the vector functions and intrinsics that they call."""

    title: str
    dtype: DType
    target: Target
    functions: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    math: set[str] = field(default_factory=set)
    declares: set[str] = field(default_factory=set)
    math_calls: int = 0
    _emitted: set[str] = field(default_factory=set)

    @property
    def scalar(self) -> str:
        """LLVM's type of a number."""
        return self.dtype.llvm

    @property
    def vector(self) -> str:
        """LLVM's type of a vector: 16 lanes on every target, which LLVM splits into the machine's registers."""
        return f"<{LANES} x {self.scalar}>"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector."""
        return LANES * self.itemsize

    def row_bytes(self, features: int) -> int:
        """Return the bytes of a row of ``features`` numbers in the kernel's buffers: whole vectors."""
        return padded(features) * self.itemsize

    def groups(self, columns: int) -> int:
        """Count the column groups, of one vector each, that hold ``columns``."""
        return ceil_div(columns, LANES)

    def is_new(self, name: str) -> bool:
        """Whether a function or table that is used several times has to be emitted now: true once per name."""
        new = name not in self._emitted
        self._emitted.add(name)
        return new

    def table(self, name: str, functions: Sequence[str]) -> None:
        """Add a constant table of function addresses; an empty name is a null entry."""
        entries = ", ".join(f"ptr @{each}" if each else "ptr null" for each in functions)
        self.tables.append(f"@{name} = internal constant [{len(functions)} x ptr] [{entries}]\n")

    def integers(self, name: str, values: Sequence[int]) -> Value:
        """Return the address of a constant table of 64-bit integers."""
        entries = ", ".join(f"i64 {value}" for value in values)
        self.tables.append(f"@{name} = internal constant [{len(values)} x i64] [{entries}]\n")
        return Value(f"@{name}", "ptr")

    def zeros(self, size: int) -> Value:
        """Return the address of ``size`` bytes of zeros."""
        name = f"@zeros.{size}"
        if self.is_new(name):
            self.tables.append(f"{name} = internal constant [{size} x i8] zeroinitializer, align 64\n")
        return Value(name, "ptr")

    def text(self) -> str:
        """Return the whole module as LLVM reads it."""
        # LLVM would prefer 256 bits on CPUs whose clock dropped for 512. Nobody reads floating-point exceptions, so
        # that none have to be preserved.
        width = self.target.vector_bits
        head = f"; {self.title}, {self.dtype}, for {self.target.name}\n"
        declares = "\n".join(sorted(self.declares | declarations(self.math, self.dtype)))
        attributes = f'attributes #0 = {{ nounwind "prefer-vector-width"="{width}" "no-trapping-math"="true" }}\n'
        maths = definitions(self.math, self.dtype, inline=self.math_calls <= MOST_INLINED)
        parts = [head, declares, maths, *self.tables, *self.functions, attributes]
        return "\n".join(part for part in parts if part)


class Function(TextBuilder):
    """Body of one function, written instruction by instruction; `end` adds it to the module.

    Arguments:
        noalias: the address parameters through which alone their memory is reached.
        exported: whether it can be looked up in the linked code.
        moves_buffers: whether the addresses of buffers change while it runs, so that each use loads them again.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        *params: Value,
        noalias: Iterable[Value] = (),
        exported: bool = False,
        moves_buffers: bool = False,
    ) -> None:
        super().__init__(params, module.declares)
        self.module, self.name, self.moves_buffers = module, name, moves_buffers
        # Never inlined: a microkernel is shared by all stages that use its tile, and every copy takes time to compile.
        linkage = "" if exported else "internal "
        kind = "" if exported else "noinline "
        noalias = set(noalias)
        head = ", ".join(f"ptr noalias {param}" if param in noalias else typed(param) for param in params)
        self._head = f"define {linkage}void @{name}({head}) {kind}#0 {{"
        self.lines.append("entry:")
        self._used.add("entry")
        self._scopes: list[dict[str, Any]] = [{}]

    def end(self) -> str:
        """Close the function and add it to its module; return its name."""
        self.do("ret void")
        self.module.functions.append("\n".join([self._head, *self.lines, "}\n"]))
        return self.name

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

    def as_number(self, a: Integer, name: str) -> Value:
        """Return an integer as a number of the module's format."""
        return self.let(name, f"sitofp i64 {a} to {self.module.scalar}", self.module.scalar)

    def as_integer(self, a: Value, name: str) -> Value:
        """Return a whole number as an integer."""
        return self.let(name, f"fptosi {typed(a)} to i64")

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

    # Memory: addresses, words, numbers, vectors.

    def at(self, pointer: Value, offset: Integer, name: str = "at") -> Value:
        """Return the address ``offset`` bytes further."""
        if offset == 0:
            return pointer
        return self._pure(name, f"getelementptr i8, ptr {pointer}, i64 {offset}", "ptr")

    def alloca(self, name: str, count: int = 1, type: str = "i64") -> Value:
        """Return the address of ``count`` integers of the stack."""
        return self.let(name, f"alloca {type}" if count == 1 else f"alloca [{count} x {type}]", "ptr")

    def alloca_bytes(self, size: int, name: str) -> Value:
        """Return the address of ``size`` bytes of the stack, aligned for any vector."""
        return self.let(name, f"alloca [{size} x i8], align 64", "ptr")

    def load_int(self, pointer: Value, name: str, type: str = "i64", *, once: bool = False) -> Value:
        """Load an integer; ``once`` if its memory doesn't change while the function runs."""
        return self._pure(name, f"load {type}, ptr {pointer}", type, once)

    def store_int(self, value: Integer, pointer: Value) -> None:
        self.do(f"store {typed(value)}, ptr {pointer}")

    def load_pointer(self, pointer: Value, name: str, *, once: bool = False) -> Value:
        """Load an address; ``once`` if its memory doesn't change while the function runs."""
        return self._pure(name, f"load ptr, ptr {pointer}", "ptr", once)

    def store_pointer(self, value: Value, pointer: Value) -> None:
        self.do(f"store ptr {value}, ptr {pointer}")

    def load_scalar(self, pointer: Value, name: str) -> Value:
        """Load one number."""
        module = self.module
        return self.let(name, f"load {module.scalar}, ptr {pointer}, align {module.itemsize}", module.scalar)

    def store_scalar(self, value: Value, pointer: Value) -> None:
        """Store one number."""
        self.do(f"store {self.module.scalar} {value}, ptr {pointer}, align {self.module.itemsize}")

    def load(self, pointer: Value, name: str, align: int, lanes: int = LANES) -> Value:
        """Load a vector, of 16 lanes by default."""
        vector = f"<{lanes} x {self.module.scalar}>"
        return self.let(name, f"load {vector}, ptr {pointer}, align {align}", vector)

    def store(self, value: Value, pointer: Value, align: int) -> None:
        """Store a vector."""
        self.do(f"store {typed(value)}, ptr {pointer}, align {align}")

    def load_masked(self, pointer: Value, mask: Value, name: str) -> Value:
        """Load the lanes of a mask; the memory of others isn't accessed, and they are zero."""
        align = Value(str(self.module.itemsize), "i32")
        function = f"masked.load.{self._suffix}.p0"
        load = self.intrinsic(function, pointer, align, mask, self.zero, result=self.module.vector)
        return self.let(name, load, self.module.vector)

    def store_masked(self, value: Value, pointer: Value, mask: Value) -> None:
        """Store the lanes of a mask."""
        align = Value(str(self.module.itemsize), "i32")
        self.do(self.intrinsic(f"masked.store.{self._suffix}.p0", value, pointer, align, mask))

    def copy_bytes(self, target: Value, source: Value, count: Integer) -> None:
        """Copy memory that doesn't overlap."""
        size = Value(str(count), "i64")
        self.do(self.intrinsic("memcpy.p0.p0.i64", target, source, size, FALSE))

    def prefetch(self, pointer: Value) -> None:
        """Prefetch a cache line into L2 (locality 2); an address that is not mapped does no harm."""
        read, locality, data = (Value(number, "i32") for number in "021")
        self.do(self.intrinsic("prefetch.p0", pointer, read, locality, data))

    # Memory that threads share.

    def load_acquire(self, pointer: Value, name: str) -> Value:
        """Load an i64 with acquire semantics: the writes before another thread's release of it are visible after."""
        return self.let(name, f"load atomic i64, ptr {pointer} acquire, align 8")

    def store_release(self, value: Integer, pointer: Value) -> None:
        """Store an i64 with release semantics: threads that acquire it see all writes before."""
        self.do(f"store atomic i64 {value}, ptr {pointer} release, align 8")

    def fetch_add(self, pointer: Value, value: Integer, name: str, ordering: str = "seq_cst") -> Value:
        """Add to an i64 atomically; return its value before."""
        return self.let(name, f"atomicrmw add ptr {pointer}, i64 {value} {ordering}")

    def exchange(self, pointer: Value, value: Integer, name: str) -> Value:
        """Replace an i64 atomically; return its value before."""
        return self.let(name, f"atomicrmw xchg ptr {pointer}, i64 {value} seq_cst")

    # Vectors of the module's number format.

    @property
    def zero(self) -> Value:
        """The vector of zeros."""
        return Value("zeroinitializer", self.module.vector)

    @property
    def _suffix(self) -> str:
        """The spelling of the vector type in the names of intrinsics."""
        return f"v{LANES}{self.module.dtype}"

    def constant(self, value: float) -> Value:
        """Return the vector of one constant."""
        module = self.module
        return Value(f"splat ({module.scalar} {literal(value, module.dtype)})", module.vector)

    def fadd(self, a: Value, b: Value, name: str) -> Value:
        return self._float("fadd", name, a, b)

    def fsub(self, a: Value, b: Value, name: str) -> Value:
        return self._float("fsub", name, a, b)

    def fmul(self, a: Value, b: Value, name: str) -> Value:
        return self._float("fmul", name, a, b)

    def fdiv(self, a: Value, b: Value, name: str) -> Value:
        return self._float("fdiv", name, a, b)

    def fneg(self, a: Value, name: str) -> Value:
        return self._float("fneg", name, a)

    def _float(self, opcode: str, name: str, *operands: Value) -> Value:
        type = type_of(*operands)
        return self.let(name, f"{opcode} {type} {', '.join(operands)}", type)

    def fcmp(self, predicate: str, a: Value, b: Value, name: str) -> Value:
        """Compare lane by lane, by LLVM's predicate: ``olt`` is less and neither NaN, ``une`` unequal or a NaN."""
        return self.let(name, f"fcmp {predicate} {typed(a)}, {b}", f"<{LANES} x i1>")

    # Without fast-math flags LLVM contracts nothing itself: a multiply-add is fused where the text says so, and nowhere
    # else. That, and the order of the text, is what makes bits the same on every target.

    def fma(self, a: Value, b: Value, c: Value, name: str) -> Value:
        """Return a*b + c: rounded once where the target has the instruction, else by multiply and add."""
        # Without the instruction LLVM would call the C library's fma for each lane.
        if not self.module.target.fma:
            return self.fadd(self.fmul(a, b, f"{name}.product"), c, name)
        vector = self.module.vector
        return self.let(name, self.intrinsic(f"fma.{self._suffix}", a, b, c, result=vector), vector)

    def math(self, op: str, *args: Value, name: str) -> Value:
        """Call a vector function of the module's number format."""
        self.module.math.add(op)
        self.module.math_calls += 1
        vector = self.module.vector
        return self.let(name, self.calling(function_name(op, self.module.dtype), args, vector), vector)

    def splat(self, scalar: Value, name: str) -> Value:
        """Return a number, or an integer, in every lane."""
        vector = f"<{LANES} x {scalar.type}>"
        first = self.let(f"{name}.lane", f"insertelement {vector} poison, {typed(scalar)}, i64 0", vector)
        instruction = f"shufflevector {vector} {first}, {vector} poison, <{LANES} x i32> zeroinitializer"
        return self.let(name, instruction, vector)

    def load_splat(self, pointer: Value, name: str) -> Value:
        """Load one number into every lane."""
        return self.splat(self.load_scalar(pointer, f"{name}.scalar"), name)

    def first_lane(self, vector: Value, name: str) -> Value:
        return self.lane(vector, 0, name)

    def lane(self, vector: Value, lane: int, name: str) -> Value:
        """Return the number in one lane."""
        return self.let(name, f"extractelement {typed(vector)}, i64 {lane}", self.module.scalar)

    def insert_lane(self, vector: Value, number: Value, lane: int, name: str) -> Value:
        """Return a vector with another number in one lane."""
        return self.let(name, f"insertelement {typed(vector)}, {typed(number)}, i64 {lane}", vector.type)

    def shuffle(self, a: Value, b: Value | None, lanes: Sequence[int], name: str) -> Value:
        """Return some lanes of two vectors, those of ``b`` numbered from the last of ``a`` on, or of one vector."""
        order = ", ".join(f"i32 {lane}" for lane in lanes)
        second = f"{a.type} {'poison' if b is None else b}"
        result = f"<{len(lanes)} x {a.type.split(' x ')[1]}"
        return self.let(name, f"shufflevector {typed(a)}, {second}, <{len(lanes)} x i32> <{order}>", result)

    def first_lanes(self, count: Integer, name: str = "mask") -> Value:
        """Return the mask of the first ``count`` lanes; all of them where it is larger."""
        kind = f"<{LANES} x i32>"
        if isinstance(count, int):
            lanes = ", ".join(f"i1 {'true' if lane < count else 'false'}" for lane in range(LANES))
            return Value(f"<{lanes}>", f"<{LANES} x i1>")
        # Compared as 32-bit lanes: of 64 bits they would take twice the registers of float32 numbers.
        short = self.let("count", f"trunc i64 {count} to i32", "i32")
        one = self.let("count.lane", f"insertelement {kind} poison, {typed(short)}, i64 0", kind)
        every = self.let("count.all", f"shufflevector {kind} {one}, {kind} poison, {kind} zeroinitializer", kind)
        numbers = ", ".join(f"i32 {lane}" for lane in range(LANES))
        return self.let(name, f"icmp slt {kind} <{numbers}>, {every}", f"<{LANES} x i1>")

    # Control flow.

    def call(self, function: str, *args: Integer) -> None:
        """Call a function, by name or by its address."""
        self.do(self.calling(function if isinstance(function, Value) else f"@{function}", args))

    def call_for(self, type: str, function: str, *args: Integer, name: str) -> Value:
        """Call a function by its address, or by its name as LLVM spells it; return its result."""
        return self.let(name, self.calling(function, args, type), type)

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
        return self.let(name, f"phi {type} {_incoming(incoming)}", type)

    def forward(self, name: str) -> Value:
        """Return the name of an i64 for a phi to use before the code that defines it, by `define_sum`."""
        return Value(f"%{self.fresh(name)}", "i64")

    def define_sum(self, result: Value, a: Integer, b: Integer) -> None:
        """Define a value that `forward` has named."""
        self.do(f"{result} = add i64 {a}, {b}")

    def current(self) -> str:
        """Return the label of the basic block that is being written."""
        return next(line[:-1] for line in reversed(self.lines) if line.endswith(":") and not line.startswith(" "))

    @contextmanager
    def if_(self, condition: Value, name: str) -> Iterator[None]:
        """Run the body if ``condition`` holds."""
        label = self.fresh(name)
        self.branch_if(condition, f"{label}.then", f"{label}.end")
        self.begin(f"{label}.then")
        with self._scope():
            yield
        self.branch(f"{label}.end")
        self.begin(f"{label}.end")

    @contextmanager
    def unless(self, condition: Value, name: str) -> Iterator[None]:
        """Run the body if ``condition`` doesn't hold."""
        with self.if_(self.not_(condition, f"is_{name}"), name):
            yield

    @contextmanager
    def for_range(
        self, name: str, start: Integer, stop: Integer, step: Integer = 1, *, nonempty: bool = False
    ) -> Iterator[Value]:
        """Loop with an index from ``start`` below ``stop``; ``nonempty`` if start < stop is certain."""
        with self.for_range_carrying(name, start, stop, [], step=step, nonempty=nonempty) as (index, _):
            yield index

    @contextmanager
    def for_range_carrying(
        self,
        name: str,
        start: Integer,
        stop: Integer,
        vectors: Sequence[Value],
        *,
        step: Integer = 1,
        nonempty: bool = False,
        names: Sequence[str] = (),
    ) -> Iterator[tuple[Value, list[Value]]]:
        """Loop that carries vectors in registers: the body replaces the list's entries by their next values.

        After the loop the list holds the last ones. The condition is at the loop's end, one branch per turn; a loop
        that may be empty is checked before it, too.
        """
        # Written as LLVM's loop rotation would leave it: that pass isn't run, to save compile time. The body's end is
        # the only branch of a turn, and what is carried is in phis, not in memory that mem2reg would have to promote.
        label, before = self.fresh(name), self.current()
        self._used |= {f"{label}.more", f"{label}.next"}
        phis = [
            Value(f"%{self.fresh(name)}", vector.type)
            for name, vector in zip(names or [f"{label}.carried"] * len(vectors), vectors, strict=True)
        ]
        nonempty = nonempty or (isinstance(start, int) and isinstance(stop, int) and start < stop)
        if nonempty:
            self.branch(f"{label}.body")
        else:
            self.branch_if(self.lt(start, stop, f"{label}.any"), f"{label}.body", f"{label}.done")
        self.begin(f"{label}.body")
        head, carried = len(self.lines), list(phis)
        with self._scope():
            yield Value(f"%{label}", "i64"), carried
        last = self.current()
        self.do(f"%{label}.next = add nsw i64 %{label}, {step}")
        self.do(f"%{label}.more = icmp slt i64 %{label}.next, {stop}")
        self.branch_if(Value(f"%{label}.more", "i1"), f"{label}.body", f"{label}.done")
        self.begin(f"{label}.done")
        # The phis are inserted at the head only now that the values of the next turn have names.
        ends = [[(first, before), (following, last)] for first, following in zip(vectors, carried, strict=True)]
        index_phi = f"  %{label} = phi i64 {_incoming([(start, before), (Value(f'%{label}.next', 'i64'), last)])}"
        vector_phis = [f"  {phi} = phi {phi.type} {_incoming(end)}" for phi, end in zip(phis, ends, strict=True)]
        self.lines[head:head] = [index_phi, *vector_phis]
        if not nonempty:
            carried[:] = [self.phi(end, f"{label}.last") for end in ends]


def _incoming(values: Sequence[tuple[Integer, str]]) -> str:
    return ", ".join(f"[ {value}, %{label} ]" for value, label in values)
