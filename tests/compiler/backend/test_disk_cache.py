import ctypes
import errno
import os
import stat
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
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
    """Load a kernel, check its result, and return whether it came from the disk."""
    loaded = load(TEXT, ["add"], host_target())
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(loaded.address("add"))(1) == 8
    return loaded.from_cache


def test_a_written_entry_is_read_back(directory):
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
def test_every_flipped_bit_is_detected(directory, place, bit):
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


def test_a_directory_at_the_path_of_an_entry_is_ignored(directory):
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


def test_a_directory_that_cannot_be_created_disables_the_cache(directory, monkeypatch):
    directory.write_text("a file")
    monkeypatch.setenv("FUSECELL_CACHE", str(directory / "below"))
    assert load_and_check() is False
    assert load_and_check() is False
    assert cache_info() == cache.CacheInfo(directory / "below", 0, 0, enabled=True)
    assert clear_cache() == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_is_tolerated(directory, monkeypatch, code):
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


@pytest.mark.parametrize("word", ["off", "OFF", "0", "false", "no"])
def test_the_cache_can_be_switched_off(word, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSECELL_CACHE", word)
    assert load_and_check() is False
    assert load_and_check() is False
    assert cache_info() == cache.CacheInfo(None, 0, 0, enabled=False, reason=f"FUSECELL_CACHE is {word}")
    assert clear_cache() == 0
    assert not directory.exists()
    assert not Path(word).exists()


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


def test_the_least_recently_used_entry_is_evicted_first(directory, monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "1")
    keys = [cache_key(str(number)) for number in range(4)]
    for age, key in enumerate(keys[:3]):
        write_entry(key, bytes(300_000))
        os.utime(entry_path(directory, key), (1000 + age, 1000 + age))
    assert read_entry(keys[0]) is not None  # now the newest
    write_entry(keys[3], bytes(300_000))
    assert [read_entry(key) is not None for key in keys] == [True, False, True, True]
    assert cache_info().bytes <= 1 << 20


def test_an_entry_above_the_size_limit_is_not_stored(directory, monkeypatch):
    write_entry(KEY, PAYLOAD)
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "1")
    write_entry(cache_key("large"), bytes(1 << 20))
    assert read_entry(cache_key("large")) is None
    assert read_entry(KEY) == PAYLOAD


def test_a_size_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "1G")
    with pytest.raises(ValueError, match="FUSECELL_CACHE_SIZE is '1G'; expected a whole number of MiB"):
        write_entry(KEY, PAYLOAD)


def test_temporary_files_of_killed_writers_are_removed(directory):
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


@pytest.fixture
def scans(monkeypatch):
    """The directories listed so far, one entry for each listing."""
    seen, scan = [], cache._scan
    monkeypatch.setattr(cache, "_scan", lambda directory: seen.append(directory) or scan(directory))
    monkeypatch.setattr(cache, "_unscanned", {})
    return seen


def test_a_thousand_writes_list_the_directory_a_few_times(directory, scans):
    for number in range(1000):
        write_entry(cache_key(str(number)), bytes(30_000))
    assert len(scans) == 2, "at the first, and after a sixteenth of 256 MiB"
    assert len(list(directory.iterdir())) == 1000


def test_a_full_cache_is_not_listed_at_every_write(directory, scans, monkeypatch):
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "2")
    for number in range(2000):
        write_entry(cache_key(str(number)), bytes(3_000))
        assert number % 100 or cache_size(directory) <= (2 << 20) * (1 + 1 / cache.SCANNED_AFTER)
    assert cache_size(directory) > 1.8 * (1 << 20)
    assert len(scans) < 2000 * 3_200 / ((2 << 20) / cache.SCANNED_AFTER) * 2


def cache_size(directory):
    return sum(path.stat().st_size for path in directory.iterdir())


def test_two_processes_writing_at_once_stay_near_the_size_limit(directory, scans, monkeypatch):
    """What another process writes is seen when this one lists the directory again."""
    monkeypatch.setenv("FUSECELL_CACHE_SIZE", "2")
    first: dict[Path, int] = {}
    second: dict[Path, int] = {}
    for number in range(1600):
        monkeypatch.setattr(cache, "_unscanned", (first, second)[number % 2])
        write_entry(cache_key(str(number)), bytes(3_000))
        assert number % 50 or cache_size(directory) <= (2 << 20) * (1 + 2 / cache.SCANNED_AFTER)


def test_many_threads_write_at_once(directory, scans):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: write_entry(cache_key(str(number)), PAYLOAD), range(200)))
    assert cache_info().entries == 200
    assert all(read_entry(cache_key(str(number))) == PAYLOAD for number in range(200))


root_only = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")


def between(directory: Path, monkeypatch, mode: int = 0o700) -> Path:
    """Create a valid cache two directories below ``directory``; return the directory between."""
    parent = directory / "parent"
    path = parent / "child" / "cache"
    directory.mkdir()
    monkeypatch.setenv("FUSECELL_CACHE", str(path))
    assert load_and_check() is False
    assert load_and_check() is True
    parent.chmod(mode)
    return parent


@posix_only
@pytest.mark.parametrize("mode", [0o757, 0o707, 0o777])
def test_a_parent_that_others_write_to_is_refused(directory, monkeypatch, mode):
    parent = between(directory, monkeypatch, mode)
    refused(rf"others may write to {parent}, on the way to it \(mode {mode:04o}\).*chmod go-w.*FUSECELL_CACHE")


@posix_only
def test_a_sticky_parent_is_as_tmp(directory, monkeypatch):
    between(directory, monkeypatch, 0o1777)
    assert load_and_check() is True


@posix_only
def test_a_shared_group_may_not_write_to_a_parent(directory, monkeypatch):
    parent = between(directory, monkeypatch, 0o770)
    monkeypatch.setattr(cache, "_is_private_group", lambda group: True)
    assert load_and_check() is True
    monkeypatch.setattr(cache, "_is_private_group", lambda group: False)
    refused(f"others may write to {parent}, on the way to it")


@posix_only
def test_private_groups(monkeypatch):
    import grp
    import pwd
    from types import SimpleNamespace

    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(pwd, "getpwuid", lambda user: SimpleNamespace(pw_name="ada", pw_gid=1234))
    groups = {1234: ("ada", ["ada"]), 100: ("users", []), 1300: ("ada", ["ada"])}

    def group(number):
        name, members = groups[number]
        return SimpleNamespace(gr_name=name, gr_mem=members)

    monkeypatch.setattr(grp, "getgrgid", group)
    assert [cache._is_private_group(number) for number in (0, 1234, 100, 1300, 77)] == [True, True, False, False, False]
    groups[1234] = ("ada", ["ada", "bob"])
    assert not cache._is_private_group(1234)


@root_only
def test_a_parent_of_somebody_else_is_refused(directory, monkeypatch):
    """Under sudo, HOME may be another user's, who could replace any file in it."""
    parent = between(directory, monkeypatch)
    os.chown(parent, 65534, 65534)
    refused(rf"{parent}, on the way to it, belongs to user 65534, not to you \(0\) or root")


@root_only
def test_a_sticky_directory_holds_only_what_is_ours(directory, monkeypatch):
    parent = between(directory, monkeypatch, 0o1777)
    os.chown(parent / "child", 65534, 65534)
    refused(f"{parent / 'child'}, on the way to it, belongs to user 65534")


@posix_only
def test_links_are_followed_and_checked(directory, monkeypatch, tmp_path):
    parent = between(directory, monkeypatch)
    link = tmp_path / "link"
    link.symlink_to("cache/parent/../parent/child")
    monkeypatch.setenv("FUSECELL_CACHE", str(link / "cache"))
    assert load_and_check() is True
    parent.chmod(0o777)
    refused(f"others may write to {parent}, on the way to it")
    assert not cache_info().enabled


@root_only
def test_a_link_of_somebody_else_is_refused(directory, monkeypatch, tmp_path):
    between(directory, monkeypatch)
    link = tmp_path / "link"
    link.symlink_to(directory / "parent" / "child" / "cache")
    os.lchown(link, 65534, 65534)
    monkeypatch.setenv("FUSECELL_CACHE", str(link))
    refused(f"{link}, on the way to it, belongs to user 65534")


@posix_only
def test_circular_links_disable_the_cache(directory, monkeypatch, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    monkeypatch.setenv("FUSECELL_CACHE", str(tmp_path / "a" / "cache"))
    assert load_and_check() is False
    assert load_and_check() is False


@root_only
def test_a_directory_created_by_another_user_meanwhile_is_not_written_to(directory, monkeypatch):
    make = Path.mkdir

    def mkdir(self, *args, **options):
        make(self, *args, **options)
        os.chown(self, 65534, 65534)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    write_entry(KEY, PAYLOAD)
    assert list(directory.iterdir()) == []
