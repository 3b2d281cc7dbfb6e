"""Every cell of the zoo: it keeps the contract, and computes its equation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fusecell as fc
from fusecell.cells import ZooCell
from fusecell.testing import check_cell

Array = np.ndarray
Equation = Callable[[dict[str, Array], Array, tuple[Array, ...]], tuple[Array, tuple[Array, ...]]]

pytestmark = pytest.mark.usefixtures("eager")

SIZES = [(1, 1), (3, 4), (7, 5), (4, 17)]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0)


def norm(p: dict[str, Array], name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def rows(matrix: Array, parts: int) -> list[Array]:
    return np.split(matrix, parts)


# Each equation is written gate by gate, matrix by matrix, from its paper: nothing here is shared with the cells.


def rnn(act: Callable[[Array], Array]) -> Equation:
    def step(p, x, s):
        h = act(x @ p["weight_ih"].T + p["bias_ih"] + s[0] @ p["weight_hh"].T + p["bias_hh"])
        return h, (h,)

    return step


def gru(reset_after: bool) -> Equation:
    def step(p, x, s):
        h = s[0]
        w_r, w_z, w_n = rows(p["weight_ih"], 3)
        u_r, u_z, u_n = rows(p["weight_hh"], 3)
        a_r, a_z, a_n = rows(p["bias_ih"], 3)
        b_r, b_z, b_n = rows(p["bias_hh"], 3)
        r = sigmoid(x @ w_r.T + a_r + h @ u_r.T + b_r)
        z = sigmoid(x @ w_z.T + a_z + h @ u_z.T + b_z)
        if reset_after:
            n = np.tanh(x @ w_n.T + a_n + r * (h @ u_n.T + b_n))
        else:
            n = np.tanh(x @ w_n.T + a_n + (r * h) @ u_n.T + b_n)
        h = (1 - z) * n + z * h
        return h, (h,)

    return step


def lstm(p, x, s):
    h, c = s
    pre = [
        x @ w.T + a + h @ u.T + b
        for w, a, u, b in zip(*(rows(p[k], 4) for k in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")), strict=True)
    ]
    i, f, g, o = sigmoid(pre[0]), sigmoid(pre[1]), np.tanh(pre[2]), sigmoid(pre[3])
    c = f * c + i * g
    h = o * np.tanh(c)
    if "weight_hr" in p:
        h = h @ p["weight_hr"].T
    return h, (h, c)


def lstm_peephole(p, x, s):
    h, c = s
    i, f, g, o = (
        x @ w.T + a + h @ u.T
        for w, a, u in zip(*(rows(p[k], 4) for k in ("weight_ih", "bias_ih", "weight_hh")), strict=True)
    )
    p_i, p_f, p_o = rows(p["weight_ch"], 3)
    c_new = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
    h = sigmoid(o + p_o * c_new) * np.tanh(c_new)
    return h, (h, c_new)


def lstm_layer_norm(p, x, s):
    h, c = s
    total = norm(p, "norm_ih", x @ p["weight_ih"].T) + norm(p, "norm_hh", h @ p["weight_hh"].T)
    i, f, g, o = np.split(total, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(norm(p, "norm_c", c))
    return h, (h, c)


def gru_layer_norm(p, x, s):
    h = s[0]
    size = h.shape[1]
    w_gates, w_n = p["weight_ih"][: 2 * size], p["weight_ih"][2 * size :]
    u_gates, u_n = p["weight_hh"][: 2 * size], p["weight_hh"][2 * size :]
    gates = sigmoid(norm(p, "norm_ih_gates", x @ w_gates.T) + norm(p, "norm_hh_gates", h @ u_gates.T))
    r, z = gates[:, :size], gates[:, size:]
    n = np.tanh(norm(p, "norm_ih_candidate", x @ w_n.T) + r * norm(p, "norm_hh_candidate", h @ u_n.T))
    h = (1 - z) * n + z * h
    return h, (h,)


def mgu(p, x, s):
    h = s[0]
    (w_f, w_n), (u_f, u_n), (b_f, b_n) = (rows(p[k], 2) for k in ("weight_ih", "weight_hh", "bias_ih"))
    f = sigmoid(x @ w_f.T + h @ u_f.T + b_f)
    h = (1 - f) * h + f * np.tanh(x @ w_n.T + (f * h) @ u_n.T + b_n)
    return h, (h,)


def ligru(p, x, s):
    h = s[0]
    u_z, u_n = rows(p["weight_hh"], 2)
    x_z, x_n = np.split(norm(p, "norm_ih", x @ p["weight_ih"].T), 2, -1)
    z = sigmoid(x_z + h @ u_z.T)
    h = z * h + (1 - z) * relu(x_n + h @ u_n.T)
    return h, (h,)


def ugrnn(p, x, s):
    h = s[0]
    (w_g, w_n), (u_g, u_n), (b_g, b_n) = (rows(p[k], 2) for k in ("weight_ih", "weight_hh", "bias_ih"))
    g = sigmoid(x @ w_g.T + h @ u_g.T + b_g + 1)
    h = g * h + (1 - g) * np.tanh(x @ w_n.T + h @ u_n.T + b_n)
    return h, (h,)


def min_gru(p, x, s):
    (w_z, w_n), (b_z, b_n) = (rows(p[k], 2) for k in ("weight_ih", "bias_ih"))
    z = sigmoid(x @ w_z.T + b_z)
    h = (1 - z) * s[0] + z * (x @ w_n.T + b_n)
    return h, (h,)


def fast_grnn(p, x, s):
    h = s[0]
    a = x @ p["weight_ih"].T + h @ p["weight_hh"].T
    z, n = sigmoid(a + p["bias_z"]), np.tanh(a + p["bias_n"])
    h = (sigmoid(p["zeta"]) * (1 - z) + sigmoid(p["nu"])) * n + z * h
    return h, (h,)


def leaky(p, x, s):
    h = 0.8 * s[0] + 0.2 * relu(x @ p["weight_ih"].T + p["bias_ih"] + s[0] @ p["weight_hh"].T)
    return h, (h,)


def ind_rnn(p, x, s):
    h = relu(x @ p["weight_ih"].T + p["bias_ih"] + s[0] * p["weight_hh"])
    return h, (h,)


def antisymmetric(p, x, s):
    h, w = s[0], p["weight_hh"]
    matrix = w - w.T - 0.01 * np.eye(len(w))
    h = h + 0.01 * np.tanh(x @ p["weight_ih"].T + p["bias_ih"] + h @ matrix.T)
    return h, (h,)


def co_rnn(p, x, s):
    y, z = s
    w_y, w_z = np.split(p["weight_hh"], 2, -1)
    force = np.tanh(x @ p["weight_ih"].T + p["bias_ih"] + y @ w_y.T + z @ w_z.T)
    z = z + 0.042 * (force - 2.7 * y - 4.7 * z)
    y = y + 0.042 * z
    return y, (y, z)


def scrn(p, x, s):
    h, slow = s
    slow = 0.05 * (x @ p["weight_is"].T) + 0.95 * slow
    h = sigmoid(slow @ p["weight_sh"].T + x @ p["weight_ih"].T + h @ p["weight_hh"].T)
    return np.concatenate((h, slow), -1), (h, slow)


EQUATIONS: dict[str, Equation] = {
    "rnn_tanh": rnn(np.tanh),
    "rnn_relu": rnn(relu),
    "gru": gru(reset_after=True),
    "gru_reset_before": gru(reset_after=False),
    "lstm": lstm,
    "lstm_projected": lstm,
    "lstm_peephole": lstm_peephole,
    "lstm_layer_norm": lstm_layer_norm,
    "gru_layer_norm": gru_layer_norm,
    "mgu": mgu,
    "ligru": ligru,
    "ugrnn": ugrnn,
    "min_gru": min_gru,
    "fast_grnn": fast_grnn,
    "leaky": leaky,
    "ind_rnn": ind_rnn,
    "antisymmetric": antisymmetric,
    "co_rnn": co_rnn,
    "scrn": scrn,
}


def make(entry: ZooCell, input_size: int, hidden_size: int, **options) -> fc.Cell:
    if entry.name == "lstm_projected":
        hidden_size += hidden_size == 1  # a projection must be narrower than what it projects
    return entry.make(input_size, hidden_size, **options)


def test_every_cell_has_its_equation_here():
    assert list(EQUATIONS) == [entry.name for entry in fc.CELLS]


@pytest.mark.parametrize(("input_size", "hidden_size"), SIZES)
def test_the_equation_in_numpy(zoo_cell: ZooCell, input_size: int, hidden_size: int):
    cell = make(zoo_cell, input_size, hidden_size, dtype=torch.float64)
    for parameter in cell.parameters():  # gains of one and biases of zero would hide mistakes
        torch.nn.init.normal_(parameter, std=0.7)
    p = {name: value.detach().numpy() for name, value in cell.named_parameters()}
    x = torch.randn(6, 3, input_size, dtype=torch.float64)
    state = tuple(torch.randn(3, size, dtype=torch.float64) for size in cell.state_sizes)
    with torch.no_grad():
        outputs, after = fc.scan(cell, x, state if len(state) > 1 else state[0])
    now = tuple(value.numpy() for value in state)
    for t in range(6):
        output, now = EQUATIONS[zoo_cell.name](p, x[t].numpy(), now)
        np.testing.assert_allclose(outputs[t].numpy(), output, rtol=1e-12, atol=1e-12)
    for actual, expected in zip((after,) if len(state) == 1 else after, now, strict=True):
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_keeps_the_contract(zoo_cell: ZooCell):
    check_cell(zoo_cell.make(3, 4))
    check_cell(zoo_cell.make(5, 3).double().eval(), steps=4, batch_size=2, seed=1)


def test_keeps_the_contract_without_bias(zoo_cell: ZooCell):
    if "bias" not in inspect.signature(zoo_cell.cell).parameters:
        assert zoo_cell.name == "fast_grnn"
        return
    cell = zoo_cell.make(3, 4, bias=False)
    assert not [name for name, _ in cell.named_parameters() if "bias" in name]
    check_cell(cell, steps=3, batch_size=2)


def test_parameters_take_device_and_dtype(zoo_cell: ZooCell):
    cell = zoo_cell.make(3, 4, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in cell.parameters()} == {("meta", torch.float64)}


def test_reset_parameters_repeats_the_construction(zoo_cell: ZooCell):
    torch.manual_seed(3)
    cell = zoo_cell.make(3, 16)
    expected = {name: value.clone() for name, value in cell.state_dict().items()}
    for parameter in cell.parameters():
        torch.nn.init.constant_(parameter, 9.0)
    torch.manual_seed(3)
    cell.reset_parameters()
    assert all(torch.equal(value, expected[name]) for name, value in cell.state_dict().items())
    drawn = [p for name, p in cell.named_parameters() if name in ("weight_ih", "bias_ih")]
    assert all(0.1 < p.abs().max().item() <= 1 / math.sqrt(16) for p in drawn)


# Their steps are meant for hundreds of them; six need larger ones to get anywhere.
LARGER_STEPS = {"antisymmetric": {"epsilon": 0.5}, "co_rnn": {"dt": 0.5}}


def test_every_cell_trains(zoo_cell: ZooCell):
    cell = zoo_cell.make(3, 8, **LARGER_STEPS.get(zoo_cell.name, {}))
    layer = fc.Sequential(fc.Recurrent(cell), torch.nn.Linear(cell.output_size, 1))
    x = torch.randn(6, 16, 3)
    target = x.cumsum(0)[..., :1].tanh()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.mse_loss(layer(x)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in layer.parameters())


def test_the_list_names_each_cell_once():
    names = [entry.name for entry in fc.CELLS]
    assert len(set(names)) == len(names)
    listed = {entry.cell for entry in (*fc.CELLS, *fc.cells.STRUCTURED_CELLS)}
    public = {getattr(fc.cells, name) for name in fc.cells.__all__}
    assert listed == {value for value in public if isinstance(value, type) and issubclass(value, fc.Cell)}
    for entry in fc.CELLS:
        assert entry.paper
        assert entry.summary
        assert "=" in entry.equation


@pytest.mark.parametrize("name", [name for name in fc.cells.__all__ if name.endswith("Cell")][2:])
def test_the_docstring_has_equation_example_and_paper(name: str):
    text = getattr(fc.cells, name).__doc__
    for part in (".. math::", "Example:", ">>> ", "Arguments:", "Paper:"):
        assert part in text, part


def test_repr_shows_the_options():
    assert repr(fc.cells.LeakyCell(3, 4, 0.5, bias=False)) == (
        "LeakyCell(3, 4, bias=False, alpha=0.5, nonlinearity='relu', sigma=0.0)"
    )
    assert repr(fc.cells.MGUCell(3, 4)) == "MGUCell(3, 4)"


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"LeakyCell: alpha is dt / tau and must be in \(0, 1\], got 0"):
        fc.cells.LeakyCell(3, 4, alpha=0)
    with pytest.raises(ValueError, match="sigma is a standard deviation and can't be negative, got -1"):
        fc.cells.LeakyCell(3, 4, sigma=-1)
    with pytest.raises(ValueError, match="IndRNNCell: nonlinearity must be 'relu' or 'tanh', got 'gelu'"):
        fc.cells.IndRNNCell(3, 4, nonlinearity="gelu")
    with pytest.raises(ValueError, match="LiGRUCell: norm must be 'layer' or None, got 'batch'"):
        fc.cells.LiGRUCell(3, 4, norm="batch")


def test_noise_of_the_leaky_cell():
    cell = fc.cells.LeakyCell(3, 4, alpha=0.5, sigma=0.3, nonlinearity="tanh", dtype=torch.float64)
    check_cell(cell)
    check_cell(cell.eval())
    cell.train()
    x, h = torch.randn(5, 2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    torch.manual_seed(4)
    y, _ = fc.scan(cell, x, h)
    torch.manual_seed(4)
    noise = torch.randn(5, 2, 4, dtype=torch.float64)
    for t in range(5):
        current = x[t] @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T
        h = 0.5 * h + 0.5 * torch.tanh(current + math.sqrt(2 / 0.5) * 0.3 * noise[t])
        torch.testing.assert_close(y[t], h, rtol=1e-12, atol=1e-12)
    assert cell.eval().draw(5, 2) == ()
    assert cell.inputs == ("x",)


def test_ligru_without_norm():
    cell = fc.cells.LiGRUCell(3, 4, norm=None, dtype=torch.float64)
    check_cell(cell)
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    both = x @ cell.weight_ih.T + cell.bias_ih + h @ cell.weight_hh.T
    z = torch.sigmoid(both[:, :4])
    torch.testing.assert_close(cell(x, h), z * h + (1 - z) * both[:, 4:].clamp(min=0), rtol=1e-12, atol=1e-12)


def test_initial_values_the_papers_ask_for():
    cell = fc.cells.FastGRNNCell(3, 4)
    assert cell.zeta.item() == 1
    assert cell.nu.item() == -4
    assert (cell.bias_z == 1).all()
    recurrent = fc.cells.IndRNNCell(3, 400).weight_hh
    assert recurrent.min() >= 0
    assert 0.9 < recurrent.max() <= 1


def test_scrn_takes_a_context_of_its_own_size():
    cell = fc.cells.SCRNCell(3, 4, 7, bias=True)
    assert (cell.state_sizes, cell.output_size) == ((4, 7), 11)
    check_cell(cell)
