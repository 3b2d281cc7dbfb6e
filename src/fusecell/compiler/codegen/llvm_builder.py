"""Typed builder of a function of a kernel: memory, vectors, calls and loops, over blocks and integers.

A method per instruction appends its line and returns its result, whose type follows from its operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from fusecell.compiler.codegen.llvm_integers import IntegerBuilder, phi_operands
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import FALSE, Integer, Value, literal, type_of, typed
from fusecell.compiler.codegen.vector_math import function_name
from fusecell.compiler.ir.primitives import LANES

__all__ = ["Function"]


class Function(IntegerBuilder):
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

    def end(self) -> str:
        """Close the function and add it to its module; return its name."""
        self.do("ret void")
        self.module.functions.append("\n".join([self._head, *self.lines, "}\n"]))
        return self.name

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

    # Numbers, and vectors of the module's number format.

    def as_number(self, a: Integer, name: str) -> Value:
        """Return an integer as a number of the module's format."""
        return self.let(name, f"sitofp i64 {a} to {self.module.scalar}", self.module.scalar)

    def as_integer(self, a: Value, name: str) -> Value:
        """Return a whole number as an integer."""
        return self.let(name, f"fptosi {typed(a)} to i64")

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
        index_phi = f"  %{label} = phi i64 {phi_operands([(start, before), (Value(f'%{label}.next', 'i64'), last)])}"
        vector_phis = [f"  {phi} = phi {phi.type} {phi_operands(end)}" for phi, end in zip(phis, ends, strict=True)]
        self.lines[head:head] = [index_phi, *vector_phis]
        if not nonempty:
            carried[:] = [self.phi(end, f"{label}.last") for end in ends]
