"""Dies at the n-th change of a file: an audit hook sees every rename, removal, directory and file opened for writing,
wherever it is done. A rename or removal is not done at all, a file that is being written is left empty; once dead the
process changes nothing more, so `finally` cannot tidy up."""

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
    _left -= 1
    if _left >= 0:
        return
    if _left == -1 and event == "open":
        _left = None
        open(args[0], "wb").close()
        _left = -1
    raise Killed


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
