"""The loops over rows and column blocks of a stage's function, and the values computed inside them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

from fusecell.compiler.codegen.kernel_abi import Layout, row_address
from fusecell.compiler.codegen.llvm_builder import LANES, Function, Value
from fusecell.compiler.codegen.pointwise_ops import VALUES, literal
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.schedule.plan import Buffer, Location, Plan, Stage

__all__ = ["Body", "epilogue_roots", "join_lanes", "own_rows", "partials", "reads"]


def partials(stage: Stage) -> str:
    """The buffer of a stage's partial reductions."""
    return f"partials.{stage.name}"


def own_rows(f: Function, layout: Layout, buffer: Buffer, slot: Value) -> tuple[str, Value, bool]:
    """Where a buffer's rows are, for a function that takes what every function of a stage takes."""
    return row_address(f, layout, f.module, buffer, t="%t", base="%base", kept="%kept", slot=slot)


def epilogue_roots(plan: Plan, stage: Stage) -> list[int]:
    """The values that the epilogue of a stage stores, or reduces."""
    return [*stage.stores, *(plan.graph[index].args[0] for index in stage.reductions)]


def reads(plan: Plan, stage: Stage, roots: Iterable[int], local: Collection[int]) -> list[Location]:
    """Every place that computing ``roots`` reads, in an order that doesn't change from run to run.

    Arguments:
        local: values that are computed, not read.
    """
    found: dict[Location, None] = {}
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        place = None if index in local else stage.operands.get(index)
        if place is not None:
            found[place] = None
        elif plan.graph[index].op != "affine":
            stack.extend(plan.graph[index].args)
    return list(found)


class Body:
    """One function's loops: ``with body.rows(): with body.columns():``, and inside ``value``, ``store``, ``reduce``.

    Arguments:
        local: values computed here; all others are read from memory or are cheap enough to be computed here too.
        roots: the values that will be asked for.
        stores: the places that will be written.
    """

    def __init__(
        self,
        f: Function,
        layout: Layout,
        plan: Plan,
        stage: Stage,
        *,
        local: Iterable[int] = (),
        roots: Iterable[int] = (),
        stores: Iterable[Location] = (),
    ) -> None:
        self.f, self.layout, self.plan, self.stage = f, layout, plan, stage
        self.module = f.module
        self.local = set(local)
        self._known: dict[int, str] = {}
        self._masks: dict[int, str] = {}
        self._reads = {place: self._base(place, "%slot") for place in reads(plan, stage, roots, self.local)}
        stores = list(stores)
        after: Value = 0
        if any(place.buffer.scope == "state" for place in stores):
            after = f.let("slot.after", "xor i64 %slot, 1")
        self._writes = {place: self._base(place, after) for place in stores}
        self._partials = layout.buffer(f, partials(stage)) if stage.reductions else ""
        self._order = layout.buffer(f, "order") if self._by_order() else ""

    # Where things are.

    def _base(self, place: Location, slot: Value) -> tuple[str, Value, bool]:
        return own_rows(self.f, self.layout, place.buffer, slot)

    def _by_order(self) -> bool:
        return any(ordered for _, _, ordered in (*self._reads.values(), *self._writes.values()))

    # The loops.

    @contextmanager
    def rows(self) -> Iterator[None]:
        """For each row: where it begins in every place."""
        f = self.f
        # A tile has some of both; a stage without products may be given none.
        with f.loop("r", 0, "%rows", some=bool(self.stage.affines)) as r:
            row = f.add("%row0", r, "row")
            ordered: Value = 0
            if self._order:
                ordered = f.load_int(f.at(self._order, f.mul(row, 8)), "caller.row")
            self._row, self._r = row, r
            self._read_rows = self._row_pointers(self._reads, row, ordered)
            self._write_rows = self._row_pointers(self._writes, row, ordered)
            yield

    def _row_pointers(
        self, bases: dict[Location, tuple[str, Value, bool]], row: Value, ordered: Value
    ) -> dict[Location, str]:
        f = self.f
        return {
            place: f.at(f.at(base, f.mul(ordered if by_order else row, stride)), place.offset * self.module.bytes)
            for place, (base, stride, by_order) in bases.items()
        }

    @contextmanager
    def columns(self) -> Iterator[None]:
        """For each block of columns: how far it is behind the first, the one number that all addresses share."""
        f, block = self.f, self.module.block
        self._first = f.mul("%block0", block, "first.column")
        width = f.mul("%blocks", block, "width")
        if self.stage.affines:
            # The tile keeps the sums of its products by [row][product][block][lane].
            row = f.at("%acc", f.mul(f.mul(self._r, len(self.stage.affines)), width))
            self._accumulators = [f.at(row, f.mul(width, p), "acc") for p in range(len(self.stage.affines))]
        with f.loop("column", 0, width, block, some=bool(self.stage.affines)) as self._column:
            self._known, self._masks = {}, {}
            yield

    def _place(self, row: str) -> str:
        """Where the columns of this block are in a row."""
        return self.f.at(self.f.at(row, self._first), self._column)

    # Values.

    def value(self, index: int) -> str:
        """The vector of a value at this row and block, loaded or computed once."""
        if index not in self._known:
            self._known[index] = self._made(index)
        return self._known[index]

    def _made(self, index: int) -> str:
        node, f = self.plan.graph[index], self.f
        if node.op == "const":
            return f"splat ({self.module.scalar} {literal(node.attrs['value'], self.module.dtype)})"
        if index in self.local and node.op == "affine":
            return f.load(self.accumulator(self.stage.affines.index(index)), node.name, self.module.block)
        if index not in self.local:
            place = self.stage.operands.get(index)
            if place is not None:
                value = self._loaded(place, node.size, node.name)
                if node.type.kind == "mask":
                    value = f.let(f"{node.name}.mask", f"fcmp une {self.module.vector} {value}, zeroinitializer")
                return value
        return VALUES[node.op](f, [self.value(arg) for arg in node.args], node.name)

    def accumulator(self, position: int) -> str:
        """Where the tile keeps the sums of one of the stage's products."""
        return self.f.at(self._accumulators[position], self._column, "acc.at")

    def _loaded(self, place: Location, size: int, name: str) -> str:
        f, pointer = self.f, self._read_rows[place]
        if size == 1:
            return f.load_splat(pointer, name)
        pointer = self._place(pointer)
        if place.buffer.scope == "user" and size % LANES:
            return f.load_masked(pointer, self._mask(size), name)
        return f.load(pointer, name, self._alignment(place))

    def _alignment(self, place: Location) -> int:
        aligned = place.buffer.scope != "user" and place.offset % LANES == 0
        return self.module.block if aligned else self.module.bytes

    def _mask(self, size: int) -> str:
        """The lanes of this block that a value of ``size`` features has."""
        if size not in self._masks:
            bytes_ = self.f.add(self._first, self._column)
            done = self.f.let("done", f"sdiv exact i64 {bytes_}, {self.module.bytes}")
            left = self.f.sub(size, done, "left")
            self._masks[size] = self.f.first_lanes(left)
        return self._masks[size]

    def store(self, index: int, place: Location) -> None:
        """Write a value to a place; a whole buffer of our own takes its padding too."""
        node, f, value = self.plan.graph[index], self.f, self.value(index)
        if node.type.kind == "mask":
            one = f"splat ({self.module.scalar} 1.0)"
            vector = self.module.vector
            value = f.let("number", f"select <{LANES} x i1> {value}, {vector} {one}, {vector} zeroinitializer")
        pointer = self._write_rows[place]
        if node.size == 1:
            scalar = f.let("first", f"extractelement {self.module.vector} {value}, i64 0")
            f.do(f"store {self.module.scalar} {scalar}, ptr {pointer}, align {self.module.bytes}")
            return
        pointer = self._place(pointer)
        part = place.buffer.scope == "user" or place.buffer.size != node.size
        if part and node.size % LANES:
            f.store_masked(value, pointer, self._mask(node.size))
        else:
            f.store(value, pointer, self._alignment(place))

    def reduce(self, position: int, index: int) -> None:
        """Add this block to the sixteen partial results of a reduction; lanes beyond the last feature take no part."""
        f, module, graph = self.f, self.module, self.plan.graph
        node = graph[index]
        count, size = len(self.stage.reductions), graph[node.args[0]].size
        pointer = f.at(self._partials, f.mul(f.add(f.mul(self._row, count), position), module.block))
        first = f.let("is.first", f"icmp eq i64 {f.add(self._first, self._column)}, 0")
        old = f.load(pointer, "partial", module.block)
        start = f"splat ({module.scalar} {literal(_IDENTITY[node.op], module.dtype)})"
        old = f.let("so.far", f"select i1 {first}, {module.vector} {start}, {module.vector} {old}")
        new = combine(f, node.op, old, self.value(node.args[0]), node.name)
        if size % LANES:
            mask = f"<{LANES} x i1> {self._mask(size)}"
            new = f.let("taken", f"select {mask}, {module.vector} {new}, {module.vector} {old}")
        f.store(new, pointer, module.block)


_IDENTITY = {"sum": 0.0, "amax": float("-inf"), "amin": float("inf")}


def combine(f: Function, op: str, a: str, b: str, name: str) -> str:
    """One step of a reduction."""
    if op == "sum":
        return f.let(name, f"fadd {f.module.vector} {a}, {b}")
    return f.math("maximum" if op == "amax" else "minimum", a, b, name=name)


def join_lanes(f: Function, op: str, value: str) -> str:
    """Sixteen partial results as one number: lanes l and l + 8, then l + 4, l + 2, l + 1."""
    vector, width = f.module.vector, LANES
    while width > 1:
        width //= 2
        lanes = ", ".join(f"i32 {lane + width if lane < width else lane}" for lane in range(LANES))
        other = f.let("upper", f"shufflevector {vector} {value}, {vector} poison, <{LANES} x i32> <{lanes}>")
        value = combine(f, op, value, other, "joined")
    return f.let("total", f"extractelement {vector} {value}, i64 0")


def start_values(plan: Plan, stage: Stage) -> list[int | None]:
    """What each of a stage's accumulations starts from."""
    return [affine_parts(plan.graph[index])[0] for index in stage.affines]
