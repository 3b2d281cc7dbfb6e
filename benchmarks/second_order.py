"""Time gradients of gradients against the Python loop and JAX, in turns: ``python -m benchmarks.second_order``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from benchmarks import machine

__all__ = ["main"]


def main() -> None:
    """Print a table: a product with the Hessian of the weights, and a gradient penalty."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each contestant")
    options = parser.parse_args()
    machine.bind(1)  # before a framework counts cores
    print(f"{machine.describe()['cpu']}, one core; GRU, {options.steps} steps, {options.rows} rows, ", end="")
    print(f"{options.features} -> {options.size}")
    print(f"{machine.versions(('fusecell', 'torch', 'jax'))}, {time.strftime('%d %B %Y')}\n")
    print("| | ms | loop / ours | JAX / ours |")
    print("|---|---:|---:|---:|")
    from benchmarks.agreement import check_agreement
    from benchmarks.clock import take_turns

    for name, contestants in _tasks(options).items():
        results = {contestant: call() for contestant, call in contestants.items()}
        check_agreement(name, results)
        timings = take_turns(contestants, options.seconds)
        ours = timings["fusecell"].median
        others = [f"{timings[other].median / ours:.2f}" for other in ("loop", "JAX")]
        print(f"| {name} | {ours * 1e3:.1f} | {' | '.join(others)} |", flush=True)


def _tasks(options: argparse.Namespace) -> dict[str, dict[str, Callable[[], Any]]]:
    import torch
    from torch.func import functional_call, grad, jvp

    import fusecell as fc

    torch.manual_seed(0)
    torch.set_num_threads(1)
    cell = fc.GRUCell(options.features, options.size)
    inputs = torch.randn(options.steps, options.rows, options.features)
    weights = list(cell.parameters())
    direction = [torch.randn_like(value) for value in weights]

    def hessian_product(runner: str) -> Any:
        with fc.runner(runner):
            y, _ = fc.scan(cell, inputs)
            first = torch.autograd.grad(y.square().mean(), weights, create_graph=True)
            along = torch.stack([(a * b).sum() for a, b in zip(first, direction, strict=True)]).sum()
            return torch.autograd.grad(along, weights)

    layer = fc.Recurrent(cell)
    names = [name for name, _ in layer.named_parameters()]
    primals = tuple([value.detach() for value in weights])

    def forward_over_reverse(runner: str) -> Any:
        def loss(*values: Any) -> Any:
            return functional_call(layer, dict(zip(names, values, strict=True)), (inputs,))[0].square().mean()

        with fc.runner(runner):
            return jvp(grad(loss, tuple(range(len(names)))), primals, tuple(direction))[1]

    def penalty(runner: str) -> Any:
        x = inputs.clone().requires_grad_()
        with fc.runner(runner):
            y, _ = fc.scan(cell, x)
            (slope,) = torch.autograd.grad(y[-1].sum(), x, create_graph=True)
            return torch.autograd.grad((slope.norm(dim=2) - 1).square().mean(), weights)

    in_jax = _jax_tasks([value.detach().numpy() for value in weights], inputs.numpy(), [d.numpy() for d in direction])
    ours = {
        "product with the Hessian": hessian_product,
        "product with the Hessian, jvp(grad)": forward_over_reverse,
        "gradient penalty": penalty,
    }
    return {
        name: {
            "fusecell": lambda task=task: task("compiled"),  # type: ignore[misc]
            "loop": lambda task=task: task("eager"),  # type: ignore[misc]
            "JAX": in_jax[name],
        }
        for name, task in ours.items()
    }


def _jax_tasks(weights: list[Any], x: Any, direction: list[Any]) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    from benchmarks.jax_peer import gru_outputs as outputs

    def loss(weights: list[Any]) -> Any:
        return jnp.mean(outputs(weights, x) ** 2)

    def penalty(weights: list[Any]) -> Any:
        slope = jax.grad(lambda x: outputs(weights, x)[-1].sum())(x)
        return jnp.mean((jnp.linalg.norm(slope, axis=2) - 1) ** 2)

    x, weights, direction = jnp.asarray(x), [jnp.asarray(w) for w in weights], [jnp.asarray(d) for d in direction]
    # Forward over reverse, the faster of the two ways to write it.
    product = jax.jit(lambda weights, direction: jax.jvp(jax.grad(loss), (weights,), (direction,))[1])
    of_penalty = jax.jit(jax.grad(penalty))
    names = ("product with the Hessian", "product with the Hessian, jvp(grad)")
    return {
        **dict.fromkeys(names, lambda: jax.block_until_ready(product(weights, direction))),
        "gradient penalty": lambda: jax.block_until_ready(of_penalty(weights)),
    }


if __name__ == "__main__":
    main()
