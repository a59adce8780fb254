"""Where input lines come from: files, a directory or a hub dataset, read one line at a time. Owns formats, the name and
number of a line, and the shuffle; knows nothing of prompts, ids or tokens. No line is ever skipped: what cannot be read
comes as Broken, in its place."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import itertools
import json
import os
import pickle
import random
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from aisp_dist import demo
from aisp_dist.config import ConfigError, Prompts

Row = dict[str, Any]


class Broken(NamedTuple):
    """A line that is not a row of columns, and as much of it as there is."""

    reason: str
    raw: str


class Line(NamedTuple):
    """file indexes Source.names; number counts from 1: lines of text files, records of the others."""

    file: int
    number: int
    row: Row | Broken


Numbered = Iterator[tuple[int, Row | Broken]]


@dataclass(frozen=True)
class Source:
    names: tuple[str, ...]  # of the files, short and distinct: they go into ids and must not depend on the machine
    lines: Iterator[Line]


def open_source(settings: Prompts) -> Source:
    """The lines of `settings.source`, shuffled if asked. ConfigError: nothing there, unreadable, or the first readable
    row of a file lacks a column; the latter only when that row is reached.

    A line (of Parquet 1024 rows, of a .json array the file) is in memory at a time. A shuffle reads all lines first,
    into a temporary file (TMPDIR) as large as the wanted columns, and holds 17 bytes a line."""
    wanted = list(
        dict.fromkeys([settings.column, *([settings.id_column] if settings.id_column else []), *settings.keep])
    )
    source = _open(settings, wanted)
    if settings.shuffle_seed is None:
        return source
    return Source(source.names, _shuffled(source.lines, settings.shuffle_seed))


def is_local(name: str) -> bool:
    """Whether a source is a path or a pattern of this machine, and not a hub id."""
    path = Path(name)
    return path.exists() or glob.has_magic(name) or _reader(path) is not None or name.startswith((".", "/", "~"))


def _open(settings: Prompts, wanted: list[str]) -> Source:
    name = str(demo.path("prompts")) if settings.source == "demo" else os.path.expanduser(settings.source)
    path = Path(name)
    if path.is_dir() or not is_local(name):
        return Source((path.name if path.is_dir() else name,), _dataset(name, settings, wanted))
    if settings.subset is not None or settings.revision is not None:
        raise ConfigError(
            f"prompts.subset and prompts.revision belong to hub datasets, not to {name!r}: leave them null"
        )
    files = [path] if path.exists() or not glob.has_magic(name) else sorted(map(Path, glob.glob(name, recursive=True)))
    if not files:
        raise ConfigError(f"prompts.source: {name!r} matches no file; give a path or pattern that does")
    for file in files:
        if not _reader(file):
            raise ConfigError(f"prompts.source: {str(file)!r} is not one of {', '.join(_READERS)} (or these with .gz)")
        if not file.is_file():
            raise ConfigError(f"prompts.source: {str(file)!r} is not there or no file; give one that exists")
    root = os.path.commonpath([file.parent for file in files])
    names = tuple(Path(os.path.relpath(file, root)).as_posix() for file in files)
    return Source(names, _files(files, wanted))


def _files(files: Sequence[Path], wanted: list[str]) -> Iterator[Line]:
    for index, file in enumerate(files):
        number, checked = 0, False
        reader = _reader(file)
        assert reader
        try:
            for number, row in reader(file, wanted):
                if isinstance(row, dict):
                    if not checked:
                        _require(wanted, row, f"{str(file)!r}, line {number}")
                        checked = True
                    row = {name: row[name] for name in wanted if name in row}
                yield Line(index, number, row)
        except ConfigError:
            raise
        except (OSError, EOFError, zlib.error, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"prompts.source: {str(file)!r} cannot be read after line {number} ({what}); mend it"
            ) from error


def _require(wanted: list[str], have: Sequence[str] | Row, where: str) -> None:
    missing = [name for name in wanted if name not in have]
    if missing:
        raise ConfigError(
            f"prompts: no column {', '.join(map(repr, missing))} in {where}, which has "
            f"{', '.join(map(repr, have)) or 'none'}; set prompts.column, id_column and keep to columns that are there"
        )


def _shuffled(lines: Iterator[Line], seed: int) -> Iterator[Line]:
    """A permutation of all lines: sorted by a random key each. They wait in a nameless file, gone with this process."""
    with tempfile.TemporaryFile() as spool:
        parts = [(array("d"), array("q")) for _ in range(256)]  # by key: only one at a time is sorted
        draw = random.Random(seed).random  # the one stream that Python promises never to change
        for line in lines:
            key = draw()
            keys, offsets = parts[int(key * len(parts))]
            keys.append(key)
            offsets.append(spool.tell())
            pickle.dump(tuple(line), spool)  # JSON has no dates, decimals and bytes; none but us can write the file
        for keys, offsets in parts:
            for i in sorted(range(len(keys)), key=keys.__getitem__):
                spool.seek(offsets[i])
                yield Line(*pickle.load(spool))


def _text_file(path: Path) -> TextIO:
    """Bytes that are no UTF-8 become lone surrogates here and are refused with their line, not with the file. Lines end
    at \\n alone: universal newlines would split prompts at a bare \\r."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    stream: TextIO = opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    return stream


def _json_row(text: str) -> Row | Broken:
    if not text.strip():
        return Broken("the line is empty", text)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Broken(f"the line is not JSON: {error}", text)
    return row if isinstance(row, dict) else Broken("the line is not a JSON object with columns", text)


def _json_lines(path: Path, wanted: list[str]) -> Numbered:
    with _text_file(path) as stream:
        yield from enumerate(map(_json_row, stream), 1)


def _json(path: Path, wanted: list[str]) -> Numbered:
    """JSON lines, which many .json files hold, if the first line is an object; else one array, which is held whole."""
    with _text_file(path) as stream:
        first = stream.readline()
        if isinstance(_json_row(first), dict):
            yield from enumerate(map(_json_row, itertools.chain([first], stream)), 1)
            return
        text = first + stream.read()
    try:
        whole = json.loads(text)
    except ValueError:
        if text.lstrip().startswith("["):
            raise
        yield from enumerate(map(_json_row, io.StringIO(text)), 1)
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield number, row if isinstance(row, dict) else Broken("not a JSON object with columns", json.dumps(row))


def _text(path: Path, wanted: list[str]) -> Numbered:
    """A prompt a line; its only column has whatever name is asked for."""
    with _text_file(path) as stream:
        for number, line in enumerate(stream, 1):
            yield number, {wanted[0]: line.removesuffix("\n").removesuffix("\r")}


def _csv(path: Path, wanted: list[str]) -> Numbered:
    csv.field_size_limit((1 << 31) - 1)  # the default refuses fields over 128 KiB
    with _text_file(path) as stream:
        reader = csv.reader(stream, strict=True)
        header = next(reader, [])
        while True:
            number = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, Broken(f"lines {number} to {reader.line_num} are not CSV: {error}", "")
                continue
            if len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True))
            else:
                yield number, Broken(f"{len(fields)} fields where the header has {len(header)}", json.dumps(fields))


def _parquet(path: Path, wanted: list[str]) -> Numbered:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # else it keeps all that it has read
        _require(wanted, file.schema_arrow.names, repr(str(path)))
        batches = file.iter_batches(batch_size=1024, columns=wanted)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _dataset(name: str, settings: Prompts, wanted: list[str]) -> Iterator[Line]:
    """A directory or hub id through `datasets`; a directory that save_to_disk made is opened as such."""
    import datasets

    saved = any(Path(name, mark).exists() for mark in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            data = datasets.load_from_disk(name)
            data = data[settings.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            how = {"split": settings.split, "revision": settings.revision, "streaming": settings.streaming}
            data = datasets.load_dataset(name, settings.subset, **how)
    except Exception as error:  # whatever the hub, the network or a foreign file says
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(
            f"prompts.source: {name!r} (subset {settings.subset}, split {settings.split}) is no file here and cannot "
            f"be loaded as a dataset ({what}); give an existing path, or a hub id that is reachable or cached"
        ) from error
    columns = data.column_names or list(next(iter(data), {}))  # a stream may not know them before its first row
    _require(wanted, columns, repr(name))
    rows = data.select_columns(wanted)
    return (Line(0, number, row) for number, row in enumerate(rows, 1))


_READERS: dict[str, Callable[[Path, list[str]], Numbered]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _reader(path: Path) -> Callable[[Path, list[str]], Numbered] | None:
    suffixes = path.suffixes[-2:]
    if suffixes[-1:] == [".gz"]:
        return None if suffixes[0] == ".parquet" else _READERS.get(suffixes[0])
    return _READERS.get(path.suffix)
