"""One stage of a plan as functions: tiles of matrix products, with the stage's pointwise values as their epilogue.

A stage with products, for rows [from, to) and this thread's column groups (BLIS's loops around the microkernel)::

    for portion of the column groups:              as wide as a tile; its panels are read once into L1 and L2
        pack the panels' portion                   only if it is used this once
        for tile of the rows:                      rows split evenly
            @<stage>.start                         accumulators = bias, or a value computed before the loop, or 0
            for each operand:
                microkernel                        accumulators += rows of the operand x panel
            @<stage>.epilogue                      pointwise values of the tile, and stores
    join the lanes of reductions, row by row

A stage without products is its epilogue alone. The accumulators pass from one of a tile's functions to the next through
a few kilobytes in L1, so that microkernels are shared by all stages and compiled once. Columns are the outer loop, as a
panel, which comes from L2 or L3, is then read once for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fusecell.compiler.backend.target import Target
from fusecell.compiler.codegen.kernel_abi import ARGS, STEP_PARAMS, THREAD_ID, THREADS, Layout
from fusecell.compiler.codegen.llvm_builder import Function
from fusecell.compiler.codegen.llvm_module import Module
from fusecell.compiler.codegen.llvm_text import NULL, Integer, Value, i1, i64
from fusecell.compiler.codegen.microkernel import (
    ProductKind,
    StaticStrides,
    microkernel,
)
from fusecell.compiler.codegen.pack_weights import pack_panel_name
from fusecell.compiler.codegen.panel import Panel
from fusecell.compiler.codegen.stage_body import (
    PART_PARAMS,
    Body,
    epilogue_roots,
    join_lanes,
    partials_of_rows,
    start_values,
    step_rows,
)
from fusecell.compiler.codegen.tile_cost import Product, TileCost, Tiling, cheapest, cheapest_tiling, split_evenly
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.ir.graph import Node
from fusecell.compiler.ir.storage import Storage
from fusecell.compiler.schedule.plan import Location, Plan, Stage

__all__ = ["FusedProducts", "StageEmitter", "fused_products"]

_MOST_FUSED = 4
"""An LSTM has four products of one operand; more would leave few accumulators to rows."""

FROM, TO, PACK_ON_USE = i64("from"), i64("to"), i1("pack_on_use")
STAGE_PARAMS = (*STEP_PARAMS, FROM, TO, THREAD_ID, THREADS, PACK_ON_USE)
"""Parameters of a stage's function: the step; its rows; the number of the thread, and of threads, that share the
columns; and whether weights are packed where they are used, as they are used only once."""


@dataclass(frozen=True, slots=True)
class FusedProducts:
    """One operand times one panel: neighbouring products of a stage that share the operand, computed at once.

    Attributes:
        first: the position of the first of them among the stage's products.
    """

    operand: Location
    first: int
    panel: Panel

    @property
    def count(self) -> int:
        """How many products these are."""
        return len(self.panel.weights)

    @property
    def product(self) -> Product:
        """What the cost of its tiles depends on."""
        stored = self.panel.stored
        if stored is not None and stored.packs_fours:  # four k at a time
            return Product(self.count, self.panel.words - 1)
        widens = stored is not None and stored.packs_pairs and not stored.multiplies_pairs
        return Product(self.count, self.panel.turns, widens)

    @property
    def kind(self) -> ProductKind:
        """What the microkernel depends on besides the tile."""
        return ProductKind(self.count, self.panel.stored)


def fused_products(plan: Plan, stage: Stage, module: Module) -> tuple[list[FusedProducts], Tiling]:
    """Fuse the products of a stage, in the order in which they accumulate, as many at once as cost least."""
    cost, groups = TileCost(module.target, module.dtype), module.groups(stage.width)
    candidates = []
    for most in range(_MOST_FUSED if stage.affines else 1, 0, -1):
        fused = _fuse(plan, stage, most, module.target)
        products = [each.product for each in fused] or [Product(1, 1)]
        pairs = any(product.pairs for product in products)
        if most == 1 or cost.fits(1, max(product.fused for product in products), pairs=pairs):
            cycles, tiling = cheapest_tiling(module.target, module.dtype, tuple(products), groups)
            candidates.append((cycles, (fused, tiling)))
    # Of equals the first: fewer calls.
    return cheapest(candidates)[1]


def _format(weight: Node, target: Target) -> Storage | None:
    """Return the format in which a panel has a weight; whole numbers are converted where bytes can't be multiplied."""
    if "stored" not in weight.attrs:
        return None
    stored = Storage(weight.attrs["stored"])
    return Storage.I8 if stored.packs_fours and target.byte_dot is None else stored


def _fuse(plan: Plan, stage: Stage, most: int, target: Target) -> list[FusedProducts]:
    """Fuse neighbouring products of one operand and one depth, up to ``most`` of them."""
    fused: list[FusedProducts] = []
    terms = [affine_parts(plan.graph[index])[1] for index in stage.affines]
    for turn in range(max(map(len, terms), default=0)):
        last: FusedProducts | None = None
        for position, terms_of_product in enumerate(terms):
            if turn >= len(terms_of_product):
                last = None
                continue
            row, weight, attrs = terms_of_product[turn]
            operand = stage.operands[row]
            (k0, k1), (column0, column1) = attrs["rows"], attrs["cols"]
            source = (plan.graph[weight].name, bool(attrs["transposed"]), (k0, k1), (column0, column1))
            leaf = plan.graph[weight]
            stored = _format(leaf, target)
            fits = last is not None and last.operand == operand and last.count < most
            # A panel has one depth and one format: its products share a loop over k.
            if last is not None and fits and (last.panel.depth, last.panel.stored) == (k1 - k0, stored):
                fused.pop()
                panel = Panel(last.panel.name, k1 - k0, stage.width, (*last.panel.weights, source), stored)
                last = FusedProducts(operand, last.first, panel)
            else:
                panel = Panel(f"panel.{stage.name}.{len(fused)}", k1 - k0, stage.width, (source,), stored)
                last = FusedProducts(operand, position, panel)
            fused.append(last)
    return fused


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows and column groups of one tile, as values of the running kernel."""

    row: Integer
    rows: Integer
    group: Integer
    groups: Integer

    def args(self) -> tuple[Integer, ...]:
        """Return the fields in the order of `PART_PARAMS`."""
        return self.row, self.rows, self.group, self.groups


@dataclass(frozen=True, slots=True)
class _Portion:
    """Column groups that a tile takes at a time.

    Attributes:
        group: the first.
        groups: their number.
        is_narrow: 1 if there is one fewer than in the first portions, else 0.
        panel_group: the position of the first among the groups of the panels in memory: 0 if only these are packed.
    """

    group: Integer
    groups: Integer
    is_narrow: Integer
    panel_group: Value


@dataclass
class StageEmitter:
    """Writer of the functions of one stage; ``@<stage>``, with the parameters `STAGE_PARAMS`, runs it.

    Attributes:
        strides: the constant strides of the kernel's microkernels, by what these multiply.
        tiling: the tiles of its products.
    """

    module: Module
    layout: Layout
    plan: Plan
    stage: Stage
    products: list[FusedProducts]
    strides: dict[ProductKind, StaticStrides]
    tiling: Tiling

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def groups(self) -> int:
        """The column groups of the stage."""
        return self.module.groups(self.stage.width)

    def emit(self) -> None:
        """Write all functions of the stage, callees first."""
        self._epilogue()
        if self.stage.affines:
            self._start()
        self._whole()

    def _whole(self) -> None:
        """Write the function of the stage over some rows and this thread's share of the columns."""
        f = Function(self.module, self.name, *STAGE_PARAMS)
        rows = f.sub(TO, FROM, "rows")
        if not self.stage.affines:
            first, last = f.partition(self.groups, THREAD_ID, THREADS)
            part = _Part(FROM, rows, first, f.sub(last, first))
            f.call(f"{self.name}.epilogue", *STEP_PARAMS, *part.args(), NULL)
        else:
            # Written by the start, added to by microkernels, read by the epilogue.
            self._acc = f.alloca_bytes(self._acc_bytes(), "acc")
            with f.if_(f.gt(rows, 0, "has_rows"), "has_rows"):
                self._tiles(f, rows)
        # Only here are all columns of a row done: a tile has but some of them.
        if self.stage.reductions:
            self._finish_reductions(f)
        f.end()

    def _acc_bytes(self) -> int:
        vectors = max(height * width for height, width in enumerate(self.tiling.widths, 1))
        return vectors * len(self.stage.affines) * self.module.vector_bytes

    def _tiles(self, f: Function, rows: Integer) -> None:
        """Loop over portions of the columns, and inside over tiles of rows: a panel is read once into the cache."""
        max_rows, short = self.tiling.max_rows, self.tiling.short
        operands = [self._operand(f, each) for each in self.products]
        tiles = f.udiv(f.add(rows, max_rows - 1, "rounded_up"), max_rows, "tiles")
        height_of_most = f.divide(rows, tiles, "tile_rows")
        taller = f.sub(rows, f.mul(height_of_most, tiles), "taller_tiles")
        # Heights differ by one at most: there is no short rest, whose few accumulators would not hide the latency of
        # its multiply-adds, and which would read the whole panel again.
        # In the table the tall tiles follow the short, whose highest is as high as the lowest of the tall.
        is_tall: Integer = 0
        if short:
            is_tall = f.zext(f.gt(rows, short, "is_many"), "is_tall")
        for portion in self._portions(f, f.minimum(f.sub(rows, 1), short, "kind")):
            with f.for_range("tile", 0, tiles, nonempty=True) as tile:
                row = f.add(FROM, f.add(f.mul(tile, height_of_most), f.minimum(tile, taller)), "row")
                is_taller = f.lt(tile, taller, "is_taller")
                height = f.add(height_of_most, f.zext(is_taller, "extra_row"), "height")
                entry = f.add(f.mul(f.add(f.sub(height, 1), is_tall), 2), portion.is_narrow, "table_entry")
                self._tile(f, operands, _Part(row, height, portion.group, portion.groups), portion, entry, tile)

    def _portions(self, f: Function, kind: Integer) -> Iterator[_Portion]:
        """Loop over this thread's share of the column groups, in as few portions as possible, of about equal width.

        Arguments:
            kind: the position in the tiling's ``kinds`` of the tiles that will run.
        """
        splits = [split_evenly(self.groups, most) for most in self.tiling.kinds]
        wide_portions, width = (
            f.lookup(kind, [split[0][i] for split in splits], name) for i, name in enumerate(("wide_portions", "width"))
        )
        portions = f.lookup(kind, [sum(count for count, _ in split) for split in splits], "portions")
        first, last = f.partition(portions, THREAD_ID, THREADS)
        with f.for_range("portion", first, last) as portion:
            # Portions differ by one group at most: the last ones are narrower.
            is_narrow: Integer = 0
            group, groups = f.mul(portion, width), width
            if any(len(split) > 1 for split in splits):
                is_narrow = f.zext(f.ge(portion, wide_portions, "is_narrow"), "is_narrow")
                group = f.sub(group, f.maximum(f.sub(portion, wide_portions), 0), "group")
                groups = f.sub(width, is_narrow, "groups")
            with f.if_(PACK_ON_USE, "pack"):
                for each in self.products:
                    panel = self.layout.buffer(f, each.panel.name)
                    f.call(pack_panel_name(each.panel), ARGS, group, groups, panel)
            yield _Portion(group, groups, is_narrow, f.select(PACK_ON_USE, 0, group, "panel_group"))

    def _operand(self, f: Function, products: FusedProducts) -> tuple[Value, Integer, Value]:
        """Return where an operand begins, the bytes between its rows, and where its panel begins."""
        operand = products.operand
        rows = step_rows(f, self.layout, operand.buffer)
        start = f.at(rows.start, operand.offset * self.module.itemsize)
        return start, rows.stride, self.layout.buffer(f, products.panel.name)

    def _tile(
        self,
        f: Function,
        operands: list[tuple[Value, Integer, Value]],
        part: _Part,
        portion: _Portion,
        entry: Integer,
        turn: Integer,
    ) -> None:
        """Write one tile: start, products, epilogue.

        Arguments:
            entry: of the tables of microkernels.
            turn: the number of the tile among those over these columns.
        """
        vector_bytes = self.module.vector_bytes
        acc_row = len(self.stage.affines) * vector_bytes
        args = (*part.args(), self._acc)
        f.call(f"{self.name}.start", *STEP_PARAMS, *args)
        for each, (base, stride, panel) in zip(self.products, operands, strict=True):
            group_bytes = each.panel.group_bytes(self.module)
            panel = f.at(panel, f.mul(portion.panel_group, group_bytes))
            # A table, as the shape of a tile depends on the rows of the call: a switch would be a branch per shape.
            table = Value(f"@{self._table(each.kind)}", "ptr")
            tile = f.load_pointer(f.at(table, f.mul(entry, 8)), "microkernel", once=True)
            f.call(
                tile,
                f.at(self._acc, f.mul(part.groups, each.first * vector_bytes)),
                f.mul(part.groups, acc_row),
                f.at(base, f.mul(part.row, stride)),
                stride,
                panel,
                group_bytes,
                each.panel.turns,
                *self._prefetch(f, panel, turn, part.groups, each),
            )
        f.call(f"{self.name}.epilogue", *STEP_PARAMS, *args)

    def _table(self, kind: ProductKind) -> str:
        """Return the name of the table of microkernels: the short tiles, then the tall, each in two widths."""
        module, tiles = self.module, self.tiling
        name = f"{self.name}.tiles.{kind.suffix}"
        if module.is_new(name):
            shapes = [(height, tiles.width(height)) for height in range(1, tiles.short + 1)]
            shapes += [(height, tiles.width(tiles.max_rows)) for height in tiles.tall]
            entries: list[str] = []
            for height, most in shapes:
                widths = [width for _, width in split_evenly(self.groups, most)]
                names = [microkernel(module, height, kind, width, self.strides[kind]) for width in widths]
                entries += [*names, ""][:2]
            module.table(name, entries)
        return name

    def _prefetch(
        self, f: Function, panel: Value, turn: Integer, groups: Integer, products: FusedProducts
    ) -> tuple[Value, Value]:
        """Return the address that a tile prefetches, and the bytes from one k to the next: its share of the next panel.

        The first tile of a panel prefetches nothing: it reads its own panel as fast as that comes from L3, which more
        requests would slow down. Nor do those that come after the whole of the next: they would fetch what is not
        needed for long, and that drives the operand's rows out of L2. Gains 11 % where the loop's weights exceed L2,
        at H of 512 (docs/performance.md).
        """
        line, count = self.module.target.tuning.cache_line_bytes, products.count
        # A tile fetches a line for every k: a group of one product's columns, as wide as a line in float32.
        lines = self.module.vector_bytes // line
        shares = f.mul(groups, count * lines)
        is_idle = f.or_(f.eq(turn, 0, "is_first", once=True), f.gt(turn, shares, "is_late"), "is_idle")
        stored = products.panel.stored
        if stored is not None and not stored.multiplies_pairs:
            # Of another size; and few rows, which don't prefetch, are what it is for.
            return panel, Value("0", "i64")
        next_panel = f.at(panel, f.mul(groups, products.panel.group_bytes(self.module)))
        share = f.at(next_panel, f.mul(f.sub(turn, 1), products.panel.turns * line), "next_panel")
        return f.select(is_idle, panel, share, "prefetch"), f.select(is_idle, 0, line, "prefetch.k")

    def _start(self) -> None:
        """Write the start of a tile's accumulators: a bias, or a value computed before the loop; else zero."""
        # The sum begins with it, and is not added to it at the end: hoisted or not, the order of additions is the same.
        f = Function(self.module, f"{self.name}.start", *STEP_PARAMS, *PART_PARAMS)
        starts = start_values(self.plan, self.stage)
        body = Body(f, self.layout, self.plan, self.stage, roots=[start for start in starts if start is not None])
        with body.rows(), body.columns():
            for position, start in enumerate(starts):
                value = f.zero if start is None else body.value(start)
                f.store(value, body.accumulator(position), self.module.vector_bytes)
        f.end()

    def _epilogue(self) -> None:
        """Write the pointwise values of a tile, row by row, and the stores of them."""
        stage = self.stage
        f = Function(self.module, f"{self.name}.epilogue", *STEP_PARAMS, *PART_PARAMS)
        body = Body(
            f,
            self.layout,
            self.plan,
            stage,
            local=stage.results(),
            roots=epilogue_roots(self.plan, stage),
            stores=[location for locations in stage.stores.values() for location in locations],
        )
        with body.rows(), body.columns():
            # All loads before stores: a state may become another state.
            for index in stage.stores:
                body.value(index)
            for position, index in enumerate(stage.reductions):
                body.reduce(position, index)
            for index, locations in stage.stores.items():
                for location in locations:
                    body.store(index, location)
        f.end()

    def _finish_reductions(self, f: Function) -> None:
        """Join the sixteen partial results of each row's reductions."""
        module, count = self.module, len(self.stage.reductions)
        start = partials_of_rows(f, self.layout, self.stage)
        with f.for_range("row", FROM, TO) as row:
            partials_at = f.at(start, f.mul(row, count * module.vector_bytes))
            for position, index in enumerate(self.stage.reductions):
                partial = f.load(f.at(partials_at, position * module.vector_bytes), "partial", module.vector_bytes)
                total = join_lanes(f, self.plan.graph[index].op, partial)
                target = step_rows(f, self.layout, self.stage.totals[index].buffer)
                f.store_scalar(total, f.at(target.start, f.mul(row, target.stride)))
