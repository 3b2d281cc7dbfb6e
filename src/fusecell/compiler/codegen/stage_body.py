"""Loops over rows and column groups in the functions of a stage, and the values computed inside them::

    for row in rows:                      each row's address in every buffer, once
        for group in column groups:       16 columns: one vector
            load, compute, store          each value once per row and group

The pointwise values of a stage are one such nest, fused: between two of them nothing goes through memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from fusecell.compiler.codegen.kernel_abi import STEP, Layout, RowAddress, row_address
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_text import Integer, Value, i64, ptr
from fusecell.compiler.codegen.pointwise_ops import POINTWISE_OPS
from fusecell.compiler.codegen.stored_numbers import narrow
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.primitives import LANES
from fusecell.compiler.ir.traversal import resolve
from fusecell.compiler.schedule.plan import SCOPES, Buffer, Location, Plan, Stage

__all__ = [
    "PART_PARAMS",
    "Body",
    "epilogue_roots",
    "join_lanes",
    "partials",
    "partials_of_rows",
    "reads",
    "start_values",
    "step_rows",
]

FIRST_ROW, ROWS, FIRST_GROUP, GROUPS, ACC = i64("first_row"), i64("rows"), i64("first_group"), i64("groups"), ptr("acc")
PART_PARAMS = (FIRST_ROW, ROWS, FIRST_GROUP, GROUPS, ACC)
"""The other parameters of a tile's functions: its rows, its column groups, its accumulators."""


def partials(stage: Stage) -> str:
    """Name the buffer of a stage's partial reductions."""
    return f"partials.{stage.name}"


def partials_of_rows(f: Function, layout: Layout, stage: Stage) -> Value:
    """Return the address of the partial reductions of the first of the rows that a stage's function runs."""
    start = layout.buffer(f, partials(stage))
    if SCOPES[stage.phase] != "chunk":
        return start
    # Each thread has its own part of a chunk's rows; by the numbers of rows alone two parts would overlap.
    return f.at(start, f.mul(STEP.base, len(stage.reductions) * f.module.vector_bytes), "partials")


def step_rows(f: Function, layout: Layout, buffer: Buffer, state: Integer = STEP.old_state) -> RowAddress:
    """Return a buffer's rows of the step that a stage's function runs; of a state, those of one copy."""
    return row_address(f, layout, f.module, buffer, STEP.with_state(state))


def epilogue_roots(plan: Plan, stage: Stage) -> list[int]:
    """List the values that the epilogue of a stage stores, or reduces."""
    return [*stage.stores, *(plan.graph[index].args[0] for index in stage.reductions)]


def reads(plan: Plan, stage: Stage, roots: Iterable[int], local: Collection[int]) -> list[Location]:
    """List every location that computing ``roots`` reads, in an order that is the same in every run.

    Arguments:
        local: values that are computed, not read.
    """
    # The order decides the text, and the text is the key of the disk cache.
    locations: dict[Location, None] = {}
    seen: set[int] = set()
    stack = list(roots)
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        location = None if index in local else stage.operands.get(index)
        if location is not None:
            locations[location] = None
        elif plan.graph[index].op != "affine":
            stack.extend(plan.graph[index].args)
    return list(locations)


class Body:
    """Loops of one function: ``with body.rows(): with body.columns():``, and inside ``value``, ``store``, ``reduce``.

    Arguments:
        local: values that this stage computes; others are read from memory, or are cheap and computed again.
        roots: the values that will be used.
        stores: the locations that will be written.
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
        self._reads = {
            location: step_rows(f, layout, location.buffer) for location in reads(plan, stage, roots, self.local)
        }
        stores = list(stores)
        # Two copies of the states: other columns of the step still read the old one while this one is written.
        new_state: Integer = 0
        if any(location.buffer.scope == "state" for location in stores):
            new_state = f.xor(STEP.old_state, 1, "new_state")
        self._pairs = {index for index, all_ in stage.stores.items() if any(each.buffer.in_pairs for each in all_)}
        self._writes = {location: step_rows(f, layout, location.buffer, new_state) for location in stores}
        self._partials = partials_of_rows(f, layout, stage) if stage.reductions else None
        ordered = any(rows.in_caller_order for rows in (*self._reads.values(), *self._writes.values()))
        self._order = layout.buffer(f, "order") if ordered else None

    # The loops.

    @contextmanager
    def rows(self) -> Iterator[None]:
        """Loop over rows, and compute the address of each in every location."""
        f = self.f
        # A tile has at least one row; a stage without products may be called for none.
        with f.for_range("tile_row", 0, ROWS, nonempty=bool(self.stage.affines)) as tile_row:
            row = f.add(FIRST_ROW, tile_row, "row")
            caller_row: Integer = 0
            if self._order is not None:
                caller_row = f.load_int(f.at(self._order, f.mul(row, 8)), "caller_row")
            self._row, self._row_of_tile = row, tile_row
            self._read_rows = self._row_pointers(self._reads, row, caller_row)
            self._write_rows = self._row_pointers(self._writes, row, caller_row)
            yield

    def _row_pointers(
        self, addresses: dict[Location, RowAddress], row: Integer, caller_row: Integer
    ) -> dict[Location, Value]:
        f, itemsize = self.f, self.module.itemsize
        pointers = {}
        for location, rows in addresses.items():
            start = f.at(rows.start, f.mul(caller_row if rows.in_caller_order else row, rows.stride))
            pointers[location] = f.at(start, location.offset * itemsize)
        return pointers

    @contextmanager
    def columns(self) -> Iterator[None]:
        """Loop over column groups, by their distance in bytes from the first: the one number all addresses share."""
        f, vector_bytes = self.f, self.module.vector_bytes
        self._first = f.mul(FIRST_GROUP, vector_bytes, "first_column")
        width = f.mul(GROUPS, vector_bytes, "width")
        products = len(self.stage.affines)
        if products:
            # A tile's accumulators are [row][product][group][lane].
            row = f.at(ACC, f.mul(f.mul(self._row_of_tile, products), width))
            self._accumulators = [f.at(row, f.mul(width, product), "acc") for product in range(products)]
        # Rows outside, columns inside: neighbouring columns are contiguous, and a row's addresses are computed once.
        with f.for_range("column", 0, width, vector_bytes, nonempty=bool(products)) as self._column:
            self._values: dict[int, Value] = {}
            self._masks: dict[int, Value] = {}
            yield

    def _in_group(self, row: Value) -> Value:
        """Return the address of the current column group in a row."""
        return self.f.at(self.f.at(row, self._first), self._column)

    # Values.

    def value(self, index: int) -> Value:
        """Return the vector of a value at the current row and column group, loaded or computed once."""
        return resolve(index, self._values, self._registers, self._emit)

    def _registers(self, index: int) -> tuple[int, ...]:
        """Return the values that must be in registers before a value is computed; none for one that is loaded."""
        node = self.plan.graph[index]
        if index in self.local:
            return () if node.op == "affine" else node.args
        return () if index in self.stage.operands else node.args

    def _emit(self, index: int) -> Value:
        node, f = self.plan.graph[index], self.f
        if node.op == "const":
            return f.constant(node.attrs["value"])
        if index in self.local and node.op == "affine":
            return f.load(self.accumulator(self.stage.affines.index(index)), node.name, self.module.vector_bytes)
        if index not in self.local:
            location = self.stage.operands.get(index)
            if location is not None:
                value = self._load(location, node.size, node.name)
                # Masks are 1.0 and 0.0 in memory, so that buffers have one format.
                return f.fcmp("une", value, f.zero, f"{node.name}.mask") if node.type.kind == "mask" else value
        if index in self._pairs:
            return self._narrowed(self._values[node.args[0]], node.size)
        return POINTWISE_OPS[node.op](f, *(self._values[arg] for arg in node.args), name=node.name)

    def _narrowed(self, value: Value, size: int) -> Value:
        """Round a value to the bfloat16 numbers of a buffer of pairs, of which the last has a zero if they are odd."""
        if size % 2:
            value = self.f.select(self._mask(size), value, self.f.zero, "to_the_last")
        return narrow(self.f, value, "pairs")

    def accumulator(self, position: int) -> Value:
        """Return the address of a tile's accumulator of one of the stage's products."""
        return self.f.at(self._accumulators[position], self._column, "acc.at")

    def _load(self, location: Location, size: int, name: str) -> Value:
        f, pointer = self.f, self._read_rows[location]
        if size == 1:
            return f.load_splat(pointer, name)
        if location.axes is not None:
            return self._load_view(location.axes, pointer, name)
        pointer = self._in_group(pointer)
        # Behind the last feature of a caller's row is other memory; rows of the kernel's buffers are padded.
        if location.buffer.scope == "user" and size % LANES:
            return f.load_masked(pointer, self._mask(size), name)
        return f.load(pointer, name, self._alignment(location))

    def _load_view(self, axes: Sequence[tuple[int, int]], pointer: Value, name: str) -> Value:
        """Load a group of a view: its last axis is whole groups, of neighbours or of one number."""
        f, item = self.f, self.module.itemsize
        # The group's place along each axis: digits of its first feature, from the last axis on.
        rest: Integer = f.exact_div(f.add(self._first, self._column), item, "feature", once=True)
        for extent, stride in reversed(axes[1:]):
            digit = f.urem(rest, extent, "digit", once=True)
            rest = f.udiv(rest, extent, "rest", once=True)
            pointer = f.at(pointer, f.mul(digit, stride * item))
        pointer = f.at(pointer, f.mul(rest, axes[0][1] * item))
        return f.load_splat(pointer, name) if axes[-1][1] == 0 else f.load(pointer, name, item)

    def _alignment(self, location: Location) -> int:
        is_aligned = location.buffer.scope != "user" and location.offset % LANES == 0
        return self.module.vector_bytes if is_aligned else self.module.itemsize

    def _mask(self, size: int) -> Value:
        """Return the mask of the lanes of this group that are features of a value of ``size`` features."""
        if size not in self._masks:
            offset = self.f.add(self._first, self._column)
            features_before = self.f.exact_div(offset, self.module.itemsize, "features_before")
            self._masks[size] = self.f.first_lanes(self.f.sub(size, features_before, "features_left"))
        return self._masks[size]

    def store(self, index: int, location: Location) -> None:
        """Store a value; in a buffer of the kernel that it fills, with its padding."""
        node, f, value = self.plan.graph[index], self.f, self.value(index)
        if node.type.kind == "mask":
            value = f.select(value, f.constant(1.0), f.zero, "number")
        pointer = self._write_rows[location]
        if location.buffer.in_pairs:
            half = self.f.exact_div(f.add(self._first, self._column), 2, "half", once=True)
            f.store(value, f.at(pointer, half), self.module.vector_bytes // 2)
            return
        if node.size == 1:
            f.store_scalar(f.first_lane(value, "first"), pointer)
            return
        pointer = self._in_group(pointer)
        # The padding of a whole row may hold anything; behind a part of a row is another value.
        is_part = location.buffer.scope == "user" or location.buffer.size != node.size
        if is_part and node.size % LANES:
            f.store_masked(value, pointer, self._mask(node.size))
        else:
            f.store(value, pointer, self._alignment(location))

    def reduce(self, position: int, index: int) -> None:
        """Add this group to the sixteen partial results of a reduction; lanes beyond the last feature take no part.

        Sixteen of them on every target, joined in one fixed order by `join_lanes`, so that the bits are the same
        however wide the CPU's vectors are.
        """
        f, graph, vector_bytes = self.f, self.plan.graph, self.module.vector_bytes
        node = graph[index]
        count, size = len(self.stage.reductions), graph[node.args[0]].size
        assert self._partials is not None, f"{self.stage.name} has no buffer for its reductions"
        pointer = f.at(self._partials, f.mul(f.add(f.mul(self._row, count), position), vector_bytes))
        # The first group starts from the identity, whatever an earlier step left in the buffer.
        is_first = f.eq(f.add(self._first, self._column), 0, "is_first")
        partial = f.load(pointer, "partial", vector_bytes)
        partial = f.select(is_first, f.constant(_IDENTITY[node.op]), partial, "partial")
        total = _combine(f, node.op, partial, self.value(node.args[0]), node.name)
        if size % LANES:
            total = f.select(self._mask(size), total, partial, "partial")
        f.store(total, pointer, vector_bytes)


_IDENTITY = {"sum": 0.0, "amax": float("-inf"), "amin": float("inf")}


def _combine(f: Function, op: str, a: Value, b: Value, name: str) -> Value:
    """Combine two partial results of a reduction."""
    if op == "sum":
        return f.fadd(a, b, name)
    return f.math("maximum" if op == "amax" else "minimum", a, b, name=name)


def join_lanes(f: Function, op: str, value: Value) -> Value:
    """Return sixteen partial results as one number: lanes l and l + 8, then l + 4, l + 2, l + 1."""
    width = LANES
    while width > 1:
        width //= 2
        upper = f.shuffle(value, None, [lane + width if lane < width else lane for lane in range(LANES)], "upper")
        value = _combine(f, op, value, upper, "joined")
    return f.first_lane(value, "total")


def start_values(plan: Plan, stage: Stage) -> list[int | None]:
    """List the value that each of a stage's accumulations starts from; None is zero."""
    return [affine_parts(plan.graph[index])[0] for index in stage.affines]
