"""Score many sequences on as many cores or machines as there are: a saved stream in the tasks of Ray Data.

A model that predicts the next value of a heartbeat is trained on healthy ones and saved as a stream. Ray reads Parquet
files of sequences of different lengths and hands out batches of rows to its workers, which load the stream, without
torch, and return scores. On a cluster the same program runs on all of it: ``ray.init(address="auto")``, with the folder
and the stream where every node can read them.

    pip install fusecell 'ray[data]'
    python examples/score_with_ray.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import fusecell as fc

ROWS = 128  # of a batch, and of the stream that scores it


def heartbeats(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw sequences of 100 to 300 values, and which of them are ill: those whose beats come at uneven times."""
    random = np.random.default_rng(seed)
    ill, sequences = random.random(count) < 0.5, []
    for row in range(count):
        beats = np.zeros(random.integers(100, 300), np.float32)
        pauses = random.integers(7, 15, len(beats)) if ill[row] else np.full(len(beats), random.integers(9, 13))
        times = pauses.cumsum()
        beats[times[times < len(beats)]] = 1
        shape = np.convolve(beats, [0.2, 1.0, -0.6, 0.1], "same")
        sequences.append((shape + random.normal(0, 0.05, len(beats))).astype(np.float32))
    return sequences, ill


def write(folder: Path, sequences: list[np.ndarray], files: int) -> None:
    """Write sequences as Parquet files: an id and a list of values in a row."""
    import pyarrow as pa
    from pyarrow import parquet

    for part in range(files):
        ids = np.arange(part, len(sequences), files)
        table = pa.table({"id": ids, "values": [sequences[row] for row in ids]})
        parquet.write_table(table, folder / f"{part:04}.parquet")


def padded(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return sequences as (T, ROWS, 1), with zeros behind them and in the rows that are too many, and their lengths."""
    lengths = np.array([len(values) for values in sequences])
    x = np.zeros((lengths.max(), ROWS, 1), np.float32)
    for row, values in enumerate(sequences):
        x[: len(values), row, 0] = values
    return x, lengths


def train(path: Path, updates: int, seed: int = 0) -> None:
    """Learn to predict the next value of healthy sequences, and save the model as a stream."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    model = fc.Sequential(fc.GRU(1, 24), nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sequences, ill = heartbeats(2 * ROWS, seed=1)
    x, lengths = padded([values for values, is_ill in zip(sequences, ill, strict=True) if not is_ill][:ROWS])
    values, valid = torch.from_numpy(x), torch.arange(len(x) - 1)[:, None] < torch.from_numpy(lengths - 1)
    for _ in range(updates):
        errors = (model(values[:-1])[0] - values[1:])[..., 0][:, : len(lengths)]
        loss = errors[valid].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fc.Stream(model, ROWS).save(path)


STREAMS: dict[str, fc.Stream] = {}  # of this process


def loaded(path: str) -> fc.Stream:
    """Load a stream, once in each worker."""
    if path not in STREAMS:
        STREAMS[path] = fc.load_stream(path, ROWS)
    return STREAMS[path]


def score(batch: dict[str, np.ndarray], model: str) -> dict[str, np.ndarray]:
    """Return the mean squared error of a model's predictions for each sequence of a batch, of at most ROWS."""
    x, lengths = padded(list(batch["values"]))
    stream = loaded(model)
    stream.reset()
    errors = (stream.push(x[:-1]) - x[1:])[..., 0] ** 2
    scores = [errors[: length - 1, row].mean() for row, length in enumerate(lengths)]
    return {"id": batch["id"], "score": np.array(scores)}


def score_files(folder: Path, model: Path) -> dict[int, float]:
    """Score every sequence in a folder's Parquet files with Ray Data."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    files = ray.data.read_parquet(str(folder))
    scored = files.map_batches(score, batch_size=ROWS, fn_kwargs={"model": str(model)})
    return {row["id"]: row["score"] for row in scored.iter_rows()}


def area_under_curve(scores: np.ndarray, ill: np.ndarray) -> float:
    """Return how often an ill sequence has a higher score than a healthy one."""
    ranks = scores.argsort().argsort()
    count = ill.sum()
    return float((ranks[ill].sum() - count * (count - 1) / 2) / (count * (len(ill) - count)))


def run(count: int, *, updates: int = 150, cpus: int = 2) -> tuple[np.ndarray, float, float]:
    """Train, score ``count`` sequences; return the scores, how well they part ill from healthy, and the seconds."""
    import ray

    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=200_000_000, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sequences, ill = heartbeats(count, seed=2)
            write(folder, sequences, files=4)
            model = folder / "heartbeat.fusecell"
            train(model, updates)
            score_files(folder, model)  # starts the workers, which compile or find the kernel
            began = time.perf_counter()
            found = score_files(folder, model)
            seconds = time.perf_counter() - began
            scores = np.array([found[row] for row in range(count)])
            return scores, area_under_curve(scores, ill), seconds
    finally:
        ray.shutdown()


def main() -> None:
    """Score, and print how well and how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    options = parser.parse_args()
    _, area, seconds = run(options.sequences, cpus=options.cpus)
    rate = options.sequences / seconds
    print(f"{rate:,.0f} sequences a second on {options.cpus} cores; area under the curve {area:.3f}")


if __name__ == "__main__":
    main()
