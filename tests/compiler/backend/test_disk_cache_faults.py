"""A cache on disk in every bad state that a system really has, each met by a process of its own, without torch."""

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
    """Modes hold for root too; for anybody else this does nothing."""
    for capability in (1, 2):  # to write to and to read from whatever there is
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def small_files():
    """Writing fails in mid-file, as on a disk that becomes full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def process(directory, *, first="", before=without_privileges, **environment):
    """What a process says, that takes its kernel from a cache in ``directory`` or compiles it."""
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
    """A sound cache with the kernel in it."""
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
def test_a_cache_that_is(tmp_path, fault):
    """The right result, from the disk where that is safe, and a warning where the user should act."""
    expected, warning = FAULTS[fault]
    done = process(fault(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    assert warning in done.stderr
    assert bool(done.stderr) == bool(warning), done.stderr


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="only root can give files away")
def test_a_cache_of_another_user(tmp_path):
    path = filled(tmp_path / "cache")
    [entry] = path.iterdir()
    os.chown(entry, NOBODY, NOBODY)
    assert process(path).stdout == "compiled\n"  # and replaced, the directory being ours
    assert process(path).stdout == "from disk\n"
    os.chown(path, NOBODY, NOBODY)
    done = process(path)
    assert done.stdout == "compiled\n"
    assert f"belongs to user {NOBODY}" in done.stderr


def test_a_disk_that_becomes_full_in_mid_write(tmp_path):
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    done = process(path, before=small_files)
    assert (done.returncode, done.stdout, done.stderr) == (0, "compiled\n", "")
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
    done = process(path, first=kill)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGXFSZ)
    left = [name for name in entries(path) if name.startswith(TEMPORARY)]
    assert len(left) == (call != "disk_cache._evict")
    assert process(path).stdout == ("from disk\n" if call == "disk_cache._evict" else "compiled\n")
    assert process(path).stdout == "from disk\n"


def test_code_for_another_cpu_or_version_is_never_taken(tmp_path):
    """What was compiled for another level, or by another LLVM, stands under another name."""
    path = filled(tmp_path / "cache")
    [mine] = entries(path)
    other = {"FUSECELL_TARGET": "x86-64-v2"}
    assert process(path, **other).stdout == "compiled\n"
    stale = "from fusecell.compiler.backend import llvm; llvm.VERSIONS = 'llvmlite 0, LLVM 0'"
    assert process(path, first=stale).stdout == "compiled\n"
    assert len(entries(path)) == 3
    for name in entries(path):  # each in the place of the other
        (path / mine).write_bytes((path / name).read_bytes())
        assert process(path).stdout == ("from disk\n" if name == mine else "compiled\n")


def test_off_writes_nothing_anywhere(tmp_path):
    done = process("off", XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path), TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "compiled\n", "")
    assert list(tmp_path.rglob("*")) == []
