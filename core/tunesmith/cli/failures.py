"""From an exception to one message on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator

from tunesmith.config import TunesmithError

_USAGE = 2
_FAILED = 1


def exit_code_for(error: Exception) -> int:
    """Print what a person needs and return the exit code: a stack only for our own bugs."""
    if isinstance(error, TunesmithError):
        _say(str(error))
        return error.exit_code
    if (where := _full_disk(error)) is not None:
        _say(f"no space left on the disk{where}; free some and run the same command again")
        return _USAGE
    if isinstance(error, PermissionError):
        _say(f"not allowed: {error.strerror}: {error.filename}")
        return _USAGE
    traceback.print_exception(error)
    _say(f"a fault in Tunesmith itself ({type(error).__name__}); please report the lines above")
    return _FAILED


def _full_disk(error: BaseException) -> str | None:
    """Where the disk is full, "" when it is not known, None when that is not the fault.

    Writers of weights, of pickles and of databases each wrap ENOSPC in an error of their own.
    """
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return f": {link.filename}" if link.filename else ""
        text = str(link)
        if "No space left on device" in text or "disk is full" in text or "os error 28" in text:
            return ""
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _say(message: str) -> None:
    bold, plain = ("\033[1;31m", "\033[0m") if _colours() else ("", "")
    print(f"{bold}error:{plain} {message}", file=sys.stderr)


def _colours() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ
