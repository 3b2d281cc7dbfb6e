"""Functions of torch that look at a tensor's values where nothing need depend on them, written so that they don't.

``one_hot`` checks its classes, and the gradients of products look for zeros, to divide where there are none. While a
step is traced, these stand for them: with torch's numbers, and gradients without a division. Others stand for functions
that copy a tensor and write to a part of it, as steps do themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusecell.compiler.frontend.rules.pooling import MOST_TAPS
from fusecell.compiler.frontend.traced_values import Untraceable

__all__ = ["REPLACEMENTS"]


class _RunningProduct(torch.autograd.Function):
    """Running product along the last dimension: its slope in x[k] is what is before k times what follows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.cumprod(x, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        before = torch.cumprod(torch.cat((torch.ones_like(x[..., :1]), x[..., :-1]), -1), -1)
        # after[k] = gradient[k] + x[k + 1] after[k + 1]: of twice as many terms in each pass, and right where x is 0.
        after, product, terms = gradients[0], _later(x, 1), 1
        while terms < x.shape[-1]:
            after = after + product * _later(after, terms)
            product = product * _later(product, terms)
            terms *= 2
        return before * after


def _later(x: Tensor, places: int) -> Tensor:
    """Return each element's later one along the last dimension; zero beyond the end."""
    return torch.cat((x[..., places:], torch.zeros_like(x[..., :places])), -1)


class _Product(torch.autograd.Function):
    """Product over the last dimension: its slope in x[k] is the product of what is before and of what is after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.prod(x, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        one = torch.ones_like(x[..., :1])
        before = torch.cumprod(torch.cat((one, x[..., :-1]), -1), -1)
        after = torch.cumprod(torch.cat((one, x[..., 1:].flip(-1)), -1), -1).flip(-1)
        return before * after * gradients[0].unsqueeze(-1)


def _running_product(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    value = _as_number(x, dtype)
    if value.is_complex():
        return torch.stack(list(accumulate(value.unbind(dim), torch.mul)), dim)
    result: Tensor = _RunningProduct.apply(value.movedim(dim, -1))  # type: ignore[no-untyped-call]
    return result.movedim(-1, dim)


def _product(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    value = _as_number(x, dtype)
    if dim is None:
        raise Untraceable("The step mixes the rows of the batch: prod() of all elements; give it a dimension.")
    if value.is_complex():
        product: Tensor = reduce(torch.mul, value.unbind(dim))
        return product.unsqueeze(dim) if keepdim else product
    result: Tensor = _Product.apply(value.movedim(dim, -1))  # type: ignore[no-untyped-call]
    return result.unsqueeze(dim) if keepdim else result


def _as_number(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        return x.to(dtype)
    return x if x.dtype.is_floating_point or x.dtype.is_complex else x.to(torch.int64)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes <= 0:
        raise Untraceable("one_hot without num_classes reads the largest class off the tensor; give it num_classes.")
    return (tensor.unsqueeze(-1) == torch.arange(num_classes)).to(torch.int64)


def _renormed(input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """Shorten the parts along a dimension whose norm is too large."""
    others = [other for other in range(input.dim()) if other != dim % input.dim()]
    norms = torch.linalg.vector_norm(input, p, others, keepdim=True)
    return input * torch.where(norms > maxnorm, maxnorm / (norms + 1e-7), 1.0)


def _taken(input: Tensor, index: Tensor) -> Tensor:
    return input.reshape(-1)[index]


def _reduced_at(
    input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    """Reduce parts of a tensor into those of another at positions: as scattering does element by element."""
    places = index.view([-1 if axis == dim % input.dim() else 1 for axis in range(input.dim())])
    return input.scatter_reduce(dim, places.expand_as(source), source, reduce, include_self=include_self)


def _median_of_numbers(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """Return the lower median along a dimension of what is not NaN, and where it is."""
    if dim is None:
        raise Untraceable("The step mixes the rows of the batch: nanmedian() of all elements; give it a dimension.")
    counted = ~input.isnan()
    order = torch.where(counted, input.detach(), math.inf).argsort(dim=dim, stable=True)
    middle = (counted.sum(dim, keepdim=True) - 1).clamp(min=0) // 2
    index = order.gather(dim, middle)
    value = input.gather(dim, index)
    if not keepdim:
        value, index = value.squeeze(dim), index.squeeze(dim)
    return torch.return_types.nanmedian((value, index))


def _unpooled(dims: int) -> Callable[..., Tensor]:
    """Return max_unpool over so many dimensions: each maximum goes back to where it was, among zeros."""

    def unpool(
        input: Tensor,
        indices: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        output_size: Sequence[int] | None = None,
    ) -> Tensor:
        kernel, steps, margin = (_each(value, dims) for value in (kernel_size, stride or kernel_size, padding))
        if any(step < extent for step, extent in zip(steps, kernel, strict=True)):
            raise Untraceable(
                "max_unpool of windows that overlap is not compiled: which maximum stays is torch's own. Use "
                "windows as wide as their stride."
            )
        size = [
            (count - 1) * step + extent - 2 * border
            for count, step, extent, border in zip(input.shape[-dims:], steps, kernel, margin, strict=True)
        ]
        size = size if output_size is None else list(output_size)[-dims:]
        whole = torch.zeros((*input.shape[:-dims], math.prod(size)), dtype=input.dtype)
        placed = whole.scatter_add(-1, indices.flatten(-dims), input.flatten(-dims))
        return placed.view(*input.shape[:-dims], *size)

    return unpool


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """Return an argument of pooling for each dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _slice_scatter(
    input: Tensor, src: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    result = input.clone()
    torch.ops.aten.slice.Tensor(result, dim, start, end, step).copy_(src)
    return result


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    result = input.clone()
    result.select(dim, index).copy_(src)
    return result


def _diagonal_scatter(input: Tensor, src: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    result = input.clone()
    result.diagonal(offset, dim1, dim2).copy_(src)
    return result


def _gaussian_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """Return the negative logarithm of a normal density; torch first looks for variances below 0."""
    variance = torch.full_like(input, var) if not isinstance(var, Tensor) else var
    if variance.shape != input.shape and variance.shape == input.shape[:-1]:
        variance = variance.unsqueeze(-1)
    # Too small ones are replaced for the value, and not for the gradient.
    variance = variance + (variance.clamp(min=eps) - variance).detach()
    loss = 0.5 * (variance.log() + (input - target) ** 2 / variance)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is not None or reduce is not None or target.requires_grad:  # which torch refuses
        return functional.soft_margin_loss(input, target, size_average, reduce, reduction)
    loss = torch.log1p(torch.exp(-target * input))
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _log_gamma_of_matrices(input: Tensor, p: int) -> Tensor:
    """Return the logarithm of the gamma function of p dimensions."""
    return sum((torch.lgamma(input - k / 2) for k in range(p)), torch.full_like(input, _of_dimensions(p)))


def _of_dimensions(p: int) -> float:
    return p * (p - 1) / 4 * math.log(math.pi)


def _short_time_fourier(
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    pad_mode: str = "reflect",
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> Tensor:
    """Return Fourier transforms of windows; torch cuts these out by their strides in memory."""
    options = (hop_length, win_length, window, center, pad_mode, normalized, onesided, return_complex, align_to_window)
    is_complex = input.is_complex() or (window is not None and window.is_complex())
    if (return_complex is None and not is_complex) or align_to_window is not None:
        return torch.stft(input, n_fft, *options)
    signal = input
    if center:
        border = [n_fft // 2] * 2
        signal = functional.pad(input.view(-1, 1, input.shape[-1]), border, pad_mode).view(*input.shape[:-1], -1)
    frames = signal.unfold(-1, n_fft, hop_length or n_fft // 4)
    if window is not None or (win_length or n_fft) < n_fft:
        frames = frames * _window_of(n_fft, win_length, window, input.real)
    one_side = not is_complex if onesided is None else onesided
    transform = torch.fft.rfft if one_side else torch.fft.fft
    result = transform(frames, norm="ortho" if normalized else None).transpose(-1, -2)
    return torch.view_as_real(result) if return_complex is False else result


def _from_short_time_fourier(
    input: Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Tensor:
    """Return the signals of short-time Fourier transforms; torch looks whether its windows cover them."""
    if n_fft > MOST_TAPS:
        raise Untraceable(f"istft of windows of more than {MOST_TAPS} samples is not compiled; torch.fft.irfft is.")
    if return_complex or input.dim() != 3 or (window is not None and window.is_complex()):
        raise Untraceable("Of istft only that of a batch (N, frequencies, frames) to real signals is compiled.")
    hop, weights = hop_length or n_fft // 4, _window_of(n_fft, win_length, window, input.real)
    # Of all frequencies torch takes one side as well.
    frames = torch.fft.irfft(input.transpose(1, 2), n_fft, norm="ortho" if normalized else None)
    size = (frames.shape[1] - 1) * hop + n_fft

    def added(windows: Tensor) -> Tensor:
        columns = windows.transpose(1, 2)
        return functional.fold(columns, (1, size), (1, n_fft), stride=(1, hop)).view(-1, size)

    border = n_fft // 2 if center else 0
    end = size - border if length is None else border + length
    covered = added(weights.square().expand(1, *frames.shape[1:]))[:, border:end]
    return functional.pad(added(frames * weights)[:, border:end] / covered, [0, max(0, end - size)])


def _window_of(n_fft: int, win_length: int | None, window: Tensor | None, like: Tensor) -> Tensor:
    """Return the weights of a window, with zeros on both sides of a shorter one."""
    width = win_length or n_fft
    weights = torch.ones(width, dtype=like.dtype) if window is None else window
    before = (n_fft - width) // 2
    return functional.pad(weights, [before, n_fft - width - before])


def _bag_of_embeddings(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Look up embeddings and join those of a row; torch puts the bags of all rows end to end."""
    if input.dim() != 2 or offsets is not None or max_norm is not None or scale_grad_by_freq or sparse:
        raise Untraceable("Of embedding_bag only plain bags (N, K) of ids are compiled; look up an nn.Embedding.")
    vectors = functional.embedding(input, weight, padding_idx)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.unsqueeze(-1)
    if padding_idx is None:
        return vectors.sum(1) if mode == "sum" else vectors.mean(1) if mode == "mean" else vectors.amax(1)
    counted = (input != padding_idx % len(weight)).unsqueeze(-1)
    if mode == "max":
        raise Untraceable("The largest of embeddings with a padding_idx are not compiled; mask them, and take amax.")
    total = (vectors * counted).sum(1)
    return total if mode == "sum" else total / counted.sum(1).clamp(min=1)


def _grid_of_maps(theta: Tensor, size: Sequence[int], align_corners: bool | None = None) -> Tensor:
    """Return the positions that affine maps send those of an image to, the last axis first."""
    lines = []
    for count in reversed(size[2:]):
        ends = 1.0 if align_corners else (count - 1) / count
        lines.append(torch.linspace(-ends, ends, count, dtype=theta.dtype) if count > 1 else torch.zeros(1))
    axes = torch.meshgrid(*reversed(lines), indexing="ij")
    places = torch.stack((*reversed(axes), torch.ones(tuple(size[2:]))), -1).to(theta.dtype)
    grid = places.flatten(0, -2) @ theta.mT
    return grid.view(len(theta), *size[2:], -1)


REPLACEMENTS: Mapping[Any, Callable[..., Any]] = {
    torch.prod: _product,
    Tensor.prod: _product,
    torch.cumprod: _running_product,
    Tensor.cumprod: _running_product,
    functional.one_hot: _one_hot,
    functional.gaussian_nll_loss: _gaussian_loss,
    functional.soft_margin_loss: _soft_margin_loss,
    functional.embedding_bag: _bag_of_embeddings,
    **dict.fromkeys((torch.stft, Tensor.stft), _short_time_fourier),
    **dict.fromkeys((torch.istft, Tensor.istft), _from_short_time_fourier),
    **dict.fromkeys((torch.mvlgamma, Tensor.mvlgamma, torch.special.multigammaln), _log_gamma_of_matrices),
    functional.affine_grid: _grid_of_maps,
    **dict.fromkeys((torch.renorm, Tensor.renorm), _renormed),
    **dict.fromkeys((torch.take, Tensor.take), _taken),
    **dict.fromkeys((torch.index_reduce, Tensor.index_reduce), _reduced_at),
    **dict.fromkeys((torch.nanmedian, Tensor.nanmedian), _median_of_numbers),
    functional.max_unpool1d: _unpooled(1),
    functional.max_unpool2d: _unpooled(2),
    functional.max_unpool3d: _unpooled(3),
    torch.slice_scatter: _slice_scatter,
    Tensor.slice_scatter: _slice_scatter,
    torch.select_scatter: _select_scatter,
    Tensor.select_scatter: _select_scatter,
    torch.diagonal_scatter: _diagonal_scatter,
    Tensor.diagonal_scatter: _diagonal_scatter,
}
