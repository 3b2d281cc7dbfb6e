"""Random draws of a step: what is drawn, so that a call can draw the same numbers that a loop would.

A draw becomes an input of the graph. Each is brought to the method of a tensor that torch itself fills it with:
``randn_like(h)`` is ``empty_like(h).normal_(0, 1)``, and dropout ``bernoulli_(1 - p)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusecell.compiler.frontend.aten_arguments import named_arguments
from fusecell.compiler.frontend.traced_values import Untraceable

__all__ = ["Draw", "draw_name", "draws_nothing", "fill", "form_of", "new_tensor"]

_FACTORIES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "randn": ("normal_", (0.0, 1.0)),
    "randn_like": ("normal_", (0.0, 1.0)),
    "rand": ("uniform_", (0.0, 1.0)),
    "rand_like": ("uniform_", (0.0, 1.0)),
}
_INTEGERS = ("randint", "randint_like", "random_")
_METHODS = ("normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_")
_REMEDIES = {
    "multinomial": "Take the largest of logits plus Gumbel noise: (logits - (-torch.rand_like(logits).log()).log()).",
    "rrelu_with_noise": (
        "torch draws a slope for each element that is not positive, so that how many it draws depends on values. Draw "
        "one for each: slope = torch.empty_like(x).uniform_(1 / 8, 1 / 3), then torch.where(x > 0, x, x * slope)."
    ),
    "binomial": "Of a fixed count n add n draws up: (torch.rand(*p.shape, n) < p[..., None]).sum(-1).",
    "_standard_gamma": (
        "Of a whole shape k add k exponentials up: -torch.rand(*rate.shape, k).log().sum(-1) / rate. Where parameters "
        "don't depend on the state, draw in Cell.draw."
    ),
    "_sample_dirichlet": (
        "Of whole parameters k it is g / g.sum(-1, keepdim=True), with sums of k exponentials in g, "
        "-torch.rand(...).log(). Where parameters don't depend on the state, draw in Cell.draw."
    ),
    "randperm": "Sort uniform numbers instead: torch.rand_like(x).argsort(-1).",
}


@dataclass(frozen=True)
class Draw:
    """One draw of each step.

    Attributes:
        method: the method of a tensor that fills it.
        args: the method's arguments.
        shape: of the tensor, for one row.
        axis: the dimension that is as long as the batch, or a multiple of it; None for what all rows share.
        dtype: of the tensor.
    """

    method: str
    args: tuple[float, ...]
    shape: tuple[int, ...]
    axis: int | None
    dtype: torch.dtype


def draw_name(number: int) -> str:
    """Return the name of the input that is a step's draw of some number; no input of a user has a dot."""
    return f"draw.{number}"


def form_of(name: str, arguments: Mapping[str, Any]) -> tuple[str, tuple[float, ...]]:
    """Return the method that fills what an operation draws, and the method's arguments.

    Raises:
        Untraceable: for one whose numbers depend on values of the step, or come from another generator.
    """
    if arguments.get("generator") is not None:
        raise Untraceable(
            "The step draws from a generator of its own; draw from torch's, which torch.manual_seed seeds, or in "
            "Cell.draw."
        )
    if name in _FACTORIES:
        return _FACTORIES[name]
    if name == "normal" and "size" in arguments:  # of two numbers; that of tensors draws into one with normal_
        return "normal_", (arguments["mean"], arguments.get("std", 1.0))
    if name in _INTEGERS and (limit := arguments.get("high", arguments.get("to"))) is not None:
        return "random_", (arguments.get("low", arguments.get("from", 0)), limit)
    numbers = [value for key, value in arguments.items() if key not in ("self", "generator")]
    if name not in _METHODS or any(not isinstance(value, int | float) for value in numbers):
        remedy = _REMEDIES.get(name, "Draw it in Cell.draw, which is called once per sequence.")
        raise Untraceable(f"The step draws random numbers by {name}, which can't be drawn before the loop. {remedy}")
    return name, tuple(numbers)


def new_tensor(name: str, arguments: Mapping[str, Any]) -> Tensor:
    """Return an empty tensor like the one that a factory makes."""
    options = {
        key: arguments[key] for key in ("dtype", "layout", "device", "pin_memory", "memory_format") if key in arguments
    }
    if name.endswith("_like"):
        result: Tensor = torch.ops.aten.empty_like.default(arguments["self"], **options)
    else:
        if options.get("dtype") is None and name in _INTEGERS:
            options["dtype"] = torch.int64
        result = torch.ops.aten.empty.memory_format(arguments["size"], **options)
    return result


def fill(tensor: Tensor, method: str, numbers: Sequence[float], generator: torch.Generator) -> None:
    """Fill a tensor with numbers of the trace's own; torch's generator is left as it is.

    They are not drawn by the method: between 0.1 and 0.9 logarithms and roots are finite.
    """
    if not tensor.is_contiguous():
        raise Untraceable("The step draws into a tensor whose elements are not in order; draw into a new one.")
    if method == "random_":
        low, high = map(int, numbers)
        tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator))
        return
    uniform = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    tensor.copy_(uniform > 0.5 if tensor.dtype == torch.bool else uniform)


def draws_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw random numbers draws none in this call: dropout outside training."""
    arguments = named_arguments(func, args, kwargs)
    if "rrelu" in func._schema.name:
        return not arguments.get("training", False)
    return "dropout" in func._schema.name and arguments.get("train") is False
