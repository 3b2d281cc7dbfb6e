"""The package fusecell-runtime, of the modules that need no torch, and declared dependencies."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
from torch import nn

import fusecell as fc
from tests.paths import ROOT

PACKAGING = ROOT / "packaging" / "runtime"

_ALONE = """
import sys
for name in ("torch", "fusecell"):
    sys.modules[name] = None  # an import of it is a ModuleNotFoundError
import numpy as np, fusecell_runtime as fc
stream = fc.load_stream(sys.argv[1])
x = np.load(sys.argv[2])
y = np.stack([stream.step(step) for step in x])
stream.reset()
assert np.array_equal(stream.push(x), y)
stream.save(sys.argv[1] + ".again")
assert np.array_equal(fc.load_stream(sys.argv[1] + ".again").push(x), y)
try:
    fc.Stream(object())
except ModuleNotFoundError as error:
    assert "pip install fusecell" in str(error)
else:
    raise AssertionError("a stream was made of a module")
np.save(sys.argv[3], y)
"""


@pytest.fixture(scope="module")
def package_files():
    spec = importlib.util.spec_from_file_location("package_files", PACKAGING / "package_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(package_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / package_files.PACKAGE
    package_files.write(folder)
    return folder


def test_the_runtime_package_computes_the_same_bits(package, tmp_path):
    stream = fc.Stream(fc.Sequential(fc.GRU(5, 9, 2), fc.Recurrent(fc.cells.LayerNormGRUCell(9, 7)), nn.Linear(7, 2)))
    x = np.random.default_rng(0).standard_normal((11, 5)).astype(np.float32)
    stream.save(tmp_path / "it")
    np.save(tmp_path / "x.npy", x)
    arguments = [str(tmp_path / name) for name in ("it", "x.npy", "y.npy")]
    code = f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{_ALONE}"
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=600)
    assert np.array_equal(np.load(tmp_path / "y.npy"), stream.push(x))


def runtime_needs():
    """The dependencies of fusecell-runtime, and those of its extras."""
    text = (PACKAGING / "pyproject.toml").read_text("utf-8")
    needs = re.search(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)[1]
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return re.findall(r'"([^"]+)"', needs), re.findall(r'"([^"]+)"', extras)


def test_the_runtime_package_imports_only_declared_dependencies(package_files, package):
    """Torch is imported inside functions only, which a stream never calls."""
    allowed = {re.match(r"\w+", need)[0] for needs in runtime_needs() for need in needs} | {
        *sys.stdlib_module_names,
        package_files.PACKAGE,
    }
    without = {name.replace("fusecell", package_files.PACKAGE, 1) for name in package_files.WITHOUT}
    for path in package.rglob("*.py"):
        at_once = [
            node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        roots = {name.partition(".")[0] for name in package_files.imported(path)}
        assert roots - allowed <= {"torch"}, path
        assert not any("torch" in ast.unparse(node).split()[1] for node in at_once), path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module.startswith(package_files.PACKAGE + ".")
                and node.module not in without
            ):
                place = package.joinpath(*node.module.split(".")[1:])
                assert place.with_suffix(".py").exists() or (place / "__init__.py").exists(), f"{path}: {node.module}"


def test_the_runtime_package_needs_numpy_alone_and_has_the_library_s_other_dependencies_as_extras():
    needs, extras = runtime_needs()
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    library = set(re.findall(r'"([^"]+)"', re.search(r"^dependencies = \[(.*)\]$", text, re.MULTILINE)[1]))
    assert needs == ["numpy"]
    assert {name for name in library if not name.startswith("torch")} == {*needs, *extras}


_DECLARED = """
import sys
for name in sys.argv[2:]:
    sys.modules[name] = None
import numpy as np, torch, fusecell as fc
layer = fc.GRU(5, 9)
layer(torch.randn(7, 3, 5))[0].sum().backward()
stream = fc.Stream(layer)
stream.save(sys.argv[1])
y = stream.push(np.ones((4, 5), np.float32))
assert np.array_equal(fc.load_stream(sys.argv[1]).push(np.ones((4, 5), np.float32)), y)
tape = fc.record(layer, torch.randn(7, 3, 5))
tape.save(sys.argv[1])
fc.Tape.load(sys.argv[1])
print(fc.summary(layer, 7, 3), fc.explain(layer), fc.show_config())
"""


def test_the_library_needs_no_package_of_an_extra(tmp_path):
    """What ``pip install fusecell`` brings is enough to train, to stream, and to save."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    names = {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', extras)} - {"fusecell"}
    assert {"rich", "typer", "matplotlib", "onnx"} <= names
    assert "safetensors" not in names
    command = [sys.executable, "-c", _DECLARED, str(tmp_path / "it"), *sorted(names)]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
