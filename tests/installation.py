"""``python -m tests.installation``: the wheels as users install them, in environments of their own.

``fusecell-runtime``, where torch is not, gives a saved stream's bits; ``fusecell`` itself declares what it imports.
It takes pip's index, and a minute; ``test_runtime_package.py`` is the short form.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import nn

import fusecell as fc
from tests.paths import ROOT

__all__ = ["main"]


STEPS = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None, "torch is installed"
assert importlib.util.find_spec("llvmlite") is None, "llvmlite is installed"
assert importlib.util.find_spec("fusecell") is None, "fusecell is installed"
import numpy as np, fusecell_runtime as fc
stream = fc.load_stream(sys.argv[1], trusted=True)
np.save(sys.argv[3], np.stack([stream.step(x) for x in np.load(sys.argv[2])]))
print("fusecell-runtime", fc.__version__, "in", fc.__file__)
"""


def run(*command: object) -> None:
    """Run a program, which must succeed."""
    subprocess.run([str(word) for word in command], check=True, cwd=tempfile.gettempdir())


def build(project: Path, folder: Path) -> Path:
    """The wheel of a project."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "-w",
        folder,
        project,
    )
    [wheel] = folder.glob("*.whl")
    return wheel


def required(wheel: Path) -> Sequence[str]:
    """Return the dependencies that a wheel declares, without extras."""
    with zipfile.ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        lines = file.read(name).decode().splitlines()
    return sorted(line.split(": ")[1] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line)


def main() -> None:
    """Build both wheels, install the small one, and compare what it computes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library, runtime = (
            build(*pair) for pair in ((ROOT, folder / "library"), (ROOT / "packaging/runtime", folder / "runtime"))
        )
        assert required(runtime) == ["numpy"]
        assert "numpy" in required(library)

        venv.create(folder / "venv", with_pip=False)
        python = folder / "venv" / "bin" / "python"
        run(
            sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check",
            "--constraint", ROOT / "constraints.txt", runtime,
        )  # fmt: skip
        stream = fc.Stream(fc.Sequential(fc.GRU(40, 64, 2), fc.Recurrent(fc.LSTMCell(64, 32)), nn.Linear(32, 2)))
        x = np.random.default_rng(0).standard_normal((50, 40)).astype(np.float32)
        stream.save(folder / "model.fusecell", code_for=["host"])
        np.save(folder / "x.npy", x)
        run(python, "-I", "-c", STEPS, folder / "model.fusecell", folder / "x.npy", folder / "y.npy")
        assert np.array_equal(np.load(folder / "y.npy"), stream.push(x)), "the installed runtime computes other numbers"
    print("the installed runtime computes the same bits, without torch")


if __name__ == "__main__":
    main()
