"""Tools that take models, each a function that uses it on a model of torch.nn's layers or of fusecell's.

``python -m tests.integrations.tools`` runs every one that is installed, the long ones too, and prints the table of
docs/integrations.md.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fusecell as fc
from tests.integrations.packages import missing

TOOLS: list[Tool] = []


@dataclass(frozen=True)
class Tool:
    """One row of the table.

    Arguments:
        name: of the tool, in the table.
        group: the heading it stands under.
        use: called with ``torch.nn`` or ``fusecell``; returns what both must agree in.
        package: what has to be importable, besides torch.
        torch, fusecell: whether it works with each; "no" is tested too.
        note: what a user should know.
        long: too long for a test; the script runs it.
    """

    name: str
    group: str
    use: Callable[[Any], Any]
    package: str = ""
    torch: bool = True
    fusecell: bool = True
    note: str = ""
    long: bool = False

    @property
    def missing(self) -> str:
        return missing(self.package) if self.package else ""

    def run(self, library: Any) -> Any:
        """Use the tool with a library, from the same random numbers each time."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.use(library)


def tool(name: str, group: str, **options: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(use: Callable[[Any], Any]) -> Callable[[Any], Any]:
        TOOLS.append(Tool(name, group, use, **options))
        return use

    return register


class Model(nn.Module):
    """A layer, batch first, and a head over its last step."""

    def __init__(self, library: Any, kind: str = "GRU", **options: Any) -> None:
        super().__init__()
        self.layer, self.out = getattr(library, kind)(5, 8, batch_first=True, **options), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.layer(x)
        return self.out(torch.relu(y[:, -1]))


class CellLoop(nn.Module):
    """Cells that a model calls step by step."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.first, self.second = library.GRUCell(5, 8), library.LSTMCell(8, 8)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.first(x, h)
        return self.second(h, (h, h))


def inputs() -> torch.Tensor:
    """A batch of 4 rows of 7 steps."""
    return torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor | None]:
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[torch.Tensor]:
    """Train on a batch, and return the parameters."""

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = model(inputs()).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
    return [parameter.detach() for parameter in model.parameters()]


# --- Files and copies


@tool("state_dict, torch.save, torch.load(weights_only=True)", "Files and copies")
def _(library):
    model, file = Model(library), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Model(library)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return list(model.state_dict()), other(inputs())


@tool("torch.save of a model", "Files and copies")
def _(library):
    file = io.BytesIO()
    torch.save(Model(library), file)
    file.seek(0)
    return torch.load(file, weights_only=False)(inputs())


@tool("pickle", "Files and copies")
def _(library):
    return pickle.loads(pickle.dumps(Model(library)))(inputs())


@tool("copy.deepcopy", "Files and copies")
def _(library):
    return copy.deepcopy(Model(library))(inputs())


@tool("torch.distributed.checkpoint", "Files and copies")
def _(library):
    import torch.distributed.checkpoint as dcp

    model = Model(library)
    with tempfile.TemporaryDirectory() as folder:
        dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
        state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@tool("safetensors.torch save_model, load_model", "Files and copies", package="safetensors")
def _(library):
    import safetensors.torch

    model, other = Model(library), Model(library)
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_model(model, folder + "/model.safetensors")
        safetensors.torch.load_model(other, folder + "/model.safetensors")
    return other(inputs())


@tool("huggingface_hub.PyTorchModelHubMixin", "Files and copies", package="huggingface_hub")
def _(library):
    from huggingface_hub import PyTorchModelHubMixin

    class Shared(Model, PyTorchModelHubMixin):
        def __init__(self, kind: str = "GRU") -> None:
            super().__init__(library, kind)

    model = Shared("LSTM")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Shared.from_pretrained(folder)(inputs())


@tool("meta device and to_empty", "Files and copies")
def _(library):
    with torch.device("meta"):
        model = Model(library)
    model.to_empty(device="cpu")
    torch.manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model(inputs())


@tool(
    "torch.nn.utils.skip_init",
    "Files and copies",
    torch=False,
    fusecell=False,
    note="it asks for a `device` argument by name",
)
def _(library):
    layer = nn.utils.skip_init(library.LSTM, 5, 8)
    torch.manual_seed(2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer(inputs())


@tool("share_memory", "Files and copies")
def _(library):
    model = Model(library).share_memory()
    return all(parameter.is_shared() for parameter in model.parameters()), model(inputs())


# --- Exporters


def script_of(library):
    return torch.jit.script(Model(library).eval())


@tool("torch.jit.script", "Exporters", note="as torch.nn's layer")
def _(library):
    script = script_of(library)
    return script.code, script(inputs()), script(inputs()[:, :3])


@tool("torch.jit.script of a loop of cells", "Exporters")
def _(library):
    script = torch.jit.script(CellLoop(library))
    return script.code, script(torch.ones(3, 5), torch.ones(3, 8))


@tool("torch.jit.save, torch.jit.load", "Exporters")
def _(library):
    file = io.BytesIO()
    torch.jit.save(script_of(library), file)
    file.seek(0)
    return torch.jit.load(file)(inputs())


@tool("torch.jit.freeze", "Exporters")
def _(library):
    return torch.jit.freeze(script_of(library))(inputs())


@tool("torch.jit.optimize_for_inference", "Exporters")
def _(library):
    return torch.jit.optimize_for_inference(script_of(library))(inputs())


@tool("torch.jit.trace", "Exporters", note="as torch.nn's layer")
def _(library):
    model = Model(library, "LSTM").eval()
    return torch.jit.trace(model, inputs())(inputs()[:2])


@tool("torch.jit.trace_module", "Exporters")
def _(library):
    return torch.jit.trace_module(Model(library), {"forward": inputs()})(inputs())


@tool("torch.fx.symbolic_trace", "Exporters", note="a leaf of the graph")
def _(library):
    graph = torch.fx.symbolic_trace(Model(library))
    return graph.code, graph(inputs())


@tool("torch.fx.Interpreter, ShapeProp", "Exporters")
def _(library):
    from torch.fx.passes.shape_prop import ShapeProp

    graph = torch.fx.symbolic_trace(Model(library))
    ShapeProp(graph).propagate(inputs())
    return [node.meta["tensor_meta"].shape for node in graph.graph.nodes if node.op == "output"]


@tool("torch.fx make_fx", "Exporters", note="the Python loop, unrolled")
def _(library):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = Model(library)
    return make_fx(model)(inputs())(inputs())


@tool("torch.export.export", "Exporters", note="one `fusecell::scan` for each cell")
def _(library):
    return torch.export.export(Model(library), (inputs(),)).module()(inputs())


@tool("torch.export.export, T dynamic", "Exporters", torch=False, note="torch.nn's layer fixes T")
def _(library):
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Model(library), (inputs(),), dynamic_shapes=shapes)
    return program.module()(inputs()[:3, :5])


@tool("torch.export.save, torch.export.load", "Exporters", note="where it is loaded: `import fusecell.torch_operator`")
def _(library):
    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(library), (inputs(),)), file)
    file.seek(0)
    return torch.export.load(file).module()(inputs())


@tool(
    "AOTInductor", "Exporters", long=True, note="as torch.export; `import fusecell.torch_operator` where it is loaded"
)
def _(library):
    import torch._inductor

    model = Model(library).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(model, (inputs(),))
        path = torch._inductor.aoti_compile_and_package(program, package_path=folder + "/model.pt2")
        torch.save(inputs(), folder + "/x.pt")
        code = (
            "import sys, torch, fusecell.torch_operator; folder = sys.argv[1];"
            "y = torch._inductor.aoti_load_package(folder + '/model.pt2')(torch.load(folder + '/x.pt'));"
            "torch.save(y, folder + '/y.pt')"
        )
        subprocess.run([sys.executable, "-c", code, str(Path(path).parent)], check=True)
        return torch.load(folder + "/y.pt")


def onnx_of(model, arguments, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/model.onnx"
        torch.onnx.export(model, arguments, path, **options)
        import onnx
        from onnx.reference import ReferenceEvaluator

        loaded = onnx.load(path)
        names = [value.name for value in loaded.graph.input]
        feed = {name: value.numpy() for name, value in zip(names, arguments, strict=True)}
        results = ReferenceEvaluator(loaded).run(None, feed)
        return [node.op_type for node in loaded.graph.node], [torch.from_numpy(value) for value in results]


@tool("torch.onnx.export(dynamo=False)", "Exporters", package="onnx", note="one GRU node")
def _(library):
    return onnx_of(Model(library).eval(), (inputs()[:1],), dynamo=False)


@tool("torch.onnx.export(dynamo=True)", "Exporters", package="onnxscript", note="one GRU node")
def _(library):
    return onnx_of(Model(library).eval(), (inputs(),), dynamo=True, verbose=False)


@tool("torch.onnx.export(dynamo=True) of cells", "Exporters", package="onnxscript")
def _(library):
    return onnx_of(CellLoop(library).eval(), (torch.ones(3, 5), torch.ones(3, 8)), dynamo=True, verbose=False)


@tool("torch.package", "Exporters")
def _(library):
    from torch.package import PackageExporter, PackageImporter

    file = io.BytesIO()
    with PackageExporter(file) as exporter:
        exporter.extern(["torch.**", "fusecell.**"])
        exporter.save_pickle("model", "model.pkl", library.GRU(5, 8))
    file.seek(0)
    return PackageImporter(file).load_pickle("model", "model.pkl")(inputs())


# --- Compilers and quantization


@tool("torch.compile", "Compilers and quantization", note="the layer runs as without it, as torch.nn's does")
def _(library):
    model = Model(library)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    return compiled(inputs()), gradients(model, compiled(inputs()).sum()), compiled(inputs()[:3, :5])


@tool(
    "torch.compile(fullgraph=True)",
    "Compilers and quantization",
    torch=False,
    fusecell=False,
    note="torch refuses every nn.RNN, GRU and LSTM without the flag of the next row; `fc.Recurrent` needs none",
)
def _(library):
    torch._dynamo.reset()
    return torch.compile(Model(library), fullgraph=True, backend="eager")(inputs())


@tool("torch.compile(fullgraph=True), allow_rnn", "Compilers and quantization")
def _(library):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        return torch.compile(Model(library), fullgraph=True, backend="eager")(inputs())


@tool("torch.compile(fullgraph=True) of cells", "Compilers and quantization")
def _(library):
    torch._dynamo.reset()
    return torch.compile(CellLoop(library), fullgraph=True, backend="eager")(torch.ones(3, 5), torch.ones(3, 8))


def quantized(model, *arguments, **options):
    small = torch.ao.quantization.quantize_dynamic(model, *arguments, **options)
    kinds = [(type(part).__module__, type(part).__name__) for part in small.children()]
    assert all("quantized" in module for module, _ in kinds if module != "torch.nn.modules.linear")
    return small, kinds


@tool("quantize_dynamic(model, {nn.GRU, nn.Linear})", "Compilers and quantization")
def _(library):
    small, kinds = quantized(Model(library), {nn.GRU, nn.Linear})
    return kinds, small(inputs())


@tool("quantize_dynamic(model)", "Compilers and quantization")
def _(library):
    small, kinds = quantized(Model(library, "LSTM"))
    return kinds, small(inputs())


@tool("quantize_dynamic of cells", "Compilers and quantization")
def _(library):
    small, kinds = quantized(CellLoop(library), {nn.GRUCell, nn.LSTMCell})
    return kinds, small(torch.ones(3, 5), torch.ones(3, 8))


@tool("quantize_dynamic(dtype=torch.float16)", "Compilers and quantization")
def _(library):
    small, kinds = quantized(Model(library), dtype=torch.float16)
    return kinds, small(inputs())


@tool(
    "torchao quantize_",
    "Compilers and quantization",
    package="torchao",
    note="of the head; torchao takes no recurrent layer",
)
def _(library):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = Model(library).eval()
    quantize_(model, Int8WeightOnlyConfig())
    return type(model.out.weight).__name__, model(inputs())


# --- Gradients


@tool("torch.autograd.gradcheck", "Gradients")
def _(library):
    model = Model(library).double()
    return torch.autograd.gradcheck(model, inputs()[:2, :3].double().requires_grad_())


@tool("torch.autograd.gradgradcheck", "Gradients")
def _(library):
    model = Model(library).double()
    return torch.autograd.gradgradcheck(model, inputs()[:2, :3].double().requires_grad_())


@tool("torch.autograd.functional.hessian", "Gradients", note="the Python loop")
def _(library):
    model = Model(library)
    return torch.autograd.functional.hessian(lambda x: model(x).square().sum(), inputs()[:1, :3])


@tool("torch.autograd.forward_ad", "Gradients", torch=False)
def _(library):
    from torch.autograd import forward_ad

    model = Model(library, "LSTM")
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(inputs(), torch.ones(4, 7, 5)))).tangent


@tool("torch.func.functional_call, grad", "Gradients")
def _(library):
    model = Model(library)
    values = {name: value.detach() for name, value in model.named_parameters()}
    return torch.func.grad(lambda values: torch.func.functional_call(model, values, inputs()).sum())(values)


@tool("torch.func.vmap of grad, gradients per sample", "Gradients", torch=False)
def _(library):
    model = Model(library)
    values = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values, x):
        return torch.func.functional_call(model, values, x[None]).sum()

    return torch.vmap(torch.func.grad(loss), (None, 0))(values, inputs())


@tool("torch.func.stack_module_state, an ensemble", "Gradients", torch=False)
def _(library):
    models = [Model(library) for _ in range(3)]
    values, buffers = torch.func.stack_module_state(models)
    x = inputs()
    return torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), x))(values, buffers)


@tool("call_for_per_sample_grads", "Gradients", note="as torch.nn's layer, whose LSTM it doesn't take")
def _(library):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    model = Model(library)
    call_for_per_sample_grads(model, batch_size=4)(inputs()).sum().backward()
    return [parameter.grad_sample for parameter in model.parameters()]


@tool("torch.utils.checkpoint", "Gradients")
def _(library):
    model = Model(library)
    return gradients(model, checkpoint(model, inputs().requires_grad_(), use_reentrant=False).sum())


@tool("torch.autograd.graph.save_on_cpu, saved_tensors_hooks", "Gradients")
def _(library):
    model = Model(library)
    with torch.autograd.graph.save_on_cpu():
        loss = model(inputs()).sum()
    return gradients(model, loss)


@tool("torch.autograd.detect_anomaly", "Gradients")
def _(library):
    model = Model(library)
    with torch.autograd.detect_anomaly():
        return gradients(model, model(inputs()).sum())


@tool("BackPACK BatchGrad", "Gradients", package="backpack", torch=False, fusecell=False, note="takes no GRU")
def _(library):
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(nn.Sequential(library.GRU(5, 8, batch_first=True)))
    with backpack(BatchGrad()):
        model(inputs())[0].sum().backward()
    return [parameter.grad_batch for parameter in model.parameters()]


@tool("higher innerloop_ctx", "Gradients", package="higher")
def _(library):
    import higher

    model = Model(library)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
        differentiable.step(functional(inputs()).square().mean())
        functional(inputs()).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


# --- Training


@tool("torch.optim: Adam, LBFGS", "Training")
def _(library):
    first, second = Model(library), Model(library)
    return (
        trained(first, torch.optim.Adam(first.parameters(), foreach=True)),
        trained(second, torch.optim.LBFGS(second.parameters(), lr=0.1, max_iter=3), 1),
    )


@tool("clip_grad_norm_, parameters_to_vector", "Training")
def _(library):
    model = Model(library)
    model(inputs()).sum().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return norm, nn.utils.parameters_to_vector(model.parameters())


@tool("AveragedModel", "Training")
def _(library):
    from torch.optim.swa_utils import AveragedModel

    model = Model(library)
    average = AveragedModel(model)
    trained(model, torch.optim.SGD(model.parameters(), lr=0.1))
    average.update_parameters(model)
    return average(inputs())


@tool("torch.nn.utils.prune", "Training")
def _(library):
    model = Model(library)
    prune.l1_unstructured(model.layer, "weight_hh_l0", amount=0.3)
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.1))


@tool("parametrizations.weight_norm", "Training")
def _(library):
    model = Model(library)
    parametrizations.weight_norm(model.layer, "weight_hh_l0")
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.1))


@tool("parametrize of one's own", "Training")
def _(library):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight + weight.flip(1)

    model = Model(library)
    parametrize.register_parametrization(model.layer, "weight_hh_l0", Symmetric())
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.1))


@tool("nn.utils.weight_norm, the older one", "Training")
def _(library):
    model = Model(library)
    model.layer = nn.utils.weight_norm(model.layer, "weight_hh_l0")
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.1))


@tool("torch.autocast of cells", "Training", note="results of autocast's dtype, computed in float32")
def _(library):
    x = torch.ones(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [kind(5, 8)(x) for kind in (library.GRUCell, library.LSTMCell, library.RNNCell)]
        results.append(library.GRUCell(5, 8)(x.bfloat16()))
    flat = torch.utils._pytree.tree_leaves(results)
    return [value.dtype for value in flat], [(value.float() * 20).round() for value in flat]


@tool("Module hooks", "Training")
def _(library):
    model, seen = Model(library), []
    model.layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model.layer.register_forward_hook(lambda module, args, result: (result[0] + 1, result[1]))
    model.layer.register_full_backward_hook(lambda module, grads, results: seen.append(results[0]))
    return gradients(model, model(inputs()).sum()), seen


def train_in_group(wrapper: str, library: str, file: str) -> None:
    """Train a wrapped model in a process group of one, save its gradients, and leave the process."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=0, world_size=1)
    model: Any = Model({"torch.nn": nn, "fusecell": fc}[library])
    if wrapper == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(model.layer, mesh=mesh)
        model = fully_shard(model, mesh=mesh)
    model(inputs()).square().mean().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    torch.save([grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads], file)
    os._exit(0)  # torch's process group may wait for its threads for ever where an interpreter takes it down


def trained_in_group(wrapper: str, library: Any) -> Any:
    """Return the gradients of :func:`train_in_group`, run in a process of its own."""
    code = "import sys; from tests.integrations.tools import train_in_group; train_in_group(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as folder:
        file = folder + "/gradients.pt"
        subprocess.run([sys.executable, "-c", code, wrapper, library.__name__, file], check=True, timeout=300)
        return torch.load(file)


@tool("DistributedDataParallel", "Training", long=True)
def _(library):
    return trained_in_group("DDP", library)


@tool("FSDP2 fully_shard", "Training", long=True)
def _(library):
    return trained_in_group("FSDP", library)


def lightning_module(library):
    import lightning

    class Trained(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model(library)
            self.example_input_array = inputs()

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, index):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Trained()


@tool("Lightning Trainer.fit", "Training", package="lightning")
def _(library):
    import logging

    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = lightning_module(library)
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False,
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(torch.cat([inputs()] * 2))
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
    return [parameter.detach() for parameter in model.parameters()]


@tool("Lightning to_torchscript", "Exporters", package="lightning")
def _(library):
    return lightning_module(library).to_torchscript()(inputs())


@tool("Lightning ModelSummary", "Inspection", package="lightning")
def _(library):
    from lightning.pytorch.utilities.model_summary import ModelSummary

    summary = ModelSummary(lightning_module(library), max_depth=2)
    return summary.layer_types, summary.out_sizes, summary.param_nums


@tool("accelerate", "Training", package="accelerate")
def _(library):
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), Model(library)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(inputs()).square().mean())
    optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@tool("accelerate init_empty_weights, cpu_offload", "Training", package="accelerate")
def _(library):
    from accelerate import cpu_offload, init_empty_weights

    with init_empty_weights():
        empty = Model(library)
    model = Model(library).eval()
    cpu_offload(model, execution_device=torch.device("cpu"))
    return [parameter.device.type for parameter in empty.parameters()], model(inputs())


@tool("skorch", "Training", package="skorch")
def _(library):
    from skorch import NeuralNetRegressor

    net = NeuralNetRegressor(Model, module__library=library, max_epochs=2, lr=0.1, train_split=None, verbose=0)
    net.fit(inputs().numpy(), torch.zeros(4, 2).numpy())
    return torch.from_numpy(net.predict(inputs().numpy()))


@tool("ignite", "Training", package="ignite")
def _(library):
    from ignite.engine import create_supervised_trainer

    model = Model(library)
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss())
    trainer.run([(inputs(), torch.zeros(4, 2))] * 2, max_epochs=2)
    return [parameter.detach() for parameter in model.parameters()]


@tool("peft LoRA, modules_to_save", "Training", package="peft")
def _(library):
    import peft

    config = peft.LoraConfig(target_modules=["out"], modules_to_save=["layer"])
    model = peft.get_peft_model(Model(library), config)
    return [name for name, value in model.named_parameters() if value.requires_grad], model(inputs())


@tool("peft LoRA, target_parameters", "Training", package="peft")
def _(library):
    import peft

    config = peft.LoraConfig(target_modules=["out"], target_parameters=["layer.weight_ih_l0"])
    model = peft.get_peft_model(Model(library), config)
    return gradients(model, model(inputs()).sum())


@tool(
    "peft LoRA, target_modules of a layer",
    "Training",
    package="peft",
    torch=False,
    fusecell=False,
    note="peft has no adapter for recurrent layers",
)
def _(library):
    import peft

    return peft.get_peft_model(Model(library), peft.LoraConfig(target_modules=["layer"]))


def fixed(library):
    from opacus.validators import ModuleValidator

    import fusecell.opacus_registry  # noqa: F401

    return ModuleValidator.validate(Model(library), strict=False), ModuleValidator.fix(Model(library))


@tool("Opacus ModuleValidator", "Training", package="opacus", note="after `import fusecell.opacus_registry`")
def _(library):
    errors, model = fixed(library)
    return [type(error).__name__ for error in errors], type(model.layer).__name__, model(inputs())


@tool("Opacus PrivacyEngine", "Training", package="opacus", note="likewise; the layers become Opacus's")
def _(library):
    from opacus import PrivacyEngine

    _, model = fixed(library)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs()), batch_size=4)
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=data, noise_multiplier=0.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    model(inputs()).square().mean().backward()
    optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@tool("Laplace", "Training", package="laplace")
def _(library):
    from laplace import Laplace

    model = Model(library).eval()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs(), torch.zeros(4, 2)), batch_size=4)
    posterior = Laplace(model, "regression", subset_of_weights="last_layer", hessian_structure="full")
    posterior.fit(data)
    return posterior(inputs())


# --- Inspection


@tool("repr, named_modules", "Inspection")
def _(library):
    return repr(Model(library, "LSTM", num_layers=2)), [name for name, _ in Model(library).named_modules()]


@tool("torch.profiler", "Inspection", note="`fusecell::GRU`, `fusecell::GRUCell`")
def _(library):
    model = Model(library)
    model(inputs())
    with torch.profiler.profile() as profile:
        model(inputs()).sum().backward()
    names = [event.key.lower() for event in profile.key_averages()]
    return any("gru" in name for name in names), any("backward" in name for name in names)


@tool("FlopCounterMode", "Inspection")
def _(library):
    from torch.utils.flop_counter import FlopCounterMode

    model = Model(library)
    with FlopCounterMode(display=False) as counter:
        model(inputs()).sum().backward()
    return counter.get_total_flops()


@tool("ModuleTracker", "Inspection")
def _(library):
    from torch.utils.module_tracker import ModuleTracker

    model, names = Model(library), []
    model.layer.register_forward_hook(lambda *_: names.append(set(tracker.parents)))
    with ModuleTracker() as tracker:
        model(inputs())
    return names


@tool("torchinfo", "Inspection", package="torchinfo")
def _(library):
    import torchinfo

    summary = torchinfo.summary(Model(library), input_size=(4, 7, 5), verbose=0)
    return summary.total_params, summary.total_mult_adds, str(summary)


@tool("torchview", "Inspection", package="torchview")
def _(library):
    from torchview import draw_graph

    graph = draw_graph(Model(library), input_data=inputs(), device="cpu")
    return sorted(node.name for edge in graph.edge_list for node in edge)


@tool("fvcore FlopCountAnalysis", "Inspection", package="fvcore", note="it counts neither's recurrence")
def _(library):
    from fvcore.nn import FlopCountAnalysis

    return FlopCountAnalysis(Model(library), inputs()).unsupported_ops_warnings(False).total()


@tool("thop", "Inspection", package="thop", note="with `custom_ops={fc.GRU: thop.rnn_hooks.count_gru}`")
def _(library):
    from thop import profile, rnn_hooks

    return profile(Model(library), (inputs(),), custom_ops={fc.GRU: rnn_hooks.count_gru}, verbose=False)


@tool("ptflops", "Inspection", package="ptflops", note="with `custom_modules_hooks={fc.GRU: rnn_flops_counter_hook}`")
def _(library):
    from ptflops import get_model_complexity_info
    from ptflops.pytorch_ops import rnn_flops_counter_hook

    options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    hooks = {fc.GRU: rnn_flops_counter_hook}
    return get_model_complexity_info(Model(library), (7, 5), custom_modules_hooks=hooks, **options)


@tool("TensorBoard add_graph", "Inspection", package="tensorboard")
def _(library):
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        writer.add_graph(Model(library), inputs())
        writer.flush()
        return len(os.listdir(folder))


def attributed(library, method):
    import captum.attr

    model = Model(library).eval()
    return getattr(captum.attr, method)(model).attribute(inputs(), target=0)


for _method in ("IntegratedGradients", "Saliency", "DeepLift", "FeatureAblation"):

    @tool(f"captum {_method}", "Inspection", package="captum")
    def _(library, method=_method):
        return attributed(library, method)


@tool("captum LayerIntegratedGradients, LayerActivation", "Inspection", package="captum")
def _(library):
    from captum.attr import LayerActivation, LayerIntegratedGradients

    model = Model(library).eval()
    return (
        LayerActivation(model, model.layer).attribute(inputs()),
        LayerIntegratedGradients(model, model.out).attribute(inputs(), target=0),
    )


# --- Libraries that build models


def with_fusecell(model, library):
    """Replace a model's layers if it is fusecell's turn, and make sure that some were."""
    if library is fc:
        report = fc.replace(model)
        assert report.changed
        assert not report.left
    return model


@tool(
    "sb3-contrib RecurrentPPO",
    "Libraries that build models",
    package="sb3_contrib",
    note="built under `with fc.accelerate():`",
)
def _(library):
    import contextlib

    import gymnasium
    from sb3_contrib import RecurrentPPO

    with fc.accelerate() if library is fc else contextlib.nullcontext():
        model = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), n_steps=32, seed=0, device="cpu")
    kinds = {type(module) for module in model.policy.modules()}
    assert (fc.LSTM in kinds) == (library is fc)
    return [value.detach().clone() for value in model.learn(64).policy.parameters()]


@tool(
    "torchrl GRUModule",
    "Libraries that build models",
    package="torchrl",
    note="built under `with fc.accelerate():`",
)
def _(library):
    import contextlib

    from tensordict import TensorDict
    from torchrl.modules import GRUModule, set_recurrent_mode

    with fc.accelerate() if library is fc else contextlib.nullcontext():
        module = GRUModule(5, 8, in_key="x", out_key="y")
    data = TensorDict({"x": inputs(), "is_init": torch.zeros(4, 7, 1, dtype=torch.bool)}, [4, 7])
    data["is_init"][1, 3] = True
    with set_recurrent_mode(True):
        return module(data)["y"]


@tool(
    "pytorch-forecasting's LSTM",
    "Libraries that build models",
    package="pytorch_forecasting",
    note="subclasses of torch.nn's, replaced by `fc.replace`",
)
def _(library):
    from pytorch_forecasting.models.nn import get_rnn

    model = with_fusecell(nn.Sequential(get_rnn("LSTM")(5, 8, batch_first=True)), library)
    y, state = model[0](inputs())
    return (
        y,
        state,
        model[0].handle_no_encoding(state, torch.tensor([[True], [False]] * 2), model[0].init_hidden_state(inputs())),
    )


@tool(
    "speechbrain LSTM, LiGRU",
    "Libraries that build models",
    package="speechbrain",
    note="by `fc.replace`; LiGRU's loop too",
)
def _(library):
    from speechbrain.nnet.RNN import LSTM, LiGRU

    model = nn.ModuleList([LSTM(8, input_size=5), LiGRU(6, (4, 7, 8), dropout=0.2, bidirectional=True)])
    lstm, ligru = with_fusecell(model, library)
    result = ligru(lstm(inputs())[0])
    return result, gradients(model, result[0].square().sum())


@tool(
    "torchrecurrent",
    "Libraries that build models",
    package="torchrecurrent",
    note="by `fc.replace`: 38 of its 41 layers",
)
def _(library):
    import torchrecurrent

    model = with_fusecell(nn.ModuleList([torchrecurrent.JANET(5, 8, num_layers=2, batch_first=True)]), library)
    y, state = model[0](inputs())
    return y, state, gradients(model, y.square().sum())


@tool("ncps CfC, LTC", "Libraries that build models", package="ncps", note="by `fc.replace`, of regular time steps")
def _(library):
    from ncps.torch import LTC, CfC
    from ncps.wirings import AutoNCP

    model = with_fusecell(nn.ModuleList([CfC(5, 8), LTC(8, AutoNCP(9, 2))]), library)
    y, state = model[1](model[0](inputs())[0])
    return y, state, gradients(model, y.square().sum())


@tool(
    "snntorch", "Libraries that build models", package="snntorch", note="a network of neurons as a cell, by `fc.wrap`"
)
def _(library):
    import snntorch

    network = nn.Sequential(nn.Linear(5, 8), snntorch.Leaky(beta=0.9, threshold=0.2, init_hidden=True))
    x = inputs().transpose(0, 1)
    if library is fc:
        spikes, _ = fc.Recurrent(fc.wrap(network, input_size=5, states=("1.mem",)))(x)
    else:
        spikes = torch.stack([network(frame) for frame in x])
    return spikes, gradients(network, spikes.square().sum())


def leaves(result: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(result)


def agree(actual: Any, expected: Any) -> None:
    """Raise AssertionError unless two results agree: numbers to float32's accuracy, all else exactly."""
    ours, theirs = leaves(actual), leaves(expected)
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        else:
            assert one == two


def table() -> str:
    """Return the table of docs/integrations.md, one group of tools after another."""
    lines = ["| tool | package | torch.nn | fusecell | |", "|---|---|---|---|---|"]
    for group in dict.fromkeys(each.group for each in TOOLS):
        lines.append(f"| **{group}** | | | | |")
        for each in TOOLS:
            if each.group == group:
                works = ["yes" if value else "no" for value in (each.torch, each.fusecell)]
                name = each.name.replace("_", r"\_")
                lines.append(f"| {name} | {each.package or 'torch'} | {works[0]} | {works[1]} | {each.note} |")
    return "\n".join(lines)


def main() -> int:
    """Run every tool with both libraries; print a line for each, and return how many differ from the table."""
    wrong = 0
    for each in TOOLS:
        if len(sys.argv) > 1 and not any(word in each.name for word in sys.argv[1:]):
            continue
        if each.missing:
            print(f"{each.name:60} {each.missing}")
            continue
        results, row = [], []
        for library, expected in ((nn, each.torch), (fc, each.fusecell)):
            try:
                results.append(each.run(library))
                works, text = True, "yes"
            except Exception as error:
                works, text = False, f"no, {type(error).__name__}: {str(error).strip()[:160]}".replace("\n", " ")
            wrong += works != expected
            row.append(text if works or expected else "no")
        try:
            if len(results) == 2:
                agree(results[1], results[0])
        except AssertionError as error:
            wrong += 1
            row.append(f"DIFFERENT: {str(error)[:200]}")
        print(f"{each.name:60} {'; '.join(row)}", flush=True)
    print(f"{len(TOOLS)} tools, {wrong} not as the table says")
    return wrong


if __name__ == "__main__":
    sys.exit(main() > 0)
