"""Disk cache of object code. It will be executed, so only files are read that nobody but the user can have written.

Listing a directory takes long where it holds hundreds of entries: a write took 130 ms with 590 of them. So a process
lists it when it first writes, and then whenever it has written a sixteenth of what the cache may hold, and then leaves
room for another sixteenth. Only several processes that write at once can exceed the bound, by a sixteenth each, until
one of them lists it again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CacheInfo", "cache_info", "cache_key", "clear_cache", "read_entry", "write_entry"]

# Raise it whenever the same text should give other object code: new pass options, another code model.
FORMAT = 1

MAGIC = b"fusecell"
SUFFIX = ".object"
TEMPORARY = ".writing-"
# Seconds after which a temporary file is that of a writer that was killed: none takes so long.
ABANDONED_AFTER = 3600.0
DEFAULT_MEBIBYTES = 256
_OFF = ("off", "0", "false", "no")  # what people write to switch something off; no name of a directory

# magic, format, key, payload's length, SHA-256 of key and payload
HEADER = struct.Struct(">8sI32sQ32s")

SCANNED_AFTER = 16
"""A process lists the cache again after writing this part, one in so many, of the bound."""
MOST_LINKS = 40
"""Symbolic links on a path, as on Linux: the system follows no more."""

_warned: set[str] = set()
_unscanned: dict[Path, int] = {}
"""By directory: the bytes that may be written before it is listed again."""


@dataclass(frozen=True)
class CacheInfo:
    """Contents of the disk cache.

    Attributes:
        path: its directory; None if there is none.
        entries: number of kernels in it.
        bytes: their size on disk.
        enabled: whether kernels are read from it and written to it.
        reason: why it isn't enabled; empty if it is.
    """

    path: Path | None
    entries: int
    bytes: int
    enabled: bool
    reason: str = ""


def cache_key(*parts: str) -> str:
    """Return the SHA-256, in hex, of the cache's format and all that decides what the object code will be."""
    digest = hashlib.sha256(FORMAT.to_bytes(4, "big"))
    for part in parts:
        data = part.encode()
        # With each length, as "ab", "c" and "a", "bc" are different keys.
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def read_entry(key: str) -> bytes | None:
    """Return the object code stored under ``key``, or None if there is none that can be trusted."""
    directory = _usable_directory()
    if directory is None:
        return None
    path = directory / (key + SUFFIX)
    try:
        payload = _payload(key, _read_own(path))
    except OSError:
        return None
    if payload is not None:
        with suppress(OSError):
            os.utime(path)  # eviction removes what was used least recently
    return payload


def write_entry(key: str, payload: bytes) -> None:
    """Store object code under ``key``; a directory that can't be written to is left alone, silently."""
    limit = _limit()
    directory = _usable_directory()
    if directory is None or HEADER.size + len(payload) > limit:
        return
    binary_key = bytes.fromhex(key)
    header = HEADER.pack(MAGIC, FORMAT, binary_key, len(payload), _digest(binary_key, payload))
    with suppress(OSError):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _danger(directory):
            return  # another user has created it meanwhile
        _replace(directory / (key + SUFFIX), header + payload)
        share = limit // SCANNED_AFTER
        left = min(_unscanned.get(directory, 0), share) - len(header) - len(payload)
        if left <= 0:
            _evict(directory, limit - share)
            left = share
        _unscanned[directory] = left


def cache_info() -> CacheInfo:
    """Report what is in the disk cache of compiled kernels, and where it is.

    The directory is ``FUSECELL_CACHE``, or ``fusecell`` in the platform's cache directory
    (``XDG_CACHE_HOME``, ``~/.cache``); ``FUSECELL_CACHE=off`` (or ``0``) switches the cache off.
    ``FUSECELL_CACHE_SIZE`` bounds it, in MiB (256).

    Example:
        >>> from fusecell.compiler.backend.disk_cache import cache_info
        >>> cache_info().entries >= 0
        True
    """
    directory, reason = _directory()
    if directory is None or reason:
        return CacheInfo(directory, 0, 0, enabled=False, reason=reason)
    entries, _ = _scan(directory)
    return CacheInfo(directory, len(entries), sum(entry.size for entry in entries), enabled=True)


def clear_cache() -> int:
    """Remove every compiled kernel from the disk cache; return how many there were. Loaded ones keep running."""
    directory = _usable_directory()
    if directory is None:
        return 0
    entries, unfinished = _scan(directory)
    _remove_abandoned(unfinished, older_than=0.0)
    return sum(_remove(entry.path) for entry in entries)


def _limit() -> int:
    text = os.environ.get("FUSECELL_CACHE_SIZE", "") or str(DEFAULT_MEBIBYTES)
    if not text.isdecimal():
        raise ValueError(f"FUSECELL_CACHE_SIZE is {text!r}; expected a whole number of MiB, as in 256.")
    return int(text) << 20


def _directory() -> tuple[Path | None, str]:
    """Return the cache's directory, and why it must not be used ("" if it may)."""
    choice = os.environ.get("FUSECELL_CACHE", "")
    if choice.lower() in _OFF:
        return None, f"FUSECELL_CACHE is {choice}"
    try:
        directory = Path(choice).expanduser().absolute() if choice else _platform_directory()
    except RuntimeError:
        return None, "the user has no home directory; set FUSECELL_CACHE"
    return directory, _danger(directory)


def _platform_directory() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
        return (Path(base) if base else Path.home() / "AppData" / "Local") / "fusecell" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fusecell"
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification wants relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fusecell"


def _danger(directory: Path) -> str:
    """Say why a directory is not to be trusted ("" if it is)."""
    try:
        status = directory.stat()
    except OSError:
        return _danger_on_the_way(directory)  # it isn't there yet, or can't be seen
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    return _foreign(status) or _danger_on_the_way(directory)


def _danger_on_the_way(directory: Path) -> str:
    """Say why one of the directories and links that lead to a directory is not to be trusted ("" if all are).

    Users who may rename entries of one of them can put a directory of their own in the cache's place. Where the sticky
    bit is set, as in /tmp, users can rename only their own entries.
    """
    if not hasattr(os, "geteuid"):
        return ""
    # Link by link, as the system would go: a resolved path would show only where the links lead at the moment.
    path, parts, links = Path(directory.anchor), list(reversed(directory.parts[1:])), 0
    while True:
        try:
            status = path.lstat()
        except OSError:
            return ""  # nothing is there, or nothing can be reached: nothing will be read
        if status.st_uid not in (0, os.geteuid()):
            return f"{path}, on the way to it, belongs to user {status.st_uid}, not to you ({os.geteuid()}) or root"
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > MOST_LINKS:
                return ""  # the system gives up too
            target = Path(os.readlink(path))
            parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            path = Path(target.anchor) if target.is_absolute() else path.parent
            continue
        if not parts:
            return ""  # the directory itself, for which `_foreign` is stricter
        if _others_may_write(status):
            return f"others may write to {path}, on the way to it (mode {stat.S_IMODE(status.st_mode):04o})"
        part = parts.pop()
        path = path.parent if part == ".." else path / part


def _others_may_write(status: os.stat_result) -> bool:
    """Whether others than the user and root may rename entries of a directory; a private group is no other."""
    if status.st_mode & stat.S_ISVTX:
        return False
    by_group = bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status.st_gid)
    return bool(status.st_mode & stat.S_IWOTH) or by_group


def _is_private_group(group: int) -> bool:
    """Whether a group is root's, or the private group that many systems create for each user."""
    if group == 0:
        return True
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def _foreign(status: os.stat_result) -> str:
    """Say why a file or directory is not the user's alone ("" if it is)."""
    if not hasattr(os, "geteuid"):
        return ""  # Windows: the user's local application data is private by inheritance
    if status.st_uid != os.geteuid():
        return f"it belongs to user {status.st_uid}, not to you ({os.geteuid()})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _usable_directory() -> Path | None:
    directory, reason = _directory()
    if directory is None or not reason:
        return directory
    if str(directory) not in _warned:
        _warned.add(str(directory))
        warnings.warn(
            f"fusecell doesn't use its cache of machine code, {directory}: {reason}. Every process compiles "
            f"its kernels anew. To fix it, make the directory yours alone (chown, chmod 700) and those on the way to "
            f"it yours or root's (chown, chmod go-w), set FUSECELL_CACHE to another one, or to 'off'.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _read_own(path: Path) -> bytes:
    # Checked on the open file: between a check by name and the reading the file could be exchanged. No links are
    # followed, and opening a pipe does not wait for a writer.
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or _foreign(status):
            raise PermissionError(f"{path} is not a private file")
        return file.read()


def _payload(key: str, data: bytes) -> bytes | None:
    if len(data) < HEADER.size:
        return None
    magic, version, binary_key, length, digest = HEADER.unpack_from(data)
    payload = data[HEADER.size :]
    mine = (magic, version, binary_key, length) == (MAGIC, FORMAT, bytes.fromhex(key), len(payload))
    return payload if mine and digest == _digest(binary_key, payload) else None


def _digest(binary_key: bytes, payload: bytes) -> bytes:
    # Against damage, and entries under another's name; against forgery there are the permissions of the directory.
    return hashlib.sha256(binary_key + payload).digest()


def _replace(path: Path, data: bytes) -> None:
    # Renamed when it is complete: a reader finds the old entry or the new one, and never a part.
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        _remove(Path(temporary))
        raise


@dataclass(frozen=True)
class _Entry:
    used: int
    size: int
    path: Path


def _scan(directory: Path) -> tuple[list[_Entry], list[_Entry]]:
    """List the entries of a directory, and the files that writers have not finished."""
    entries: list[_Entry] = []
    unfinished: list[_Entry] = []
    with suppress(OSError), os.scandir(directory) as listing:
        for item in listing:
            files = entries if item.name.endswith(SUFFIX) else unfinished if item.name.startswith(TEMPORARY) else None
            if files is not None:
                with suppress(OSError):  # another process may have removed it since
                    status = item.stat(follow_symlinks=False)
                    files.append(_Entry(status.st_mtime_ns, status.st_size, directory / item.name))
    return entries, unfinished


def _evict(directory: Path, limit: int) -> None:
    """Remove the least recently used entries until the rest is within the limit; the newest one always stays."""
    entries, unfinished = _scan(directory)
    _remove_abandoned(unfinished, ABANDONED_AFTER)
    total = sum(entry.size for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.used)[:-1]:
        if total <= limit:
            break
        total -= entry.size
        _remove(entry.path)


def _remove_abandoned(unfinished: list[_Entry], older_than: float) -> None:
    """Remove the files of writers that were killed."""
    now = time.time_ns()
    for entry in unfinished:
        if now - entry.used >= older_than * 1e9:
            _remove(entry.path)


def _remove(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
