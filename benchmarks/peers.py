"""The contestants: each makes a call without arguments that runs a problem and returns its outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

import fusecell as fc
from benchmarks.problem import Array, Problem

__all__ = ["EAGER", "OURS", "PEERS", "TORCH", "Call", "Peer", "installed"]

Call = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Attributes:
        name: the column's title.
        packages: what must be installed, as imported.
        build: makes the call; None where the contestant has no such layer.
        outputs: the outputs (T, N, H) of what the call returned.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[Problem, int], Call | None]
    outputs: Callable[[object], Array]


def installed(peer: Peer) -> bool:
    """Whether all that ``peer`` needs can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in peer.packages)


def _ours(problem: Problem, threads: int) -> Call:
    """Machine code or nothing: a silent fall back to the Python loop would be timed under the wrong name."""

    def call() -> object:
        with torch.inference_mode(), fc.runner("compiled"):
            return problem.layer(problem.input)

    return call


def _eager_loop(problem: Problem, threads: int) -> Call | None:
    """The baseline of layers that torch.nn lacks: what their users write today."""
    if problem.in_torch:
        return None

    def call() -> object:
        with torch.inference_mode(), fc.runner("eager"):
            return problem.layer(problem.input)

    return call


def _torch_nn(problem: Problem, threads: int) -> Call | None:
    if not problem.in_torch:
        return None
    layer = getattr(torch.nn, type(problem.layer).__name__)(problem.shape.inputs, problem.shape.hidden)
    layer.load_state_dict(problem.layer.state_dict())
    layer.eval()

    def call() -> object:
        with torch.inference_mode():
            return layer(problem.input)

    return call


def _first(returned: object) -> Array:
    found: Array = returned[0].numpy()  # type: ignore[index]  # every layer of torch and ours returns a pair
    return found


def _onnx_runtime(problem: Problem, threads: int) -> Call | None:
    from benchmarks import onnx_peers

    return onnx_peers.onnx_runtime(problem, threads)


def _openvino(problem: Problem, threads: int) -> Call | None:
    from benchmarks import onnx_peers

    return onnx_peers.openvino(problem, threads)


def _onnx_outputs(returned: object) -> Array:
    from benchmarks import onnx_peers

    return onnx_peers.outputs(returned)


def _jax(problem: Problem, threads: int) -> Call | None:
    from benchmarks import jax_peer

    return jax_peer.jax_scan(problem)


def _jax_outputs(returned: object) -> Array:
    from benchmarks import jax_peer

    return jax_peer.outputs(returned)


OURS = Peer("fusecell", (), _ours, _first)
TORCH = Peer("torch.nn", (), _torch_nn, _first)
EAGER = Peer("eager loop", (), _eager_loop, _first)
PEERS: tuple[Peer, ...] = (
    TORCH,
    EAGER,
    Peer("ONNX Runtime", ("onnx", "onnxruntime"), _onnx_runtime, _onnx_outputs),
    Peer("OpenVINO", ("onnx", "openvino"), _openvino, _onnx_outputs),
    Peer("JAX", ("jax",), _jax, _jax_outputs),
)
