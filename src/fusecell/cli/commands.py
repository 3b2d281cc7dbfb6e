"""The commands; each reads its arguments, calls the library and prints."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusecell import __version__
from fusecell.errors import NotCompilable

if TYPE_CHECKING:
    from torch import nn

    from fusecell.streaming import Stream

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Write one time step of a recurrent network in plain PyTorch; run it over whole sequences.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fusecell {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before any command."""


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to train, all layers together.")] = 80.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many updates of each, if that is sooner.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in the output folder.")] = False,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("demo-output"),
    layer: Annotated[str, typer.Option(help="Whose GRU to train: fusecell, torch, or both in turns.")] = "both",
    hidden_size: Annotated[int | None, typer.Option(min=1, help="Features of each layer.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of text read side by side.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the order of the files and the sample.")] = 0,
) -> None:
    """Teach a character model Python from this machine's own standard library: fusecell's GRU races torch's."""
    from fusecell.demo import Settings, run_demo
    from fusecell.demo.model import LAYERS

    sizes = {"hidden_size": hidden_size, "batch_size": batch_size}
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    try:
        run_demo(
            Settings(seed=seed, **given),
            layers=tuple(LAYERS) if layer == "both" else (layer,),
            seconds=seconds,
            steps=math.inf if steps is None else steps,
            output=output,
            resume=resume,
        )
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        typer.echo("Stopped. Go on with the same command and --resume.")
        raise typer.Exit(130) from None


@app.command()
def cells() -> None:
    """The cells that come with fusecell."""
    from fusecell.cells import CELLS

    table = Table("name", "states", "what it is, its step, its paper", show_lines=True)
    for member in CELLS:
        states = ", ".join(member.make(2, 2).states)
        lines = Text(f"{member.summary} ({member.cell.__name__})\n")
        lines.append(f"{member.equation}\n", style="bold").append(member.paper, style="dim")
        table.add_row(member.name, states, lines)
    Console().print(table)


@app.command()
def count(
    seq_len: Annotated[int, typer.Option(min=0, help="Steps of the sequence.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers above one another.")] = 1,
    bidirectional: Annotated[bool, typer.Option(help="A second direction, from the end to the start.")] = False,
) -> None:
    """How many cell calls one sequence takes: seq_len x directions x layers."""
    from fusecell.drop_in import GRU
    from fusecell.inspection.summary import count_cells

    calls = count_cells(GRU(1, 1, num_layers=layers, bidirectional=bidirectional), seq_len)
    directions = 2 if bidirectional else 1
    typer.echo(f"{seq_len} steps x {directions} direction(s) x {layers} layer(s) = {calls} cell calls")
    typer.echo(f"by {layers * directions} distinct cell(s), each with its own weights, shared over time")


@app.command()
def summary(
    module: Annotated[str | None, typer.Argument(metavar="[MODULE:FACTORY]", help="A function, or a layer.")] = None,
    cell: Annotated[str | None, typer.Option(help="Or a cell by its name in `fusecell cells`, such as gru.")] = None,
    input_size: Annotated[int, typer.Option(min=1, help="Features of the input, with --cell.")] = 5,
    hidden_size: Annotated[int, typer.Option(min=1, help="Features of the state, with --cell.")] = 10,
    seq_len: Annotated[int, typer.Option(min=0, help="Steps of the sequence.")] = 35,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
) -> None:
    """Parameters, multiply-accumulates, shapes and cell calls of a layer."""
    from fusecell.inspection.summary import summary as summarize

    _say(lambda layer: summarize(layer, seq_len, batch_size), module, cell, input_size, hidden_size)


@app.command()
def bench(
    module: Annotated[str | None, typer.Argument(metavar="[MODULE:FACTORY]", help="A function, or a layer.")] = None,
    cell: Annotated[str | None, typer.Option(help="Or a cell by its name in `fusecell cells`, such as gru.")] = None,
    input_size: Annotated[int, typer.Option(min=1, help="Features of the input, with --cell.")] = 64,
    hidden_size: Annotated[int, typer.Option(min=1, help="Features of the state, with --cell.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Steps of the sequence.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 32,
    training: Annotated[bool, typer.Option(help="Time a forward and a backward.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; torch's own choice if left out.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure.")] = 3.0,
) -> None:
    """How fast a layer is here: compiled, as a Python loop, in torch.nn, and beside what the machine can do."""
    import torch

    from fusecell.inspection.benchmark import measure

    if threads is not None:
        torch.set_num_threads(threads)
    _say(
        lambda layer: measure(layer, seq_len, batch_size, training=training, seconds=seconds),
        module,
        cell,
        input_size,
        hidden_size,
    )


@app.command()
def explain(
    module: Annotated[str | None, typer.Argument(metavar="[MODULE:FACTORY]", help="A function, or a layer.")] = None,
    cell: Annotated[str | None, typer.Option(help="Or a cell by its name in `fusecell cells`, such as gru.")] = None,
    input_size: Annotated[int, typer.Option(min=1, help="Features of the input, with --cell.")] = 5,
    hidden_size: Annotated[int, typer.Option(min=1, help="Features of the state, with --cell.")] = 10,
    stage: Annotated[
        str | None, typer.Option(help="Show one stage of the compiler: graph, passes, plan, llvm or asm.")
    ] = None,
    gradients: Annotated[bool, typer.Option(help="With --stage: of forward and backward.")] = False,
) -> None:
    """What was compiled, what left the loop, what it costs, and why the rest runs as a Python loop."""
    from fusecell.inspection.explain import explain as describe

    if gradients and stage is None:
        raise typer.BadParameter("--gradients goes with --stage: without one, both are described anyway")

    def shown(layer: nn.Module) -> str:
        explained = describe(layer)
        if stage is None:
            return str(explained)
        return "\n".join(each.stage(stage, gradients=gradients) for each in explained.cells)

    _say(shown, module, cell, input_size, hidden_size)


stream = typer.Typer(no_args_is_help=True, help="Layers run step by step.")
app.add_typer(stream, name="stream")


@stream.command("save")
def stream_save(
    module: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="A function, or a layer.")],
    path: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Write a layer to a file that fusecell.load_stream reads without torch."""
    made = _stream(module, 1)
    made.save(path)
    typer.echo(f"{path}: {path.stat().st_size:,} bytes, {made}")


@stream.command("bench")
def stream_bench(
    model: Annotated[str, typer.Argument(help="A saved stream, or MODULE:FACTORY.")],
    steps: Annotated[int, typer.Option(min=1, help="How many to time.")] = 100_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows side by side.")] = 1,
) -> None:
    """How long a step takes: median, tail, the longest, and a histogram."""
    from rich.progress import Progress

    from fusecell.streaming.latency import measure

    made = _stream(model, batch_size)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=steps)
        found = measure(made, steps, progress=lambda done: progress.update(task, completed=done))
    console.print(f"{made}, {steps:,} steps, microseconds through Python", highlight=False, soft_wrap=True)
    table = Table("p50", "p99", "p99.9", "longest")
    table.add_row(*(f"{1e6 * found.quantile(share):.2f}" for share in (0.5, 0.99, 0.999)), f"{1e6 * found.longest:.1f}")
    console.print(table)
    most = max(count for *_, count in found.histogram())
    for low, high, count in found.histogram():
        # Bars of the logarithm: a tail of one in a million is to be seen beside the rest.
        bar = "#" * round(40 * math.log1p(count) / math.log1p(most))
        console.print(f"{1e6 * low:9.2f} to {1e6 * high:9.2f} {count:9,} {bar}", highlight=False, soft_wrap=True)


def _stream(model: str, batch_size: int) -> Stream:
    """The stream that an argument names: a file's, or a module's in eval()."""
    from fusecell.streaming import Stream, load_stream

    try:
        if Path(model).exists() or ":" not in model:
            return load_stream(model, batch_size)
        from fusecell.cli.lookup import find_module

        return Stream(find_module(model).eval(), batch_size)
    except (OSError, TypeError, ValueError, NotCompilable) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all machine code kept on disk.")] = False,
) -> None:
    """Where compiled kernels are kept, and how many."""
    from fusecell.compiler.backend.disk_cache import cache_info, clear_cache

    if clear:
        typer.echo(f"removed {clear_cache()} kernels")
    info = cache_info()
    if not info.enabled:
        typer.echo(f"no cache in use: {info.reason}")
        return
    typer.echo(f"{info.entries} kernels, {info.bytes:,} bytes, in {info.path}")


@app.command()
def config() -> None:
    """Versions, machine and settings, for a report."""
    from fusecell.inspection.environment import show_config

    typer.echo(str(show_config()))


def _say(
    describe: Callable[[nn.Module], object], module: str | None, cell: str | None, input_size: int, hidden_size: int
) -> None:
    """Print what ``describe`` says of the layer that the arguments name."""
    from fusecell.cli.lookup import find_cell, find_module

    if (module is None) == (cell is None):
        raise typer.BadParameter("give either MODULE:FACTORY or --cell NAME")
    try:
        layer = find_module(module) if module is not None else find_cell(str(cell), input_size, hidden_size)
        text = str(describe(layer))
    except (NotCompilable, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(text)
