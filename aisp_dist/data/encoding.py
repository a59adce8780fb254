"""Which encoding a text file has: the one that its byte order mark names, else UTF-8. Windows tools write UTF-16."""

from __future__ import annotations

import codecs

HEAD = 4096  # bytes of a file that `of` looks at
_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's, so it is tried first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NoText(ValueError):
    """Why a file holds no text."""


def of(head: bytes) -> str:
    """The codec for a text that begins with these bytes; it drops the byte order mark. Raises NoText for NUL bytes
    where no mark explains them: a binary file, or UTF-16 without its mark."""
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return codec
    if b"\0" in head:
        raise NoText("it holds NUL bytes, as binary files and UTF-16 without a byte order mark do; save it as UTF-8")
    return "utf-8-sig"
