"""What torch builds around modules: the same numbers as without, or as with torch.nn's layers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import fusecell as fc


def model(layer=fc.GRU):
    torch.manual_seed(0)
    return nn.ModuleDict({"rnn": layer(5, 9), "out": nn.Linear(9, 2)})


def loss_of(model, x):
    return model["out"](model["rnn"](x)[0]).square().mean()


def trained(model, x, steps=3):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.fixture
def x():
    return torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(x, use_reentrant):
    made = model()
    loss_of(made, x).backward()
    expected = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda x: made["rnn"](x)[0], leaf, use_reentrant=use_reentrant)
    made["out"](y).square().mean().backward()
    for parameter, value in zip(made.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, value)


def test_training_with_clipping_is_torchs(x):
    for mine, theirs in zip(trained(model(), x), trained(model(nn.GRU), x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_averaged_models(x):
    averages = []
    for layer in (fc.GRU, nn.GRU):
        made = model(layer)
        average = AveragedModel(made)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(made, x).backward()
            optimizer.step()
            average.update_parameters(made)
        with torch.no_grad():
            averages.append(loss_of(average.module, x))
            assert averages[-1] != loss_of(made, x)
    torch.testing.assert_close(*averages)


def test_functional_calls(x):
    made = model()
    other = {name: 2 * value.detach() for name, value in made["rnn"].named_parameters()}
    found = torch.func.functional_call(made["rnn"], other, (x,))[0]
    swapped = copy.deepcopy(made["rnn"])
    swapped.load_state_dict(other)
    assert torch.equal(found, swapped(x)[0])
    leaves = {name: value.clone().requires_grad_() for name, value in other.items()}
    torch.func.functional_call(made["rnn"], leaves, (x,))[0].sum().backward()
    swapped(x)[0].sum().backward()
    for name, parameter in swapped.named_parameters():
        assert torch.equal(leaves[name].grad, parameter.grad)


def test_autocast(x):
    """The recurrence computes in its weights' dtype; what is around it may not."""
    made = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made["rnn"](x)[0]
        narrow = made["rnn"](x.bfloat16())[0]
        loss = loss_of(made, x)
    assert inside.dtype is torch.float32
    assert torch.equal(inside, made["rnn"](x)[0])
    assert torch.equal(narrow, made["rnn"](x.bfloat16().float())[0])
    loss.backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in made.parameters())


def test_a_copy_made_during_training_learns_alone(x):
    made = model()
    trained(made, x)
    other = copy.deepcopy(made)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    again = trained(made, x)
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(trained(other, x), again, strict=True))


@pytest.mark.parametrize(
    ("kind", "layer", "runner"),
    [
        ("weight_norm", nn.GRU, "auto"),
        ("orthogonal", nn.GRU, "auto"),
        # torch's layer asks for a parametrized weight four times in a call, each of which is a step of its iteration.
        ("spectral_norm", fc.GRU, "eager"),
    ],
)
def test_parametrizations(x, kind, layer, runner):
    fc.refresh()  # the first that is traced of its class holds a weight that is no leaf
    found = []
    for made, name in ((model(), "auto"), (model(layer), runner)):
        made.double()
        torch.manual_seed(2)
        getattr(parametrizations, kind)(made["rnn"], "weight_hh_l0")
        with fc.runner(name):
            found.append(trained(made, x.double()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    plain = model().double()
    loss_of(plain, x.double()).backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


class Last(nn.Module):
    def forward(self, result):
        return result[0][-1]


def test_in_a_sequential(x):
    torch.manual_seed(3)
    chain = nn.Sequential(nn.Linear(5, 5), fc.LSTM(5, 9), Last(), nn.ReLU(), nn.Linear(9, 1))
    torch.manual_seed(3)
    theirs = nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 9), Last(), nn.ReLU(), nn.Linear(9, 1))
    for each in (chain, theirs):
        each(x).sum().backward()
    for p, q in zip(chain.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


_WORKER = """
import os, sys, torch, torch.distributed as dist
from torch import nn
import fusecell as fc
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.ModuleDict({"rnn": fc.Recurrent(fc.LSTMCell(5, 9)), "out": nn.Linear(9, 2)}).double()
class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
    def forward(self, x):
        return self.net["out"](self.net["rnn"](x)[0])
x = torch.randn(7, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
module, rank = Whole(), int(os.environ.get("RANK", "-1"))
if rank >= 0:
    dist.init_process_group("gloo")
    module, x = nn.parallel.DistributedDataParallel(module), x[:, 3 * rank : 3 * rank + 3]
optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    module(x).square().mean().backward()
    optimizer.step()
if rank <= 0:
    torch.save(net.state_dict(), sys.argv[1])
if rank >= 0:
    dist.barrier()
    dist.destroy_process_group()
    # Threads of torch's process group can outlive it and abort an interpreter that shuts down under them.
    os._exit(0)
"""


def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    for command, name in ((run, "two.pt"), ([sys.executable, str(script)], "one.pt")):
        done = subprocess.run(
            [*command, str(tmp_path / name)],
            check=False,
            env=environment,
            timeout=600,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    two, one = (torch.load(tmp_path / name) for name in ("two.pt", "one.pt"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-11, atol=1e-13)
