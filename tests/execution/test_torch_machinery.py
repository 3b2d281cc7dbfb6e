"""Torch's machinery around modules gives the same numbers as without it, or as with torch.nn's layers."""

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
    net = model()
    loss_of(net, x).backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(lambda x: net["rnn"](x)[0], leaf, use_reentrant=use_reentrant)
    net["out"](y).square().mean().backward()
    for parameter, value in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, value)


def test_training_with_clipping_is_torchs(x):
    for actual, expected in zip(trained(model(), x), trained(model(nn.GRU), x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_averaged_models(x):
    averages = []
    for layer in (fc.GRU, nn.GRU):
        net = model(layer)
        average = AveragedModel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net, x).backward()
            optimizer.step()
            average.update_parameters(net)
        with torch.no_grad():
            averages.append(loss_of(average.module, x))
            assert averages[-1] != loss_of(net, x)
    torch.testing.assert_close(*averages)


def test_functional_calls(x):
    net = model()
    other = {name: 2 * value.detach() for name, value in net["rnn"].named_parameters()}
    output = torch.func.functional_call(net["rnn"], other, (x,))[0]
    swapped = copy.deepcopy(net["rnn"])
    swapped.load_state_dict(other)
    assert torch.equal(output, swapped(x)[0])
    leaves = {name: value.clone().requires_grad_() for name, value in other.items()}
    torch.func.functional_call(net["rnn"], leaves, (x,))[0].sum().backward()
    swapped(x)[0].sum().backward()
    for name, parameter in swapped.named_parameters():
        assert torch.equal(leaves[name].grad, parameter.grad)


def test_autocast(x):
    """The recurrence computes in its weights' dtype; what is around it may not."""
    net = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net["rnn"](x)[0]
        narrow = net["rnn"](x.bfloat16())[0]
        loss = loss_of(net, x)
    assert inside.dtype is torch.float32
    assert torch.equal(inside, net["rnn"](x)[0])
    assert torch.equal(narrow, net["rnn"](x.bfloat16().float())[0])
    loss.backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in net.parameters())


def test_a_copy_made_during_training_learns_alone(x):
    net = model()
    trained(net, x)
    other = copy.deepcopy(net)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    again = trained(net, x)
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
    parameters = []
    for net, name in ((model(), "auto"), (model(layer), runner)):
        net.double()
        torch.manual_seed(2)
        getattr(parametrizations, kind)(net["rnn"], "weight_hh_l0")
        with fc.runner(name):
            parameters.append(trained(net, x.double()))
    for actual, expected in zip(*parameters, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
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
    reference = nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 9), Last(), nn.ReLU(), nn.Linear(9, 1))
    for each in (chain, reference):
        each(x).sum().backward()
    for p, q in zip(chain.parameters(), reference.parameters(), strict=True):
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
        process = subprocess.run(
            [*command, str(tmp_path / name)],
            check=False,
            env=environment,
            timeout=600,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
    two, one = (torch.load(tmp_path / name) for name in ("two.pt", "one.pt"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-11, atol=1e-13)
