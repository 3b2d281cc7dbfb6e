"""The contestants: each builds a function without arguments that runs a problem and returns outputs or gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fusecell as fc
from benchmarks.problem import Array, Call, Problem
from benchmarks.shapes import Mode

__all__ = ["EAGER", "OURS", "PEERS", "TORCH", "Peer", "installed"]


@dataclass(frozen=True)
class Peer:
    """A library that runs problems: what it needs, and how it is called.

    Attributes:
        name: the title of its column.
        packages: the packages it needs, by their names on import.
        build: makes the call, for a number of threads; returns None if the contestant can't run the problem.
        arrays: turns what the call returned into arrays named and laid out as the problem's answer.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[Problem, int], Call | None]
    arrays: Callable[[Problem, object], dict[str, Array]]


def installed(peer: Peer) -> bool:
    """Return whether all packages that a contestant needs can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in peer.packages)


def _fusecell(problem: Problem, threads: int) -> Call:
    if problem.mode is Mode.STREAM:
        stream, x = fc.Stream(problem.layer), problem.inputs[0][0].numpy()
        return lambda: stream.step(x)
    return problem.call(problem.layer)


def _eager_loop(problem: Problem, threads: int) -> Call | None:
    """Return a call of the Python loop over the step, which users write for layers that torch.nn lacks."""
    if problem.in_torch or problem.mode is Mode.STREAM:
        return None
    layer = problem.call(problem.layer)

    def call() -> object:
        with fc.runner("eager"):
            return layer()

    return call


def _torch_nn(problem: Problem, threads: int) -> Call | None:
    if not problem.in_torch:
        return None
    if problem.mode is Mode.STREAM:
        return _torch_stream(problem)
    layer = getattr(torch.nn, type(problem.layer).__name__)(problem.shape.inputs, problem.shape.hidden)
    layer.load_state_dict(problem.layer.state_dict())
    return problem.call(layer.train(problem.mode.training))


def _torch_stream(problem: Problem) -> Call:
    """Return a step of torch.nn's cell, which keeps its state from call to call."""
    kind = getattr(torch.nn, f"{type(problem.layer).__name__}Cell")
    cell = kind(problem.shape.inputs, problem.shape.hidden)
    cell.load_state_dict({name: torch.from_numpy(value) for name, value in problem.weights().items()})
    # Without a state at first, then with the last: a stream's state is carried over from call to call too.
    x, state = problem.inputs[0][0], None

    def call() -> object:
        nonlocal state
        state = cell(x, state)
        return state if isinstance(state, torch.Tensor) else state[0]

    return call


def _onnx_runtime(problem: Problem, threads: int) -> Call | None:
    from benchmarks import onnx_peers

    return onnx_peers.onnx_runtime(problem, threads)


def _openvino(problem: Problem, threads: int) -> Call | None:
    from benchmarks import onnx_peers

    return onnx_peers.openvino(problem, threads)


def _onnx_arrays(problem: Problem, returned: object) -> dict[str, Array]:
    from benchmarks import onnx_peers

    return onnx_peers.arrays(returned)


def _jax(problem: Problem, threads: int) -> Call | None:
    from benchmarks import jax_peer

    return jax_peer.jax_scan(problem)


def _jax_arrays(problem: Problem, returned: object) -> dict[str, Array]:
    from benchmarks import jax_peer

    return jax_peer.arrays(problem, returned)


OURS = Peer("fusecell", (), _fusecell, Problem.arrays)
TORCH = Peer("torch.nn", (), _torch_nn, Problem.arrays)
EAGER = Peer("eager loop", (), _eager_loop, Problem.arrays)
PEERS: tuple[Peer, ...] = (
    TORCH,
    EAGER,
    Peer("ONNX Runtime", ("onnx", "onnxruntime"), _onnx_runtime, _onnx_arrays),
    Peer("OpenVINO", ("onnx", "openvino"), _openvino, _onnx_arrays),
    Peer("JAX", ("jax",), _jax, _jax_arrays),
)
