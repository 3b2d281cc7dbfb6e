"""The interpreter: a rule for every primitive, each against a few lines of its own."""

from __future__ import annotations

import pytest
import torch

from fusecell.compiler.ir.graph import Builder
from fusecell.compiler.ir.interpreter import EVALUATE, interpret
from fusecell.compiler.ir.primitives import PRIMITIVES
from fusecell.compiler.ir.sizes import DType


def test_a_rule_for_every_primitive() -> None:
    assert set(EVALUATE) == set(PRIMITIVES)


def _builder() -> tuple[Builder, int, int]:
    builder = Builder("test", DType.F64)
    return (
        builder,
        builder.append("input", (), {"shape": [3]}, "x"),
        builder.append("weight", (), {"shape": [4, 3]}, "w"),
    )


def test_products() -> None:
    builder, x, w = _builder()
    whole = builder.add("product", x, w, transposed=True, rows=[0, 3], cols=[0, 4])
    part = builder.add(
        "product", builder.add("slice", x, start=1, stop=3), w, transposed=True, rows=[1, 3], cols=[2, 4]
    )
    straight = builder.add("product", whole, w, transposed=False, rows=[0, 4], cols=[1, 3])
    term = {"transposed": True, "rows": [0, 3], "cols": [0, 4]}
    sums = builder.add("affine", whole, x, w, x, w, init=True, terms=[term, term])
    graph = builder.build({"whole": whole, "part": part, "straight": straight, "affine": sums})
    row, weight = torch.randn(5, 3).double(), torch.randn(4, 3).double()
    results = interpret(graph, {"x": row, "w": weight})
    torch.testing.assert_close(results["whole"], row @ weight.T)
    torch.testing.assert_close(results["part"], row[:, 1:] @ weight[2:, 1:].T)
    torch.testing.assert_close(results["straight"], row @ weight.T @ weight[:, 1:])
    torch.testing.assert_close(results["affine"], 3 * (row @ weight.T))


def test_sums_over_rows() -> None:
    builder, x, _ = _builder()
    squares = builder.add("mul", x, x)
    outer = builder.add("outer", squares, x)
    symmetric = builder.add("total", builder.add("transpose", outer), outer)
    placed = builder.add("place", builder.add("rowsum", x), shape=[7], corner=[2])
    constant = builder.add("rowsum", builder.const(2.0))
    graph = builder.build({"symmetric": symmetric, "placed": placed, "constant": constant})
    row = torch.randn(5, 3).double()
    results = interpret(graph, {"x": row, "w": torch.zeros(4, 3)})
    product = (row * row).T @ row
    torch.testing.assert_close(results["symmetric"], product + product.T)
    torch.testing.assert_close(results["placed"][2:5], row.sum(0))
    assert results["placed"][:2].abs().sum() == 0
    assert results["constant"].tolist() == [10.0]


def test_features() -> None:
    builder, x, _ = _builder()
    joined = builder.add("concat", x, builder.const(1.5), builder.add("broadcast", builder.add("amax", x), size=2))
    selected = builder.add("where", builder.add("gt", x, builder.const(0.0)), x, builder.add("sum", x))
    graph = builder.build({"joined": joined, "selected": selected, "flag": builder.add("lt", x, builder.const(0.0))})
    row = torch.randn(5, 3)
    results = interpret(graph, {"x": row, "w": torch.zeros(4, 3)})
    most = row.amax(1, keepdim=True)
    torch.testing.assert_close(results["joined"], torch.cat([row, torch.full((5, 1), 1.5), most, most], 1))
    torch.testing.assert_close(results["selected"], torch.where(row > 0, row, row.sum(1, keepdim=True)))
    assert torch.equal(results["flag"], row < 0)


def test_constant_outputs_have_a_row_each() -> None:
    builder, _, _ = _builder()
    graph = builder.build({"y": builder.add("broadcast", builder.const(3.0), size=2)})
    results = interpret(graph, {"x": torch.zeros(5, 3), "w": torch.zeros(4, 3)})
    assert torch.equal(results["y"], torch.full((5, 2), 3.0))


def test_leaves_are_checked() -> None:
    builder, x, _ = _builder()
    graph = builder.build({"y": builder.add("neg", x)})
    with pytest.raises(ValueError, match="takes x"):
        interpret(graph, {})
    with pytest.raises(ValueError, match=r"x is row\[3\]"):
        interpret(graph, {"x": torch.zeros(5, 4)})
