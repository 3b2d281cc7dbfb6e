"""Fuzz hostile files by the thousand: each is refused with a sentence, or does exactly what its graph says.

``python -m tests.reliability.fuzz_files --streams 10000 --tapes 2000 --seed 0``

Each mutant (``tests.reliability.file_mutants``) is loaded in a process of its own kind, in the check mode, where memory
ends at pages that nobody may touch, so that a signal is its mutant's. A stream that loads is stepped, and every step is
compared with the interpreter of its graph, evaluated from the state that the stream had;
and chunks with steps, bit by bit.
What is found is shrunk to the fewest mutations that do it, and printed with what makes it again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.reliability.file_mutants import KINDS, bases, mutant

__all__ = ["fuzz"]

SECONDS, MEGABYTES = 20, 400
"""Of processor time that a mutant may take, and by which it may make the process grow."""
_WAIT, _MOST_IN_ONE = 900, 500
"""Seconds in which a worker must answer, however busy the machine; and mutants after which a new one begins."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a mutant: ``ran``, ``refused``, or the kind of defect, with its message."""

    kind: str
    detail: str
    mutations: list[str]

    @property
    def is_defect(self) -> bool:
        return self.kind not in ("ran", "refused")


class _Worker:
    """A process that answers for one mutant after another."""

    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "FUSECELL_CHECK": "1", "FUSECELL_CACHE": "off", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.reliability.fuzz_files", "--answer", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )
        self.answered = 0

    def ask(self, question: dict[str, Any]) -> Outcome:
        """Return the outcome of a mutant; a crash of the process is one too."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _WAIT)
        answer = process.stdout.readline() if ready else b""
        self.answered += 1
        if answer.endswith(b"\n"):
            return Outcome(**json.loads(answer))
        if not ready:
            process.kill()
        _, errors = process.communicate()
        hangs = not ready or process.returncode == -signal.SIGPROF
        message = errors.decode(errors="replace")
        return Outcome("hang" if hangs else "signal", f"status {process.returncode}: {message[:2000]}", [])

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process."""
        if self.is_alive:
            self._process.communicate()


def fuzz(
    kind: str, count: int, seed: int, *, first: int = 0, report: Callable[[int, Outcome], None] | None = None
) -> dict[int, Outcome]:
    """Try mutants; returns those that are a defect, by index.

    Arguments:
        kind: ``streams`` or ``tapes``.
        report: called with every outcome.
    """
    defects: dict[int, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        bases(Path(folder))
        worker = _Worker(Path(folder))
        for index in range(first, first + count):
            if not worker.is_alive or worker.answered >= _MOST_IN_ONE:
                worker.stop()
                worker = _Worker(Path(folder))
            question = {"kind": kind, "seed": seed, "index": index, "skipped": []}
            outcome = worker.ask(question)
            if outcome.is_defect:
                worker.stop()
                outcome = defects[index] = _shrunk(Path(folder), question, outcome)
                worker = _Worker(Path(folder))
            if report is not None:
                report(index, outcome)
        worker.stop()
    return defects


def _shrunk(folder: Path, question: dict[str, Any], outcome: Outcome) -> Outcome:
    """Return the defect with the fewest mutations; slow defects are not retried."""

    def changes(skipped: Sequence[int]) -> list[str]:
        return mutant(folder, question["kind"], question["seed"], question["index"], skipped)[1]

    every = range(len(changes(())) - 1)
    if outcome.kind not in ("hang", "slow", "large"):
        for count in range(len(every) - 1, 0, -1):
            for skipped in combinations(every, count):
                worker = _Worker(folder)
                less = worker.ask({**question, "skipped": skipped})
                worker.stop()
                if less.kind == outcome.kind:
                    return Outcome(less.kind, f"skipped={list(skipped)} {less.detail}", changes(skipped))
    return Outcome(outcome.kind, outcome.detail, changes(()))


# The worker


def _answer(folder: Path) -> None:
    from fusecell.compiler.backend import llvm
    from fusecell.compiler.runtime import kernel

    llvm.EFFORT = 0
    kernel.compile_graph = _with_cache(kernel.compile_graph)  # which is imported where it is used
    path = Path(tempfile.mkdtemp()) / "mutant"
    for line in sys.stdin:
        question = json.loads(line)
        content, mutations = mutant(folder, question["kind"], question["seed"], question["index"], question["skipped"])
        path.write_bytes(content)
        before, began = _megabytes(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS + 10)  # counts processor time, and ends the process
        try:
            kind, detail = (_stream if question["kind"] == "streams" else _tape)(path)
        except Exception as error:  # whatever it is, it is what is looked for
            import traceback

            kind, detail = type(error).__name__, f"{error!r:.300} {traceback.format_exc()[-1500:]}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds, grown = time.process_time() - began, _megabytes() - before
        if seconds > SECONDS:
            kind, detail = "slow", f"{seconds:.0f} s: {detail}"
        if grown > MEGABYTES:
            kind, detail = "large", f"{grown:.0f} MB: {detail}"
        print(json.dumps({"kind": kind, "detail": detail, "mutations": mutations}), flush=True)
    path.unlink(missing_ok=True)
    path.parent.rmdir()


def _with_cache(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``compile_graph`` in a cache by graph text: most parts of most mutants are unchanged."""
    kernels: dict[str, Any] = {}

    def cached(graph: Any, **limits: int) -> Any:
        text = graph.text
        if text not in kernels:
            kernel = compile_graph(graph, **limits)
            if len(kernels) >= 64:
                kernels.pop(next(iter(kernels)))
            kernels[text] = kernel
        return kernels[text]

    return cached


def _megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _stream(path: Path) -> tuple[str, str]:
    import fusecell as fc
    from fusecell.errors import StreamFileError

    rows = 2
    try:
        stream = fc.load_stream(path, rows)
    except StreamFileError as error:
        if "please report" in str(error):
            return "compiler", str(error)
        return _sentence(str(error), "is not a saved stream, or is damaged: ")
    rng = np.random.default_rng(0)
    for _ in range(2):
        x = rng.normal(size=(rows, stream.input_size)).astype(stream.dtype)
        before = stream.state
        y = stream.step(x)
        wrong = _difference(stream.parts, x, before, [y, *stream.state])
        if wrong:
            return "different", wrong
    x = rng.normal(size=(3, rows, stream.input_size)).astype(stream.dtype)
    before = stream.state
    together, after = stream.push(x), stream.state
    stream.state = before
    one_by_one = np.stack([stream.step(each) for each in x])
    pairs = [(together, one_by_one), *zip(after, stream.state, strict=True)]
    if not all(np.array_equal(one, other, equal_nan=True) for one, other in pairs):
        return "different", "a chunk differs from its steps"
    before = stream.state
    y = stream.step(x[0], rows=np.array([False, True]))
    if y[0].any() or not all(
        np.array_equal(one[0], other[0], equal_nan=True) for one, other in zip(before, stream.state, strict=True)
    ):
        return "different", "a row that takes no part has changed"
    return "ran", repr(stream)


def _sentence(text: str, beginning: str) -> tuple[str, str]:
    """Classify a refusal: readable if it is one printable line of moderate length."""
    reads = beginning in text and text.isprintable() and text.endswith(".") and len(text) < 1500
    return "refused" if reads else "unreadable", text


def _difference(
    parts: Sequence[Any], x: np.ndarray[Any, Any], state: Sequence[np.ndarray[Any, Any]], step_results: list[Any]
) -> str:
    """Say where a step differs from the interpreter by more than rounding can explain."""
    runs = [_interpreted(parts, x, state, dtype, nudge) for dtype, nudge in _WAYS]
    for place, values in enumerate(zip(*runs, strict=True)):
        exact, others, actual = values[0], values[1:], torch.from_numpy(np.asarray(step_results[place], np.float64))
        spread = torch.stack([(other - exact).abs() for other in others]).amax(0)
        same_kind = torch.stack([_class(other) == _class(exact) for other in others]).all(0)
        settled = same_kind & ((exact.abs() < 1e30) | ~exact.isfinite())
        scale = exact[exact.isfinite()].abs().max() if exact.isfinite().any() else torch.tensor(0.0)
        near = (actual - exact).abs() <= 1e-3 * exact.abs() + 1e-5 * min(float(scale), 1.0) + 1e-30 + 1000 * spread
        right = torch.where(exact.isfinite(), near, _class(actual) == _class(exact))
        if not right[settled].all():
            wrong = settled & ~right
            return f"result {place}: {actual[wrong][:4].tolist()}, expected {exact[wrong][:4].tolist()}"
    return ""


_WAYS = [
    (torch.float64, 0.0),
    (torch.float64, 1e-6),
    (torch.float64, -1e-5),
    (torch.float32, 0.0),
    (torch.float32, 1e-6),
]


def _class(value: torch.Tensor) -> torch.Tensor:
    """0 for a number, else which infinity, or NaN."""
    infinite = value.isinf() * value.nan_to_num(0.0, 1.0, -1.0).sign()
    return torch.where(value.isnan(), torch.full_like(infinite, 2.0), infinite)


def _interpreted(
    parts: Sequence[Any],
    x: np.ndarray[Any, Any],
    state: Sequence[np.ndarray[Any, Any]],
    dtype: torch.dtype,
    nudge: float,
) -> list[torch.Tensor]:
    """Interpret a stream's step by its graphs, in some precision, with slightly perturbed values."""
    from fusecell.compiler.ir.interpreter import interpret

    states, after = iter(state), []
    draw = torch.Generator().manual_seed(0)

    def value(array: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.asarray(array)).to(dtype)
        return tensor * (1 + nudge * torch.rand(tensor.shape, generator=draw, dtype=dtype))

    output = value(x)
    for part in parts:
        graph = part.graph
        values = {graph[graph.leaves("input")[0]].name: output}
        values |= {graph[index].name: value(next(states)) for index in graph.leaves("state")}
        values |= {graph[i].name: value(weight) for i, weight in zip(graph.leaves("weight"), part.weights, strict=True)}
        results = interpret(graph, values)
        output = results["output"]
        after += [results[f"state.{graph[index].name}"].double() for index in graph.leaves("state")]
    return [output.double(), *after]


def _tape(path: Path) -> tuple[str, str]:
    import fusecell as fc
    from fusecell.errors import TapeFileError

    try:
        tape = fc.Tape.load(path)
    except TapeFileError as error:
        return _sentence(str(error), "is not a tape that was saved, or is damaged: ")
    shape = (tape.steps, tape.rows)
    for layer, direction, track in tape.tracks():
        for name in tape.names(layer) if direction == 0 else ():
            assert tuple(tape.value(name, layer).shape[:2]) == shape
            tape.norms(name, layer)
            tape.saturation(name, layer)
        for name in track.probes:
            assert tape.gradient(name, layer, direction).shape == tape.value(name, layer, direction).shape
    text = repr(tape)
    assert all(character.isprintable() or character == "\n" for character in text)
    if min(shape) > 0:
        tape.save_html(path.with_suffix(".html"))
        path.with_suffix(".html").unlink()
    tape.save(path)
    again = fc.Tape.load(path)
    for (_, _, one), (_, _, other) in zip(tape.tracks(), again.tracks(), strict=True):
        assert all(torch.equal(one.values[name].nan_to_num(), other.values[name].nan_to_num()) for name in one.values)
    return "ran", text.partition("\n")[0]


def main() -> None:
    """Try the requested number of mutants and print their outcomes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tapes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the index to begin with")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer is not None:
        _answer(arguments.answer)
        return
    defects = dict(_all(arguments.seed, arguments.first, {kind: getattr(arguments, kind) for kind in KINDS}))
    sys.exit(1 if any(defects.values()) else 0)


def _all(seed: int, first: int, counts: dict[str, int]) -> Iterator[tuple[str, int]]:
    for kind, count in counts.items():
        outcomes: Counter[str] = Counter()
        began = time.perf_counter()

        def report(
            index: int, outcome: Outcome, kind: str = kind, outcomes: Counter[str] = outcomes, began: float = began
        ) -> None:
            outcomes[outcome.kind] += 1
            if outcome.is_defect:
                print(f"--first {index}, {kind}: {outcome.kind}: {outcome.detail}\n    {outcome.mutations}", flush=True)
            elif sum(outcomes.values()) % 500 == 0:
                print(kind, dict(outcomes), f"{time.perf_counter() - began:.0f} s", flush=True)

        defects = fuzz(kind, count, seed, first=first, report=report)
        print(f"{count} {kind} of seed {seed}: {dict(outcomes)}, {len(defects)} defects", flush=True)
        yield kind, len(defects)


if __name__ == "__main__":
    main()
