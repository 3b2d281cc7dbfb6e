"""Private names of torch under public ones: what each of them is, and why nothing public does.

Checked against torch 2.10, 2.12, 2.13 and 2.14. A torch that has renamed one fails the tests at once, as calls and
traces use all of them. Only ``tensor_guards`` does without, as nothing but speed depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "OPERATOR_TYPE",
    "SOLVES_ADJOINTS_BY_FACTORS",
    "TAKES_MODULES_AS_CONSTANTS",
    "any_autocast",
    "apply_directly",
    "autograd_node",
    "computes_weight",
    "disable_current_modes",
    "forward_ad",
    "function_apply",
    "has_gradient",
    "has_hooks",
    "has_saved_tensor_hooks",
    "in_dispatch_mode",
    "in_jit_script",
    "in_jit_trace",
    "in_onnx_export",
    "is_expanded_weight",
    "is_profiling",
    "tensor_guards",
    "with_torch_functions",
    "without_compilation",
    "without_distribution_checks",
    "without_functorch",
    "without_jit_trace",
    "without_modes",
    "without_onednn",
    "without_saved_tensor_hooks",
    "without_torch_functions",
]

_FROM_2_12 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)
SOLVES_ADJOINTS_BY_FACTORS = _FROM_2_12
"""Whether the gradient of a linear system is ``lu_solve`` with the factors as they are; in 2.10 it isn't."""

TAKES_MODULES_AS_CONSTANTS = _FROM_2_12
"""Whether torch.compile gives a module to a function whose result is a constant of its trace; 2.10 and 2.11 don't."""

OPERATOR_TYPE: type = torch._ops.OperatorBase
"""Base class of ``torch.ops.aten.add.Tensor`` and of higher-order operators."""


def computes_weight(hook: object) -> bool:
    """Whether a hook before a module is torch's own for pruning or the older norms: it computes a weight, no more."""
    kind = next((kind for kind in type(hook).__mro__ if "__call__" in vars(kind)), object)
    return kind.__module__.startswith("torch.nn.utils.")


with_torch_functions: Any = torch._C._EnableTorchFunction
"""Context manager: ``__torch_function__`` is called, also inside another one, where torch turns it off."""
without_torch_functions: Any = torch._C.DisableTorchFunction
"""Context manager: no mode and no subclass gets ``__torch_function__`` called; ``DisableTorchFunctionSubclass`` is
public, and leaves the modes on."""
without_functorch: Any = torch._C._DisableFuncTorch
"""Context manager: no transform of torch.func is active."""


def autograd_node() -> Any:
    """Return the node whose backward the engine is running in this thread; None outside."""
    return torch._C._current_autograd_node()


def in_jit_trace() -> bool:
    """Whether torch.jit.trace records: there is a tracing state, which :func:`without_jit_trace` takes away."""
    return torch._C._get_tracing_state() is not None


def in_jit_script() -> bool:
    """Whether torch.jit.script runs, in any thread: its module notes that it is no call from outside any more."""
    return not torch.jit._script._TOPLEVEL  # type: ignore[attr-defined]  # hidden by the function of that name


def in_onnx_export() -> bool:
    """Whether an exporter of torch.onnx runs; the public function, without an import of torch.onnx by the question."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


# Called for real while torch.compile or torch.export traces: torch's own answer there is always no.
in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_expanded_weight(value: Tensor) -> bool:
    """Whether ``torch.nn.utils`` computes a gradient per sample through this weight: it answers torch.nn's calls only.

    Its class has no public name.
    """
    kind = type(value)
    return kind.__name__ == "ExpandedWeight" and kind.__module__.startswith("torch.nn.utils.")


is_profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled
"""Whether a profiler of torch records in this thread; no Python function, as each call of a prepared kernel asks."""


def in_dispatch_mode() -> bool:
    """Whether a ``TorchDispatchMode`` is active: it must see ATen calls, of which a kernel makes none."""
    return bool(torch._C._len_torch_dispatch_stack())


def function_apply() -> tuple[Any, Callable[[type[Any]], Callable[..., Any]]]:
    """Return the class on which ``apply`` of every autograd Function can be replaced, and what gets the original's.

    Up to torch 2.13 ``Function.apply`` looks ``apply`` up in its base, whichever way it was called or bound. From 2.14
    on it is a function in C: a Function's ``apply`` that the user has bound before is not seen.
    """
    own = vars(torch.autograd.Function)["apply"]
    if isinstance(own, classmethod):
        base = torch.autograd.function._SingleLevelFunction
        return base, lambda function: super(base, function).apply
    return torch.autograd.Function, lambda function: own.__get__(None, function)


def any_autocast() -> bool:
    """Whether autocast is on for any device type; ``torch.is_autocast_enabled`` asks for one."""
    return bool(torch._C._is_any_autocast_enabled())


def has_gradient(value: Tensor) -> bool:
    """Whether a tensor's dtype is one that gradients and tangents are of."""
    return value.is_floating_point() or value.is_complex()


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of a module runs more than its ``forward``: hooks of its own, or of all modules."""
    every = torch.nn.modules.module
    tables = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module, f"_{name}") or getattr(every, f"_global_{name}") for name in tables)


def has_saved_tensor_hooks() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` are set; True: those that a tracer ignores count too."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def tensor_guards(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Return a check that other tensors are like these: class, dtype, sizes, strides, ``requires_grad``, transforms.

    torch.compile's own guards, in C++: one call for all tensors takes less time than Python does for one. They are
    built with all sizes and strides, of which none is dynamic. None where they do not take the tensors, or where two of
    these are one, which they would not tell from two that are equal; and for a torch that has them no more.
    """
    sizes: Any = [list(value.shape) for value in tensors]
    strides: Any = [list(value.stride()) for value in tensors]
    try:
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        check: Callable[..., bool] = guards.check
        return check if check(*tensors) else None
    except (AttributeError, TypeError):
        return None


def apply_directly(function: type[torch.autograd.Function]) -> Any:
    """Return the ``apply`` of a Function's C++ base, past the Python one that looks for transforms of torch.func.

    Only for calls that have made sure that there are none.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # its stub has no C++ base


def disable_current_modes() -> AbstractContextManager[Any]:
    """Leave all dispatch modes for a ``with`` block, such as the one of fake tensors in a trace of torch."""
    return _disable_current_modes()


@contextmanager
def without_saved_tensor_hooks() -> Iterator[None]:
    """Keep the caller's saved-tensor hooks from the trace, whose tensors they would count, move or encrypt.

    They are not taken off, but ignored, as torch ignores them while it traces: where the caller has forbidden new hooks
    they could not be put back.
    """
    before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_set_tracing(before)


@contextmanager
def without_jit_trace() -> Iterator[None]:
    """Suspend a trace of torch.jit, in which sizes are tensors, and which would record this one."""
    before = torch._C._get_tracing_state()
    if before is None:
        yield
        return
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]  # not in its stubs
    try:
        yield
    finally:
        torch._C._set_tracing_state(before)  # type: ignore[attr-defined]


@contextmanager
def without_compilation() -> Iterator[None]:
    """Let what torch.compile has wrapped run as it is written for the block."""
    if "torch._dynamo" not in sys.modules:  # nothing is wrapped, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_onednn() -> Iterator[None]:
    """Keep torch from computing by oneDNN for the block; what is public for it, ``flags``, warns on some machines."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@contextmanager
def without_distribution_checks() -> Iterator[None]:
    """Keep torch.distributions from looking at the values of parameters and samples for the block, unless asked to."""
    from torch.distributions import Distribution

    enabled = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(enabled)


@contextmanager
def without_modes() -> Iterator[None]:
    """Take the caller's function and dispatch modes off their stacks for the block."""
    functions = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    dispatches = [torch._C._pop_torch_dispatch_stack() for _ in range(torch._C._len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(dispatches):
            torch._C._push_on_torch_dispatch_stack(mode)
        for mode in reversed(functions):
            torch._C._push_on_torch_function_stack(mode)
