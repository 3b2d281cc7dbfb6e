"""Cells whose steps compute along axes: heads, matrices, images, positions; for the tracer's tests and the kernels'."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusecell as fc

Body = Callable[[Any, Tensor], Tensor]


class AxisCell(fc.Cell):
    """A cell of 24 features; its step is a function of (cell, z) with any result of 24 features."""

    def __init__(self, body: Body) -> None:
        super().__init__(5, 24)
        self.body = body
        self.inp = nn.Linear(5, 24)
        self.rec = nn.Linear(24, 24, bias=False)
        for name, shape in {
            "heads": (3, 8, 8),
            "narrow": (3, 8, 4),
            "square": (8, 8),
            "mix": (3, 3),
            "kernel1": (3, 3, 4),
            "depth": (3, 1, 3),
            "kernel2": (4, 2, 3, 3),
            "back2": (2, 3, 2, 2),
            "bias": (4,),
            "table": (7, 24),
            "cube": (5, 4, 6),
            "gain": (4,),
            "phases": (3, 2),
        }.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) * 0.8 - 0.3))
        self.register_buffer("order", torch.tensor([5, 3, 0, 23, 7, 7, 11, 2]))
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("variance", torch.rand(3) + 0.5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def step(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (h,) = state
        y = self.body(self, torch.tanh(self.inp(x) + self.rec(h)))
        return y, (torch.tanh(y),)


def heads(z: Tensor) -> Tensor:
    return z.view(-1, 3, 8)


def image(z: Tensor) -> Tensor:
    return z.view(-1, 2, 3, 4)


def square(z: Tensor) -> Tensor:
    """Well-conditioned matrices: two of 2 x 2 for each of six."""
    return z.view(-1, 6, 2, 2) * 0.2 + torch.eye(2, dtype=z.dtype)


def fit(z: Tensor) -> Tensor:
    """Repeat or cut features to 24."""
    flat = z.flatten(1)
    return flat.repeat(1, -(-24 // flat.shape[1]))[:, :24]


def _positive(z: Tensor) -> Tensor:
    a = z.view(-1, 6, 2, 2)
    return a @ a.mT + torch.eye(2, dtype=z.dtype)


def _larger(z: Tensor) -> Tensor:
    """Matrices of 6 x 6 whose largest elements are not on the diagonal."""
    return z[:, :6, None] * z[:, None, 6:12] * 0.5 + torch.diag_embed(z[:, 12:18] * 0.2 + 1).flip(-1)


def _larger_positive(z: Tensor) -> Tensor:
    a = _larger(z)
    return a @ a.mT + torch.eye(6, dtype=z.dtype)


def _normal(mean: Tensor, **options: Tensor) -> torch.distributions.Distribution:
    return torch.distributions.MultivariateNormal(mean, validate_args=False, **options)


def _lower(z: Tensor) -> Tensor:
    return torch.tril(z.view(-1, 6, 2, 2), -1) + 2 * torch.eye(2, dtype=z.dtype)


def _ids(z: Tensor, count: int) -> Tensor:
    return ((z * 0.5 + 0.5) * (count - 0.01)).long()


def _written_by_row(c: Any, z: Tensor) -> Tensor:
    rows, place = torch.arange(z.size(0)), z[:, :3].argmax(1)
    table = heads(z).clone()
    table[rows, place] = table[rows, place].sin() + c.square[0]
    table[rows, :, place] += 0.5
    table[rows, 0] = z[:, 3:11]
    return table.index_put((rows[:, None], _ids(z[:, :2], 3)), z[:, None, :8], accumulate=True).flatten(1)


def _losses(c: Any, z: Tensor) -> Tensor:
    x, y, classes = z[:, :8], z[:, 8:16], _ids(z[:, 0], 8)
    weights = c.square[0].detach().abs()
    each = [
        F.mse_loss(x, y, reduction="none"),
        F.smooth_l1_loss(x, y, reduction="none", beta=0.3),
        F.smooth_l1_loss(x, y, reduction="none", beta=0.0),
        F.huber_loss(x, y, reduction="none", delta=0.4),
        F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), weights, reduction="none"),
        F.binary_cross_entropy_with_logits(x * 30, y.sigmoid(), weights, pos_weight=weights + 1, reduction="none"),
        F.cross_entropy(x, classes, reduction="none")[:, None] * x,
        F.nll_loss(x, classes, weights, reduction="none", ignore_index=2)[:, None] * y,
        F.gaussian_nll_loss(x, y, z[:, 16:].square(), reduction="none", eps=0.05),
        F.gaussian_nll_loss(x, y, z[:, 16].exp(), full=True, reduction="none"),
    ]
    return fit(torch.stack(each).sum(0))


# What is computed along axes: of products,
PRODUCTS: dict[str, Body] = {
    "a_weight_per_head": lambda c, z: fit(torch.einsum("nhd,hde->nhe", heads(z), c.heads)),
    "a_narrow_weight_per_head": lambda c, z: fit(torch.einsum("nhd,hde->neh", heads(z), c.narrow)),
    "one_weight_for_all_heads": lambda c, z: fit(F.linear(heads(z), c.square) + heads(z) @ c.square),
    "a_weight_on_the_left": lambda c, z: fit(c.mix @ heads(z)),
    "a_weight_that_also_scales": lambda c, z: fit(heads(z) @ c.square + c.square[:3] * heads(z)),
    "matrices_of_a_row": lambda c, z: fit(heads(z).mT @ heads(z * 2)),
    "matrix_times_vector": lambda c, z: fit(torch.einsum("nij,nj->ni", z.view(-1, 4, 6), z[:, :6])),
    "outer_product": lambda c, z: fit(torch.einsum("ni,nj->nij", z[:, :4], z[:, 4:10])),
    "attention": lambda c, z: fit(c.attention(heads(z), heads(z * z), heads(z), need_weights=False)[0]),
    "scaled_dot_product": lambda c, z: fit(F.scaled_dot_product_attention(heads(z), heads(z * 2), heads(z))),
    "baddbmm": lambda c, z: fit(torch.baddbmm(heads(z), heads(z), heads(z).mT @ heads(z), beta=0.5, alpha=2.0)),
    "bilinear": lambda c, z: fit(F.bilinear(z[:, :4], z[:, 4:10], c.cube)),
    "distances": lambda c, z: fit(torch.cdist(heads(z), heads(z * z + 1)) + torch.cdist(heads(z), heads(z * 3), p=1.0)),
    "distances_to_weights": lambda c, z: fit(torch.cdist(z, c.table)) + fit(torch.cdist(z[:, :8], c.square, p=1.0)),
    "distances_of_many": lambda c, z: fit(torch.cdist(z.repeat(1, 4).view(-1, 48, 2), heads(z)[..., :2] * 0.1 + 3)),
    "a_vector_per_head": lambda c, z: (
        fit(heads(z) @ c.square[0]) + fit(torch.einsum("nhd,d->nh", heads(z), c.square[:, 1]))
    ),
    "parts_of_a_vector_as_matrices": lambda c, z: fit(
        heads(z)[..., :4] @ c.square[0, :4, None]
        + heads(z)[..., 4:] @ c.bias[:, None]
        + heads(z)[..., :2] @ c.gain[:2, None]
    ),
    "repeated_weights": lambda c, z: (
        heads(z) * c.square[0].expand(3, 8) + heads(z) * c.gain[0].expand(8) + c.gain[0]
    ).flatten(1),
    "dots": lambda c, z: z * torch.stack([torch.dot(c.square[0], c.square[1])]) + z,
}
# images,
IMAGES: dict[str, Body] = {
    "conv1d": lambda c, z: fit(F.conv1d(heads(z), c.kernel1, c.gain[:3])),
    "depthwise": lambda c, z: fit(F.conv1d(heads(z), c.depth, padding=1, groups=3)),
    "depthwise_to_a_point": lambda c, z: fit(F.conv1d(heads(z)[..., :3], c.depth, groups=3)),
    "conv2d": lambda c, z: fit(F.conv2d(image(z), c.kernel2, c.bias, padding=1)),
    "conv2d_strided": lambda c, z: fit(F.conv2d(image(z), c.kernel2, padding=(1, 2), stride=(1, 2), dilation=1)),
    "conv2d_dilated": lambda c, z: fit(F.conv2d(image(z), c.kernel2, padding=2, dilation=2)),
    "conv_transposed": lambda c, z: fit(F.conv_transpose2d(image(z), c.back2, stride=2, padding=1, output_padding=1)),
    "a_kernel_for_each_row": lambda c, z: (
        fit(
            F.conv2d(
                z.reshape(1, -1, 3, 4),
                z[:, :18].reshape(-1, 1, 3, 3),
                z[:, 18:20].flatten(),
                padding=1,
                groups=2 * len(z),
            ).view(-1, 2, 12)
        )
        + fit(F.conv1d(z.view(1, -1, 6), z[:, :24].reshape(-1, 4, 2), stride=2, groups=len(z)).view(-1, 3, 3))
    ),
    "max_pool": lambda c, z: fit(F.max_pool2d(image(z), 2, 1)) + fit(F.max_pool1d(heads(z), 3, 2, 1)),
    "max_pool_of_odd_windows": lambda c, z: (
        fit(F.max_pool2d(image(z), 2, 2, 1, ceil_mode=True))
        + fit(F.max_pool1d(heads(z), 3, 2, dilation=2, ceil_mode=True))
        + fit(F.adaptive_max_pool2d(image(z), (2, 3)))
        + fit(F.adaptive_max_pool1d(heads(z), 3, return_indices=True)[1] * heads(z)[..., :3])
    ),
    "average_pool_of_odd_windows": lambda c, z: (
        fit(F.avg_pool2d(image(z), 2, 2, 1, count_include_pad=False))
        + fit(F.avg_pool2d(image(z), (2, 3), 2, (1, 1), ceil_mode=True))
        + fit(F.avg_pool1d(heads(z), 3, 2, 1, ceil_mode=True, count_include_pad=False))
        + fit(F.avg_pool2d(image(z), 2, 2, 1, ceil_mode=True, divisor_override=3))
    ),
    "average_pool": lambda c, z: fit(F.avg_pool2d(image(z), 2, 1, 1)) + fit(F.avg_pool1d(heads(z), 2)),
    "nearest": lambda c, z: fit(F.interpolate(image(z)[:, :, ::2, ::2], scale_factor=2)),
    "nearest_by_any_factor": lambda c, z: (
        fit(F.interpolate(image(z), size=(5, 3)))
        + fit(F.interpolate(heads(z), scale_factor=1.7))
        + fit(F.interpolate(heads(z), scale_factor=1.3, mode="nearest-exact"))
        + fit(F.interpolate(image(z), size=(5, 6), mode="nearest-exact"))
        + fit(F.interpolate(z.view(-1, 1, 2, 3, 4), size=(3, 3, 2)))
        + fit(F.interpolate(z.view(-1, 1, 2, 3, 4), scale_factor=2, mode="nearest-exact"))
    ),
    "resized_bilinearly": lambda c, z: fit(F.interpolate(image(z), size=(5, 3), mode="bilinear")),
    "bilinear_by_scale": lambda c, z: fit(F.interpolate(image(z), scale_factor=(1.7, 0.6), mode="bilinear")),
    "bicubic_aligned": lambda c, z: fit(F.interpolate(image(z), size=(3, 4), mode="bicubic", align_corners=True)),
    "backwards_then_zero": lambda c, z: fit(F.pad(z[:, :2].flip(-1), (0, 1))) + fit(F.pad(z[:, :1], (0, 1)).sin()),
    "trilinear": lambda c, z: fit(F.interpolate(z.view(-1, 1, 2, 3, 4), size=(3, 2, 3), mode="trilinear")),
    "linear": lambda c, z: fit(F.interpolate(heads(z), size=5, mode="linear", align_corners=False)),
    "unfolded": lambda c, z: fit(F.unfold(image(z), (2, 3), padding=(1, 0), stride=(1, 2), dilation=1).sin()),
    "folded": lambda c, z: fit(F.fold(F.unfold(image(z), 2, 2, 1).cos()[:, :, ::2], (4, 3), 2, padding=1, stride=2)),
    "mirrored": lambda c, z: (
        fit(F.pad(image(z), (2, 1, 1, 2), mode="reflect").sin())
        + fit(F.pad(heads(z), (0, 3), mode="reflect") * z[:, 1:2, None])
    ),
    "repeated_at_the_border": lambda c, z: (
        fit(F.pad(image(z), (2, 0, 1, 2), mode="replicate").sin()[:, :, ::2])
        + fit(F.pad(heads(z), (3, 1), mode="replicate"))
    ),
    "padded_volumes": lambda c, z: (
        fit(F.pad(z.view(-1, 1, 2, 3, 4), (1, 2, 0, 1, 1, 1), mode="reflect").sin()[:, :, ::2])
        + fit(F.pad(z.view(-1, 1, 2, 3, 4), (0, 1, 2, 0, 1, 0), mode="replicate").cos()[..., 1:])
    ),
    "circular": lambda c, z: fit(F.pad(image(z), (1, 2, 1, 0), mode="circular").cos()[..., 1:]),
    "windows": lambda c, z: fit(z.unfold(1, 5, 3).cos().sum(-1)) + fit(image(z).unfold(2, 2, 1).prod(-1)),
    "turned": lambda c, z: image(z).rot90(1, (2, 3)).flatten(1) + image(z).rot90(2, (1, 2)).flatten(1),
    "pooled_to_a_size": lambda c, z: (
        fit(F.adaptive_max_pool2d(image(z), (3, 2))) + fit(F.adaptive_max_pool1d(heads(z), 4))
    ),
    "averaged_to_a_size": lambda c, z: (
        fit(F.adaptive_avg_pool2d(image(z).sin(), (2, 3)))
        + fit(F.adaptive_avg_pool1d(heads(z), 2))
        + fit(F.adaptive_avg_pool3d(z.view(-1, 1, 2, 3, 4), (1, 2, 3)))
    ),
    "pooled_in_three_dimensions": lambda c, z: (
        fit(F.avg_pool3d(z.view(-1, 1, 2, 3, 4), 2, 1))
        + fit(F.max_pool3d(z.view(-1, 1, 2, 3, 4), (1, 2, 2), 1))
        + fit(F.adaptive_max_pool3d(z.view(-1, 1, 2, 3, 4), (1, 2, 3)))
    ),
    "sampled volume": lambda c, z: fit(
        F.grid_sample(z.view(-1, 2, 2, 3, 2), z[:, :12].view(-1, 2, 1, 2, 3) * 1.5, align_corners=False)
    ),
    "sampled": lambda c, z: fit(F.grid_sample(image(z), z[:, :12].view(-1, 3, 2, 2) * 1.5, align_corners=False)),
    "sampled_within_borders": lambda c, z: fit(
        F.grid_sample(image(z), z[:, :12].view(-1, 2, 3, 2) * 1.7, padding_mode="border", align_corners=True)
    ),
    "sampled_at_the_nearest": lambda c, z: fit(
        F.grid_sample(image(z), z[:, :8].view(-1, 2, 2, 2) * 1.2, mode="nearest", align_corners=False)
    ),
    "sampled_by_maps": lambda c, z: fit(
        F.grid_sample(image(z), F.affine_grid(z[:, :6].view(-1, 2, 3), [len(z), 2, 2, 3], False), align_corners=False)
        + F.grid_sample(image(z), F.affine_grid(z[:, :6].view(-1, 2, 3), [len(z), 2, 2, 3], True), align_corners=True)
    ),
    "unpooled": lambda c, z: (
        fit(F.max_unpool2d(*F.max_pool2d(image(z), (1, 2), return_indices=True), (1, 2)))
        + fit(F.max_unpool1d(*F.max_pool1d(heads(z), 3, return_indices=True), 3, output_size=[8]))
    ),
    "nearest_1d": lambda c, z: fit(F.interpolate(heads(z)[..., ::2], scale_factor=2)),
}
# norms and reductions,
REDUCTIONS: dict[str, Body] = {
    "group_norm": lambda c, z: F.group_norm(z.view(-1, 4, 6), 2, c.gain, c.bias).flatten(1),
    "group_norm_plain": lambda c, z: F.group_norm(z, 3),
    "batch_norm": lambda c, z: F.batch_norm(heads(z), c.mean, c.variance, c.gain[:3], c.bias[:3]).flatten(1),
    "instance_norm": lambda c, z: (
        F.instance_norm(heads(z), weight=c.gain[:3], bias=c.bias[:3]) + F.instance_norm(image(z)).view(-1, 3, 8)
    ).flatten(1),
    "layer_norm": lambda c, z: F.layer_norm(heads(z), (8,)).flatten(1),
    "softmax_over_heads": lambda c, z: heads(z).softmax(1).flatten(1) + heads(z).log_softmax(2).flatten(1),
    "sums": lambda c, z: fit(heads(z).sum((1,)) + z.view(-1, 8, 3).sum(2)) + z.view(-1, 12, 2).mean(1).repeat(1, 12),
    "extremes": lambda c, z: fit(heads(z).amax(1) + heads(z).amin(2, keepdim=True).sum(1)),
    "extremes_of_dim": lambda c, z: fit(heads(z).max(1).values - heads(z).min(2, keepdim=True).values.sum(1)),
    "products": lambda c, z: fit(heads(z).prod(1)) + fit(z.view(-1, 12, 2).prod(1)),
    "positions": lambda c, z: z * fit(heads(z).argmax(1)) + z * fit(heads(z).argmin(2)),
    "cumulative": lambda c, z: fit(heads(z).cumsum(1) + heads(z).cumprod(2)) + z.view(-1, 2, 12).cumsum(1).flatten(1),
    "losses": _losses,
    "running_extremes": lambda c, z: (
        (heads(z).cummax(1).values * heads(z).cummin(2).values).flatten(1) + z * z.cummin(1).indices.to(z.dtype)
    ),
    "running_extremes_with_ties": lambda c, z: z * fit((z.view(-1, 4, 6) > 0).to(z.dtype).cummax(2).indices),
    "cumulative_log": lambda c, z: fit(z.view(-1, 6, 4).logcumsumexp(2)),
    "all_and_any": lambda c, z: z * fit((heads(z) > -0.9).all(2)) + z * fit((heads(z) > 0.9).any(1, keepdim=True)),
    "distances_of_pairs": lambda c, z: fit(F.pairwise_distance(heads(z), heads(z * z + 1))),
    "without_nan": lambda c, z: fit(heads(torch.where(z > 0, z, math.nan)).nansum(1)) + _nan_mean(z),
    "ranges": lambda c, z: fit(torch.aminmax(heads(z), dim=1).max - torch.aminmax(z, dim=1, keepdim=True).min),
    "counts": lambda c, z: z * fit(torch.count_nonzero(heads(z) > 0, dim=2)) + torch.ldexp(z, (z > 0).long()),
    "medians_of_numbers": lambda c, z: (
        fit(heads(torch.where(z > 0.3, math.nan, z)).nanmedian(2).values.nan_to_num(0.5))
        + fit(heads(z).nanmedian(1, keepdim=True)[0])
    ),
    "renormed": lambda c, z: torch.renorm(z, 1, 0, 2.0) + torch.renorm(heads(z), 2, 0, 0.9).flatten(1),
    "norms": lambda c, z: fit(F.normalize(heads(z), dim=1) + heads(z).norm(dim=2, keepdim=True)),
}


def _nan_mean(z: Tensor) -> Tensor:
    return torch.nanmean(torch.where(z > -0.5, z, math.nan), dim=1, keepdim=True)


def _written_by_position(c: Any, z: Tensor) -> Tensor:
    y = z.clone()
    y[:, 1] = 1.5
    y[:, [4, -1]] = z[:, 2:4]
    y[:, c.order[:3]] = c.gain[:3] * z[:, :3]
    y[:, torch.tensor([7])] += 1.0
    y[:, 9] = c.bias[1]
    y[:, 10].fill_(c.gain[2])
    table = heads(y).clone()
    table[:, [0, 2], 1:3] = z[:, 5:6, None]
    table[..., [True, False] * 4] *= 2
    return table.flatten(1) + fit(table[:, :, [True, True, False, False] * 2].sin())


def _written_at_masks(c: Any, z: Tensor) -> Tensor:
    y = z.clone()
    y[(c.square[0, 0] < 9).expand_as(y)] *= 0.5
    y[(c.table[0] > 0).expand_as(y)] = 1.5
    y[c.mean[0] > 9] = 7.0
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=z, validate_args=False),
        torch.distributions.Categorical(logits=c.table[1], validate_args=False),
    )
    return y * divergence[:, None] + z


def _interpolated(c: Any, z: Tensor) -> Tensor:
    knots = torch.linspace(-1, 1, 6, dtype=z.dtype)
    right = torch.searchsorted(knots, z.detach().contiguous()).clamp(1, 5)
    values = c.square[0]
    left = values[right - 1]
    return (
        left
        + (z - knots[right - 1]) / (knots[right] - knots[right - 1]) * (values[right] - left)
        + fit(values * z[:, :8])
    )


def _written_over(c: Any, z: Tensor) -> Tensor:
    """More values than places, and a triangle that is filled from a line."""
    i, j = torch.triu_indices(7, 7, 1)
    square = z.new_zeros(z.shape[0], 7, 7)
    square[:, i, j] = z[:, :21]
    return fit(square - square.mT) + z.scatter(1, _ids(z, 9), z.sin())


def _many_reduced(c: Any, z: Tensor) -> Tensor:
    return fit(z[:, :4].scatter_reduce(1, _ids(z, 4), z.cos(), "amax")) + torch.stack(
        [
            z.scatter_reduce(1, _ids(z, 5), z.sin(), "amin", include_self=False),
            heads(z).scatter_reduce(1, _ids(heads(z).repeat(1, 7, 1), 3), heads(z).repeat(1, 7, 1), "amax").flatten(1),
        ]
    ).sum(0)


def _scatter_reduced(c: Any, z: Tensor) -> Tensor:
    places = (c.order[:5] % 4).expand(len(z), 5)
    each = [
        z[:, :6].scatter_reduce(1, places, z[:, 10:15], reduce, include_self=include_self)
        for reduce in ("sum", "mean", "prod", "amax", "amin")
        for include_self in (True, False)
    ]
    return fit(torch.stack(each, 1))


def _triangles(c: Any, z: Tensor) -> Tensor:
    i, j = torch.tril_indices(4, 4)
    lower = z.new_zeros(len(z), 4, 4)
    lower[:, i, j] = z[:, :10]
    lower[:, range(4), range(4)] += 0.7
    lower[:, j[1:3], i[1:3]] = c.gain[:2]
    picked = (lower @ lower.mT)[:, [[-1], [0]], [0, 1, -2]]
    return fit(lower.sin()) + fit(picked) + fit(lower[:, i, j])


def _copied_and_written(c: Any, z: Tensor) -> Tensor:
    y = torch.select_scatter(heads(z), z[:, :8].sin(), 1, -1)
    y = torch.slice_scatter(y, heads(z)[:, :, :3] * 2, 2, 1, 7, 2)
    square = torch.diagonal_scatter(y.mT @ y, z[:, 2:9], 1, 1, 2)
    return fit(y) + fit(square.index_copy(1, c.order[1:4] % 8, y)) + fit(square.index_fill(2, c.order[:2], 0.7))


# positions,
INDEXING: dict[str, Body] = {
    "written_by_position": _written_by_position,
    "interpolated": _interpolated,
    "scatter_reduced": _scatter_reduced,
    "written_over": _written_over,
    "many_reduced": _many_reduced,
    "triangles_by_position": _triangles,
    "copied_and_written": _copied_and_written,
    "written_at_masks_of_weights": _written_at_masks,
    "taken_from_a_flat_weight": lambda c, z: z * torch.take(c.table, _ids(z, 168)),
    "bins": lambda c, z: (
        z * torch.bucketize(z.detach(), c.mean.sort().values)
        + z * torch.bucketize(z.detach(), torch.linspace(-1, 1, 5, dtype=z.dtype), right=True)
    ),
    "searched_per_row": lambda c, z: (
        z * fit(torch.searchsorted(heads(z).detach().sort(2).values, heads(z * z).detach(), side="right"))
    ),
    "among": lambda c, z: z * torch.isin(_ids(z, 5), torch.tensor([0, 3])) + z * torch.isin(_ids(z, 4), 2, invert=True),
    "embedding": lambda c, z: F.embedding(_ids(z[:, 0], 7), c.table) + F.embedding(_ids(z[:, :2], 7), c.table).sum(1),
    "embedding_with_padding": lambda c, z: F.embedding(_ids(z[:, 0], 7), c.table, padding_idx=3) * z,
    "bags_of_embeddings": lambda c, z: (
        F.embedding_bag(_ids(z[:, :3], 7), c.table)
        + F.embedding_bag(_ids(z[:, :2], 7), c.table, mode="max")
        + F.embedding_bag(_ids(z[:, :3], 7), c.table, mode="sum", per_sample_weights=z[:, 3:6], padding_idx=3)
        + F.embedding_bag(_ids(z[:, :4], 7), c.table, padding_idx=-2)
    ),
    "one_hot": lambda c, z: z * F.one_hot(z.argmax(1), 24),
    "gather": lambda c, z: fit(heads(z).gather(2, heads(z)[..., :4].argsort(2))),
    "gather_over_heads": lambda c, z: fit(heads(z).gather(1, heads(z).argsort(1)[:, :2])),
    "take": lambda c, z: fit(z.index_select(1, c.order)) + fit(z[:, c.order - 3]),
    "sort": lambda c, z: torch.sort(heads(z), 1).values.flatten(1) + z.sort(1, descending=True)[0],
    "topk": lambda c, z: fit(heads(z).topk(3, 2).values) + fit(z.topk(5, largest=False).values),
    "kth": lambda c, z: fit(heads(z).kthvalue(2, 2).values + heads(z).median(2).values),
    "scatter_add": lambda c, z: torch.zeros_like(z).scatter_add(1, _ids(z, 24), z),
    "scatter": lambda c, z: z.scatter(1, z.argmax(1, keepdim=True), 2.0) + _at_best(z),
    "index_add": lambda c, z: z.index_add(1, c.order, z[:, :8], alpha=2.0),
    "index_of_a_table": lambda c, z: c.table[_ids(z[:, :3], 7)].sum(1),
    "own_element_of_each_row": lambda c, z: z * heads(z)[torch.arange(len(z)), z[:, :3].argmax(1)].repeat(1, 3),
    "own_elements_in_two_dimensions": lambda c, z: (
        z * heads(z)[torch.arange(len(z))[:, None], _ids(z[:, :2], 3), _ids(z[:, 2:4], 8) - 8].repeat(1, 12)
    ),
    "own_elements_written": _written_by_row,
    "index_of_a_plane": lambda c, z: fit(image(z)[:, :, c.order[2:4] % 3]),
}
# and small matrices.
MATRICES: dict[str, Body] = {
    "inverse": lambda c, z: torch.linalg.inv(square(z)).flatten(1),
    "solve": lambda c, z: fit(torch.linalg.solve(square(z), z.view(-1, 6, 2, 2)[..., :1])),
    "determinant": lambda c, z: z * fit(torch.linalg.det(square(z))),
    "cholesky": lambda c, z: torch.linalg.cholesky(_positive(z)).flatten(1),
    "cholesky_solve": lambda c, z: fit(
        torch.cholesky_solve(z.view(-1, 6, 2, 2), torch.linalg.cholesky(_positive(z)))
        + torch.cholesky_solve(z.view(-1, 6, 2, 2), _lower(z).mT, upper=True)
    ),
    "triangular": lambda c, z: fit(torch.linalg.solve_triangular(_lower(z), z.view(-1, 6, 2, 2), upper=False)),
    "from_the_right": lambda c, z: fit(
        torch.linalg.solve_triangular(_lower(z), z.view(-1, 6, 2, 2)[..., :1, :], upper=False, left=False)
        + torch.linalg.solve(square(z), z.view(-1, 6, 2, 2)[..., :1, :], left=False)
    ),
    "determinants_of_weights": lambda c, z: (
        z * torch.linalg.det(c.square) + z * torch.linalg.slogdet(c.square[:6, :6]).logabsdet
    ),
    "logarithms_of_determinants": lambda c, z: (
        z * fit(torch.logdet(square(z))) + fit(torch.slogdet(z[:, :9].view(-1, 1, 3, 3)).logabsdet)
    ),
    "larger": lambda c, z: (
        fit(torch.linalg.inv(_larger(z)))
        + fit(
            torch.linalg.solve(_larger(z), z[:, :6])
            + torch.linalg.solve(_larger(z), z[:, None, 6:12], left=False)[:, 0]
        )
    ),
    "larger_determinants": lambda c, z: (
        z * torch.linalg.det(_larger(z))[:, None] + z * torch.linalg.slogdet(_larger(z.flip(1))).logabsdet[:, None]
    ),
    "larger_triangular": lambda c, z: (
        fit(torch.linalg.solve_triangular(_larger(z), z[:, :6, None], upper=True, unitriangular=True))
        + fit(torch.linalg.cholesky(_larger_positive(z), upper=True))
        + fit(torch.cholesky_solve(z[:, :6, None], torch.linalg.cholesky(_larger_positive(z))))
        + fit(torch.cholesky_inverse(torch.linalg.cholesky(_larger_positive(z), upper=True), upper=True))
    ),
    "normal_density": lambda c, z: (
        z * _normal(z[:, :6], covariance_matrix=_larger_positive(z)).log_prob(z[:, 6:12])[:, None]
        + z * _normal(z[:, :8], scale_tril=c.square + 2 * torch.eye(8)).log_prob(z[:, 8:16])[:, None]
    ),
    "one_larger_matrix_for_all_rows": lambda c, z: (
        fit(torch.linalg.solve(c.square, z[:, :8].T).T + torch.linalg.solve(c.square, z[:, :8], left=False))
        + fit(torch.linalg.solve_triangular(c.square, heads(z).mT, upper=False))
        + fit(torch.cholesky_solve(heads(z).mT, torch.linalg.cholesky(c.square @ c.square.T + torch.eye(8))))
    ),
    "one_matrix_for_all_rows": lambda c, z: fit(
        torch.linalg.solve(torch.diag(c.gain + 1) + c.square[:4, :4], z[:, :4].T).T
    ),
    "inverse_by_cholesky": lambda c, z: (
        torch.cholesky_inverse(torch.linalg.cholesky(_positive(z))) + torch.cholesky_inverse(_lower(z).mT, upper=True)
    ).flatten(1),
    "cross": lambda c, z: torch.linalg.cross(z.view(-1, 8, 3), z.view(-1, 8, 3).flip(1)).flatten(1),
    "triangles": lambda c, z: fit(torch.triu(z.view(-1, 6, 4), 1) + torch.tril(z.view(-1, 6, 4))),
    "diagonals": lambda c, z: fit(torch.diag_embed(z[:, :5])) + fit(z.view(-1, 4, 6).diagonal(dim1=1, dim2=2)),
}


def _rotating(c: Any, z: Tensor) -> Tensor:
    state = torch.view_as_complex(z.view(-1, 12, 2))
    turned = state * torch.exp(torch.complex(-c.gain.abs().repeat(3), c.bias.repeat(3))) + torch.polar(
        z[:, :12], z[:, 12:]
    )
    mixed = torch.einsum("ni,nij->nj", turned[:, :3], turned.view(-1, 3, 4)) / (2 + 1j)
    return torch.view_as_real(turned - 0.5 * turned.conj()).flatten(1) + fit(mixed.real) + fit(turned.abs())


def _functions(c: Any, z: Tensor) -> Tensor:
    x = torch.complex(z[:, :6] * 2, z[:, 6:12])
    weight = torch.complex(c.narrow[0, :6], c.narrow[1, :6])
    each = [
        x**3,
        (x + 2) ** -1.5,
        (x - 0.4).sqrt(),
        torch.log(x + 3),
        torch.tanh(3 * x),
        1 - x,
        torch.reciprocal(x + 3),
        torch.sin(x),
        torch.cos(2 * x),
        torch.sinh(x),
        torch.cosh(x),
        torch.sigmoid(3 * x),
    ]
    mapped = torch.addmm(weight[0], x, weight)
    return fit(torch.view_as_real(torch.stack(each).sum(0))) + fit(mapped.imag) + fit(x.square().real)


def _spectrum_cut(c: Any, z: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(image(z), norm="ortho")
    low = torch.zeros_like(spectrum)
    low[..., :2, :2] = spectrum[..., :2, :2] * torch.view_as_complex(c.square[:2].view(2, 2, 2, 2))
    return torch.fft.irfft2(low, s=(3, 4)).flatten(1) + fit(torch.fft.ifft2(torch.fft.fft2(image(z)) * (1 + 2j)).imag)


COMPLEX: dict[str, Body] = {
    "rotations": _rotating,
    "functions": _functions,
    "products": lambda c, z: (
        fit(torch.view_as_real(torch.complex(heads(z), heads(z * z)).prod(1)))
        + fit(torch.complex(heads(z), heads(z * z)).cumprod(2).imag)
    ),
    "fourier_of_images": _spectrum_cut,
    "conjugates": lambda c, z: (
        fit((torch.complex(heads(z), heads(z * z)).conj() @ torch.complex(heads(z), -heads(z)).mH).imag)
        + fit(torch.complex(z, z * z).conj().imag.sin())
    ),
    "angles": lambda c, z: fit(torch.polar(z[:, :6], torch.complex(z[:, 6:12], z[:, 12:18]).angle()).imag),
    "angles_of_a_spectrum": lambda c, z: fit(torch.fft.rfft(heads(z)).angle().sin()),
    "complex_from_real": lambda c, z: fit(
        (z[:, :6].to(torch.complex128 if z.dtype == torch.float64 else torch.complex64) * (2 + 1j)).imag
    ),
    "powers_of_e": lambda c, z: fit(torch.exp(1j * torch.complex(z[:, :6], z[:, 6:12])).imag),
    "complex_parameters": lambda c, z: fit((torch.complex(z[:, :3], z[:, 3:6]) * torch.view_as_complex(c.phases)).imag),
    "conjugates_of_parameters": lambda c, z: (
        fit((torch.complex(z[:, :3], z[:, 3:6]) @ torch.view_as_complex(c.phases).conj())[:, None].real)
        + fit((torch.complex(z[:, 6:9], z[:, 9:12]) * torch.view_as_complex(c.phases).conj()).imag)
    ),
    "fourier": lambda c, z: torch.fft.irfft(torch.fft.rfft(z) * torch.sigmoid(c.table[0, :13]), n=24),
    "fourier_of_heads": lambda c, z: fit(torch.fft.fft(torch.complex(heads(z), heads(z * z)), dim=1).real),
}


def _at_best(z: Tensor) -> Tensor:
    best = z.topk(3)
    return torch.zeros_like(z).scatter(1, best.indices, best.values * 2)


AXES: dict[str, Body] = {**PRODUCTS, **IMAGES, **REDUCTIONS, **INDEXING, **MATRICES, **COMPLEX}
