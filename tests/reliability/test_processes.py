"""Many threads, many processes, interrupts: nothing is lost, nothing hangs."""

from __future__ import annotations

import _thread
import os
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
        thread.join(timeout=120)
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


def test_20_processes_fill_one_cache_at_once(tmp_path):
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
        for number in range(20)
    ]
    said = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0] * 20, said
    assert len({out for out, _ in said[::2]}) == len({out for out, _ in said[1::2]}) == 1
    assert not [line for _, error in said for line in error.splitlines() if "arning" in line]
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
def test_workers_of_a_data_loader(start):
    torch.manual_seed(1)
    layer = fc.GRU(5, 9)
    layer(torch.zeros(4, 1, 5))  # compiled before they start
    data = Set(layer)
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=start)
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.stack([data[index] for index in range(6)]))


def test_shared_memory():
    layer = fc.LSTM(5, 9)
    x = torch.randn(4, 2, 5)
    expected, _ = layer(x)
    layer.share_memory()
    assert torch.equal(layer(x)[0], expected)


def test_an_interrupt_in_a_long_call():
    """It is raised when the kernel returns; the layer works on."""
    layer, x = fc.GRU(64, 256), torch.randn(2000, 16, 64)
    with torch.no_grad():
        layer(x[:2])
        threading.Thread(target=lambda: (time.sleep(0.15), _thread.interrupt_main())).start()
        with pytest.raises(KeyboardInterrupt):
            _again_and_again(layer, x)
        assert layer(x[:5])[0].isfinite().all()


def _again_and_again(layer, x):
    for _ in range(200):
        layer(x)
