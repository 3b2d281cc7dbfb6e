"""Functions of a kernel that work alike on other buffers are compiled once, and compute the same bits."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.compiler import codegen
from fusecell.compiler.codegen.shared_functions import share_functions


class Repeated(fc.Cell):
    """Three rounds of attention over a memory, each with weights of its own."""

    def __init__(self) -> None:
        super().__init__(5, 48)
        self.state_sizes = ((6, 8),)
        self.inp = nn.Linear(5, 8)
        self.maps = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def step(self, x, state):
        memory = state[0] + self.inp(x)[:, None]
        for each in self.maps:
            query, key, value = each(memory).chunk(3, -1)
            memory = torch.tanh(memory + torch.softmax(query @ key.mT, -1) @ value)
        return memory.flatten(1), (memory,)


def _run(dtype: torch.dtype) -> tuple[list[torch.Tensor], int]:
    torch.manual_seed(0)
    cell = type("Own", (Repeated,), {})().to(dtype)
    x = torch.randn(6, 5, 5, dtype=dtype, requires_grad=True)
    with fc.runner("compiled"):
        y, memory = fc.scan(cell, x, lengths=[6, 2, 0, 4, 6])
    inputs = (x, *cell.parameters())
    gradients = torch.autograd.grad(y.square().sum() + memory.sum(), inputs)
    explained = fc.explain(cell).cells[0]
    functions = sum(kernel.llvm.count("\ndefine ") for kernel in (explained.forward, explained.backward))
    return [y, memory, *gradients], functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_those_of_separate_functions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, few = _run(dtype)
    monkeypatch.setattr(codegen, "share_functions", lambda functions, tables: (functions, tables))
    separate, many = _run(dtype)
    assert few < many
    assert all(torch.equal(a, b) for a, b in zip(shared, separate, strict=True))


def _function(name: str, *slots: int, stride: int = 64, calls: str = "") -> str:
    lines = [f"define internal void @{name}(ptr %args, i64 %n) noinline #0 {{", "entry:"]
    for place, slot in enumerate(slots):
        lines.append(f"  %{name}.{place} = getelementptr i8, ptr %args, i64 {slot}")
        lines += [f"  %{name}.{place}.{i} = getelementptr i8, ptr %{name}.{place}, i64 {stride}" for i in range(30)]
    return "\n".join([*lines, *([f"  call void @{calls}(ptr %args, i64 %n)"] if calls else []), "  ret void", "}", ""])


def test_slots_that_all_have_stay_constants() -> None:
    (first, caller), _ = share_functions(
        [_function("a", 8, 24, 8), _function("b", 16, 24, 16), _function("c", 0, 0, 0, stride=8, calls="b")]
    )
    assert first.startswith("define internal void @a(ptr %args, i64 %n, i64 %slot.at0) noinline")
    assert re.findall(r"ptr %args, i64 (\S+)", first) == ["%n,", "%slot.at0", "24", "%slot.at0"]
    assert "call void @a(ptr %args, i64 %n, i64 noundef 16)" in caller


@pytest.mark.parametrize(
    "other",
    [_function("b", 16, 24, stride=128), _function("b", 16), _function("b", 16, 24, calls="f"), "; no function\n"],
)
def test_functions_that_differ_in_more_stay_apart(other: str) -> None:
    functions = [_function("a", 8, 24), other]
    assert share_functions(functions) == (functions, [])


def test_functions_in_tables_stay_as_they_are() -> None:
    functions = [_function("a", 8, 24), _function("b", 16, 24)]
    tables = ["@table = internal constant [1 x ptr] [ptr @b]\n"]
    assert share_functions(functions, tables) == (functions, tables)


def test_callers_of_functions_that_became_one_become_one() -> None:
    """Slots that they pass on are parameters as their own are."""
    inner = [_function(f"inner{each}", 8 * each) for each in (1, 2, 3)]
    outer = [_function(f"outer{each}", 80, calls=f"inner{each}") for each in (1, 2, 3)]
    functions, _ = share_functions([*outer, _function("caller", 0, 0, calls="outer3"), *inner])
    shared_outer, caller, shared_inner = functions
    assert "define internal void @inner1(ptr %args, i64 %n, i64 %slot.at0)" in shared_inner
    assert "define internal void @outer1(ptr %args, i64 %n, i64 %slot.at0)" in shared_outer
    assert "call void @inner1(ptr %args, i64 %n, i64 noundef %slot.at0)" in shared_outer
    assert "call void @outer1(ptr %args, i64 %n, i64 noundef 24)" in caller


def test_tables_of_the_same_entries_become_one() -> None:
    readers = [
        _function(name, 8).replace("  ret void", f"  store ptr @{name}.table, ptr %n\n  ret void") for name in "ab"
    ]
    tables = [f"@{name}.table = internal constant [1 x ptr] [ptr @f]\n" for name in "ab"]
    other = "@other = internal constant [1 x ptr] [ptr @g]\n"
    functions, remaining = share_functions(readers, [*tables, other])
    assert remaining == [tables[0], other]
    assert functions == readers[:1]
