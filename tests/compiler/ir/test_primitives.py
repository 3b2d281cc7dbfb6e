"""Every table indexed by primitives has all of them, so that a new primitive can't be forgotten."""

from __future__ import annotations

import math

import pytest
import torch

from fusecell.compiler.codegen.pointwise_ops import POINTWISE_OPS
from fusecell.compiler.codegen.vector_math import BINARY_OPS, OPS
from fusecell.compiler.frontend.dtypes import COMPILED_DTYPES, casts_of
from fusecell.compiler.frontend.graph_writer import Writer
from fusecell.compiler.frontend.rules import RULES
from fusecell.compiler.frontend.rules.pointwise import POINTWISE
from fusecell.compiler.frontend.rules.special import SPECIAL
from fusecell.compiler.frontend.traced_values import Row, Untraceable
from fusecell.compiler.ir.graph import Builder
from fusecell.compiler.ir.interpreter import EVALUATE
from fusecell.compiler.ir.primitives import ARGUMENTS, PRIMITIVES
from fusecell.errors import CompilerError

POINTWISE_PRIMITIVES = {name for name, primitive in PRIMITIVES.items() if primitive.pointwise}


def test_the_interpreter_evaluates_every_primitive() -> None:
    assert set(EVALUATE) == set(PRIMITIVES)


def test_every_pointwise_primitive_has_machine_code() -> None:
    assert set(POINTWISE_OPS) == POINTWISE_PRIMITIVES


def test_vector_functions_are_pointwise_primitives_of_as_many_arguments() -> None:
    assert {op: PRIMITIVES[op].arity for op in OPS} == {op: 1 + (op in BINARY_OPS) for op in OPS}
    assert set(OPS) <= POINTWISE_PRIMITIVES


def test_what_is_expensive_is_a_vector_function() -> None:
    """A primitive of one instruction is cheaper to recompute than to save; a series or iteration is not."""
    expensive = {name for name, primitive in PRIMITIVES.items() if primitive.expensive and primitive.pointwise}
    assert expensive <= set(OPS)
    cheap = {"neg", "abs", "sign", "floor", "maximum", "minimum", "reciprocal"}
    cheap |= {"nextafter", "mantissa", "round", "copysign", "to_float16", "to_bfloat16", "to_float32"}
    assert set(OPS) - expensive == cheap, "a new vector function: say expensive=True in its row, or name it here"


def test_torch_reaches_every_pointwise_primitive() -> None:
    """Call each rule of an elementwise operation with rows and collect the primitives it writes."""
    written = set()
    for rule in {**POINTWISE, **SPECIAL}.values():
        for arity in (1, 2, 3):
            builder = Builder("test", "f64")
            rows = [Row((11, 4), builder.append("input", (), {"shape": [4]}, f"x{i}")) for i in range(arity)]
            try:
                rule(Writer(builder, 11, lambda slot, form: -1), *rows)
            except (CompilerError, TypeError, Untraceable):
                continue
            written |= {node.op for node in builder.nodes}
    casts = {primitive for dtype in COMPILED_DTYPES for primitive in casts_of(dtype).values()}
    # The order of a polygamma is a number: test_tracer reaches it.
    assert POINTWISE_PRIMITIVES - {"broadcast", "trigamma", *casts} <= written
    assert set(POINTWISE) <= set(RULES)


@pytest.mark.parametrize("name", [name for name, primitive in PRIMITIVES.items() if primitive.fold])
def test_folding_computes_what_torch_does(name: str) -> None:
    primitive = PRIMITIVES[name]
    assert primitive.fold is not None
    numbers = (0.7, -1.3)[: primitive.arity]
    expected = EVALUATE[name]([torch.tensor(number, dtype=torch.float64) for number in numbers], {})
    assert primitive.fold(*numbers) == expected.item()


@pytest.mark.parametrize("name", [name for name, primitive in PRIMITIVES.items() if primitive.identities])
def test_an_identity_leaves_the_other_argument(name: str) -> None:
    for position, identity in PRIMITIVES[name].identities:
        for value in (1.5, -2.0, 0.0, math.inf, math.nan):
            arguments = [torch.tensor(value), torch.tensor(value)]
            arguments[position] = torch.tensor(identity)
            result = EVALUATE[name](arguments, {}).item()
            assert result == value or (math.isnan(value) and math.isnan(result))


def test_the_table_of_primitives_is_consistent() -> None:
    for name, primitive in PRIMITIVES.items():
        assert primitive.leaf == (primitive.arity == 0), name
        assert primitive.pointwise or not (primitive.fold or primitive.identities), name
        assert primitive.pointwise or primitive.nest or not primitive.expensive, name
        assert primitive.arity == 2 or not primitive.commutes, name
        moves = ("slice", "concat", "view", "gather", "interleave")
        assert primitive.cheap == (name in moves or (primitive.pointwise and not primitive.expensive)), name
    assert {"input", "state", "weight"} == ARGUMENTS
