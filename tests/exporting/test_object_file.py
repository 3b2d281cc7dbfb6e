"""What reports say of object files, against binutils."""

from __future__ import annotations

import shutil
import subprocess

import pytest

import fusecell as fc
from fusecell.compiler.backend import llvm
from fusecell.errors import CompilerError
from fusecell.exporting.object_file import read_object
from fusecell.exporting.targets import TARGETS

TEXT = """\
@table = internal constant [100 x i32] [{}]
declare double @sin(double) nounwind
declare void @elsewhere(ptr) nounwind
define double @used(double %x) nounwind {{
  %y = call double @sin(double %x)
  call void @elsewhere(ptr @table)
  ret double %y
}}
""".format(", ".join(f"i32 {number + 7}" for number in range(100)))


@pytest.mark.parametrize("name", TARGETS)
def test_undefined_symbols_and_sizes_in_every_format(name):
    target = TARGETS[name]
    code, _ = llvm.program_object(
        TEXT, {}, ["used"], cpu=target.cpu, features=target.features, triple=target.triple, abi=target.abi
    )
    found = read_object(code)
    assert {"sin", "elsewhere"} <= set(found.undefined) <= {"sin", "elsewhere", "_fltused"}
    assert 400 < found.loaded < 700


@pytest.mark.skipif(shutil.which("size") is None, reason="needs binutils: apt-get install binutils")
def test_sizes_are_those_of_binutils(tmp_path):
    report = fc.export(fc.GRU(4, 16), tmp_path / "gru", "x86-64-v3")
    text = subprocess.run(["size", report.files[0]], check=True, capture_output=True, text=True).stdout
    assert int(text.splitlines()[1].split()[3]) == report.code_bytes + report.weight_bytes


def test_other_files_are_refused():
    with pytest.raises(CompilerError, match="begins with 25504446"):
        read_object(b"%PDF-1.7")
