"""The disk cache in every bad state that occurs on real systems, each met by a new process without torch."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys

import pytest

from fusecell.compiler.backend.disk_cache import TEMPORARY

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="modes, owners and limits are Linux's")

CODE = """
import ctypes, os, sys
from fusecell.compiler.backend.jit import load
from fusecell.compiler.backend.target import host_target
text = "define i32 @add(i32 %i) { %j = add i32 %i, 7 ret i32 %j }"
exec(sys.argv[1])
code = load(text, ["add"], host_target())
assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(code.address("add"))(1) == 8
print("from disk" if code.from_cache else "compiled", flush=True)
"""
NOBODY = 65534


def without_privileges():
    """Drop root's right to ignore file modes; no effect for other users."""
    for capability in (1, 2):  # to write to and to read from whatever there is
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def small_files():
    """Limit the size of files, so that writing fails midway, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def process(directory, *, first="", before=without_privileges, **environment):
    """Run a process that loads a kernel from the cache in ``directory`` or compiles it; return its output."""
    return subprocess.run(
        [sys.executable, "-c", CODE, first],
        env={**os.environ, "FUSECELL_CACHE": str(directory), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        preexec_fn=before,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def entries(directory):
    return sorted(path.name for path in directory.iterdir())


def filled(path):
    """Create a valid cache that holds the kernel."""
    assert process(path).stdout == "compiled\n"
    assert process(path).stdout == "from disk\n"
    return path


def missing(path):
    return path / "not" / "there yet"


def read_only(path):
    path.mkdir(mode=0o500)
    return path


def read_only_and_filled(path):
    filled(path).chmod(0o500)
    return path


def under_a_read_only_one(path):
    path.mkdir(mode=0o500)
    return path / "below"


def shut(path):
    filled(path).chmod(0o000)
    return path


def a_file(path):
    path.write_text("mine")
    return path


def a_broken_link(path):
    path.symlink_to(path.with_name("nowhere"))
    return path


def a_pipe(path):
    filled(path)
    [entry] = path.iterdir()
    entry.unlink()
    os.mkfifo(entry)
    return path


def world_writable(path):
    filled(path).chmod(0o777)
    return path


def blanks_and_unicode(path):
    return filled(path.with_name("ein Ordner  缓存 ü 🗂"))


def a_device(path):
    return "/dev/full"


FAULTS = {
    missing: ("compiled", ""),
    read_only: ("compiled", ""),
    read_only_and_filled: ("from disk", ""),
    under_a_read_only_one: ("compiled", ""),
    shut: ("compiled", ""),
    a_file: ("compiled", "not a directory"),
    a_broken_link: ("compiled", ""),
    a_pipe: ("compiled", ""),
    world_writable: ("compiled", "others may write to it"),
    blanks_and_unicode: ("from disk", ""),
    a_device: ("compiled", "not a directory"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_cache_directories_in_every_state(tmp_path, fault):
    """The right result, from the disk where that is safe, and a warning where the user should act."""
    expected, warning = FAULTS[fault]
    result = process(fault(tmp_path / "cache"))
    assert (result.returncode, result.stdout) == (0, f"{expected}\n"), result.stderr
    assert warning in result.stderr
    assert bool(result.stderr) == bool(warning), result.stderr


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user(tmp_path):
    path = filled(tmp_path / "cache")
    [entry] = path.iterdir()
    os.chown(entry, NOBODY, NOBODY)
    assert process(path).stdout == "compiled\n"  # and replaced, the directory being ours
    assert process(path).stdout == "from disk\n"
    os.chown(path, NOBODY, NOBODY)
    result = process(path)
    assert result.stdout == "compiled\n"
    assert f"belongs to user {NOBODY}" in result.stderr


def test_a_disk_that_becomes_full_in_mid_write(tmp_path):
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    result = process(path, before=small_files)
    assert (result.returncode, result.stdout, result.stderr) == (0, "compiled\n", "")
    assert entries(path) == []


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "disk_cache._evict"])
def test_a_writer_killed_in_mid_write(tmp_path, call):
    """Whatever it leaves behind, the next one finds a whole entry or none."""
    if call == "os.fsync":
        # In the midst of the bytes: the file's limit, whose signal kills.
        kill = "import signal, resource; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)"
        kill += "; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    else:
        kill = f"from fusecell.compiler.backend import disk_cache; {call} = lambda *_: os.kill(os.getpid(), 9)"
    path = tmp_path / "cache"
    result = process(path, first=kill)
    assert result.returncode in (-signal.SIGKILL, -signal.SIGXFSZ)
    left = [name for name in entries(path) if name.startswith(TEMPORARY)]
    assert len(left) == (call != "disk_cache._evict")
    assert process(path).stdout == ("from disk\n" if call == "disk_cache._evict" else "compiled\n")
    assert process(path).stdout == "from disk\n"


def test_code_for_another_cpu_or_version_is_never_taken(tmp_path):
    """Code for another CPU level, or of another LLVM, has another file name."""
    path = filled(tmp_path / "cache")
    [native] = entries(path)
    level = "x86-64-v2"
    other = {"FUSECELL_TARGET": "native" if os.environ.get("FUSECELL_TARGET") == level else level}
    assert process(path, **other).stdout == "compiled\n"
    stale = "from fusecell.compiler.backend import llvm; llvm.VERSIONS = 'llvmlite 0, LLVM 0'"
    assert process(path, first=stale).stdout == "compiled\n"
    assert len(entries(path)) == 3
    for name in entries(path):  # each in the place of the other
        (path / native).write_bytes((path / name).read_bytes())
        assert process(path).stdout == ("from disk\n" if name == native else "compiled\n")


def test_off_writes_nothing_anywhere(tmp_path):
    result = process("off", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert (result.returncode, result.stdout, result.stderr) == (0, "compiled\n", "")
    assert list(tmp_path.rglob("*")) == []
