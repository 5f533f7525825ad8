"""Atomic writes, folder locks, and checks before reading or writing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from showtell.errors import MissingFileError, UserError

try:
    import fcntl
except ImportError:  # Windows: a folder is guarded within one process only
    fcntl = None

_held: dict[Path, tuple[int, object]] = {}  # by a thread of this process, which a file lock does not exclude


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success, flush it to disk and rename it to `path`.

    A reader sees the old file or the new one, never a part of one; a failure leaves the old file and nothing else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)  # there is no other way to read it
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object, indent: int | None = 1) -> None:
    """Write `value` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def lock(folder: str | os.PathLike, doing: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder, made if missing, for one writer; the system releases it when the process ends, killed or not.

    `doing` tells others what the holder does: "is training in". With `wait`, wait for another process or thread, with a
    note on standard error; without it, or if this thread holds the folder itself, raise a `UserError`.
    """
    folder = Path(folder).absolute()
    me = f"process {os.getpid()} on {socket.gethostname()}"
    noted = False

    def wait_for(holder: str, may_wait: bool) -> None:
        nonlocal noted
        state = f"{holder} {doing} {folder}"
        if not may_wait:
            raise UserError(f"{state}; wait until it ends, stop it, or choose another folder") from None
        if not noted:
            print(f"note: {state}; waiting until it ends", file=sys.stderr, flush=True)
        noted = True
        time.sleep(0.2)

    mine = threading.get_ident(), object()
    while (other := _held.setdefault(folder, mine)) is not mine:
        wait_for(me, wait and other[0] != mine[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "a+", encoding="utf-8") as file:
            while fcntl is not None:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would pass to forked workers
                    break
                except (BlockingIOError, PermissionError):
                    file.seek(0)
                    wait_for(file.read().strip() or "another process", wait)
                except OSError:
                    break  # some network file systems have no locks
            file.truncate(0)
            file.write(me)
            file.flush()
            yield
    finally:
        del _held[folder]


def require_regular_file(path: str | os.PathLike, what: str, remedy: str) -> None:
    """Raise for anything but a regular file before it is opened: a pipe would block, and a device never ends.

    No file raises a `MissingFileError`; a folder, a pipe, a socket or a device a `UserError`. The message says `what`
    the file should be ("image", "checkpoint"), and the `remedy`.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a {what}; {remedy}")
    if not path.exists():
        raise MissingFileError(f"there is no {what} at {path}; {remedy}")
    if not path.is_file():
        raise UserError(f"{path} is no regular file (a pipe, a socket or a device); {remedy}")


def require_free_space(folder: str | os.PathLike, needed_bytes: int, what: str) -> None:
    """Raise a `UserError` before a long write if the disk of `folder` has less than `needed_bytes` free."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        sizes = f"{what} needs {readable_size(needed_bytes)} and {folder} has {readable_size(free)} free"
        raise UserError(f"{sizes}; free space there or choose another folder")


def readable_size(n_bytes: float) -> str:
    """Format a size for people: `1536` -> `1.5 KB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} bytes" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TB"
