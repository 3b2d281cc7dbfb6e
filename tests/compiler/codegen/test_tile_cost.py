"""The model of tiles: what it chooses fits the registers of every target, and costs what machines are known to take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusecell.compiler.backend.target import Target, target_of
from fusecell.compiler.codegen.tile_cost import MAX_GROUPS, MAX_ROWS, Product, TileCost, cheapest_tiling
from fusecell.compiler.ir.sizes import DType

AVX2 = target_of("x86-64-v3", "", "x86_64-unknown-linux-gnu", frozenset({"avx2", "fma"}))
AVX512 = target_of("x86-64-v4", "", "x86_64-unknown-linux-gnu", frozenset({"avx2", "fma", "avx512f", "avx512vl"}))
SSE = target_of("x86-64-v2", "", "x86_64-unknown-linux-gnu", frozenset())
NEON = target_of("generic", "", "aarch64-unknown-linux-gnu", frozenset({"neon"}))
TARGETS = {"AVX-512": AVX512, "AVX2": AVX2, "SSE": SSE, "NEON": NEON}


@pytest.fixture(params=TARGETS)
def target(request) -> Target:
    return TARGETS[request.param]


products = st.lists(st.builds(Product, st.integers(1, 4), st.integers(1, 900)), min_size=1, max_size=3)


@given(products, st.integers(1, 60), st.sampled_from(sorted(TARGETS)), st.sampled_from([DType.F32, DType.F64]))
def test_every_tile_fits_the_registers(products, groups, name, dtype):
    """Or is of one row and one vector, below which there is none."""
    cost = TileCost(TARGETS[name], dtype)
    fused = max(product.fused for product in products)
    _, tiling = cheapest_tiling(TARGETS[name], dtype, tuple(products), groups)
    assert 1 <= tiling.max_rows <= MAX_ROWS
    for height in (*range(1, tiling.short + 1), *tiling.tall):
        width = tiling.width(height)
        assert 1 <= width <= min(groups, MAX_GROUPS)
        assert cost.fits(height, width * fused) or (height, width) == (1, 1)


def test_a_tile_costs_at_least_its_multiply_adds(target):
    """Two a cycle; and one of few accumulators waits for their sums."""
    cost = TileCost(target, DType.F32)
    for rows in range(1, 9):
        for columns in range(1, 9):
            in_l1, from_l2 = (cost.per_k(rows, columns, from_l2=place) for place in (False, True))
            assert from_l2 >= in_l1 >= max(4, rows * columns * cost.registers_each / 2)


def test_products_are_fused_where_registers_allow_it():
    """A GRU's three gates share their operand's loads in 32 registers; in 16 one product's panel serves six rows."""

    def cheapest_fusing(target):
        costs = {}
        for fused in (1, 3):
            products = tuple(Product(fused, 512) for _ in range(3 // fused))
            costs[fused] = cheapest_tiling(target, DType.F32, products, groups=32)
        return costs

    wide = cheapest_fusing(AVX512)
    assert wide[3][0] <= wide[1][0] + 0.02
    assert (wide[3][1].max_rows, wide[3][1].width(8)) == (8, 1)
    narrow = cheapest_fusing(AVX2)
    assert narrow[1][0] < narrow[3][0]
    assert (narrow[1][1].max_rows, narrow[1][1].width(6)) == (6, 1)


def test_a_panel_in_l1_is_read_again_for_nothing(target):
    """Short panels cost the same wherever their tiles stand; long ones are paid for by every tile."""
    cost = TileCost(target, DType.F32)
    short, long = Product(1, 64), Product(1, 4096)

    def per_tile(product, tiles):
        return cost.portion([(tiles, 1)], product, 1) / tiles / product.depth

    assert per_tile(short, 8) <= per_tile(short, 1)
    assert per_tile(long, 8) == pytest.approx(per_tile(long, 1))


def test_what_is_said_of_tiles_is_what_they_cost(target):
    """The share is that of multiply-adds at the full rate: 16 rows, two products of depth 64, four groups of columns."""
    cost, products = TileCost(target, DType.F32), (Product(2, 64),)
    _, tiling = cheapest_tiling(target, DType.F32, products, 4)
    report = cost.describe(tiling, products, 4)
    assert (report.tiles, report.fused, report.rows) == (tiling.text, 2, 16)
    assert report.share * report.cycles == pytest.approx(16 * 2 * 64 * 4 * cost.registers_each / 2)
    assert 0 < report.share <= 1
