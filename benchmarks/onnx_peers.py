"""ONNX Runtime and OpenVINO, for layers that ONNX has an operator for; both read the same model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.problem import Array, Call, Problem
from benchmarks.shapes import Mode

__all__ = ["arrays", "make_model", "onnx_runtime", "openvino"]

# ONNX's operator, and the order of torch's blocks of rows (r z n; i f g o) in its weights (z r n; i o f g).
_OPERATORS = {"gru": ("GRU", (1, 0, 2)), "lstm": ("LSTM", (0, 3, 1, 2)), "rnn_tanh": ("RNN", (0,))}


def _has(problem: Problem) -> bool:
    """Return whether a problem is inference of a layer that ONNX has an operator for."""
    return problem.mode in (Mode.INFERENCE, Mode.STREAM) and problem.shape.cell in _OPERATORS


def make_model(problem: Problem) -> onnx.ModelProto:
    """Make a model of one operator with constant weights, from x (T, N, I) to y (T, 1, N, H), all sizes fixed.

    A stream's model also takes and returns the state, (1, N, H).
    """
    shape = problem.shape
    operator, order = _OPERATORS[shape.cell]
    rows = {
        name: np.concatenate([np.split(value, len(order))[block] for block in order])
        for name, value in problem.weights().items()
    }
    constants = {
        "W": rows["weight_ih"],
        "R": rows["weight_hh"],
        "B": np.concatenate([rows["bias_ih"], rows["bias_hh"]]),
    }
    reset_after: dict[str, Any] = {"linear_before_reset": 1} if operator == "GRU" else {}
    before, after = _states(problem)
    # "": no lengths, the input between the biases and the state.
    names = ["x", *constants, *(["", *before] if before else [])]
    state_shape = [1, shape.batch, shape.hidden]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y", *after], hidden_size=shape.hidden, **reset_after)],
        shape.cell,
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.steps, shape.batch, shape.inputs]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, state_shape) for name in before),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape.steps, 1, shape.batch, shape.hidden]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, state_shape) for name in after),
        ],
        [numpy_helper.from_array(value[None], name) for name, value in constants.items()],
    )
    # Both runtimes have read opset 14 and IR version 8 for years; onnx writes newer ones by default.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _states(problem: Problem) -> tuple[list[str], list[str]]:
    """Return the names of a model's states as inputs and as outputs; none unless it is a stream's."""
    if problem.mode is not Mode.STREAM:
        return [], []
    names = ["h", "c"] if problem.shape.cell == "lstm" else ["h"]
    return names, [f"{name}_n" for name in names]


def onnx_runtime(problem: Problem, threads: int) -> Call | None:
    """Return a call of an ONNX Runtime session with NumPy's arrays, ``threads`` threads inside an operator."""
    import onnxruntime

    if not _has(problem):
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    model = make_model(problem).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": problem.inputs[0].numpy()}
    before, after = _states(problem)
    if not before:
        return lambda: session.run(None, feed)[0]
    for name in before:
        feed[name] = np.zeros((1, problem.shape.batch, problem.shape.hidden), np.float32)

    def step() -> object:
        y, *states = session.run(["y", *after], feed)
        feed.update(zip(before, states, strict=True))
        return y

    return step


def openvino(problem: Problem, threads: int) -> Call | None:
    """Return a call of an OpenVINO request in one stream, without copies of inputs and outputs."""
    import openvino as ov

    if not _has(problem):
        return None
    core = ov.Core()
    # f32: on some CPUs the default is bfloat16, whose numbers would not pass.
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    model = core.read_model(make_model(problem).SerializeToString())
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = [problem.inputs[0].numpy()]
    states, _ = _states(problem)
    if not states:
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]
    feed += [np.zeros((1, problem.shape.batch, problem.shape.hidden), np.float32) for _ in states]

    def step() -> object:
        # Outputs are copied: the next request would overwrite the state that it reads.
        results = request.infer(feed, share_inputs=True)
        feed[1:] = [results[index + 1] for index in range(len(states))]
        return results[0]

    return step


def arrays(returned: object) -> dict[str, Array]:
    """Return y as (T, N, H), of the model's (T, 1, N, H)."""
    return {"y": np.array(returned)[:, 0]}
