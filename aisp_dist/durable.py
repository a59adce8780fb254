"""File operations that leave either the old state or the new one, whatever moment the process is killed at. Local and
shared POSIX file systems. Knows nothing of what the files hold."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


def make_dir(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)


def write_temporary(path: Path, data: bytes) -> Path:
    """Write `data` beside `path` under a name of its own and force it to disk; `publish` makes it visible."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return temporary


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, replacing what was there, in one step."""
    os.replace(temporary, path)
    _sync_dir(path.parent)


def write(path: Path, data: bytes) -> None:
    publish(write_temporary(path, data), path)


def remove(path: Path) -> None:
    if path.exists():
        path.unlink()
        _sync_dir(path.parent)


def _sync_dir(path: Path) -> None:
    """A rename is on disk only when its directory is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such call for directories
            raise
    finally:
        os.close(handle)
