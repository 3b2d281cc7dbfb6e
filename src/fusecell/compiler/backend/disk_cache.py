"""Object code on disk: what lies here will be executed, so nothing is read that isn't surely our own."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CacheInfo", "cache_info", "cache_key", "clear_cache", "read_entry", "write_entry"]

# Raise it whenever the same text should give other object code: new pass options, another code model.
FORMAT = 1

MAGIC = b"fusecell"
SUFFIX = ".object"
TEMPORARY = ".writing-"
ABANDONED_AFTER = 3600.0
DEFAULT_MEBIBYTES = 256

# magic, format, key, payload's length, SHA-256 of key and payload
HEADER = struct.Struct(">8sI32sQ32s")

_warned: set[str] = set()


@dataclass(frozen=True)
class CacheInfo:
    """What the disk cache holds.

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
    """SHA-256, in hex, over the cache's format and everything that decides what the object code will be."""
    digest = hashlib.sha256(FORMAT.to_bytes(4, "big"))
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def read_entry(key: str) -> bytes | None:
    """The object code stored under ``key``, or None if there is none that can be trusted."""
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
        _replace(directory / (key + SUFFIX), header + payload)
        _evict(directory, limit)


def cache_info() -> CacheInfo:
    """What is in the disk cache of compiled kernels, and where it is.

    The directory is ``FUSECELL_CACHE``, or ``fusecell`` in the platform's cache directory
    (``XDG_CACHE_HOME``, ``~/.cache``); ``FUSECELL_CACHE=off`` switches the cache off.
    ``FUSECELL_CACHE_SIZE`` bounds it, in MiB (256).

    Example:
        >>> from fusecell.compiler.backend.disk_cache import cache_info
        >>> cache_info().entries >= 0
        True
    """
    directory, reason = _directory()
    if directory is None or reason:
        return CacheInfo(directory, 0, 0, enabled=False, reason=reason)
    found = list(_entries(directory))
    return CacheInfo(directory, len(found), sum(entry.size for entry in found), enabled=True)


def clear_cache() -> int:
    """Remove every compiled kernel from the disk cache; how many there were. Loaded ones keep running."""
    directory = _usable_directory()
    if directory is None:
        return 0
    removed = sum(_remove(entry.path) for entry in _entries(directory))
    _remove_abandoned(directory, older_than=0.0)
    return removed


def _limit() -> int:
    text = os.environ.get("FUSECELL_CACHE_SIZE", "") or str(DEFAULT_MEBIBYTES)
    if not text.isdecimal():
        raise ValueError(f"FUSECELL_CACHE_SIZE is {text!r}; expected a whole number of MiB, as in 256.")
    return int(text) << 20


def _directory() -> tuple[Path | None, str]:
    """The cache's directory and why it must not be used ("" if it may)."""
    choice = os.environ.get("FUSECELL_CACHE", "")
    if choice == "off":
        return None, "FUSECELL_CACHE is off"
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
    try:
        status = directory.stat()
    except OSError:
        return ""  # it isn't there yet, or can't be seen: nothing will be read
    if not stat.S_ISDIR(status.st_mode):
        return "it is not a directory"
    return _foreign(status)


def _foreign(status: os.stat_result) -> str:
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
            f"its kernels anew. To fix it, make the directory yours alone (chown, chmod 700), set "
            f"FUSECELL_CACHE to another one, or to 'off'.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _read_own(path: Path) -> bytes:
    # Checked on the open file: between a check by name and the reading the file could be exchanged.
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
    return hashlib.sha256(binary_key + payload).digest()


def _replace(path: Path, data: bytes) -> None:
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


def _entries(directory: Path) -> Iterator[_Entry]:
    with suppress(OSError):
        for path in directory.iterdir():
            if path.name.endswith(SUFFIX):
                with suppress(OSError):  # another process may have removed it since
                    status = path.lstat()
                    yield _Entry(status.st_mtime_ns, status.st_size, path)


def _evict(directory: Path, limit: int) -> None:
    _remove_abandoned(directory, ABANDONED_AFTER)
    found = sorted(_entries(directory), key=lambda entry: entry.used)
    excess = sum(entry.size for entry in found) - limit
    for entry in found:
        if excess <= 0:
            break
        excess -= entry.size
        _remove(entry.path)


def _remove_abandoned(directory: Path, older_than: float) -> None:
    """Remove what writers that were killed left behind."""
    now = time.time()
    with suppress(OSError):
        for path in directory.iterdir():
            if path.name.startswith(TEMPORARY):
                with suppress(OSError):
                    if now - path.lstat().st_mtime >= older_than:
                        path.unlink()


def _remove(path: Path) -> bool:
    with suppress(OSError):
        path.unlink()
        return True
    return False
