"""The records of one file, whatever its format: JSON lines, JSON, CSV, Parquet, plain text. A record that cannot be
read comes as Broken, in its place; a blank line is no record. Knows no prompts and no other files."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from aisp_dist.config import ConfigError
from aisp_dist.data import encoding

Row = dict[str, Any]


class Broken(NamedTuple):
    """A record that is not a row of columns, and as much of it as there is."""

    reason: str
    raw: str


class Columns(NamedTuple):
    """required: columns that a file must have, the prompt's first; optional: those that it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def check(self, have: Sequence[str] | Row, where: str) -> None:
        """Raise ConfigError unless all required ones are there."""
        missing = [name for name in self.required if name not in have]
        if missing:
            raise ConfigError(
                f"prompts: no column {', '.join(map(repr, missing))} in {where}, which has "
                f"{', '.join(map(repr, have)) or 'none'}; set prompts.column, id_column and keep to columns that are "
                "there"
            )

    def check_single(self, have: Sequence[str], path: Path) -> None:
        """Raise ConfigError where one that is read is there twice. Of the others that does no harm."""
        for name in (*self.required, *self.optional):
            if have.count(name) > 1:
                raise ConfigError(
                    f"prompts.source: {str(path)!r} has {have.count(name)} columns {name!r}, and which one is meant "
                    "cannot be told; rename or remove the others"
                )


# Numbers count lines of a text file from 1, blank ones included, and records of the other formats.
Numbered = Iterator[tuple[int, Row | Broken]]
Reader = Callable[[Path, Columns], Numbered]


def reader(path: Path) -> Reader | None:
    """The reader for a file's name; None where the name says no format that we read."""
    suffixes = path.suffixes[-2:]
    if suffixes[-1:] == [".gz"]:
        return None if suffixes[0] == ".parquet" else READERS.get(suffixes[0])
    return READERS.get(path.suffix)


def _text_file(path: Path) -> TextIO:
    """Bytes that are not text become lone surrogates here and are refused with their line, not with the file. Lines
    end at \\n alone: universal newlines would split prompts at a bare \\r. Raises NoText."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as stream:
        codec = encoding.of(stream.read(encoding.HEAD))
    errors = "surrogateescape" if codec == "utf-8-sig" else "surrogatepass"
    text: TextIO = opener(path, "rt", encoding=codec, errors=errors, newline="\n")
    return text


class RepeatedKey(ValueError):
    """One object has a key twice, of which JSON readers keep the last without a word."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        key = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise RepeatedKey(f"the key {key!r} twice in one object")
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)  # made once: json.loads would make one a line


def _loads(text: str) -> Any:
    """Raises ValueError, as json.loads does, and RepeatedKey."""
    return json.loads(text) if text.startswith("\ufeff") else _decoder.decode(text)  # json.loads names the mark


def _json_row(text: str) -> Row | Broken:
    try:
        row = _loads(text)
    except RepeatedKey as error:
        return Broken(f"the line has {error}", text)
    except (ValueError, RecursionError) as error:
        return Broken(f"the line is not JSON: {error}", text)
    return row if isinstance(row, dict) else Broken("the line is not a JSON object with columns", text)


def _json_rows(lines: Iterator[str]) -> Numbered:
    return ((number, _json_row(line)) for number, line in enumerate(lines, 1) if line.strip())


def _json_lines(path: Path, columns: Columns) -> Numbered:
    with _text_file(path) as stream:
        yield from _json_rows(stream)


def _json(path: Path, columns: Columns) -> Numbered:
    """JSON lines, which many .json files hold, if the first line that is not blank is an object; else one array, which
    is held in memory whole."""
    with _text_file(path) as stream:
        first = next((line for line in stream if line.strip()), "")
        stream.seek(0)
        if isinstance(_json_row(first), dict):
            yield from _json_rows(stream)
            return
        text = stream.read()
    try:
        whole = _loads(text)
    except ValueError:
        if text.lstrip().startswith("["):
            raise
        yield from _json_rows(io.StringIO(text))
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield number, row if isinstance(row, dict) else Broken("not a JSON object with columns", json.dumps(row))


def _text(path: Path, columns: Columns) -> Numbered:
    """A prompt a line; its only column has whatever name is asked for."""
    with _text_file(path) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield number, {columns.required[0]: line.removesuffix("\n").removesuffix("\r")}


def _csv(path: Path, columns: Columns) -> Numbered:
    csv.field_size_limit((1 << 31) - 1)  # the default refuses fields over 128 KiB
    with _text_file(path) as stream:
        rows = csv.reader(stream, strict=True)
        header = next(rows, [])
        mark = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
        if mark is not None and columns.required[0] not in header:
            raise ConfigError(
                f"prompts.source: {str(path)!r} separates its columns by {mark!r}, and a .csv is read with commas; "
                "save it with commas, or as .jsonl"
            )
        columns.check_single(header, path)
        while True:
            number = rows.line_num + 1
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, Broken(f"lines {number} to {rows.line_num} are not CSV: {error}", "")
                continue
            if not fields or (len(fields) == 1 < len(header) and not fields[0].strip()):
                continue  # a blank line
            if len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True))
            else:
                yield number, Broken(f"{len(fields)} fields where the header has {len(header)}", json.dumps(fields))


def _parquet(path: Path, columns: Columns) -> Numbered:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:  # else it keeps all that it has read
        names = file.schema_arrow.names
        columns.check(names, repr(str(path)))
        columns.check_single(names, path)
        wanted = [name for name in dict.fromkeys((*columns.required, *columns.optional)) if name in names]
        batches = file.iter_batches(batch_size=1024, columns=wanted)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
