"""ONNX Runtime and OpenVINO: both read one model, of the layers that ONNX has an operator for."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.problem import Array, Call, Problem
from benchmarks.shapes import Mode

__all__ = ["arrays", "make_model", "onnx_runtime", "openvino"]

# ONNX's operator, and where in its weights' rows each block of torch's stands (z r n; i o f g).
_OPERATORS = {"gru": ("GRU", (1, 0, 2)), "lstm": ("LSTM", (0, 3, 1, 2)), "rnn_tanh": ("RNN", (0,))}


def _has(problem: Problem) -> bool:
    """Inference of a layer that ONNX has an operator for."""
    return problem.mode in (Mode.INFERENCE, Mode.STREAM) and problem.shape.cell in _OPERATORS


def make_model(problem: Problem) -> onnx.ModelProto:
    """One operator, its weights constants, x (T, N, I) to y (T, 1, N, H) with fixed sizes; a stream's also takes and
    gives the state."""
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
    taken, given = _states(problem)
    names = ["x", *constants, *(["", *taken] if taken else [])]
    of_state = [1, shape.batch, shape.hidden]
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y", *given], hidden_size=shape.hidden, **reset_after)],
        shape.cell,
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [shape.steps, shape.batch, shape.inputs]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, of_state) for name in taken),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape.steps, 1, shape.batch, shape.hidden]),
            *(helper.make_tensor_value_info(name, TensorProto.FLOAT, of_state) for name in given),
        ],
        [numpy_helper.from_array(value[None], name) for name, value in constants.items()],
    )
    # Opset 14 and IR 8 are what both runtimes have read for years.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _states(problem: Problem) -> tuple[list[str], list[str]]:
    """The names of the states that a model takes and gives."""
    if problem.mode is not Mode.STREAM:
        return [], []
    names = ["h", "c"] if problem.shape.cell == "lstm" else ["h"]
    return names, [f"{name}_n" for name in names]


def onnx_runtime(problem: Problem, threads: int) -> Call | None:
    """A session with ``threads`` threads inside an operator, fed with NumPy."""
    import onnxruntime

    if not _has(problem):
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    model = make_model(problem).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": problem.inputs[0].numpy()}
    taken, given = _states(problem)
    if not taken:
        return lambda: session.run(None, feed)[0]
    for name in taken:
        feed[name] = np.zeros((1, problem.shape.batch, problem.shape.hidden), np.float32)

    def step() -> object:
        y, *states = session.run(["y", *given], feed)
        feed.update(zip(taken, states, strict=True))
        return y

    return step


def openvino(problem: Problem, threads: int) -> Call | None:
    """A request in float32 (the default may be bfloat16), one stream, nothing copied in or out."""
    import openvino as ov

    if not _has(problem):
        return None
    core = ov.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    model = core.read_model(make_model(problem).SerializeToString())
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    feed = [problem.inputs[0].numpy()]
    taken, _ = _states(problem)
    if not taken:
        return lambda: request.infer(feed, share_inputs=True, share_outputs=True)[0]
    feed += [np.zeros((1, problem.shape.batch, problem.shape.hidden), np.float32) for _ in taken]

    def step() -> object:
        found = request.infer(feed, share_inputs=True)
        feed[1:] = [found[index + 1] for index in range(len(taken))]
        return found[0]

    return step


def arrays(returned: object) -> dict[str, Array]:
    """y (T, N, H) of y (T, 1, N, H)."""
    return {"y": np.array(returned)[:, 0]}
