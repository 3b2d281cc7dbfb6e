"""Other libraries' layers that run as scans: outputs, states and gradients are those of the library's own loops.

.ci/run runs these with the packages of tests/integrations/requirements.txt; elsewhere those of absent ones are skipped.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fusecell as fc
from fusecell.other_libraries import scanned_class

pytestmark = pytest.mark.packages
DOUBLE = torch.float64


def package(name: str) -> Any:
    """Import a module of a package that may be absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture(autouse=True)
def warnings_of_theirs():
    """Let the libraries warn of what they like, while fusecell's warnings stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", fc.EagerWarning)
        yield


def leaves(result: Any) -> list[torch.Tensor]:
    return [value for value in torch.utils._pytree.tree_leaves(result) if isinstance(value, torch.Tensor)]


def agree(
    model: nn.Module, *arguments: Any, tolerance: float = 1e-10, replaced: int = 1, call: Any = None
) -> nn.Module:
    """Compare a model with a copy that is replaced, in results and gradients; return the copy."""
    call = call or (lambda module, *arguments: module(*arguments))
    ours = copy.deepcopy(model)
    report = fc.replace(ours)
    assert len(report.changed) == replaced, report
    assert list(ours.state_dict()) == list(model.state_dict())
    results = []
    for module in (model, ours):
        module.zero_grad()
        torch.manual_seed(1)
        result = leaves(call(module, *arguments))
        trained = [value for value in result if value.requires_grad]
        weights = [torch.randn(value.shape, dtype=value.dtype) for value in trained]
        torch.autograd.backward([(value * weight).sum() for value, weight in zip(trained, weights, strict=True)])
        results.append(result)
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    for (name, theirs), mine in zip(model.named_parameters(), ours.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        actual = torch.zeros_like(mine) if mine.grad is None else mine.grad
        torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=10 * tolerance, msg=name)
    return ours


# --- torchrecurrent


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LiGRU", {"num_layers": 2, "batch_first": True}),
        ("JANET", {"num_layers": 2}),
        ("NAS", {}),
        ("SCRN", {}),
        ("MCLSTM", {"batch_first": True}),
    ],
)
def test_torchrecurrent(name, options):
    library = package("torchrecurrent")
    torch.manual_seed(0)
    layer = getattr(library, name)(5, 7, **options).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    x = torch.randn(4, 3, 5, dtype=DOUBLE)
    ours = agree(layer, x)
    assert [fc.explain(cell).training_runner for _, cell in ours.scanned_cells.values()] == [
        "compiled"
    ] * layer.num_layers
    with torch.no_grad():
        state = layer(x)[1]
        torch.testing.assert_close(ours(x, state), layer(x, state), rtol=1e-10, atol=1e-10)


def test_every_layer_of_torchrecurrent_is_replaced_or_left_for_a_reason():
    library = package("torchrecurrent")
    base = importlib.import_module("torchrecurrent.base").RecurrentLayerBase
    kinds = [kind for kind in vars(library).values() if isinstance(kind, type) and issubclass(kind, base)]
    left = {kind.__name__: scanned_class(kind) for kind in kinds if not isinstance(scanned_class(kind), type)}
    assert len(kinds) - len(left) >= 38
    assert all("is its own" in str(reason) for reason in left.values()), left


def test_what_a_scan_would_change_stays_the_librarys():
    """Dropout in every step is drawn as the library draws it; a sequence of no steps is refused as there."""
    library = package("torchrecurrent")
    layer = library.MGU(5, 7, num_layers=2, dropout=0.5)
    ours = copy.deepcopy(layer)
    fc.replace(ours)
    x = torch.randn(4, 3, 5)
    for module in (layer.train(), ours.train()):
        torch.manual_seed(3)
        module.result = module(x)[0]
    assert torch.equal(layer.result, ours.result)
    torch.testing.assert_close(ours.eval()(x), layer.eval()(x))
    with pytest.raises(RuntimeError):
        ours(x[:0])


# --- ncps


@pytest.mark.parametrize("kind", ["CfC", "mixed", "last", "wired", "LTC"])
def test_ncps(kind):
    library = package("ncps.torch")
    wirings = package("ncps.wirings")
    torch.manual_seed(0)
    layer, state = {
        "CfC": lambda: (library.CfC(5, 7, proj_size=3), torch.randn(3, 7)),
        "mixed": lambda: (library.CfC(5, 7, mode="no_gate", mixed_memory=True), (torch.randn(3, 7), torch.randn(3, 7))),
        "last": lambda: (library.CfC(5, 7, mode="pure", return_sequences=False), None),
        "wired": lambda: (library.CfC(5, wirings.AutoNCP(11, 3)), torch.randn(3, 11)),
        "LTC": lambda: (library.LTC(5, wirings.AutoNCP(11, 3), batch_first=True), None),
    }[kind]()
    x = torch.randn(3, 6, 5)
    ours = agree(layer, x, state, tolerance=2e-5)
    assert [fc.explain(cell).training_runner for _, cell in ours.scanned_cells.values()] == ["compiled"]
    ours.scanned_cells = None
    torch.testing.assert_close(ours(x[0])[0], layer(x[0])[0])  # without a batch, by ncps itself
    assert ours.scanned_cells is None


# --- speechbrain


@pytest.mark.parametrize("kind", ["LiGRU", "SLiGRU"])
@pytest.mark.parametrize("nonlinearity", ["relu", "sin"])
def test_speechbrain(kind, nonlinearity):
    library = package("speechbrain.nnet.RNN")
    torch.manual_seed(0)
    model = getattr(library, kind)(
        7, (3, 6, 5), num_layers=2, bidirectional=True, dropout=0.3, nonlinearity=nonlinearity
    ).double()
    x = torch.randn(3, 6, 5, dtype=DOUBLE)
    ours = agree(model, x, replaced=2)  # in training, with dropout's masks
    layers = [layer for layer in ours.modules() if hasattr(layer, "scanned_cells")]
    cells = [layer.scanned_cells[0][1] for layer in layers]
    assert [fc.explain(cell, input_sizes=(14, 7)).training_runner for cell in cells] == ["compiled"] * 2
    for module in (model, ours):  # running means and variances have moved alike
        module.eval()
    more = torch.randn(4, 9, 5, dtype=DOUBLE)
    torch.testing.assert_close(ours(more), model(more), rtol=1e-10, atol=1e-10)


def test_a_layer_that_is_replaced_is_copied_pickled_and_restored():
    library = package("speechbrain.nnet.RNN")
    layer = library.LiGRU_Layer(5, 7, 1, 3)
    x = torch.randn(3, 6, 5)
    expected = layer.eval()(x)
    report = fc.replace(layer)
    assert str(report).endswith("LiGRU_Layer -> fusecell's speechbrain.nnet.RNN.LiGRU_Layer")
    assert isinstance(layer, library.LiGRU_Layer)
    torch.testing.assert_close(layer(x), expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert other.scanned_cells is None
        torch.testing.assert_close(other(x), expected)
        with torch.no_grad():
            other.u.weight.zero_()
        assert not torch.allclose(other(x), expected)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script can't compile LiGRU_Layer"):
        torch.jit.script(layer)
    layer.u = nn.Linear(7, 14, bias=False)  # another part, another cell
    assert not torch.allclose(layer(x), expected)
    assert len(fc.replace(layer, back=True).changed) == 1
    assert type(layer) is library.LiGRU_Layer
    assert "scanned_cells" not in vars(layer)


def test_a_loop_of_ones_own_is_left():
    library = package("speechbrain.nnet.RNN")

    class Own(library.LiGRU_Layer):
        def _ligru_cell(self, w, ht):
            return w

    report = fc.replace(nn.Sequential(Own(5, 7, 1, 3)))
    assert report.changed == ()
    assert report.left == (("0", "Own: the _ligru_cell of Own is its own"),)


def test_models_are_accelerated_as_they_are_built():
    library = package("speechbrain.nnet.RNN")
    with fc.accelerate() as report:
        library.LiGRU(7, (3, 6, 5))
    assert [after for _, _, after in report.changed] == ["fusecell's speechbrain.nnet.RNN.LiGRU_Layer"]


# --- sb3-contrib


@pytest.mark.parametrize("layers", [1, 2])
def test_sb3_contrib(layers):
    policies = package("sb3_contrib.common.recurrent.policies")
    spaces = package("gymnasium").spaces
    torch.manual_seed(0)
    policy = policies.RecurrentActorCriticPolicy(
        spaces.Box(-1, 1, (5,)), spaces.Discrete(3), lambda _: 1e-3, lstm_hidden_size=7, n_lstm_layers=layers
    )
    rows, steps = 3, 6
    observation = torch.randn(rows * steps, 5)
    states = policies.RNNStates(*[(torch.randn(layers, rows, 7), torch.randn(layers, rows, 7)) for _ in range(2)])
    begins = torch.zeros(rows * steps)
    begins[[0, 3, 4, 17]] = 1.0
    action = torch.arange(rows * steps) % 3

    def evaluate(policy: Any, begins: Any) -> Any:
        return policy.evaluate_actions(observation, action, states, begins)

    fresh = copy.deepcopy(policy)
    ours = agree(policy, begins, tolerance=1e-5, replaced=3, call=evaluate)
    agree(fresh, torch.zeros_like(begins), tolerance=1e-5, replaced=3, call=evaluate)
    # A step of a rollout, deterministic, as sampling would draw.
    one = [policies.RNNStates(*states), begins[:rows]]
    torch.testing.assert_close(ours(observation[:rows], *one, True), policy(observation[:rows], *one, True))


# --- torchrl


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("starts", ["none", "zeros", "others"])
def test_torchrl(kind, layers, starts):
    library = package("torchrl.modules")
    tensordict = package("tensordict")
    torch.manual_seed(0)
    names = ("h",) if kind == "GRU" else ("h", "c")
    module = getattr(library, f"{kind}Module")(
        5, 7, num_layers=layers, in_keys=["x", *names], out_keys=["y", *[("next", name) for name in names]]
    ).double()
    data = tensordict.TensorDict(
        {"x": torch.randn(3, 8, 5, dtype=DOUBLE), "is_init": torch.zeros(3, 8, 1, dtype=torch.bool)}, [3, 8]
    )
    data["is_init"][0, 0] = data["is_init"][1, 3] = data["is_init"][1, 4] = data["is_init"][2, 7] = True
    if starts != "none":
        for name in names:
            state = torch.randn(3, 8, layers, 7, dtype=DOUBLE)
            data[name] = state if starts == "others" else state * ~data["is_init"][..., None]

    def call(module: Any, data: Any) -> Any:
        with library.set_recurrent_mode(True):
            result = module(data.clone())
        return [result["y"], *[result["next", name] for name in names]]

    ours = agree(module, data, replaced=2, call=call)
    assert ours.recurrent_backend == "scan"
    assert vars(ours)["recurrent_backend"] == "pad"
    agree(module, data.exclude("is_init").set("is_init", torch.zeros_like(data["is_init"])), replaced=2, call=call)
    step = data[:, 0].exclude("y")  # one step of a rollout
    torch.testing.assert_close(ours(step.clone())["y"], module(step.clone())["y"])
    fc.replace(ours, back=True)
    assert ours.recurrent_backend == "pad"
    assert type(ours) is type(module)
