"""A stage as functions: its accumulators' start, its products tile by tile, its pointwise values as their epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fusecell.compiler.emit.body import Body, join_lanes, partials, start_values
from fusecell.compiler.emit.layout import Layout, Panel, row_address
from fusecell.compiler.emit.packing import pack_panel_name
from fusecell.compiler.emit.text import Function, Module, Value
from fusecell.compiler.emit.tiles import LINE, Tiling, budget, shared_out, tile_name, tiling
from fusecell.compiler.passes import affine_parts
from fusecell.compiler.plan import Place, Plan, Stage

__all__ = ["CALL", "SHARE", "Segment", "StageEmitter", "segments"]

CALL = ("ptr %args", "i64 %t", "i64 %base", "i64 %slot")
"""What every function of a stage takes first: the argument block, the step, its first row in the chunk's buffers,
and which of the two copies of the state is the old one."""
SHARE = ("i64 %from", "i64 %to", "i64 %me", "i64 %crew", "i1 %fresh")
"""What the whole of a stage takes besides: its rows, which of a crew of threads takes its share of the columns, and
whether weights are packed on the way, because they are used this once."""
_PART = ("i64 %row0", "i64 %rows", "i64 %block0", "i64 %blocks", "ptr %acc")


@dataclass(frozen=True, slots=True)
class Segment:
    """One operand against one panel: neighbouring products of a stage that share the operand."""

    operand: Place
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
            place = plan.place(row, stage.phase)
            assert place is not None, f"{plan.graph[row].name}, an operand of {stage.name}, is nowhere in memory"
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
            for height, width in self._sizes():
                self._tile(height, width)
        self._whole()

    def _sizes(self) -> dict[tuple[int, int], None]:
        """The heights and widths of all tiles."""
        short = [(height, self.tiling.width(height)) for height in range(1, self.tiling.short + 1)]
        tall = [(height, self.tiling.width(self.tiling.most)) for height in self.tiling.tall]
        return dict.fromkeys(
            (height, width) for height, most in (*short, *tall) for _, width in shared_out(self.blocks, most)
        )

    def _whole(self) -> None:
        """The stage over some rows, a crew's share of its columns."""
        f = Function(self.module, self.name, *CALL, *SHARE)
        rows = f.sub("%to", "%from", "rows")
        if not self.stage.affines:
            first, last = f.share(self.blocks, "%me", "%crew")
            given = (f"i64 {rows}", f"i64 {first}", f"i64 {f.sub(last, first)}", "ptr null")
            f.call(f"{self.name}.epilogue", *CALL, "i64 %from", *given)
        else:
            for height in range(1, self.tiling.short + 1):
                with f.when(f"rows{height}", f.let("is.short", f"icmp eq i64 {rows}, {height}")):
                    for block, width, slot in self._columns(f, self.tiling.width(height)):
                        self._call_tile(f, height, width, ("%from", block, 0, slot))
            with f.when("tall", f.let("is.tall", f"icmp sgt i64 {rows}, {self.tiling.short}")):
                self._tall(f, rows)
        if self.stage.reductions:
            self._finish_reductions(f)
        f.end()

    def _tall(self, f: Function, rows: Value) -> None:
        """Rows shared out evenly to high tiles; column blocks outside, so that a panel is read once into the cache."""
        most = self.tiling.most
        up = f.add(rows, most - 1, "up")
        count = f.let("tiles", f"udiv i64 {up}, {most}")
        least = f.let("least", f"udiv i64 {rows}, {count}")
        more = f.sub(rows, f.mul(least, count), "more")
        for block, width, slot in self._columns(f, self.tiling.width(most)):
            with f.loop("tile", 0, count) as tile:
                row = f.add("%from", f.add(f.mul(tile, least), f.minimum(tile, more)), "row")
                is_more = f.let("is.more", f"icmp slt i64 {tile}, {more}")
                height = f.add(least, f.let("one", f"zext i1 {is_more} to i64"), "height")
                for each in self.tiling.tall:
                    with f.when(f"height{each}", f.let("fits", f"icmp eq i64 {height}, {each}")):
                        self._call_tile(f, each, width, (row, block, tile, slot))

    def _columns(self, f: Function, most: int) -> Iterator[tuple[str, int, str]]:
        """Loops over a crew's share of the column blocks, as few at a time as make all portions about equal.

        Yields:
            The first block, how many there are, and which of the panels' blocks is theirs.
        """
        portions = shared_out(self.blocks, most)
        first, last = f.share(sum(many for many, _ in portions), "%me", "%crew")
        start = done = 0
        for many, width in portions:
            begin, end = f.maximum(first, done), f.minimum(last, done + many)
            with f.loop("portion", begin, end) as portion:
                block = f.add(f.mul(f.sub(portion, done), width), start, "block")
                with f.when("fresh", "%fresh"):
                    for segment in self.segments:
                        to = self.layout.buffer(f, segment.panel.name)
                        f.call(pack_panel_name(segment.panel), "ptr %args", f"i64 {block}", f"i64 {width}", f"ptr {to}")
                yield f"{block}", width, f.let("slot", f"select i1 %fresh, i64 0, i64 {block}")
            start, done = start + many * width, done + many

    def _call_tile(self, f: Function, height: int, width: int, given: tuple[Value, ...]) -> None:
        f.call(self._tile_name(height, width), *CALL, *(f"i64 {value}" for value in given))

    def _tile_name(self, rows: int, blocks: int) -> str:
        return f"{self.name}.tile.{rows}x{blocks}"

    def _tile(self, rows: int, blocks: int) -> None:
        """Start, products and epilogue of one tile; its accumulators pass through a little memory in L1."""
        module, block = self.module, self.module.block
        where = ("i64 %row", "i64 %block", "i64 %turn", "i64 %panel.slot")
        f = Function(module, self._tile_name(rows, blocks), *CALL, *where)
        acc_row = len(self.stage.affines) * blocks * block
        acc = f.let("acc", f"alloca [{rows * acc_row} x i8], align 64")
        part = ("i64 %row", f"i64 {rows}", "i64 %block", f"i64 {blocks}", f"ptr {acc}")
        f.call(f"{self.name}.start", *CALL, *part)
        for segment in self.segments:
            place, depth = segment.operand, segment.panel.depth
            base, stride, _ = row_address(f, self.layout, module, place.buffer, t="%t", base="%base", slot="%slot")
            operand = f.at(f.at(base, f.mul("%row", stride)), place.offset * module.bytes)
            panel_block = depth * segment.count * block
            panel = f.at(self.layout.buffer(f, segment.panel.name), f.mul("%panel.slot", panel_block))
            f.call(
                tile_name(module, rows, segment.count, blocks),
                f"ptr {f.at(acc, segment.first * blocks * block)}",
                f"i64 {acc_row}",
                f"ptr {operand}",
                f"i64 {stride}",
                f"ptr {panel}",
                f"i64 {panel_block}",
                f"i64 {depth}",
                *self._ahead(f, panel, blocks * panel_block, depth),
            )
        f.call(f"{self.name}.epilogue", *CALL, *part)
        f.end()

    def _ahead(self, f: Function, panel: str, bytes_: int, depth: int) -> tuple[str, str]:
        """What a tile asks for meanwhile: the first nothing, each of the others its share of the next panel.

        The first tile of a panel takes it as fast as it comes from L3; asking for more would slow that down.
        """
        first = f.let("is.first", "icmp eq i64 %turn, 0")
        share = f.mul(f.sub("%turn", 1), depth * LINE)
        following = f.at(f.at(panel, bytes_), share, "following")
        ahead = f.let("ahead", f"select i1 {first}, ptr {panel}, ptr {following}")
        return f"ptr {ahead}", f"i64 {f.let('ahead.k', f'select i1 {first}, i64 0, i64 {LINE}')}"

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
        stage, graph = self.stage, self.plan.graph
        f = Function(self.module, f"{self.name}.epilogue", *CALL, *_PART)
        body = Body(
            f,
            self.layout,
            self.plan,
            stage,
            local=stage.results(),
            roots=[*stage.stores, *(graph[index].args[0] for index in stage.reductions)],
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
                buffer = self.plan.homes[index].buffer
                base, stride, _ = row_address(f, self.layout, module, buffer, t="%t", base="%base", slot="%slot")
                f.do(f"store {module.scalar} {total}, ptr {f.at(base, f.mul(row, stride))}, align {module.bytes}")
