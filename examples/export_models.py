"""Take trained cells out of Python: a filter in C++, Rust or a plugin, a GRU on a bare microcontroller, a web page.

python examples/export_models.py filter             trains a filter, builds a C++ program, and filters a WAV file
python examples/export_models.py rust               the same filter in a Rust program, which filters what it reads
python examples/export_models.py plugin             the same filter as a LADSPA plugin, for audio editors and hosts
python examples/export_models.py microcontroller    builds a program for a Cortex-M7, and runs it on QEMU
python examples/export_models.py page               trains the pitch tracker of live_pitch.py, and serves a page
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import time
import wave
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fusecell as fc

HERE = Path(__file__).parent
SOURCES = HERE / "export"
RATE = 16_000


# A filter in C++.


def amplifier(sound: np.ndarray) -> np.ndarray:
    """Return what a filter is to imitate: a low-pass and a soft clipper, of sounds (count, samples)."""
    y, level = np.zeros_like(sound), np.zeros(len(sound), sound.dtype)
    for t in range(sound.shape[1]):
        level = level + 0.2 * (sound[:, t] - level)
        y[:, t] = np.tanh(3 * level)
    return y


def train_filter(seconds: float, *, updates: int | None = None, seed: int = 0) -> tuple[nn.Module, float]:
    """Train a GRU of 8 units to imitate the amplifier; return it, and its error relative to the signal's power."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    layer = fc.Recurrent(fc.WithReadout(fc.GRUCell(1, 8), nn.Linear(8, 1)))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    began, update, error = time.perf_counter(), 0, 1.0
    while update < updates if updates is not None else time.perf_counter() - began < seconds:
        sound = random.normal(0, 0.5, (32, 400)).astype(np.float32)
        target = torch.from_numpy(amplifier(sound).T[..., None])
        y, _ = layer(torch.from_numpy(np.ascontiguousarray(sound.T[..., None])))
        loss = (y - target).pow(2)[50:].mean() / target.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update, error = update + 1, loss.item()
    return layer.eval(), error


def build_filter(layer: nn.Module, folder: Path) -> Path:
    """Export a filter as a static library, and build the C++ program; return the program."""
    print(fc.export(layer, folder / "filter", format="static", verify=True))
    program = folder / "wav_filter"
    command = ["c++", "-std=c++11", "-O2", "-Wall", "-Wextra", f"-I{folder}", SOURCES / "wav_filter.cpp"]
    subprocess.run([*command, folder / "filter.a", "-o", program], check=True)
    return program


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())


def read_wav(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def filter_example(folder: Path, seconds: float, updates: int | None = None) -> tuple[float, bool]:
    """Train, build and run; return the filter's error, and whether the program's samples are the stream's."""
    layer, error = train_filter(seconds, updates=updates)
    program = build_filter(layer, folder)
    samples = np.random.default_rng(1).normal(0, 8000, RATE).clip(-32768, 32767).round()
    write_wav(folder / "in.wav", samples)
    subprocess.run([program, folder / "in.wav", folder / "out.wav"], check=True)
    y = fc.Stream(layer).push((samples[:, None] / 32768).astype(np.float32))[:, 0]
    expected = np.rint(np.clip(y * np.float32(32768), -32768, 32767)).astype(np.int16)
    same = bool((read_wav(folder / "out.wav") == expected).all())
    print(f"error {error:.2%} of the signal's power; {len(samples)} samples in {folder / 'out.wav'}, equal: {same}")
    return error, same


# The same filter in Rust.


def build_rust(layer: nn.Module, folder: Path) -> Path:
    """Export a filter as a static library, and build the Rust program around it; return the program."""
    fc.export(layer, folder / "filter", format="static", verify=True)
    # Rust can't read a C header: its constants go into a file that the program includes.
    sizes = re.findall(r"#define FILTER_(\w+_SIZE|MEMORY_BYTES) (\d+)", (folder / "filter.h").read_text())
    lines = [f"#[allow(dead_code)]\nconst {name}: usize = {size};\n" for name, size in sizes]
    (folder / "sizes.rs").write_text("".join(lines))
    shutil.copy(folder / "filter.a", folder / "libfilter.a")
    program = folder / "filter_rs"
    command = ["rustc", "--edition=2021", "-O", "-D", "warnings", SOURCES / "filter.rs", "-L", folder]
    environment = {**os.environ, "EXPORTED": str(folder.resolve())}
    subprocess.run([*command, "-l", "static=filter", "-l", "m", "-o", program], check=True, env=environment)
    return program


def rust_example(folder: Path, seconds: float, updates: int | None = None) -> bool:
    """Train, build and run; return whether the program's samples are the stream's, bit by bit."""
    layer, _ = train_filter(seconds, updates=updates)
    program = build_rust(layer, folder)
    samples = np.random.default_rng(1).normal(0, 0.3, RATE).astype("<f4")
    done = subprocess.run([program], input=samples.tobytes(), stdout=subprocess.PIPE, check=True)
    same = done.stdout == fc.Stream(layer).push(samples[:, None]).astype("<f4").tobytes()
    print(f"{len(samples)} samples by {program}, equal: {same}")
    return same


# The same filter as a LADSPA plugin.


def build_plugin(layer: nn.Module, folder: Path) -> Path:
    """Export a filter as a static library, and build the plugin around it; return the plugin."""
    fc.export(layer, folder / "filter", format="static", verify=True)
    plugin = folder / "fusecell_filter.so"
    command = [
        "cc",
        "-std=c11",
        "-shared",
        "-fPIC",
        "-O2",
        "-Wall",
        "-Wextra",
        f"-I{folder}",
        SOURCES / "ladspa_filter.c",
    ]
    subprocess.run([*command, folder / "filter.a", "-lm", "-o", plugin], check=True)
    return plugin


def plugin_example(folder: Path, seconds: float, updates: int | None = None) -> bool:
    """Train, build, and have the host of LADSPA's SDK run the plugin; return whether its samples are the stream's."""
    layer, _ = train_filter(seconds, updates=updates)
    plugin = build_plugin(layer, folder).resolve()
    samples = np.random.default_rng(1).normal(0, 8000, RATE).clip(-32768, 32767).round()
    write_wav(folder / "in.wav", samples)
    command = ["applyplugin", folder / "in.wav", folder / "out.wav", plugin, "fusecell_filter", "1"]
    subprocess.run(command, check=True)
    y = fc.Stream(layer).push((samples[:, None] / 32768).astype(np.float32))[:, 0]
    heard = read_wav(folder / "out.wav")
    # The host rounds to 16 bits in its own way.
    same = len(heard) == RATE and bool(np.abs(heard - np.clip(y * 32768, -32768, 32767)).max() <= 1)
    print(f"{len(heard)} samples by {plugin}, equal: {same}")
    return same


# A GRU on a microcontroller.


def microcontroller_example(folder: Path, seed: int = 0) -> dict[str, int]:
    """Build a program for a Cortex-M7 and run it on QEMU; return what it prints, and the hash that the stream has."""
    torch.manual_seed(seed)
    layer = fc.GRU(4, 16).eval()
    print(fc.export(layer, folder / "gru", target="cortex-m7", verify=True))
    program = folder / "gru.elf"
    flags = ["-mcpu=cortex-m7", "-mthumb", "-mfloat-abi=hard", "-Os", "-ffreestanding", "-nostdlib", "-Wall", "-Wextra"]
    sources = [SOURCES / "cortex_m7.c", folder / "gru.o"]
    layout = ["-T", SOURCES / "cortex_m7.ld", "-Wl,-z,noexecstack"]
    subprocess.run(["arm-none-eabi-gcc", *flags, f"-I{folder}", *layout, *sources, "-lgcc", "-o", program], check=True)
    machine = ["-M", "mps2-an500", "-nographic", "-monitor", "none", "-serial", "none"]
    debugger = ["-semihosting-config", "enable=on,target=native"]
    done = subprocess.run(
        ["qemu-system-arm", *machine, *debugger, "-kernel", program], check=True, capture_output=True, text=True
    )
    printed = {name: int(value) for name, value in (line.split() for line in (done.stdout + done.stderr).splitlines())}
    x = np.array([[(7 * t + 3 * i) % 11 - 5 for i in range(4)] for t in range(100)], np.float32) / np.float32(4)
    digest = 2166136261
    for byte in fc.Stream(layer).push(x).tobytes():
        digest = (digest ^ byte) * 16777619 % (1 << 32)
    print(f"{printed}, the stream's hash is {digest}")
    return {**printed, "expected": digest}


# A pitch tracker in a web page.


def build_page(folder: Path, seconds: float, updates: int | None = None) -> Path:
    """Train the pitch tracker, export it, and copy the page beside it; return the page."""
    spec = importlib.util.spec_from_file_location("live_pitch", HERE / "live_pitch.py")
    assert spec is not None
    assert spec.loader is not None
    live_pitch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(live_pitch)
    print(fc.export(live_pitch.train(seconds, updates=updates, quiet=True), folder / "pitch", format="web"))
    for name in ("pitch.html", "pitch-listener.mjs"):
        shutil.copy(SOURCES / name, folder)
    return folder / "pitch.html"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve files, ES modules as what they are."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}  # noqa: RUF012

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def serve(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of a folder; worklets load from servers alone, not from files."""
    return http.server.ThreadingHTTPServer(("localhost", port), functools.partial(Handler, directory=folder))


def main() -> None:
    """Run one of the examples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("example", choices=("filter", "rust", "plugin", "microcontroller", "page"))
    parser.add_argument("--seconds", type=float, default=30, help="how long to train")
    parser.add_argument("--output", type=Path, default=Path("export-output"), help="the folder for all files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.example == "filter":
        filter_example(options.output, options.seconds)
    elif options.example == "rust":
        rust_example(options.output, options.seconds)
    elif options.example == "plugin":
        plugin_example(options.output, options.seconds)
    elif options.example == "microcontroller":
        microcontroller_example(options.output)
    else:
        page = build_page(options.output, options.seconds)
        with serve(options.output, 8000) as server:
            print(f"http://localhost:8000/{page.name}, until Ctrl-C")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return


if __name__ == "__main__":
    main()
