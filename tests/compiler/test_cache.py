import ctypes
import errno
import os
import stat
import time
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusecell.compiler.backend import disk_cache as cache
from fusecell.compiler.backend.disk_cache import cache_info, cache_key, clear_cache, read_entry, write_entry
from fusecell.compiler.backend.jit import load
from fusecell.compiler.backend.target import host_target

KEY = cache_key("a text", "a cpu")
PAYLOAD = bytes(range(256)) * 5
TEXT = "define i32 @add(i32 %i) { %j = add i32 %i, 7 ret i32 %j }"

posix_only = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("FUSECELL_CACHE", str(path))
    monkeypatch.delenv("FUSECELL_CACHE_SIZE", raising=False)
    monkeypatch.setattr(cache, "_warned", set())
    return path


def entry_path(directory: Path, key: str = KEY) -> Path:
    return directory / f"{key}.object"


def load_and_check() -> bool:
    """Loads a kernel afresh, checks that it is right, says whether it came from the disk."""
    loaded = load(TEXT, ["add"], host_target())
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(loaded.address("add"))(1) == 8
    return loaded.from_cache


def test_what_is_written_is_read(directory):
    assert read_entry(KEY) is None
    write_entry(KEY, PAYLOAD)
    assert read_entry(KEY) == PAYLOAD
    write_entry(KEY, b"")
    assert read_entry(KEY) == b""
    assert [path.name for path in directory.iterdir()] == [f"{KEY}.object"]


def test_keys_tell_their_parts_apart():
    keys = [cache_key("ab", "c"), cache_key("a", "bc"), cache_key("abc"), cache_key("abc", ""), cache_key("é")]
    assert len(set(keys)) == len(keys)
    assert cache_key("ab", "c") == keys[0]


@posix_only
def test_directory_and_entries_are_private(directory):
    write_entry(KEY, PAYLOAD)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry_path(directory).stat().st_mode) == 0o600


def cut_in_header(path):
    path.write_bytes(path.read_bytes()[:20])


def cut_in_payload(path):
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path):
    path.write_bytes(b"")


def lengthened(path):
    path.write_bytes(path.read_bytes() + b"\0")


def another_s_content(path):
    write_entry(cache_key("another"), PAYLOAD)
    path.write_bytes(entry_path(path.parent, cache_key("another")).read_bytes())


def older_format(path):
    data = bytearray(path.read_bytes())
    data[11] ^= 0xFF
    path.write_bytes(data)


def bare_object(path):
    path.write_bytes(path.read_bytes()[cache.HEADER.size :])


def symbolic_link(path):
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def writable_by_others(path):
    path.chmod(0o666)


FAULTS = [
    cut_in_header,
    cut_in_payload,
    emptied,
    lengthened,
    another_s_content,
    older_format,
    bare_object,
    pytest.param(symbolic_link, marks=posix_only),
    pytest.param(writable_by_others, marks=posix_only),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_entry_is_compiled_anew_and_replaced(directory, fault):
    assert load_and_check() is False
    assert load_and_check() is True
    [path] = directory.iterdir()
    fault(path)
    assert read_entry(path.stem) is None
    assert load_and_check() is False
    assert load_and_check() is True


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(place=st.integers(0, cache.HEADER.size + len(PAYLOAD) - 1), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(directory, place, bit):
    write_entry(KEY, PAYLOAD)
    data = bytearray(entry_path(directory).read_bytes())
    data[place] ^= 1 << bit
    entry_path(directory).write_bytes(data)
    assert read_entry(KEY) is None


def test_an_intact_entry_that_is_no_object_is_compiled_anew(directory):
    load_and_check()
    [path] = directory.iterdir()
    write_entry(path.stem, b"this is not object code")
    assert load_and_check() is False
    assert load_and_check() is True


def test_a_directory_in_an_entry_s_place_does_no_harm(directory):
    load_and_check()
    [path] = directory.iterdir()
    path.unlink()
    path.mkdir()
    assert load_and_check() is False
    assert list(directory.iterdir()) == [path]


def refused(match):
    with pytest.warns(RuntimeWarning, match=match):
        assert load_and_check() is False
    assert load_and_check() is False  # and this time without a warning, which would be an error
    assert clear_cache() == 0
    assert not cache_info().enabled
    assert (cache_info().entries, cache_info().bytes) == (0, 0)


@posix_only
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_write_to_is_refused(directory, mode):
    load_and_check()
    directory.chmod(mode)
    refused(rf"others may write to it \(mode {mode:04o}\).*chmod 700.*FUSECELL_CACHE")
    assert len(list(directory.iterdir())) == 1


@posix_only
def test_a_directory_of_somebody_else_is_refused(directory, monkeypatch):
    load_and_check()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    refused(f"belongs to user {me}, not to you")


def test_a_file_in_the_directory_s_place_is_refused(directory):
    directory.write_text("mine")
    refused("not a directory")
    assert directory.read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_done_without(directory, monkeypatch):
    directory.write_text("a file")
    monkeypatch.setenv("FUSECELL_CACHE", str(directory / "below"))
    assert load_and_check() is False
    assert load_and_check() is False
    assert cache_info() == cache.CacheInfo(directory / "below", 0, 0, enabled=True)
    assert clear_cache() == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_done_without(directory, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", fail)
    assert load_and_check() is False
    assert load_and_check() is False
    assert list(directory.iterdir()) == []


def test_a_read_only_cache_is_still_read(directory, monkeypatch):
    def fail(*_):
        raise OSError(errno.EROFS, "read-only")

    load_and_check()
    monkeypatch.setattr(os, "utime", fail)
    assert load_and_check() is True


def test_off(directory, monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE", "off")
    assert load_and_check() is False
    assert load_and_check() is False
    assert cache_info() == cache.CacheInfo(None, 0, 0, enabled=False, reason="FUSECELL_CACHE is off")
    assert clear_cache() == 0
    assert not directory.exists()
    assert not Path("off").exists()


@pytest.mark.skipif(os.name != "posix" or os.uname().sysname == "Darwin", reason="XDG's rules")
def test_default_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSECELL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_info().path == tmp_path / "xdg" / "fusecell"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_info().path == tmp_path / "home" / ".cache" / "fusecell"
    write_entry(KEY, PAYLOAD)
    assert read_entry(KEY) == PAYLOAD
    monkeypatch.setenv("FUSECELL_CACHE", "~/elsewhere")
    assert cache_info().path == tmp_path / "home" / "elsewhere"


def test_info_and_clear(directory):
    for number in range(3):
        write_entry(cache_key(str(number)), PAYLOAD)
    (directory / "notes.txt").write_text("not ours")
    (directory / f"{cache.TEMPORARY}left").write_bytes(b"half")
    size = 3 * (cache.HEADER.size + len(PAYLOAD))
    assert cache_info() == cache.CacheInfo(directory, 3, size, enabled=True)
    assert clear_cache() == 3
    assert clear_cache() == 0
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


def test_clearing_leaves_loaded_code_running():
    loaded = load(TEXT, ["add"], host_target())
    assert clear_cache() == 1
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(loaded.address("add"))(1) == 8


def test_what_was_used_least_recently_goes_first(directory, monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "1")
    keys = [cache_key(str(number)) for number in range(4)]
    for age, key in enumerate(keys[:3]):
        write_entry(key, bytes(300_000))
        os.utime(entry_path(directory, key), (1000 + age, 1000 + age))
    assert read_entry(keys[0]) is not None  # now the newest
    write_entry(keys[3], bytes(300_000))
    assert [read_entry(key) is not None for key in keys] == [True, False, True, True]
    assert cache_info().bytes <= 1 << 20


def test_an_entry_above_the_bound_is_not_kept(directory, monkeypatch):
    write_entry(KEY, PAYLOAD)
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "1")
    write_entry(cache_key("large"), bytes(1 << 20))
    assert read_entry(cache_key("large")) is None
    assert read_entry(KEY) == PAYLOAD


def test_a_size_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "1G")
    with pytest.raises(ValueError, match="FUSECELL_CACHE_SIZE is '1G'; expected a whole number of MiB"):
        write_entry(KEY, PAYLOAD)


def test_remains_of_killed_writers_are_removed(directory):
    directory.mkdir(mode=0o700)
    old, young = directory / f"{cache.TEMPORARY}old", directory / f"{cache.TEMPORARY}young"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    write_entry(KEY, PAYLOAD)
    assert not old.exists()
    assert young.exists()


def test_a_sound_cache_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_and_check()
        load_and_check()
