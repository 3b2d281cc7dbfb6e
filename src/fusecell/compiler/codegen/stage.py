"""A stage as functions: its accumulators' start, its products tile by tile, its pointwise values as their epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fusecell.compiler.codegen.kernel_abi import Layout, Panel
from fusecell.compiler.codegen.llvm_builder import Function, Module, Value
from fusecell.compiler.codegen.microkernel import LINE, StaticStrides, Tiling, budget, shared_out, tile_name, tiling
from fusecell.compiler.codegen.pack_weights import pack_panel_name
from fusecell.compiler.codegen.stage_body import Body, epilogue_roots, join_lanes, own_rows, partials, start_values
from fusecell.compiler.ir.affine import affine_parts
from fusecell.compiler.schedule.plan import Location, Plan, Stage

__all__ = ["CALL", "SHARE", "Segment", "StageEmitter", "segments"]

CALL = ("ptr %args", "i64 %t", "i64 %base", "i64 %kept", "i64 %slot")
"""What every function of a stage takes first: the argument block, the step, its first row in the chunk's buffers and in
what is saved of the chunk, and which of the two copies of the state is the old one."""
SHARE = ("i64 %from", "i64 %to", "i64 %me", "i64 %crew", "i1 %fresh")
"""What the whole of a stage takes besides: its rows, which of a crew of threads takes its share of the columns, and
whether weights are packed on the way, because they are used this once."""
_PART = ("i64 %row0", "i64 %rows", "i64 %block0", "i64 %blocks", "ptr %acc")


@dataclass(frozen=True, slots=True)
class Segment:
    """One operand against one panel: neighbouring products of a stage that share the operand."""

    operand: Location
    first: int
    panel: Panel

    @property
    def count(self) -> int:
        return len(self.panel.weights)


def segments(plan: Plan, stage: Stage, module: Module) -> list[Segment]:
    """The products of a stage in the order in which they accumulate, as many at once as registers hold."""
    most = max(1, min(4, budget(module.target, module.dtype)))
    found: list[Segment] = []
    terms = [affine_parts(plan.graph[index])[1] for index in stage.affines]
    for turn in range(max(map(len, terms), default=0)):
        open_: Segment | None = None
        for position, mine in enumerate(terms):
            if turn >= len(mine):
                open_ = None
                continue
            row, weight, attrs = mine[turn]
            place = stage.operands[row]
            (k0, k1), (f0, f1) = attrs["rows"], attrs["cols"]
            source = (plan.graph[weight].name, bool(attrs["transposed"]), (k0, k1), (f0, f1))
            joins = open_ is not None and open_.operand == place and open_.count < most
            if open_ is not None and joins and open_.panel.depth == k1 - k0:
                found.pop()
                panel = Panel(open_.panel.name, k1 - k0, stage.width, (*open_.panel.weights, source))
                open_ = Segment(place, open_.first, panel)
            else:
                panel = Panel(f"panel.{stage.name}.{len(found)}", k1 - k0, stage.width, (source,))
                open_ = Segment(place, position, panel)
            found.append(open_)
    return found


@dataclass
class StageEmitter:
    """Writes the functions of one stage; ``@<stage>(args, t, base, slot, from, to, me, crew, fresh)`` runs it."""

    module: Module
    layout: Layout
    plan: Plan
    stage: Stage
    segments: list[Segment]
    known: dict[int, StaticStrides]
    """Of all the kernel's tiles of so many products."""
    tiling: Tiling = field(init=False)

    def __post_init__(self) -> None:
        products = max((segment.count for segment in self.segments), default=1)
        self.tiling = tiling(self.module.target, self.module.dtype, products, self.blocks)

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def blocks(self) -> int:
        return self.module.blocks(self.stage.width)

    def emit(self) -> None:
        """All functions of the stage, those that are called first."""
        self._epilogue()
        if self.stage.affines:
            self._start()
        self._whole()

    def _whole(self) -> None:
        """The stage over some rows, a crew's share of its columns."""
        f = Function(self.module, self.name, *CALL, *SHARE)
        rows = f.sub("%to", "%from", "rows")
        if not self.stage.affines:
            first, last = f.share(self.blocks, "%me", "%crew")
            given = (f"i64 {rows}", f"i64 {first}", f"i64 {f.sub(last, first)}", "ptr null")
            f.call(f"{self.name}.epilogue", *CALL, "i64 %from", *given)
        else:
            self._acc = f.let("acc", f"alloca [{self._acc_bytes()} x i8], align 64")
            with f.when("some", f.let("are.some", f"icmp sgt i64 {rows}, 0")):
                self._tiles(f, rows)
        if self.stage.reductions:
            self._finish_reductions(f)
        f.end()

    def _acc_bytes(self) -> int:
        vectors = max(height * width for height, width in enumerate(self.tiling.widths, 1))
        return vectors * len(self.stage.affines) * self.module.block

    def _tiles(self, f: Function, rows: Value) -> None:
        """Rows shared out evenly to tiles; column blocks outside, so that a panel is read once into the cache."""
        most, short = self.tiling.most, self.tiling.short
        operands = [self._operand(f, segment) for segment in self.segments]
        count = f.let("tiles", f"udiv i64 {f.add(rows, most - 1, 'up')}, {most}")
        least = f.quotient(rows, count, "least")
        more = f.sub(rows, f.mul(least, count), "more")
        # In the table the tall tiles follow the short, whose highest is as high as the lowest of the tall.
        tall: Value = 0
        if short:
            tall = f.let("tall", f"zext i1 {f.let('are.many', f'icmp sgt i64 {rows}, {short}')} to i64")
        for block, width, narrow, slot in self._columns(f, f.minimum(f.sub(rows, 1), short, "kind")):
            with f.loop("tile", 0, count, some=True) as tile:
                row = f.add("%from", f.add(f.mul(tile, least), f.minimum(tile, more)), "row")
                is_more = f.let("is.more", f"icmp slt i64 {tile}, {more}")
                height = f.add(least, f.let("one", f"zext i1 {is_more} to i64"), "height")
                entry = f.add(f.mul(f.add(f.sub(height, 1), tall), 2), narrow, "entry")
                self._tile(f, operands, (row, height, block, width), entry, tile, slot)

    def _columns(self, f: Function, kind: Value) -> Iterator[tuple[Value, Value, Value, str]]:
        """A loop over a crew's share of the column blocks, as few at a time as make all portions about equal.

        Arguments:
            kind: which of the tiling's kinds of tiles it is for.

        Yields:
            The first block, how many there are, whether these are one fewer than in the first portions, and which of
            the panels' blocks is theirs.
        """
        shared = [shared_out(self.blocks, most) for most in self.tiling.kinds]
        many, wide = (f.choose(kind, [each[0][i] for each in shared], name) for i, name in enumerate(("many", "wide")))
        portions = f.choose(kind, [sum(count for count, _ in each) for each in shared], "portions")
        first, last = f.share(portions, "%me", "%crew")
        with f.loop("portion", first, last) as portion:
            narrow: Value = 0
            block, width = f.mul(portion, wide), wide
            if any(len(each) > 1 for each in shared):
                narrow = f.let("narrow", f"zext i1 {f.let('is.narrow', f'icmp sge i64 {portion}, {many}')} to i64")
                block = f.sub(block, f.maximum(f.sub(portion, many), 0), "block")
                width = f.sub(wide, narrow, "width")
            with f.when("fresh", "%fresh"):
                for segment in self.segments:
                    to = self.layout.buffer(f, segment.panel.name)
                    f.call(pack_panel_name(segment.panel), "ptr %args", f"i64 {block}", f"i64 {width}", f"ptr {to}")
            yield block, width, narrow, f.let("slot", f"select i1 %fresh, i64 0, i64 {block}")

    def _operand(self, f: Function, segment: Segment) -> tuple[str, Value, str]:
        """Where a segment's operand begins, how far apart its rows are, and where its panel begins."""
        place, module = segment.operand, self.module
        base, stride, _ = own_rows(f, self.layout, place.buffer, "%slot")
        return f.at(base, place.offset * module.bytes), stride, self.layout.buffer(f, segment.panel.name)

    def _tile(
        self,
        f: Function,
        operands: list[tuple[str, Value, str]],
        part: tuple[Value, Value, Value, Value],
        entry: Value,
        turn: Value,
        slot: Value,
    ) -> None:
        """Start, products and epilogue of one tile; its accumulators pass through a little memory in L1."""
        block = self.module.block
        row, _, _, blocks = part
        given = (*(f"i64 {value}" for value in part), f"ptr {self._acc}")
        f.call(f"{self.name}.start", *CALL, *given)
        for segment, (base, stride, panel) in zip(self.segments, operands, strict=True):
            depth, panel_block = segment.panel.depth, segment.panel.depth * segment.count * block
            panel = f.at(panel, f.mul(slot, panel_block))
            tile = f.same("tile", f"load ptr, ptr {f.at(f'@{self._table(segment.count)}', f.mul(entry, 8))}")
            f.call(
                tile,
                f"ptr {f.at(self._acc, f.mul(blocks, segment.first * block))}",
                f"i64 {f.mul(blocks, len(self.stage.affines) * block)}",
                f"ptr {f.at(base, f.mul(row, stride))}",
                f"i64 {stride}",
                f"ptr {panel}",
                f"i64 {panel_block}",
                f"i64 {depth}",
                *self._ahead(f, panel, turn, f.mul(blocks, panel_block), depth),
            )
        f.call(f"{self.name}.epilogue", *CALL, *given)

    def _table(self, products: int) -> str:
        """The tiles of so many products: of few rows, then those that many are shared out to, each in two widths."""
        module, tiling_ = self.module, self.tiling
        name = f"{self.name}.tiles.{products}"
        if name not in module.made:
            module.made.add(name)
            tiles = [(height, tiling_.width(height)) for height in range(1, tiling_.short + 1)]
            tiles += [(height, tiling_.width(tiling_.most)) for height in tiling_.tall]
            entries: list[str] = []
            for height, most in tiles:
                widths = [width for _, width in shared_out(self.blocks, most)]
                made = (tile_name(module, height, products, width, self.known[products]) for width in widths)
                entries += [*made, ""][:2]
            module.table(name, entries)
        return name

    def _ahead(self, f: Function, panel: str, turn: Value, bytes_: Value, depth: int) -> tuple[str, str]:
        """What a tile asks for meanwhile: the first nothing, each of the others its share of the next panel.

        The first tile of a panel takes it as fast as it comes from L3; asking for more would slow that down.
        """
        first = f.same("is.first", f"icmp eq i64 {turn}, 0")
        share = f.mul(f.sub(turn, 1), depth * LINE)
        following = f.at(f.at(panel, bytes_), share, "following")
        ahead = f.let("ahead", f"select i1 {first}, ptr {panel}, ptr {following}")
        return f"ptr {ahead}", f"i64 {f.same('ahead.k', f'select i1 {first}, i64 0, i64 {LINE}')}"

    def _start(self) -> None:
        """Accumulators begin with their init: a weight's values, or what was lifted; else with zero."""
        f = Function(self.module, f"{self.name}.start", *CALL, *_PART)
        inits = start_values(self.plan, self.stage)
        body = Body(f, self.layout, self.plan, self.stage, roots=[init for init in inits if init is not None])
        with body.rows(), body.columns():
            for position, init in enumerate(inits):
                value = "zeroinitializer" if init is None else body.value(init)
                f.store(value, body.accumulator(position), self.module.block)
        f.end()

    def _epilogue(self) -> None:
        """Pointwise values of a tile, row by row, and what is stored of them."""
        stage = self.stage
        f = Function(self.module, f"{self.name}.epilogue", *CALL, *_PART)
        body = Body(
            f,
            self.layout,
            self.plan,
            stage,
            local=stage.results(),
            roots=epilogue_roots(self.plan, stage),
            stores=[place for places in stage.stores.values() for place in places],
        )
        with body.rows(), body.columns():
            # All loads before stores: a state may become another state.
            for index in stage.stores:
                body.value(index)
            for position, index in enumerate(stage.reductions):
                body.reduce(position, index)
            for index, places in stage.stores.items():
                for place in places:
                    body.store(index, place)
        f.end()

    def _finish_reductions(self, f: Function) -> None:
        """Sixteen partial results a row become one, by one fixed tree."""
        module, count = self.module, len(self.stage.reductions)
        start = self.layout.buffer(f, partials(self.stage))
        with f.loop("row", "%from", "%to") as row:
            here = f.at(start, f.mul(row, count * module.block))
            for position, index in enumerate(self.stage.reductions):
                value = f.load(f.at(here, position * module.block), "partial", module.block)
                total = join_lanes(f, self.plan.graph[index].op, value)
                buffer = self.stage.totals[index].buffer
                base, stride, _ = own_rows(f, self.layout, buffer, "%slot")
                f.do(f"store {module.scalar} {total}, ptr {f.at(base, f.mul(row, stride))}, align {module.bytes}")
