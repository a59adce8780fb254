"""Dies before the n-th change of a file: an audit hook sees every rename, removal, directory and file opened for
writing, wherever it is done, and once dead the process changes nothing more, so `finally` cannot tidy up."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
_left: float | None = None  # changes until death; None: immortal


class Killed(BaseException):
    pass


def _hook(event: str, args: tuple) -> None:
    global _left
    if _left is None or not (event in _CHANGES or (event == "open" and _writes(args))):
        return
    if _left <= 0:
        raise Killed
    _left -= 1


def _writes(args: tuple) -> bool:
    return isinstance(args[0], (str, os.PathLike)) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@contextmanager
def killed_after(changes: float) -> Iterator[list[bool]]:
    """Runs its block until `changes` changes are done; the list then says whether it died."""
    global _left
    died: list[bool] = []
    _left = changes
    try:
        yield died
    except Killed:
        died.append(True)
    finally:
        _left = None


sys.addaudithook(_hook)
