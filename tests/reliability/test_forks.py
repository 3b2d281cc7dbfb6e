"""A child forked after its parent used several threads has none of them, and never waits for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PARENT = """
import faulthandler, json, os, sys, tempfile, traceback, numpy as np, torch, fusecell as fc
from dataclasses import replace
from fusecell.compiler.backend import tuning
tuning.TUNING = replace(tuning.TUNING, team_call_us=0, team_step_us=0)  # any call is worth threads
torch.set_num_threads(2)
(torch.randn(700, 700) @ torch.randn(700, 700) + 1).sum()  # torch's own team
layer, x = fc.LSTM(5, 40), torch.randn(7, 64, 5)
y, _ = layer(x)
y.sum().backward()  # a call of several threads, forward and backward
before = y.detach()[-1, -1].tolist()


# torch's own operators on large tensors, autograd's among them, wait for ever: a child's program has to do without.
def ones(*shape):
    return torch.from_numpy(np.ones(shape, np.float32))


def small(*shape):
    return torch.from_numpy(np.full(shape, 1e-3, np.float32))


class Custom(fc.Cell):
    def __init__(self, inputs, units):
        super().__init__(inputs, units)
        self.w, self.u = (torch.nn.Parameter(small(units, size)) for size in (inputs, units))
        self.register_buffer("mask", ones(units, units))

    def step(self, x, state):
        h = torch.tanh(x @ self.w.t() + state[0] @ (self.u * self.mask - self.u.t()).t())  # weights of weights
        return h, (h,)


def train(layer, x):
    y, _ = layer(x)
    y.backward(ones(*y.shape))
    for parameter in layer.parameters():
        assert torch.isfinite(parameter.grad.view(-1)[:100]).all()
    with torch.no_grad():
        assert torch.isfinite(layer(x)[0].view(-1)[:100]).all()


exit_codes = {}
for name, program in json.loads(sys.stdin.read()).items():
    child = os.fork()
    if not child:
        # Its own cache: a kernel that an earlier child compiled would be loaded, where it is to be compiled.
        os.environ["FUSECELL_CACHE"] = tempfile.mkdtemp()
        os.dup2(os.open(f"{sys.argv[1]}/{name}", os.O_WRONLY | os.O_CREAT), 2)
        faulthandler.dump_traceback_later(600, exit=True)
        try:
            exec(program)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    exit_codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(exit_codes))
"""
CHILDREN = {
    "GRU": "with torch.no_grad(): fc.GRU(3, 7)(torch.randn(5, 2, 3))",
    "LSTM": "with torch.no_grad(): fc.LSTM(3, 7)(torch.randn(5, 2, 3), lengths=[5, 3])",
    "training": "train(fc.GRU(3, 7, num_layers=2), torch.randn(5, 2, 3))",
    "large weights of weights": "with torch.no_grad(): fc.Recurrent(Custom(300, 600))(torch.randn(3, 2, 300))",
    "training with large weights": "train(fc.GRU(300, 600), torch.randn(3, 2, 300))",
    "training, weights of weights": "train(fc.Recurrent(Custom(30, 60)), torch.randn(3, 2, 30))",
    "training with many rows": "train(fc.GRU(8, 64), torch.randn(4, 400, 8))",
    "gradients of rows that end": """
layer, x = fc.GRU(8, 64), torch.randn(9, 300, 8)
x.requires_grad_()
y, h = layer(x, lengths=torch.arange(300) % 9 + 1)
torch.autograd.grad((h,), [x, *layer.parameters()], (ones(*h.shape),))
""",
    "any layer of the parent's": "assert layer(x)[0][-1, -1].tolist() == before; train(layer, x)",
    "a cell that isn't compiled": """
import warnings
class Branches(fc.Cell):
    def step(self, x, state):
        h = torch.tanh(x + state[0]) if x.sum() < 1e9 else x
        return h, (h,)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    with torch.no_grad(): fc.Recurrent(Branches(300, 300))(torch.randn(3, 400, 300))
""",
    "record": "assert fc.record(layer, x[:, :2]).outputs is not None",
    "Stream": "fc.Stream(fc.GRU(3, 7)).step(torch.randn(1, 3).numpy())",
    "explain": "assert fc.explain(fc.GRU(30, 70)).training_runner == 'compiled'",
    "the number of threads": "fc.GRU(3, 7)(torch.randn(5, 2, 3))\nassert torch.get_num_threads() == 2",
    "a child of the child": """
grandchild = os.fork()
if not grandchild:
    train(fc.GRU(4, 9), torch.randn(5, 2, 4))
    os._exit(0)
assert os.waitpid(grandchild, 0)[1] == 0
""",
}


@pytest.fixture(scope="module")
def children(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """The exit code of every child of one parent, and what it said: they run one after another."""
    folder = tmp_path_factory.mktemp("children")
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONWARNINGS": "ignore"}
    parent = subprocess.run(
        [sys.executable, "-c", PARENT, str(folder)],
        input=json.dumps(CHILDREN), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert parent.returncode == 0, parent.stderr[-3000:]
    exit_codes = json.loads(parent.stdout)
    return {name: (code, (folder / name).read_text()) for name, code in exit_codes.items()}


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_compiles_new_cells(name, children):
    exit_code, said = children[name]
    assert exit_code == 0, said[-3000:]
