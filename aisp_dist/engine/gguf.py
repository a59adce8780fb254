"""The header of a GGUF file: what it says of the model and of its tensors. transformers dequantises the weights, for
which it needs the packages gguf and accelerate; this reads the header without them. No torch.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

_NUMBERS = dict(enumerate(["B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"]))
_STRING, _ARRAY = 8, 9
_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}
# Elements and bytes of a block of each type; the size of another type's last tensor is not checked.
_BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
_BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)}


@dataclass(frozen=True)
class Header:
    """values: the metadata, an array by its length. tensors: name, shape, type and offset behind `data` of each. data:
    where the tensors begin."""

    values: dict[str, Any]
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]
    data: int

    def size(self) -> int:
        """Bytes of a whole file, as far as the types of its tensors are known here."""
        ends = (at + math.prod(shape) * b // n for _, shape, t, at in self.tensors for n, b in [_BLOCKS.get(t, (1, 0))])
        return self.data + max(ends, default=0)

    def config(self) -> dict[str, Any]:
        """What a config.json would say of dtype and experts, by the same keys. dtype: that of most matrices; bfloat16
        where they are quantised."""
        matrices = [kind for _, shape, kind, _ in self.tensors if len(shape) > 1]
        dtype = _FLOATS.get(max(set(matrices), key=matrices.count, default=0), "bfloat16")
        arch = self.values.get("general.architecture")
        return {"dtype": dtype, "num_experts": self.values.get(f"{arch}.expert_count")}


def read(file: Path) -> Header:
    """Raises ValueError for what is no GGUF file of version 2 or 3, EOFError for one that ends within its header."""
    now = file.stat()
    return _read(file, now.st_ino, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=4)  # a command asks many times, and a vocabulary takes a third of a second
def _read(file: Path, *version: int) -> Header:
    """version: what changes with the file's content."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF" or _number(stream, "I") not in (2, 3):
            raise ValueError(f"{str(file)!r} is no GGUF file of version 2 or 3")
        num_tensors, num_values = _number(stream, "Q"), _number(stream, "Q")
        values = {_string(stream): _value(stream, _number(stream, "I")) for _ in range(num_values)}
        tensors = []
        for _ in range(num_tensors):
            name = _string(stream)
            shape = tuple(_number(stream, "Q") for _ in range(_number(stream, "I")))
            tensors.append((name, shape, _number(stream, "I"), _number(stream, "Q")))
        unit = values.get("general.alignment", 32)
        return Header(values, tuple(tensors), -(-stream.tell() // unit) * unit)


def fault(file: Path) -> str | None:
    """Why a file cannot be loaded as a language model, and what to do, or None."""
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer in place of a GGUF file; download it with `git lfs pull`"
    size = file.stat().st_size
    try:
        header = read(file)
    except EOFError:
        return f"is a GGUF file, cut off after {size:,} bytes, within its header; download it again"
    except (ValueError, UnicodeDecodeError, OverflowError, MemoryError):
        return "is no GGUF file of version 2 or 3 that can be read; download it again"
    if (parts := header.values.get("split.count", 0)) > 1:
        return f"is one of {parts} parts of a GGUF file; merge them (llama-gguf-split --merge) and name the result"
    if (kind := header.values.get("general.type", "model")) != "model":
        return f"is a GGUF file of type {kind}, not a language model; name the file of the model itself"
    if size < header.size():
        return f"is a GGUF file, cut off after {size:,} of {header.size():,} bytes; download it again"
    if "tokenizer.ggml.tokens" not in header.values:
        return "is a GGUF file without a tokenizer; name one that has its own"
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        return f"is a GGUF file, which needs the package {missing[0]}; pip install 'aisp-dist[gguf]'"
    return None


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within it the gguf package parses a file once and makes its table of tensor names once. transformers asks for the
    first with each of config, tokenizer and weights, for the second with every module of the model: most of a load."""
    import numpy as np

    package: Any = import_module("gguf")
    theirs = package.GGUFReader, package.get_tensor_name_map
    if not isinstance(package.GGUFReader, type):  # within another
        yield
        return

    class Reader(package.GGUFReader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)  # a header is 100,000s of slices, which are slow of a numpy.memmap

    package.GGUFReader, package.get_tensor_name_map = cache(Reader), cache(theirs[1])
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = theirs


def _number(stream: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", _bytes(stream, struct.calcsize(f"<{form}")))[0]


def _string(stream: BinaryIO) -> str:
    return _bytes(stream, _number(stream, "Q")).decode()


def _bytes(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        if not (form := _NUMBERS.get(kind)):
            raise ValueError(f"a GGUF header has a value of type {kind}, which this version does not know")
        return _number(stream, form)
    inner, count = _number(stream, "I"), _number(stream, "Q")
    if inner in (_STRING, _ARRAY):
        for _ in range(count):
            _value(stream, inner)
    else:
        if not (form := _NUMBERS.get(inner)):
            raise ValueError(f"a GGUF header has a value of type {inner}, which this version does not know")
        stream.seek(count * struct.calcsize(f"<{form}"), 1)
    return count
