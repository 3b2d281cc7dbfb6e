"""The commands of ``fusecell``: each reads its arguments, calls the library and prints the result.

The library is imported inside the commands, because importing torch takes longer than ``--help`` should.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusecell import __version__
from fusecell.errors import CompilerError, ExportError, NotCompilable

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

_MODULE_HELP = (
    "A layer, or a function without arguments that returns one: models.tagger:build is build in models/tagger.py."
)
_WEIGHTS_HELP = "float32, bfloat16, float16, int8 or int8-dynamic."
_KEEP_HELP = "A weight that stays float32; may be given again."
_INPUTS_HELP = "The size of each of several inputs, as in 5,4x16,scalar."
_MODULE = typer.Argument(metavar="[MODULE:FACTORY]", help=_MODULE_HELP)
_CELL = typer.Option(help="Instead of MODULE:FACTORY, a cell by its name in `fusecell cells`, such as gru.")


def _version(requested: bool) -> None:
    if requested:
        typer.echo(f"fusecell {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds of training, all layers together.")] = 80.0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after this number of updates of each layer, if that is sooner.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the checkpoints in the output folder.")] = False,
    output: Annotated[Path, typer.Option(help="The folder for all results.")] = Path("demo-output"),
    layer: Annotated[str, typer.Option(help="The GRU to train: fusecell, torch, or both in turns.")] = "both",
    hidden_size: Annotated[int | None, typer.Option(min=1, help="Features of each layer.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of text in a batch.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order of the files and the sample.")] = 0,
) -> None:
    """Train a character model on Python's standard library, with fusecell's GRU and with torch's."""
    from fusecell.demo import Settings, run_demo
    from fusecell.demo.model import LAYERS

    # Only what the user set: the defaults are those of Settings.
    sizes = {"hidden_size": hidden_size, "batch_size": batch_size}
    overrides: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    try:
        run_demo(
            Settings(seed=seed, **overrides),
            layers=tuple(LAYERS) if layer == "both" else (layer,),
            seconds=seconds,
            steps=math.inf if steps is None else steps,
            output=output,
            resume=resume,
        )
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        # 130 is the shell's exit status for SIGINT; race() has saved the checkpoints by now.
        typer.echo("Stopped. Go on with the same command and --resume.")
        raise typer.Exit(130) from None


@app.command()
def play(
    path: Annotated[Path, typer.Argument(help="The page to write.")] = Path("play.html"),
    cell: Annotated[
        list[str] | None, typer.Option(help="A cell by its name in `fusecell cells`; several times for several.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the training's sequences.")] = 0,
    updates: Annotated[
        int | None, typer.Option(min=0, help="Updates of each model's training, instead of its own number.")
    ] = None,
) -> None:
    """Train small cells for forty seconds, and write a web page where they run: see, hold and change every gate."""
    from fusecell.play import KINDS, write_page

    try:
        written = write_page(path, seed=seed, kinds=cell or KINDS, updates=updates)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{written}: {written.stat().st_size:,} bytes; open it in a browser, it needs no network")


@app.command()
def cells() -> None:
    """List the cells that come with fusecell."""
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
    layers: Annotated[int, typer.Option(min=1, help="Number of stacked layers.")] = 1,
    bidirectional: Annotated[bool, typer.Option(help="A second direction, from the end to the start.")] = False,
) -> None:
    """Count the cell calls of one sequence: seq_len x directions x layers."""
    from fusecell.drop_in import GRU
    from fusecell.inspection.summary import count_cells

    calls = count_cells(GRU(1, 1, num_layers=layers, bidirectional=bidirectional), seq_len)
    directions = 2 if bidirectional else 1
    typer.echo(f"{seq_len} steps x {directions} direction(s) x {layers} layer(s) = {calls} cell calls")
    typer.echo(f"by {layers * directions} distinct cell(s), each with its own weights, shared over time")


@app.command()
def summary(
    module: Annotated[str | None, _MODULE] = None,
    cell: Annotated[str | None, _CELL] = None,
    input_size: Annotated[int, typer.Option(min=1, help="Features of the input, with --cell.")] = 5,
    hidden_size: Annotated[int, typer.Option(min=1, help="Features of the state, with --cell.")] = 10,
    seq_len: Annotated[int, typer.Option(min=0, help="Steps of the sequence.")] = 35,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
) -> None:
    """Print the parameters, multiply-accumulates, shapes and cell calls of a layer."""
    from fusecell.inspection.summary import summary as summarize

    _print_report(lambda layer: summarize(layer, seq_len, batch_size), module, cell, input_size, hidden_size)


@app.command()
def bench(
    module: Annotated[str | None, _MODULE] = None,
    cell: Annotated[str | None, _CELL] = None,
    input_size: Annotated[int, typer.Option(min=1, help="Features of the input, with --cell.")] = 64,
    hidden_size: Annotated[int, typer.Option(min=1, help="Features of the state, with --cell.")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="Steps of the sequence.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 32,
    training: Annotated[bool, typer.Option(help="Time a forward and a backward, not a forward alone.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Cores to use; torch's own choice if left out.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure, all together.")] = 3.0,
) -> None:
    """Measure how fast a layer is on this machine: compiled, as a Python loop and in torch.nn."""
    import torch

    from fusecell.inspection.benchmark import measure

    # fusecell's threads follow torch's number, and so does the peak that it is compared with.
    if threads is not None:
        torch.set_num_threads(threads)
    _print_report(
        lambda layer: measure(layer, seq_len, batch_size, training=training, seconds=seconds),
        module,
        cell,
        input_size,
        hidden_size,
    )


@app.command()
def explain(
    module: Annotated[str | None, _MODULE] = None,
    cell: Annotated[str | None, _CELL] = None,
    input_size: Annotated[int, typer.Option(min=1, help="Features of the input, with --cell.")] = 5,
    hidden_size: Annotated[int, typer.Option(min=1, help="Features of the state, with --cell.")] = 10,
    stage: Annotated[
        str | None, typer.Option(help="Show one stage of the compiler: graph, passes, plan, llvm or asm.")
    ] = None,
    gradients: Annotated[
        bool, typer.Option(help="With --stage: show the two kernels of training, forward and backward.")
    ] = False,
) -> None:
    """Print how a layer is compiled: the stages of its loops, their cost, and why a cell isn't compiled."""
    from fusecell.inspection.explain import explain as describe

    if gradients and stage is None:
        raise typer.BadParameter("--gradients goes with --stage: without one, both are described anyway")

    def shown(layer: nn.Module) -> str:
        explained = describe(layer)
        if stage is None:
            return str(explained)
        return "\n".join(each.stage(stage, gradients=gradients) for each in explained.cells)

    _print_report(shown, module, cell, input_size, hidden_size)


stream_app = typer.Typer(
    no_args_is_help=True, help="Run a layer one step at a time: save it for use without torch, or time it."
)
app.add_typer(stream_app, name="stream")


@stream_app.command("save")
def stream_save(
    module: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help=_MODULE_HELP)],
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    code_for: Annotated[
        list[str] | None,
        typer.Option(
            help="A CPU to add machine code for: host, x86-64-v3, x86-64-v4, or one of the two with -vnni behind it; "
            "may be given several times."
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help=_WEIGHTS_HELP)] = "float32",
    keep: Annotated[list[str] | None, typer.Option(help=_KEEP_HELP)] = None,
    input_sizes: Annotated[str | None, typer.Option(help=_INPUTS_HELP)] = None,
) -> None:
    """Write a layer to a file that fusecell.load_stream reads without torch."""
    stream = _stream(module, 1, weights, keep or (), input_sizes)
    try:
        stream.save(path, code_for=code_for or ())
    except (OSError, ValueError, CompilerError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{path}: {path.stat().st_size:,} bytes, {stream}")


@stream_app.command("bench")
def stream_bench(
    model: Annotated[str, typer.Argument(help="The file of a saved stream, or MODULE:FACTORY.")],
    steps: Annotated[int, typer.Option(min=1, help="Number of steps to time.")] = 100_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    input_sizes: Annotated[str | None, typer.Option(help=_INPUTS_HELP)] = None,
) -> None:
    """Time the steps of a stream: median, tail, maximum and histogram."""
    from rich.progress import Progress

    from fusecell.streaming.latency import measure

    stream = _stream(model, batch_size, input_sizes=input_sizes)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=steps)
        latency = measure(stream, steps, progress=lambda done: progress.update(task, completed=done))
    console.print(f"{stream}, {steps:,} steps, microseconds through Python", highlight=False, soft_wrap=True)
    table = Table("p50", "p99", "p99.9", "longest")
    quantiles = (f"{1e6 * latency.quantile(share):.2f}" for share in (0.5, 0.99, 0.999))
    table.add_row(*quantiles, f"{1e6 * latency.longest:.1f}")
    console.print(table)
    most = max(count for *_, count in latency.histogram())
    # soft_wrap: else rich breaks a long line into two.
    for low, high, count in latency.histogram():
        # On a logarithmic scale, so that a tail of one step in a million is visible.
        bar = "#" * round(40 * math.log1p(count) / math.log1p(most))
        console.print(f"{1e6 * low:9.2f} to {1e6 * high:9.2f} {count:9,} {bar}", highlight=False, soft_wrap=True)


def _stream(
    model: str, batch_size: int, weights: str = "float32", keep: Sequence[str] = (), input_sizes: str | None = None
) -> Stream:
    """Open the stream that an argument names: a saved one, or one of MODULE:FACTORY in eval() mode."""
    from fusecell.streaming import Stream, load_stream

    try:
        if Path(model).exists() or ":" not in model:
            if weights != "float32" or keep or input_sizes is not None:
                raise ValueError(
                    "--weights, --keep and --input-sizes are for MODULE:FACTORY: a saved stream has its own"
                )
            return load_stream(model, batch_size)
        from fusecell.cli.lookup import find_module, sizes_of

        sizes = None if input_sizes is None else sizes_of(input_sizes)
        return Stream(find_module(model).eval(), batch_size, weights=weights, keep=keep, input_sizes=sizes)
    except (OSError, TypeError, ValueError, NotCompilable) as error:
        raise typer.BadParameter(str(error)) from error


def _list_targets(requested: bool) -> None:
    if requested:
        from fusecell.exporting import TARGETS

        table = Table("target", "machine", "multiply-adds round")
        table.add_row("host", "this machine", "")
        for target in TARGETS.values():
            table.add_row(target.name, target.summary, "once" if target.machine.fma else "twice")
        Console().print(table)
        raise typer.Exit


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="The file of a saved stream, or MODULE:FACTORY.")],
    path: Annotated[Path, typer.Argument(help="The files' common path, without a suffix.")],
    target: Annotated[str, typer.Option(help="The machine, one of --list.")] = "host",
    format: Annotated[str, typer.Option(help="object, static, shared, c or web.")] = "object",
    prefix: Annotated[str | None, typer.Option(help="Of every symbol; the file's name if left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 1,
    verify: Annotated[bool, typer.Option(help="Run it, here or emulated, and compare bits with the stream.")] = False,
    weights: Annotated[str, typer.Option(help=_WEIGHTS_HELP)] = "float32",
    keep: Annotated[list[str] | None, typer.Option(help=_KEEP_HELP)] = None,
    input_sizes: Annotated[str | None, typer.Option(help=_INPUTS_HELP)] = None,
    listed: Annotated[
        bool, typer.Option("--list", callback=_list_targets, is_eager=True, help="List the targets.")
    ] = False,
) -> None:
    """Write a layer's step for programs without Python: an object file, a library, C, or a web page's module."""
    from fusecell.exporting import export as write

    stream = _stream(model, batch_size, weights, keep or (), input_sizes)
    try:
        typer.echo(str(write(stream, path, target, format, prefix=prefix, verify=verify)))  # type: ignore[arg-type]
    except (OSError, ValueError, ExportError) as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all kernels in the cache first.")] = False,
) -> None:
    """Print where compiled kernels are cached on disk, and how many there are."""
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
    """Print versions, machine and settings, for a bug report."""
    from fusecell.inspection.environment import show_config

    typer.echo(str(show_config()))


def _print_report(
    describe: Callable[[nn.Module], object], module: str | None, cell: str | None, input_size: int, hidden_size: int
) -> None:
    """Print the report that ``describe`` makes of the layer named by the arguments."""
    from fusecell.cli.lookup import find_cell, find_module

    if (module is None) == (cell is None):
        raise typer.BadParameter("give either MODULE:FACTORY or --cell NAME")
    try:
        layer = find_module(module) if module is not None else find_cell(str(cell), input_size, hidden_size)
        text = str(describe(layer))
    except (NotCompilable, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(text)
