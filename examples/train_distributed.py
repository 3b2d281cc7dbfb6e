"""Train a sequence model on several processes: data parallel (DDP), or with its weights sharded (FSDP2).

Each process has the same model and a part of every batch; after the backward gradients are averaged. Here the processes
are on one machine and speak by gloo; on a cluster the same command runs on every node, with ``--nnodes`` and
``--rdzv-endpoint``.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --strategy fsdp
    python examples/train_distributed.py                        # one process, for comparison

The task is adding: of a sequence of random numbers two are marked, and the model says their sum.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusecell as fc


class Adder(nn.Module):
    """A GRU that reads (N, T, 2) and answers from its last state."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.reader = fc.GRU(2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, h_n = self.reader(x)
        answer: Tensor = self.head(h_n[0])
        return answer


def batch(size: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw sequences (size, steps, 2) of numbers and marks, and the sums (size, 1) of the marked ones."""
    numbers = torch.rand(size, steps, generator=generator)
    marks = torch.zeros(size, steps)
    first = torch.randint(steps // 2, (size,), generator=generator)
    second = torch.randint(steps // 2, steps, (size,), generator=generator)
    rows = torch.arange(size)
    marks[rows, first] = marks[rows, second] = 1
    return torch.stack((numbers, marks), -1), (numbers * marks).sum(1, keepdim=True)


def parallel(model: nn.Module, strategy: str, processes: int) -> nn.Module:
    """Make a model's gradients those of all processes' batches."""
    if processes == 1:
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The whole model as one group: its weights are gathered before the forward, as the layer's are too small to part.
    return fully_shard(model, mesh=init_device_mesh("cpu", (processes,)))


def train(options: argparse.Namespace, rank: int, processes: int) -> float:
    """Train, print how fast and how well on process 0, and return the last loss."""
    torch.manual_seed(0)  # the same weights everywhere
    model = parallel(Adder(options.hidden), options.strategy, processes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    part = slice(rank, None, processes)
    began, loss = time.perf_counter(), torch.zeros(())
    for step in range(options.updates):
        x, target = batch(options.batch, options.steps, generator)  # the same everywhere, too: each takes its part
        loss = (model(x[part]) - target[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            began = time.perf_counter()  # the first call compiles
    seconds = time.perf_counter() - began
    if processes > 1:
        dist.all_reduce(loss.detach_())
        loss = loss / processes
    if rank == 0:
        rate = options.batch * (options.updates - 1) / seconds
        print(f"{options.strategy}, {processes} processes: {rate:.0f} sequences a second, loss {loss.item():.4f}")
    return loss.item()


def main() -> None:
    """Join the other processes, if torchrun has started some, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="sequences of all processes together")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=128)
    options = parser.parse_args()
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)  # a core for each process
    if processes > 1:
        dist.init_process_group("gloo")
    try:
        train(options, rank, processes)
    finally:
        if processes > 1:
            dist.barrier()  # none leaves while another still speaks to it
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
