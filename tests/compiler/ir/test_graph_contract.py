"""The contract of graphs: primitive rules accept or reject any arguments, and whole graphs are checked."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import fusecell as fc
from fusecell.compiler.frontend import trace
from fusecell.compiler.ir.axes import AXIS_PRIMITIVES
from fusecell.compiler.ir.graph import Graph
from fusecell.compiler.ir.graph_contract import GraphLimits, check_graph
from fusecell.compiler.ir.interpreter import interpret
from fusecell.compiler.ir.primitives import PRIMITIVES, Type
from fusecell.compiler.runtime.kernel import compile_graph
from fusecell.errors import CompilerError

HEAD = 'graph step f32\nx = input() {"shape": [3]} : row[3]\nh = state() {"shape": [4]} : row[4]\n'
HEAD += 'w = weight() {"shape": [3, 4]} : weight[3, 4]\nb = weight() {"shape": [4]} : weight[4]\n'
PRODUCT = 'p = product(x, w) {"cols": [0, 4], "rows": [0, 3], "transposed": false} : row[4]\n'
TAIL = "new = add(h, p) : row[4]\nreturn output = new\nreturn state.h = new\n"
GOOD = HEAD + PRODUCT + TAIL


def test_a_good_graph_passes():
    check_graph(Graph.parse(GOOD))
    assert Graph.parse(GOOD).text == GOOD


@pytest.mark.parametrize("gradients", [False, True])
def test_traced_graphs_pass(zoo_cell, gradients):
    traced = trace(zoo_cell.make(5, 9), [(5,)], torch.float32, gradients=gradients)
    check_graph(traced.graph, "joint" if gradients else "step")
    assert Graph.parse(traced.graph.text).text == traced.graph.text


def test_notes_may_be_called_anything_that_prints():
    """Labels of notes may hold any printable text; names of values are adapted."""

    class Noting(fc.Cell):
        def __init__(self):
            super().__init__(3, 4)
            self.linear = torch.nn.Linear(3, 4)

        def step(self, x, state):
            (h,) = state
            h = self.note("the gate / r = 1", torch.tanh(self.linear(x))) + self.note("n" * 300, h * 0.5)
            return h, (h,)

    graph = trace(Noting(), [(3,)], torch.float32, gradients=True).graph
    check_graph(graph, "joint")
    assert "note.the gate / r = 1" in graph.outputs
    assert Graph.parse(graph.text).text == graph.text
    assert fc.record(fc.Recurrent(Noting()), torch.randn(2, 1, 3)).value("the gate / r = 1").shape == (2, 1, 4)


UNREADABLE = {
    "nothing": ("", "the first line must be"),
    "a head of another dtype": (GOOD.replace("f32", "f16"), "the first line must be"),
    "a last line that is cut": (GOOD[:-1], "ends in the middle of a line"),
    "an empty line": (GOOD + "\n", "a value after a return: values come first"),
    "a value after a result": (GOOD + "o = neg(x) : row[3]\n", "a value after a return: values come first"),
    "a label twice": (GOOD + "return output = p\n", "the label is taken"),
    "a name twice": (HEAD + PRODUCT + PRODUCT + TAIL, "the name is taken"),
    "a result that is nothing": (
        GOOD.replace("output = new", "output = nothing"),
        "there is no value 'nothing' before it",
    ),
    "an argument that comes later": (
        GOOD.replace("product(x, w)", "product(new, w)"),
        "there is no value 'new' before it",
    ),
    "another primitive": (GOOD.replace("= add(", "= system("), "no primitive is called 'system'"),
    "an argument more": (GOOD.replace("add(h, p)", "add(h, p, p)"), "add takes 2 arguments, got 3"),
    "another type": (GOOD.replace("add(h, p) : row[4]", "add(h, p) : row[5]"), r"the type is row\[4\]"),
    "another spelling": (GOOD.replace('{"shape": [3]}', '{"shape":[3]}'), "expected it spelled as"),
    "a name of control characters": (GOOD.replace("new", "n\x1b[2J"), "expected name = op"),
    "a name that is too long": (GOOD.replace("new", "n" * 257), "names of up to 256 characters"),
    "a name of another line's end": (GOOD.replace("new", "n\x85w"), "expected name = op"),
    "half a character": (GOOD.replace("new", "n\ud800"), "expected name = op"),
    "an attribute twice": (GOOD.replace('"shape": [3]}', '"shape": [3], "shape": [3]}'), "names 'shape' twice"),
    "an attribute more": (
        GOOD.replace('"shape": [3]}', '"more": 1, "shape": [3]}'),
        "input has the attributes 'shape', got",
    ),
    "no attributes": (GOOD.replace(' {"shape": [3]}', ""), "input has the attributes 'shape', got no attributes"),
    "attributes of a pointwise value": (
        GOOD.replace("add(h, p)", 'add(h, p) {"size": 4}'),
        "add has no attributes, got",
    ),
    "attributes that nest": (GOOD.replace("[3]}", "[" * 50_000 + "]" * 50_000 + "}"), "nests deeper than 4"),
    "attributes that never end": (GOOD.replace("[3]}", "[" * 50_000 + "}"), "nests deeper than 4"),
    "a size of true": (GOOD.replace('x = input() {"shape": [3]}', 'x = input() {"shape": [true]}'), "got True"),
    "a size of a text": (GOOD.replace('{"shape": [3]}', '{"shape": ["3"]}'), "got '3'"),
    "a size of a fraction": (GOOD.replace('{"shape": [3]}', '{"shape": [3.0]}'), "got 3.0"),
    "a size of infinity": (GOOD.replace('{"shape": [3]}', '{"shape": [Infinity]}'), "got inf"),
    "a size of nothing": (GOOD.replace('{"shape": [3]}', '{"shape": [0]}'), "from 1 to .* got 0"),
    "a negative size": (GOOD.replace('{"shape": [3]}', '{"shape": [-3]}'), "from 1 to .* got -3"),
    "a size beyond memory": (GOOD.replace('{"shape": [3]}', '{"shape": [99999999999999]}'), "integer from 1 to"),
    "a size of 5,000 digits": (
        GOOD.replace('{"shape": [3]}', '{"shape": [' + "9" * 5000 + "]}"),
        "line 2 of the graph",
    ),
    "an input of two axes": (GOOD.replace('{"shape": [3]}', '{"shape": [3, 1]}'), "a list of 1 integers"),
    "a weight of three axes": (
        GOOD.replace('{"shape": [3, 4]}', '{"shape": [3, 4, 1]}'),
        "a list of 1 or 2 integers",
    ),
    "columns beyond a weight": (GOOD.replace('"cols": [0, 4]', '"cols": [0, 5]'), r"columns 0:5 of weight\[3, 4\]"),
    "columns that are three": (
        GOOD.replace('"cols": [0, 4]', '"cols": [0, 2, 4]'),
        "cols is a list of 2 integers",
    ),
    "turned by a number": (
        GOOD.replace('"transposed": false', '"transposed": 0'),
        "transposed is true or false, got 0",
    ),
    "a product of no weight": (
        GOOD.replace("product(x, w)", "product(x, x)"),
        r"row\[3\] is an argument where a weight is needed",
    ),
    "a constant that is a text": (HEAD + 'c = const() {"value": "1"} : row[1]\n' + TAIL, "is a number with a point"),
    "a constant that is whole": (HEAD + 'c = const() {"value": 1} : row[1]\n' + TAIL, "is a number with a point"),
    "a place outside": (
        HEAD + 's = rowsum(x) : sum[3]\nq = place(s) {"corner": [2], "shape": [4]} : sum[4]\n' + PRODUCT + TAIL,
        r"sum\[3\] at \[2\] doesn't lie inside a sum of shape \[4\]",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_invalid_graph_texts_are_rejected(kind):
    text, message = UNREADABLE[kind]
    with pytest.raises(CompilerError, match=message) as raised:
        Graph.parse(text)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


BROKEN = {
    "no output": (GOOD.replace("return output = new\n", ""), "the result 'output' is missing"),
    "a state that ends": (GOOD.replace("return state.h = new\n", ""), r"'state\.h', the state's new value, is missing"),
    "a new state of another size": (
        GOOD.replace("return state.h = new", "return state.h = x"),
        r"the new value of state h is row\[3\], expected row\[4\]",
    ),
    "a new state that is a weight": (
        GOOD.replace("return state.h = new", "return state.h = b"),
        r"the new value of state h is weight\[4\], expected row\[4\]",
    ),
    "a state from nowhere": (GOOD + "return state.c = new\n", "is the new value of no state"),
    "an output that is a weight": (GOOD.replace("output = new", "output = b"), r"is weight\[4\], expected a row"),
    "an output that is a matrix": (GOOD.replace("output = new", "output = w"), r"is weight\[3, 4\], expected a row"),
    "another result": (GOOD + "return more = new\n", "a step has no result 'more'"),
    "a gradient of a step": (GOOD + "return grad.input.x = x\n", r"a step has no result 'grad\.input\.x'"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_graphs_that_are_no_step_are_rejected(kind):
    text, message = BROKEN[kind]
    graph = Graph.parse(text)
    with pytest.raises(CompilerError, match=message):
        check_graph(graph)
    with pytest.raises(CompilerError, match=message):
        compile_graph(graph)


def test_a_joint_graph():
    graph = trace(fc.GRUCell(3, 4), [(3,)], torch.float32, gradients=True).graph
    check_graph(graph, "joint")
    ih = graph.outputs["grad.weight.weight_ih"]
    for changes, message in (
        ({"grad.weight.weight_hh": ih}, r"is sum\[12, 3\], the gradient of weight\[12, 4\]"),
        ({"grad.weight.more": ih}, "is the gradient of no weight"),
        ({"grad.input.x": ih}, r"is sum\[12, 3\], the gradient of row\[3\]"),
        ({"grad.state.h": graph.outputs["grad.input.x"]}, r"is row\[3\], the gradient of row\[4\]"),
        ({"grad.state.c": graph.outputs["grad.state.h"]}, "is the gradient of no state"),
    ):
        with pytest.raises(CompilerError, match=message):
            check_graph(replace(graph, outputs={**graph.outputs, **changes}), "joint")
    with pytest.raises(CompilerError, match=r"its input grad\.output is missing"):
        check_graph(Graph.parse(GOOD), "joint")


def test_check_graph_trusts_no_node():
    """The checker trusts no node: not its type, its arguments or its name."""
    graph = Graph.parse(GOOD)
    last = graph.nodes[-1]
    for change, message in (
        ({"type": Type("row", (5,))}, r"new is row\[4\], not row\[5\]"),
        ({"args": (0, 9)}, "takes what is not computed before it"),
        ({"args": (5, -1)}, "takes what is not computed before it"),
        ({"name": "x"}, "the name 'x' is taken"),
        ({"name": "\x1b"}, r"the name '\\x1b' is taken, or none"),
        ({"op": "launch"}, "no primitive is called 'launch'"),
    ):
        with pytest.raises(CompilerError, match=message):
            check_graph(replace(graph, nodes=(*graph.nodes[:-1], replace(last, **change))))
    with pytest.raises(CompilerError, match="is none of the graph's values"):
        check_graph(replace(graph, outputs={"output": 99}))


def test_limits_of_a_graph():
    graph = Graph.parse(GOOD)
    check_graph(graph, limits=GraphLimits(nodes=6, features=15, elements=16))
    for limits in (GraphLimits(nodes=5), GraphLimits(features=14), GraphLimits(elements=15)):
        with pytest.raises(CompilerError, match=r"more than \d"):
            check_graph(graph, limits=limits)


ZEROS = '{"offset": 0, "strides": [0, 0]}'
NESTS = [
    f'n = contract(x, x) {{"a": {ZEROS}, "b": {ZEROS}, "count": [{1 << 40}], "shape": [4]}} : row[4]',
    f'n = argsort(y) {{"count": {1 << 21}, "descending": false, "outer": 1}} : row[{1 << 21}]',
]


@pytest.mark.parametrize("nest", NESTS)
def test_the_work_of_nests_is_limited(nest):
    """Of a few features a nest can have any number of terms."""
    large = f'y = input() {{"shape": [{1 << 21}]}} : row[{1 << 21}]\n'
    graph = Graph.parse(HEAD + large + PRODUCT + nest + "\n" + TAIL)
    with pytest.raises(CompilerError, match=r"its nests combine [\d,]+ elements for each row, more than"):
        check_graph(graph)
    check_graph(graph, limits=GraphLimits(work=1 << 43))


NUMBERS = [
    0,
    1,
    2,
    4,
    -1,
    True,
    1.0,
    float("nan"),
    float("inf"),
    2**70,
    "1",
    None,
    [],
    [1],
    [0, 1],
    [0, 4],
    [[0, 1]],
    {},
]
TYPES = [Type(kind, shape) for kind in ("row", "mask") for shape in ((1,), (4,))]
TYPES += [Type(kind, shape) for kind in ("weight", "sum") for shape in ((1,), (4,), (3, 4), (4, 4))]


@pytest.mark.parametrize("op", PRIMITIVES)
def test_primitive_rules_return_a_type_or_raise(op):
    """For any arguments a rule returns a type with features, or raises CompilerError."""
    rng, primitive = random.Random(op), PRIMITIVES[op]
    names = ["shape", "value", "size", "start", "stop", "rows", "cols", "transposed", "init", "terms", "corner", "more"]
    answered, messages = 0, []
    for _ in range(4000):
        args = [rng.choice(TYPES) for _ in range(rng.choice([primitive.arity or 0, rng.randrange(5)]))]
        attrs = {
            name: rng.choice(NUMBERS) for name in (primitive.attributes if rng.random() < 0.9 else rng.sample(names, 2))
        }
        if op == "affine" and rng.random() < 0.7:
            attrs["terms"] = [{name: rng.choice(NUMBERS) for name in ("rows", "cols", "transposed")}] * rng.randrange(3)
        try:
            result = primitive.result(op, args, attrs)
        except CompilerError as error:
            messages.append(str(error))
            continue
        answered += 1
        assert result.shape
        assert all(type(size) is int and size > 0 for size in result.shape)
    assert all(message.isprintable() for message in messages)
    # Attributes of products, and of what computes along axes, seldom fit by chance.
    assert answered or op in ("product", "affine", "place", *AXIS_PRIMITIVES)


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e+300", "-0.0", "5e-324"])
def test_constants_that_a_trace_may_have(value):
    """Masks are filled with infinities; they are spelled as JSON in Python spells them."""
    text = HEAD + f'c = const() {{"value": {value}}} : row[1]\nm = mul(h, c) : row[4]\n'
    text += "return output = m\nreturn state.h = m\n"
    graph = Graph.parse(text)
    assert graph.text == text
    compile_graph(graph)
    h = torch.tensor([[1.0, -1.0, 0.5, 2.0]])
    output = interpret(graph, {"x": torch.zeros(1, 3), "h": h, "w": torch.zeros(3, 4), "b": torch.zeros(4)})["output"]
    assert torch.equal(output.nan_to_num(7.0), (h * float(value)).nan_to_num(7.0))


LONG = {
    "one line": lambda count: GOOD.replace("add(h, p)", "add(" + "h, " * count + "p)"),
    "blanks": lambda count: GOOD.replace("add(h, p)", "add(" + " " * count + ")"),
    "braces": lambda count: GOOD.replace("[3]}", "[3]} : row[" + "} : row[1" * count),
    "quotes": lambda count: GOOD.replace("[3]}", '["' + '\\"' * count + "}"),
    "names that follow one another": lambda count: (
        HEAD
        + "".join(f"a{'.1' * (place % 100)}.{place} = neg(h) : row[4]\n" for place in range(count // 10))
        + PRODUCT
        + TAIL
    ),
    "many lines": lambda count: (
        HEAD + "".join(f"n{i} = neg(h) : row[4]\n" for i in range(count // 10)) + PRODUCT + TAIL
    ),
}


@pytest.mark.parametrize("kind", LONG)
def test_parsing_takes_linear_time(kind, tmp_path):
    """A text of half a million: a parser that goes over it again at each of its places would take hours."""
    path = tmp_path / "text"
    path.write_text(LONG[kind](500_000), encoding="utf-8")
    script = """
import contextlib, pathlib, sys
from fusecell.compiler.ir.graph import Graph
from fusecell.errors import CompilerError
with contextlib.suppress(CompilerError):
    Graph.parse(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
"""
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, timeout=300)
