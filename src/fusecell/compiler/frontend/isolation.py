"""Isolation of a trace: none of the caller's modes is in force in it, and nothing in it reads a tensor's value."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fusecell.compiler.frontend.matrix_functions import MATRIX_FUNCTIONS
from fusecell.compiler.frontend.replacements import REPLACEMENTS
from fusecell.compiler.frontend.sampling import SAMPLING
from fusecell.compiler.frontend.traced_values import Untraceable
from fusecell.execution.context import runner
from fusecell.execution.forked_child import one_thread_after_fork
from fusecell.torch_internals import (
    with_torch_functions,
    without_compilation,
    without_distribution_checks,
    without_functorch,
    without_jit_trace,
    without_modes,
    without_onednn,
    without_saved_tensor_hooks,
)
from fusecell.torch_transforms import in_functorch_transform

__all__ = ["ValueReadGuard", "isolated", "users_globals", "users_line"]

_REPLACED = {**REPLACEMENTS, **SAMPLING}

# The functions that return the value of a tensor, or its memory, to Python. Some, such as numpy() and data_ptr(), never
# reach the dispatcher; others would only be seen there as _local_scalar_dense, without the name of what was called.
_READS = {
    Tensor.__bool__: "bool()",
    Tensor.__float__: "float()",
    Tensor.__int__: "int()",
    Tensor.__index__: "an index",
    Tensor.__complex__: "complex()",
    Tensor.__contains__: "in",
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__array__: "numpy",
    Tensor.__dlpack__: "dlpack",
    Tensor.data_ptr: ".data_ptr()",
    Tensor.__repr__: "print() or repr()",
    Tensor.__format__: "a format string",
    torch.equal: "torch.equal",
    torch.allclose: "torch.allclose",
    torch.is_nonzero: "torch.is_nonzero",
}
# Frames of torch, of the tracer itself and of code without a file are not the user's.
_HIDDEN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
# What runs the step: frames further out are not the step's.
_OUTSIDE = str(Path(__file__).with_name("step_run.py"))


class ValueReadGuard(TorchFunctionMode):
    """Function mode that refuses to read a value out of a tensor: what the step does with it no graph can express.

    A function mode, not the recorder, because most of these never reach the dispatcher.

    Arguments:
        may_read: says, and notes, that the value of a tensor may be read: one that no input of the step has changed.
        is_weight: says whether a tensor is made of weights alone.
    """

    def __init__(
        self,
        may_read: Callable[[Tensor], bool] = lambda tensor: False,
        is_weight: Callable[[Tensor], bool] = lambda tensor: False,
    ) -> None:
        super().__init__()
        self._may_read = may_read
        self._is_weight = is_weight

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        how = _READS.get(func)
        if how is not None and not (func is not Tensor.data_ptr and self._are_readable(args)):
            raise Untraceable(
                f"The step reads the value of a tensor ({how}){users_line()}. A compiled loop computes the same for "
                "all values: write torch.where(condition, a, b), which chooses row by row, and iterate a fixed "
                "number of times."
            )
        of_matrices = MATRIX_FUNCTIONS.get(func)
        if of_matrices is not None and "out" not in (kwargs or {}):
            return of_matrices(self._is_weight, *args, **(kwargs or {}))
        func = _REPLACED.get(func, func)
        return func(*args, **(kwargs or {}))

    def _are_readable(self, args: tuple[Any, ...]) -> bool:
        tensors = [value for value in args if isinstance(value, Tensor)]
        return bool(tensors) and all(map(self._may_read, tensors))


def _users_frame() -> FrameType | None:
    """Return the innermost frame that is the user's; None where all code of the step is without a file."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_HIDDEN):
        frame = None if frame.f_code.co_filename == _OUTSIDE else frame.f_back
    return frame


def users_globals() -> dict[str, Any] | None:
    """Return the global variables of the user's code that is being run; None if there is none."""
    frame = _users_frame()
    return None if frame is None else frame.f_globals


def users_line() -> str:
    """Return the line of the user's code that is being run, as words to add to a sentence; empty if there is none."""
    frame = _users_frame()
    if frame is None:
        return ""
    name, line = frame.f_code.co_filename, frame.f_lineno
    source = linecache.getline(name, line).strip()
    source = source if len(source) < 100 else source[:97] + "..."
    return f" in {Path(name).name}, line {line}" + (f": `{source}`" if source else "")


@contextmanager
def isolated(dtype: torch.dtype) -> Iterator[None]:
    """Switch grad mode on for the block, and inference mode, autocast, functorch and all modes of the caller off.

    Arguments:
        dtype: what the step computes in.
    """
    with ExitStack() as stack:
        stack.enter_context(one_thread_after_fork())
        stack.enter_context(without_modes())
        # A user's __torch_function__ may run with torch functions disabled, and values would be read unseen.
        stack.enter_context(with_torch_functions())
        # Transforms in the step itself are followed: with functorch off their gradients would be zeros.
        if in_functorch_transform():
            stack.enter_context(without_functorch())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(without_saved_tensor_hooks())
        stack.enter_context(_without_nan_checks())
        stack.enter_context(without_distribution_checks())
        stack.enter_context(without_jit_trace())
        stack.enter_context(without_compilation())
        # Cells and layers inside the step are part of it.
        stack.enter_context(runner("eager"))
        # A scripted function is run as it is written at its first call, and otherwise optimised at its second.
        stack.enter_context(torch.jit.optimized_execution(False))  # type: ignore[attr-defined]  # documented
        stack.enter_context(_with_computing_default_dtype(dtype))
        stack.enter_context(_without_fused_operations())
        yield


@contextmanager
def _without_nan_checks() -> Iterator[None]:
    """Keep anomaly mode from reading each gradient to look for NaN; the rest of it stays, as it is process-wide."""
    enabled, checks = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    if not (enabled and checks):
        yield
        return
    torch.set_anomaly_enabled(True, False)
    try:
        yield
    finally:
        torch.set_anomaly_enabled(enabled, checks)


@contextmanager
def _with_computing_default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Replace a default dtype of 16 bits that is not the step's own by float32, for numbers of the step."""
    before = torch.get_default_dtype()
    if before in (torch.float32, torch.float64, dtype):
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_fused_operations() -> Iterator[None]:
    """Let attention and recurrent layers be computed by operations that have rules, not by fused ones."""
    flash = torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]  # torch's
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with without_onednn():
            yield
    finally:
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.mha.set_fastpath_enabled(fast)
