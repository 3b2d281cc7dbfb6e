"""``show_config``, and the tests that the check mode runs."""

import platform
from pathlib import Path

import torch

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.compiler.backend.disk_cache import cache_info
from tests import check_mode
from tests.check_mode import RUN_NO_KERNELS


def test_show_config_reports_the_active_settings(monkeypatch):
    monkeypatch.setenv("FUSECELL_TARGET", "x86-64-v2")
    with fc.runner("eager"):
        config = fc.show_config()
    assert config.fusecell == fc.__version__
    assert config.torch == torch.__version__
    assert platform.python_version() in config.python
    assert config.target.startswith("x86-64-v2")
    assert "FUSECELL_TARGET=x86-64-v2" in config.target
    assert config.vectors == "128 bits, 16 registers, no FMA"
    assert config.denormals == "count as zero inside kernels"
    assert config.threads.startswith(f"{torch.get_num_threads()} of ")
    assert config.runner == "eager"


def test_show_config_prints_a_line_per_setting(monkeypatch):
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
