"""Time transforms of torch.func against the Python loop and JAX, in turns: ``python -m benchmarks.transforms``.

An ensemble, forward and backward, by ``vmap`` and as ``fc.Ensemble``; gradients of each row by itself; a derivative
along a direction (jvp).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks import machine

__all__ = ["main"]

Task = Callable[[], Any]


def main() -> None:
    """Print a table: a dash where a contestant has no such thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contestant")
    options = parser.parse_args()
    machine.bind(options.threads)  # before a framework counts cores
    print(
        f"{machine.describe()['cpu']}, {options.threads} threads; GRU, {options.steps} steps, {options.rows} rows, ",
        end="",
    )
    print(f"{options.features} -> {options.size}, {options.members} members")
    print(f"{machine.versions(('fusecell', 'torch', 'jax'))}, {time.strftime('%d %B %Y')}\n")
    print("| | ms | plain calls / ours | loop / ours | JAX / ours |")
    print("|---|---:|---:|---:|---:|")
    from benchmarks.agreement import check_agreement
    from benchmarks.clock import take_turns

    for name, contestants in _tasks(options).items():
        check_agreement(name, {contestant: call() for contestant, call in contestants.items() if contestant != "plain"})
        timings = take_turns(contestants, options.seconds)
        ours = timings["fusecell"].median
        others = [f"{timings[other].median / ours:.2f}" for other in ("plain", "loop", "JAX")]
        print(f"| {name} | {ours * 1e3:.2f} | {' | '.join(others)} |", flush=True)


def _tasks(options: argparse.Namespace) -> dict[str, dict[str, Task]]:
    import torch
    from torch.func import functional_call, grad, jvp, stack_module_state, vmap

    import fusecell as fc

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    members = [fc.Recurrent(fc.GRUCell(options.features, options.size)) for _ in range(options.members)]
    layer = members[0]
    stacked, buffers = stack_module_state(members)
    leaves = list(stacked.values())
    own = {name: value.detach() for name, value in layer.named_parameters()}
    x = torch.randn(options.members, options.steps, options.rows, options.features)
    along = torch.randn_like(x[0])

    def ensemble() -> Any:
        y = vmap(lambda weights, tables, x: functional_call(layer, (weights, tables), (x,))[0])(stacked, buffers, x)
        return torch.autograd.grad(y.square().mean(), leaves)

    together = fc.Ensemble(members)

    def by_class() -> Any:
        return torch.autograd.grad(together(x, each=True)[0].square().mean(), list(together.parameters()))

    def one_by_one() -> Any:
        outputs = [member(value)[0] for member, value in zip(members, x, strict=True)]
        loss = torch.stack([y.square().mean() for y in outputs]).mean()
        return torch.autograd.grad(loss, [value for member in members for value in member.parameters()])

    def loss(weights: Any, row: Any) -> Any:
        return functional_call(layer, weights, (row[:, None],))[0].square().mean()

    def of_rows() -> Any:
        return list(vmap(grad(loss), in_dims=(None, 1))(own, x[0]).values())

    def of_all_rows() -> Any:
        y = layer(x[0])[0]
        return torch.autograd.grad(y.square().mean(), list(layer.parameters()))

    def tangent() -> Any:
        with torch.no_grad():
            return jvp(lambda x: layer(x)[0], (x[0],), (along,))

    def forward() -> Any:
        with torch.no_grad():
            return layer(x[0])

    def in_loop(task: Task) -> Task:
        def run() -> Any:
            with fc.runner("eager"):
                return task()

        return run

    in_jax = _jax_tasks([[w.detach().numpy() for w in m.parameters()] for m in members], x.numpy(), along.numpy())
    tasks = {
        "ensemble by vmap": (ensemble, one_by_one),
        "fc.Ensemble": (by_class, one_by_one),
        "gradients of each row": (of_rows, of_all_rows),
        "jvp": (tangent, forward),
    }
    return {
        name: {"fusecell": task, "plain": plain, "loop": in_loop(task), "JAX": in_jax[name]}
        for name, (task, plain) in tasks.items()
    }


def _jax_tasks(weights: list[list[Any]], x: Any, along: Any) -> dict[str, Task]:
    import jax
    import jax.numpy as jnp

    from benchmarks.jax_peer import gru_outputs as outputs

    stacked = [jnp.stack(values) for values in zip(*weights, strict=True)]
    own, x, along = [value[0] for value in stacked], jnp.asarray(x), jnp.asarray(along)
    ensemble = jax.jit(jax.grad(lambda weights, x: jnp.mean(jax.vmap(outputs)(weights, x) ** 2)))
    of_row = jax.grad(lambda weights, row: jnp.mean(outputs(weights, row[:, None]) ** 2))
    of_rows = jax.jit(jax.vmap(of_row, in_axes=(None, 1)))
    tangent = jax.jit(lambda x, along: jax.jvp(lambda x: outputs(own, x), (x,), (along,)))
    return {
        "ensemble by vmap": lambda: jax.block_until_ready(ensemble(stacked, x)),
        "fc.Ensemble": lambda: jax.block_until_ready(ensemble(stacked, x)),
        "gradients of each row": lambda: jax.block_until_ready(of_rows(own, x[0])),
        "jvp": lambda: jax.block_until_ready(tangent(x[0], along)),
    }


if __name__ == "__main__":
    main()
