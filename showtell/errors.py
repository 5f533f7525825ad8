"""The exceptions for a user's mistake, and text for the command line to print, in place of a traceback and otherwise.

A message says what was given, what is accepted and what to do next.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from typing import TextIO


class UserError(ValueError):
    """A mistake in what the user gave; the command line prints the message without a traceback."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


def explain(error: Exception) -> str:
    """Say what went wrong and what to do about it; empty for a defect of the program, which deserves its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r:.200} is not valid Unicode; rename the file or folder"
    if isinstance(error, OverflowError):
        return f"a number is too large to compute with ({error}); give a smaller one"
    if not isinstance(error, OSError):
        memory = isinstance(error, MemoryError) or re.search("(out of|not enough|allocate) memory", str(error))
        return "out of memory; give a smaller --batch-size or --beam-size, or smaller images" if memory else ""
    full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
    verb = "write" if full or error.errno == errno.EROFS else "open"
    remedy = "choose another path"
    if full or error.errno in (errno.EACCES, errno.EPERM):
        remedy = f"{'free space' if full else 'change the permissions'} or {remedy}"
    name = f" {error.filename}" if error.filename else ""
    reason = error.strerror or str(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)):  # of a folder to be made or listed
        reason = "it is not a folder"
    return f"cannot {verb}{name}: {reason}; {remedy}"


def printable(name: object) -> str:
    """Show the bytes of a file name that are not UTF-8, which Python keeps as lone surrogates, as `\\xe9`."""
    return re.sub("[\udc80-\udcff]", lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", str(name))


def print_text(text: str, stream: TextIO | None = None) -> None:
    """Print text, to standard output by default, with escapes for what the stream cannot encode."""
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def json_text(value: object, indent: int | None = 1) -> str:
    """Return a JSON document that any program can read; a file name that is not UTF-8 reads back as it was."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", lambda lone: f"\\u{ord(lone[0]):04x}", text)
