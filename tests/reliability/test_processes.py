"""Many threads, many processes, interrupts: nothing is lost, nothing hangs."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import fusecell as fc


def test_32_threads_call_the_same_and_different_layers():
    torch.manual_seed(0)
    layers = [fc.GRU(5, 9), fc.LSTM(5, 9), fc.Recurrent(fc.cells.LayerNormGRUCell(5, 9)), fc.RNN(5, 9)]
    x = torch.randn(40, 4, 5)
    fc.refresh()  # compiled while others run
    with fc.runner("eager"), torch.no_grad():
        expected = [layer(x)[0] for layer in layers]
    wrong: list[str] = []
    begin = threading.Barrier(32)

    def work(number: int) -> None:
        begin.wait()
        for turn in range(12):
            which = (number + turn) % len(layers)
            training = number % 3 == 0
            with torch.set_grad_enabled(training):
                y, _ = layers[which](x)
            if training:
                torch.autograd.grad(y.square().sum(), list(layers[which].parameters()))
            if not torch.allclose(y.detach(), expected[which], atol=1e-5):
                wrong.append(f"thread {number}, turn {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


_ONE = """
import sys, torch, fusecell as fc
torch.manual_seed(0)
layer = fc.GRU(6, int(sys.argv[1]))
y, _ = layer(torch.randn(9, 3, 6))
y.sum().backward()
print(y.double().sum().item(), sum(p.grad.double().sum().item() for p in layer.parameters()))
"""


def test_processes_fill_one_cache_at_once(tmp_path):
    """In a folder with blanks and Unicode in its path, half of them of one size and half of another."""
    cache = tmp_path / "ein Ordner" / "缓存 ü"
    environment = {**os.environ, "FUSECELL_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE, str(7 + number % 2)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    outputs = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * 4, outputs
    assert len({out for out, _ in outputs[::2]}) == len({out for out, _ in outputs[1::2]}) == 1
    assert not [line for _, error in outputs for line in error.splitlines() if "arning" in line]
    entries = [path for path in cache.rglob("*") if path.is_file()]
    assert entries
    assert not [path for path in entries if "tmp" in path.suffix or "part" in path.suffix]


class Set(torch.utils.data.Dataset):
    """Items that a layer computes, in the worker."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with torch.no_grad():
            return self.layer(torch.full((4, 1, 5), float(index)))[0][-1, 0]


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")  # on a single core
def test_workers_of_a_data_loader(start):
    torch.manual_seed(1)
    layer = fc.GRU(5, 9)
    layer(torch.zeros(4, 1, 5))  # compiled before they start
    data = Set(layer)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start)
    items = torch.cat(list(loader))
    assert torch.equal(items, torch.stack([data[index] for index in range(6)]))


def test_shared_memory():
    layer = fc.LSTM(5, 9)
    x = torch.randn(4, 2, 5)
    expected, _ = layer(x)
    layer.share_memory()
    assert torch.equal(layer(x)[0], expected)


@pytest.fixture
def interruptible():
    """Handle SIGINT, which shells make background processes ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_in_a_long_call():
    """It is raised when the kernel returns; the layer works on."""
    layer, x = fc.GRU(64, 256), torch.randn(10_000, 16, 64)
    with torch.no_grad():
        layer(x[:2])
        threading.Thread(target=lambda: (time.sleep(0.1), _thread.interrupt_main())).start()
        with pytest.raises(KeyboardInterrupt):
            _again_and_again(layer, x)
        assert layer(x[:5])[0].isfinite().all()


def _again_and_again(layer, x):
    for _ in range(200):
        layer(x)


def alone(script, *arguments, **environment):
    """Run a script in a new process and return its output."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


_BOUNDED = """
import resource, sys, numpy as np, torch, fusecell as fc
layer, x = fc.GRU(64, 128), torch.zeros(3, 2, 64)
stream = fc.Stream(layer)
expected = layer(x)[0]
def learn(x):
    layer(x)[0].sum().backward()
learn(x)
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20),) * 2)
large = torch.zeros(1, 1, 64).expand(1000, 2000, 64)
calls = {
    "inference": lambda: torch.no_grad()(layer)(large),
    "training": lambda: learn(large),
    "scratch": lambda: torch.no_grad()(fc.scan)(fc.LSTMCell(64, 1), torch.zeros(1, 1, 64).expand(2, 2_000_000, 64)),
    "chunk": lambda: stream.push(np.zeros((10**6, 64), np.float32)),
    "stream": lambda: fc.Stream(layer, 10**6),
}
for name, call in calls.items():
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        assert "alloc" in str(error).lower() or "memory" in str(error).lower(), error
        print(name, flush=True)
    assert torch.equal(layer(x)[0], expected)
    learn(x)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is Linux's")
def test_a_process_whose_memory_runs_out():
    """Allocating results, saved values or scratch fails with an error, and later calls work."""
    process = alone(_BOUNDED)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.split("\n")[:-1] == ["inference", "training", "scratch", "chunk", "stream"]


_FORKS = """
import os, threading, time, torch, fusecell as fc
torch.set_num_threads(1)
x, ended = torch.randn(6, 3, 5), threading.Event()
fc.GRU(5, 1)(x)  # Python itself leaves a module's lock shut in a child that is forked while a thread imports it
def compile_on():
    size = 2
    while not ended.is_set():
        with torch.set_grad_enabled(size % 4 == 0):
            fc.GRU(5, size)(x)
        size += 1
thread = threading.Thread(target=compile_on)
thread.start()
for size in range(40, 44):
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        y, _ = fc.LSTM(5, size)(x)
        y.sum().backward()
        os._exit(0 if y.isfinite().all() else 1)
    deadline = time.monotonic() + 300
    while (ended_child := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.02)
    print(os.waitstatus_to_exitcode(ended_child[1]), flush=True)
ended.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_compiles():
    """The child compiles and trains: no lock held by the parent's threads stays locked."""
    process = alone(_FORKS, FUSECELL_CACHE="off")
    assert (process.returncode, process.stdout) == (0, "0\n" * 4), process.stderr


def test_compiling_in_a_thread_while_another_runs():
    torch.manual_seed(2)
    layer, x = fc.GRU(5, 9), torch.randn(40, 4, 5)
    expected = layer(x)[0]
    wrong, ended = [], threading.Event()

    def run():
        while not ended.is_set():
            if not torch.equal(layer(x)[0], expected):
                wrong.append(True)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for size in (23, 27, 29):
            other = fc.LSTM(5, size)
            y, _ = other(x)
            with fc.runner("eager"):
                torch.testing.assert_close(y, other(x)[0])
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=600)
    assert not wrong


_WAITING = """
import itertools, sys, threading
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.jit import load
from fusecell.compiler.backend.target import host_target
def text(number):
    lines = "".join(f"  %v{i} = mul i32 %v{i - 1}, %v{i // 2}\\n" for i in range(1, 4000))
    return f"define i32 @f(i32 %v0) {{\\n{lines}  %last = add i32 %v3999, {number}\\n  ret i32 %last\\n}}"
begin, compiled = threading.Barrier(9), threading.Semaphore(0)
def work(first):
    begin.wait()
    for number in itertools.count(first, 8):  # until the interpreter ends
        load(text(number), ["f"], host_target())
        compiled.release()
for first in range(8):
    threading.Thread(target=work, args=(first,), daemon=True).start()
begin.wait()
for _ in range(int(sys.argv[1])):
    compiled.acquire()
print(threading.active_count())
"""


@pytest.mark.parametrize("compiled", [0, 2])
def test_the_end_while_threads_wait_for_the_compiler(compiled):
    """One thread compiles and others wait for the lock while the interpreter exits."""
    process = alone(_WAITING, str(compiled), FUSECELL_CACHE="off")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "9\n"  # the main thread and the eight


_HELD = """
import os, sys, threading, time
from fusecell.compiler.dispatch import program_cache
from fusecell.compiler.programs import autograd
from fusecell.compiler.backend import llvm
from fusecell.compiler.frontend import tracer
module = {"program_cache": program_cache, "autograd": autograd, "tracer": tracer, "llvm": llvm}[sys.argv[1]]
held = threading.Event()
lock = module.lock if module is llvm else module._LOCK
def hold():
    with lock:
        held.set()
        time.sleep(0.3)
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    os._exit(0 if lock.acquire(timeout=600) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("name", ["program_cache", "autograd", "tracer", "llvm"])
def test_a_fork_waits_for_locks(name):
    """A lock held by a thread of the parent is free in the child."""
    process = alone(_HELD, name)
    assert (process.returncode, process.stderr) == (0, "")
