"""Install the packages of requirements.txt into an environment of their own, on top of the one that runs this.

``python -m tests.integrations.environment .venv-integrations``. The new environment sees the packages of this one, such
as torch. A package that can't be had is named and left out, and its tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from tests.paths import ROOT

FOLDER = Path(__file__).parent
# Compiled against one build of torch, which need not be this one's.
COMPILED_FOR_TORCH = ("torchvision", "torchaudio")


def site_packages(python: Path) -> Path:
    """Return where an interpreter's packages are."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def create(folder: Path) -> Path:
    """Create an environment that sees this one's packages and this tree; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    paths = [ROOT / "src", ROOT, sysconfig.get_path("purelib")]
    (site_packages(python) / "base.pth").write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    return python


def install(python: Path, *arguments: str | Path) -> bool:
    """Return whether pip could install something into an environment."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install", "--quiet")
    return subprocess.run([*pip, *arguments], check=False).returncode == 0


def requirements(name: str) -> list[str]:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def fits(python: Path, package: str) -> bool:
    return subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode == 0


def without_compiled_parts(python: Path, package: str) -> None:
    """Take away a package's libraries that this torch can't load, or the package if it can't do without."""
    for library in (site_packages(python) / package).rglob("*.so"):
        library.unlink()
    if not fits(python, package):
        pip = [sys.executable, "-m", "pip", "--python", python, "uninstall", "--quiet", "--yes", package]
        subprocess.run(pip, check=True)


def main() -> None:
    """Create the environment and install."""
    folder = Path(sys.argv[1])
    python = create(folder)
    kept = folder / "kept.txt"
    kept.write_text("".join(f"{name}=={version(name)}\n" for name in ("torch", "numpy")), encoding="utf-8")
    pins = ("--constraint", FOLDER / "constraints.txt", "--constraint", kept)
    left_out = []
    if not install(python, *pins, "--requirement", FOLDER / "requirements.txt"):
        print("Not all can be had together; each by itself:", flush=True)
        left_out += [each for each in requirements("requirements.txt") if not install(python, *pins, each)]
    left_out += [each for each in requirements("requirements-alone.txt") if not install(python, "--no-deps", each)]
    for package in COMPILED_FOR_TORCH:
        if not fits(python, package):
            without_compiled_parts(python, package)
    print("left out:", ", ".join(left_out) or "nothing")


if __name__ == "__main__":
    main()
