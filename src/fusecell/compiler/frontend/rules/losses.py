"""Rules for losses of each element or row, such as a step that learns as it runs computes; and for their gradients.

A loss over all rows mixes them, and is refused as a reduction of the batch is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusecell.compiler.frontend.graph_writer import Operand, Writer
from fusecell.compiler.frontend.rules.indexing import gather, index_select, scattered
from fusecell.compiler.frontend.rules.reduction import mean, total
from fusecell.compiler.frontend.traced_values import Row, Untraceable, Value

__all__ = ["LOSSES"]

_LEAST_SPREAD = 9.999999960041972e-13  # torch has float32's 1e-12, in float64 too

_NONE, _MEAN = 0, 1
"""Of torch's numbers for ``reduction``."""


def _reduced(w: Writer, loss: Row, reduction: int) -> Any:
    if reduction == _NONE:
        return loss
    return mean(w, loss) if reduction == _MEAN else total(w, loss)


def _of_each(reduction: int) -> None:
    if reduction != _NONE:
        raise Untraceable('The step mixes the rows of the batch: a loss over all of them; use reduction="none".')


def _squared(w: Writer, x: Operand, target: Operand, reduction: int = _MEAN) -> Any:
    apart = w.point("sub", x, target)
    return _reduced(w, w.point("mul", apart, apart), reduction)


def _squared_backward(w: Writer, g: Operand, x: Operand, target: Operand, reduction: int) -> Row:
    _of_each(reduction)
    return w.point("mul", w.point("mul", w.point("sub", x, target), 2.0), g)


def _smooth(scale: Callable[[float], float]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the rules of a loss that is squared near 0 and linear beyond, and of its gradient.

    Arguments:
        scale: of the loss, from the width of its squared part: 1 / width for smooth L1, 1 for Huber's.
    """

    def loss(w: Writer, x: Operand, target: Operand, reduction: int = _MEAN, width: float = 1.0) -> Any:
        size = w.point("abs", w.point("sub", x, target))
        if width == 0:
            return _reduced(w, size, reduction)
        near = w.point("mul", w.point("mul", size, size), 0.5 * scale(width))
        far = w.point("mul", w.point("sub", size, 0.5 * width), width * scale(width))
        return _reduced(w, w.point("where", w.point("lt", size, width), near, far), reduction)

    def backward(w: Writer, g: Operand, x: Operand, target: Operand, reduction: int, width: float) -> Row:
        _of_each(reduction)
        apart = w.point("sub", x, target)
        slope = w.point("sign", apart)
        if width != 0:
            cut = w.point("maximum", w.point("minimum", apart, width), -width)
            slope = w.point("mul", cut, scale(width))
        return w.point("mul", slope, g)

    return loss, backward


def _likelihood(
    w: Writer, x: Row, target: Operand, weight: Value | None, reduction: int, ignored: int
) -> tuple[Any, Row]:
    """Write the negative log-likelihood of each row's class, of (N, classes)."""
    places = w.number(target)
    at: Row = w.move(lambda numbers: numbers.unsqueeze(1), places)
    picked: Row = w.move(lambda numbers: numbers.squeeze(1), gather(w, x, 1, _in_range(w, at, x)))
    loss = w.point("mul", w.point("neg", picked), _factor(w, places, weight, ignored))
    return _reduced(w, loss, reduction), w.const(0.0)


def _likelihood_backward(
    w: Writer, g: Row, x: Row, target: Operand, weight: Value | None, reduction: int, ignored: int, _total: Any
) -> Row:
    _of_each(reduction)
    places = w.number(target)
    slope = w.point("mul", w.point("neg", g), _factor(w, places, weight, ignored))
    at, values = (w.move(lambda numbers: numbers.unsqueeze(1), each) for each in (places, slope))
    return scattered(w, x.shape, 1, _in_range(w, at, x), values)


def _in_range(w: Writer, places: Row, x: Row) -> Row:
    # A class that is ignored may be any number; its loss is 0.
    return w.point("maximum", w.point("minimum", places, x.shape[1] - 1.0), 0.0)


def _factor(w: Writer, places: Row, weight: Value | None, ignored: int) -> Row:
    counts = w.point("where", w.point("eq", places, float(ignored)), 0.0, 1.0)
    if weight is None:
        return counts
    classes = w.row(weight).shape[0]
    inside = w.point("maximum", w.point("minimum", places, classes - 1.0), 0.0)
    return w.point("mul", counts, index_select(w, weight, 0, inside))


def _cross_entropy(w: Writer, x: Operand, target: Operand, weight: Operand | None, reduction: int = _MEAN) -> Any:
    # torch's logarithms end at -100.
    yes = w.point("maximum", w.point("log", x), -100.0)
    no = w.point("maximum", w.point("log1p", w.point("neg", x)), -100.0)
    loss_of_no = w.point("mul", w.point("sub", target, 1.0), no)
    loss = w.point("sub", loss_of_no, w.point("mul", target, yes))
    return _reduced(w, loss if weight is None else w.point("mul", loss, weight), reduction)


def _cross_entropy_backward(
    w: Writer, g: Operand, x: Operand, target: Operand, weight: Operand | None, reduction: int = _MEAN
) -> Row:
    _of_each(reduction)
    spread = w.point("maximum", w.point("mul", w.point("sub", 1.0, x), x), _LEAST_SPREAD)
    slope = w.point("div", w.point("mul", w.point("sub", x, target), g), spread)
    return slope if weight is None else w.point("mul", slope, weight)


def _cross_entropy_of_logits(
    w: Writer,
    x: Operand,
    target: Operand,
    weight: Operand | None,
    positive: Operand | None,
    reduction: int = _MEAN,
) -> Any:
    linear = w.point("mul", w.point("sub", 1.0, target), x)
    below = w.point("neg", w.point("minimum", x, 0.0))
    log = w.point("add", w.point("log1p", w.point("exp", w.point("neg", w.point("abs", x)))), below)
    if positive is not None:
        factor = w.point("add", w.point("mul", w.point("sub", positive, 1.0), target), 1.0)
        log = w.point("mul", log, factor)
    loss = w.point("add", linear, log)
    return _reduced(w, loss if weight is None else w.point("mul", loss, weight), reduction)


_l1, _l1_backward = _smooth(lambda width: 1 / width)
_huber, _huber_backward = _smooth(lambda width: 1.0)
LOSSES: Mapping[str, Callable[..., Any]] = {
    "mse_loss": _squared,
    "mse_loss_backward": _squared_backward,
    "smooth_l1_loss": _l1,
    "smooth_l1_loss_backward": _l1_backward,
    "huber_loss": _huber,
    "huber_loss_backward": _huber_backward,
    "binary_cross_entropy": _cross_entropy,
    "binary_cross_entropy_backward": _cross_entropy_backward,
    "binary_cross_entropy_with_logits": _cross_entropy_of_logits,
    "nll_loss_forward": _likelihood,
    "nll_loss_backward": _likelihood_backward,
}
