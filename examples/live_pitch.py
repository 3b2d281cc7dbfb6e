"""Track the pitch of a sound live: train for half a minute on synthetic voices, then stream a file in blocks.

Every 10 ms a block of 160 samples arrives. The spectrum of the last 40 ms goes into a GRU with a readout, one
``Stream.step``, which gives the pitch. The sounds are voices of a few harmonics with vibrato and glides, in noise.
The fundamental is often weaker than its harmonics, so that the baseline, the strongest frequency, is often wrong.

    python examples/live_pitch.py --seconds 30
"""

from __future__ import annotations

import argparse
import time
import wave
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fusecell as fc

RATE, BLOCK, WINDOW, BANDS = 16_000, 160, 640, 128
LOWEST, STEPS_PER_OCTAVE, OCTAVES = 80.0, 24, 3
PITCHES = STEPS_PER_OCTAVE * OCTAVES
HANN = np.hanning(WINDOW).astype(np.float32)


def voices(count: int, blocks: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Synthesise sounds (count, samples); return them and their pitch at each block's end, in octaves above LOWEST."""
    time_axis = np.arange(blocks * BLOCK) / RATE
    shape = (count, 1)
    start, end = random.uniform(0.1, OCTAVES - 0.1, shape), random.normal(0, 0.3, shape)
    glide = np.clip(start + end * time_axis / time_axis[-1], 0.05, OCTAVES - 0.05)
    vibrato = random.uniform(0, 0.03, shape) * np.sin(2 * np.pi * random.uniform(4, 7, shape) * time_axis)
    octaves = np.clip(glide + vibrato, 0, OCTAVES - 0.01)
    phase = 2 * np.pi * np.cumsum(LOWEST * 2**octaves, 1) / RATE
    sound = np.zeros_like(phase)
    for harmonic in range(1, 6):
        sound += random.uniform(0, 0.4 if harmonic == 1 else 1.0, shape) * np.sin(harmonic * phase)
    sound /= sound.std(1, keepdims=True)
    sound += random.uniform(0.1, 1.0, shape) * random.normal(size=sound.shape)
    return sound.astype(np.float32), octaves[:, BLOCK - 1 :: BLOCK].astype(np.float32)


def spectrum(window: np.ndarray) -> np.ndarray:
    """Return the log magnitudes (..., BANDS) of samples (..., WINDOW), in bands 25 Hz apart."""
    magnitudes = np.abs(np.fft.rfft(window * HANN, axis=-1))[..., :BANDS]
    return np.log1p(magnitudes).astype(np.float32)


def frames(sound: np.ndarray) -> np.ndarray:
    """Return the spectra (T, count, BANDS) at the end of each block of sounds (count, samples)."""
    padded = np.pad(sound, ((0, 0), (WINDOW - BLOCK, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW, axis=1)[:, ::BLOCK]
    return spectrum(windows).transpose(1, 0, 2)


def train(seconds: float, *, updates: int | None = None, seed: int = 0, quiet: bool = False) -> fc.Recurrent:
    """Train a tracker, which maps spectra to scores of the pitches."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    layer = fc.Recurrent(fc.WithReadout(fc.GRUCell(BANDS, 96), nn.Linear(96, PITCHES)))
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    began, update = time.perf_counter(), 0
    while update < updates if updates is not None else time.perf_counter() - began < seconds:
        sound, octaves = voices(32, 60, random)
        target = torch.from_numpy((octaves.T * STEPS_PER_OCTAVE).astype(np.int64))
        scores, _ = layer(torch.from_numpy(frames(sound)))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        update += 1
        if not quiet and update % 50 == 0:
            print(f"update {update:4}  loss {loss.item():.3f}")
    return layer.eval()


def semitones(scores: np.ndarray) -> float:
    """Return the pitch for some scores, in semitones: the mean of the best and its neighbours by their softmax."""
    best = int(scores.argmax())
    near = slice(max(best - 1, 0), best + 2)
    weights = np.exp(scores[near] - scores[best])
    pitch = (weights * (np.arange(PITCHES)[near] + 0.5)).sum() / weights.sum()
    return float(12 * pitch / STEPS_PER_OCTAVE)


def strongest(bands: np.ndarray) -> float:
    """Return the baseline's pitch, in semitones: the strongest frequency in the range."""
    low, high = int(LOWEST / 25), int(LOWEST * 2**OCTAVES / 25) + 1
    best = low + int(bands[low:high].argmax())
    return 12 * float(np.log2(max(best * 25.0, LOWEST) / LOWEST))


def write_sound(path: Path, seed: int) -> np.ndarray:
    """Write a second of each of eight voices to a WAV file; return the pitch at each block, in semitones."""
    sound, octaves = voices(8, 100, np.random.default_rng(seed))
    loud = np.clip(sound.reshape(-1) * 6000, -32768, 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(loud.tobytes())
    return 12 * octaves.reshape(-1)


def listen(layer: fc.Recurrent, path: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Read a file block by block, as it would arrive; return the pitches, the baseline's, and the seconds it took."""
    stream, window = fc.Stream(layer), np.zeros(WINDOW, np.float32)
    pitches, baseline = [], []
    began = time.perf_counter()
    with wave.open(str(path), "rb") as file:
        while len(data := file.readframes(BLOCK)) == 2 * BLOCK:
            window = np.concatenate((window[BLOCK:], np.frombuffer(data, "<i2").astype(np.float32) / 6000))
            bands = spectrum(window)
            pitches.append(semitones(stream.step(bands)))
            baseline.append(strongest(bands))
    return np.array(pitches), np.array(baseline), time.perf_counter() - began


def report(layer: fc.Recurrent, path: Path, seed: int = 1) -> dict[str, float]:
    """Return the shares of blocks within half a semitone, and the real-time factor."""
    truth = write_sound(path, seed)
    pitches, baseline, seconds = listen(layer, path)
    return {
        "within half a semitone": float((np.abs(pitches - truth) < 0.5).mean()),
        "the strongest frequency": float((np.abs(baseline - truth) < 0.5).mean()),
        "real-time factor": seconds / (len(truth) * BLOCK / RATE),
    }


def main() -> None:
    """Train, stream the file and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="how long to train")
    parser.add_argument("--sound", type=Path, default=Path("voices.wav"), help="the file to write and listen to")
    options = parser.parse_args()
    results = report(train(options.seconds), options.sound)
    print(f"{options.sound}, in blocks of {1000 * BLOCK // RATE} ms")
    print(f"  {results['within half a semitone']:.0%} of the blocks within half a semitone")
    print(f"  {results['the strongest frequency']:.0%} by the strongest frequency")
    print(f"  real-time factor {results['real-time factor']:.4f}: one core could listen to", end=" ")
    print(f"{1 / results['real-time factor']:.0f} such sounds at once")


if __name__ == "__main__":
    main()
