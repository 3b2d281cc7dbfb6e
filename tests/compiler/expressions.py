"""Expressions for the lines of random cells; ``{a}`` and ``{b}`` are values of the step."""

__all__ = ["BINARY", "GROUPED", "NORMS", "ORDERS", "POWERS", "REDUCTIONS", "TENSORS", "UNARY"]

UNARY = (
    *(f"torch.{name}({{a}})" for name in ("tanh", "sigmoid", "sin", "cos", "abs", "neg", "square", "sign", "erf")),
    *(f"torch.{name}({{a}})" for name in ("erfc", "floor", "ceil", "trunc")),
    *(f"F.{name}({{a}})" for name in ("relu", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "softplus")),
    *(f"F.{name}({{a}})" for name in ("hardtanh", "hardsigmoid", "hardswish", "mish", "softsign", "logsigmoid")),
    *(f"F.{name}({{a}})" for name in ("hardshrink", "softshrink", "relu6")),
    # Of a small number, tanhshrink is the rounding of tanh and nothing else.
    "F.tanhshrink({a} + 1)",
    *(f"torch.{name}({{a}}.abs() + 1)" for name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal", "log2", "log10")),
    *(f"torch.{name}(torch.tanh({{a}}))" for name in ("exp", "exp2", "expm1", "tan")),
    "F.gelu({a}, approximate='tanh')",
    "F.softplus({a}, 2.0, 1.0)",
    "F.elu({a}, 0.5)",
    "F.threshold({a}, 0.1, 0.2)",
    "torch.exp(-{a}.abs())",
    "({a}.abs() + 0.1) ** 1.5",
    "({a}.abs() + 0.2) ** -0.5",
    "{a} ** 2",
    "{a} ** 3",
    "2 ** torch.tanh({a})",
    "1 - {a}",
    "0.9 * {a} + 0.1",
    "{a} / 3",
    "2 / ({a}.abs() + 1)",
    "{a}.clamp(-0.3, 0.4)",
    "{a}.clamp(min=0)",
    "torch.nan_to_num({a}, 0.0, 5.0, -5.0)",
    "torch.div({a}, 0.3, rounding_mode='trunc')",
    "({a} * 2).add_(1).mul_({a})",
    "torch.relu_({a} * 2)",
    "{a} * {a}.detach()",
    "torch.ones_like({a}) * 2 - {a}",
)
POWERS = {"torch.square({a})": 2, "{a} ** 2": 2, "{a} ** 3": 3, "({a}.abs() + 0.1) ** 1.5": 1.5}
BINARY = (
    "{a} + {b}",
    "{a} - {b}",
    "{b} - {a}",
    "{a} * {b}",
    "{a} / ({b} * {b} + 0.5)",
    "{b} / ({a}.abs() + 1)",
    "torch.sub({a}, {b}, alpha=3)",
    "0.7 * {a} + 0.3 * {b}",
)
TENSORS = (
    "torch.maximum({a}, {b})",
    "torch.minimum({a}, {b})",
    "{a}.clamp(max={b})",
    "torch.clamp({a}, -{b}.abs(), {b}.abs())",
    "torch.where({a} > {b}, {a}, {b})",
    "torch.where({b} > 0.1, {a}, -1.0)",
    "({a} <= {b}) * {a}",
    "torch.lerp({a}, {b}, 0.3)",
    "torch.lerp({a}, {b}, torch.sigmoid({b}))",
    "torch.addcmul({a}, {a}, {b}, value=0.5)",
    "torch.addcdiv({a}, {b}, {a}.abs() + 1)",
    "({a}.abs() + 0.1) ** torch.tanh({b})",
    "torch.sigmoid({a}) * {a} + (1 - torch.sigmoid({a})) * {b}",
    "{a}.masked_fill({b} > 0.2, 1.5)",
    "F.prelu({a}, self.one) * {b}",
)
# Each with how much larger than its argument it can be, for a value of ten features.
REDUCTIONS = {
    "{a}.sum(-1, keepdim=True)": 10,
    "{a}.mean(-1, keepdim=True)": 1,
    "{a}.mean(1)[:, None]": 1,
    "{a}.var(-1, keepdim=True, unbiased=False)": 10,
    "({a}.var(-1, keepdim=True) + 0.3).sqrt()": 2,
    "torch.var_mean({a}, -1, keepdim=True)[0]": 10,
    "{a}.amax(-1, keepdim=True)": 1,
    "{a}.amin(-1, keepdim=True)": 1,
    "{a}.detach().max(-1, keepdim=True)[0]": 1,
    "{a}.norm(dim=-1, keepdim=True)": 4,
    "torch.linalg.vector_norm({a}, 1, -1, keepdim=True)": 10,
    "torch.linalg.vector_norm({a}, float('inf'), -1, keepdim=True)": 1,
    "{a}.logsumexp(-1, keepdim=True)": 2,
    "({a} * {a}.softmax(-1)).sum(-1, keepdim=True)": 1,
    "F.cosine_similarity({a}, {a}.cos(), dim=1)[:, None]": 1,
}
NORMS = (
    "{a}.softmax(-1)",
    "{a}.log_softmax(-1)",
    "F.layer_norm({a}, ({w},), None, None, 0.1)",
    "F.layer_norm({a}, ({w},), {v}, None, 0.1)",
    "F.layer_norm({a}, ({w},), {v}, {u}, 0.1)",
    "F.rms_norm({a}, ({w},))",
    "F.rms_norm({a}, ({w},), {v}, 0.1)",
    "{a} / ({a}.norm(dim=-1, keepdim=True) + 0.5)",
    "{a} - {a}.mean(-1, keepdim=True)",
    "{a} * torch.sigmoid({a}.sum(-1, keepdim=True))",
)
GROUPED = (
    "{a}.view(-1, {p}, {q}).softmax(2).flatten(1)",
    "{a}.view(-1, {p}, {q}).softmax(1).flatten(1)",
    "{a}.unflatten(1, ({p}, {q})).log_softmax(-1).flatten(1)",
    "F.layer_norm({a}.view(-1, {p}, {q}), ({q},), None, None, 0.1).flatten(1)",
    "({a}.view(-1, {p}, {q}) - {a}.view(-1, {p}, {q}).mean(2, keepdim=True)).flatten(1)",
    "{a}.view(-1, {p}, {q}).transpose(1, 2).tanh().reshape(-1, {w})",
)
ORDERS = ("{a}.flip(1)", "torch.roll({a}, 1, 1)", "torch.stack({a}.unbind(1)[::-1], 1)")
