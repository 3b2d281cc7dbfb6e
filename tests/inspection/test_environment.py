"""What is in force: fusecell's own configuration, and which tests the check mode runs."""

import platform
from pathlib import Path

import torch

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.disk_cache import cache_info
from tests import check_mode
from tests.check_mode import RUN_NO_KERNELS


def test_it_says_what_is_in_force(monkeypatch):
    monkeypatch.setenv("FUSECELL_TARGET", "x86-64-v2")
    with fc.runner("eager"):
        found = fc.show_config()
    assert found.fusecell == fc.__version__
    assert found.torch == torch.__version__
    assert platform.python_version() in found.python
    assert found.target.startswith("x86-64-v2")
    assert "FUSECELL_TARGET=x86-64-v2" in found.target
    assert found.vectors == "128 bits, 16 registers, no FMA"
    assert found.denormals == "count as zero inside kernels"
    assert found.threads.startswith(f"{torch.get_num_threads()} of ")
    assert found.runner == "eager"


def test_it_prints_a_line_for_each(monkeypatch):
    monkeypatch.delenv("FUSECELL_TARGET", raising=False)
    text = str(fc.show_config())
    assert llvm.host().cpu in text
    assert [line.split()[0] for line in text.splitlines()][:3] == ["fusecell", "torch", "llvmlite"]
    info = cache_info()
    assert (str(info.path) if info.enabled else info.reason) in text


def test_the_check_mode_leaves_out_files_that_are_there():
    tests = Path(check_mode.__file__).parent
    names = {path.relative_to(tests).with_suffix("").as_posix() for path in tests.rglob("test_*.py")}
    assert set(RUN_NO_KERNELS) <= names
