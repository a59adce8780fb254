"""Part files: names, metadata, what stands on disk and how staged rows are merged into it.

Part k of each table covers the ordinals k * rows_per_file <= source_index < (k + 1) * rows_per_file. data/part-k always
exists once the part is committed and its metadata says which range the part covers; failed/part-k and candidates/part-k
exist where they have rows. The metadata depends on the run and the inputs only, so equal rows are equal bytes.

A part may have more text than Arrow's 32-bit offsets reach, where all candidates of long answers are kept. So no more
than ROW_GROUP bytes of rows are put together: each such group is a row group of its own, and is read by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place
from aisp_dist.output.schema import VERSION, Tables
from aisp_dist.records import Input

ROW_GROUP = 1 << 29  # bytes of rows, as Arrow holds them; a single larger row is a group too


class Header(NamedTuple):
    """Metadata of a part file. digest: of the inputs in [start, end), see range_digest. candidates: rows that the
    commit wrote to the part's candidates; outputs of 0.1.0 do not say."""

    start: int
    end: int
    digest: str
    fingerprint: str
    run_id: str
    version: int = VERSION
    candidates: int | None = None


class Standing(NamedTuple):
    """A committed part: its header, how many of its inputs are done, and the schema of its data."""

    header: Header
    num_done: int
    schema: pa.Schema


def name(table: str, part: int) -> str:
    return f"{table}/part-{part:06d}.parquet"


def range_digest(inputs: Iterable[Input]) -> str:
    """Hash over id and digest of each input, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for line in inputs:
        digest.update(json.dumps([line.id, line.digest]).encode() + b"\n")
    return digest.hexdigest()


def encode(table: pa.Table, covers: Header) -> bytes:
    """A whole Parquet file, with a row group for each chunk of the table. A table without rows has none: `datasets`
    cannot read an empty one."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", compression_level=3) as writer:
        for batch in table.to_batches():
            if batch.num_rows:
                writer.write_batch(batch)
        known = {name: str(value) for name, value in covers._asdict().items() if value is not None}
        writer.add_key_value_metadata({f"aisp.{name}": value for name, value in known.items()})
    return bytes(sink.getvalue())


def header(metadata: pq.FileMetaData) -> Header:
    """Raises KeyError or ValueError where a file is not one of ours."""
    found = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items()}
    start, end, digest, fingerprint, run_id, version = (found[f"aisp.{name}"] for name in Header._fields[:-1])
    candidates = found.get("aisp.candidates")
    counted = None if candidates is None else int(candidates)
    return Header(int(start), int(end), digest, fingerprint, run_id, int(version), counted)


def read_standing(place: Place, part: int) -> Standing | None:
    """The committed part without its rows; None where there is none. Raises ConfigError where it is damaged, OSError
    where the network or the disk does not give it."""
    file = place.open(name("data", part))
    if file is None:
        return None
    try:
        with file:
            metadata = pq.read_metadata(file)
        return Standing(header(metadata), metadata.num_rows, metadata.schema.to_arrow_schema().remove_metadata())
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        if isinstance(error, OSError) and (place.remote or error.errno is not None):
            raise  # the network's or the disk's; where Arrow cannot decode what it read, its OSError has no errno
        raise ConfigError(
            f"output: {place}/{name('data', part)} is damaged ({_line(error)}); delete this file, and the same command "
            "computes its rows again"
        ) from None


def read_rows(place: Place, part: int, end: int, schemas: Tables, columns: Sequence[str] | None = None) -> Tables:
    """Rows of a committed part whose range ends at `end`, whole or only some columns. Failed rows beyond `end` were
    put there by a commit that did not come to its end; they are staged still."""

    def read(table: str, schema: pa.Schema) -> pa.Table:
        data = place.read(name(table, part))
        if data is None:
            return schema.empty_table() if columns is None else schema.empty_table().select(columns)
        try:
            return read_table(pq.ParquetFile(pa.BufferReader(data)), columns)
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(
                f"output: {place}/{name(table, part)} is damaged ({_line(error)}); delete this part's file in data/, "
                "and the same command computes its rows again"
            ) from None

    failed = read("failed", schemas.failed)
    failed = failed.filter(pc.less(failed["source_index"], end))
    return Tables(read("data", schemas.data), failed, read("candidates", schemas.candidates))


def read_table(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a part file, whole or only some columns, without its metadata. A row group at a time: Arrow's reader
    cannot put nested columns together that are too long for one chunk."""
    groups = [file.read_row_group(group, columns=columns) for group in range(file.num_row_groups)]
    whole = pa.concat_tables(groups) if groups else file.read(columns=columns)
    return whole.replace_schema_metadata(None)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def merge(rows: Sequence[Tables], end: int) -> Tables:
    """One part's rows below `end` from several places, oldest first, in input order: a done row beats a failed one, of
    two done rows the earlier counts and brings its candidates, of two failed ones the later."""
    source: dict[int, int] = {}
    for number, tables in enumerate(rows):
        for ordinal in ordinals(tables.data):
            source.setdefault(ordinal, number)
    data = _latest([t.data for t in rows], lambda ordinal, number: ordinal < end and source[ordinal] == number)
    done = ordinals(data)
    failed = _latest([t.failed for t in rows], lambda ordinal, number: ordinal < end and ordinal not in done)
    kept = _latest([t.candidates for t in rows], lambda o, number: o in done and source[o] == number)
    return Tables(data, failed, kept)


def ordinals(table: pa.Table) -> set[int]:
    return set(table["source_index"].to_pylist())


def _latest(tables: Sequence[pa.Table], wanted: Callable[[int, int], bool]) -> pa.Table:
    """The last wanted row of each ordinal, in groups of up to ROW_GROUP bytes, a chunk each. wanted: of an ordinal, and
    the number of the table that has it."""
    found = [(n, ordinal) for n, table in enumerate(tables) for ordinal in table["source_index"].to_pylist()]
    last = {ordinal: row for row, (number, ordinal) in enumerate(found) if wanted(ordinal, number)}
    whole = pa.concat_tables(tables)
    sizes = [size for batch in whole.to_batches() for size in np.sum([*map(_sizes, batch.columns)], axis=0).tolist()]
    groups: list[list[pa.Table]] = []
    room = 0
    for _, row in sorted(last.items()):
        if not groups or sizes[row] > room:
            groups.append([])
            room = ROW_GROUP
        groups[-1].append(whole.slice(row, 1))
        room -= sizes[row]
    # not `take`, which puts all rows together first
    return pa.concat_tables([pa.concat_tables(group).combine_chunks() for group in groups] or [whole.slice(0, 0)])


def _sizes(values: pa.Array) -> np.ndarray:
    """About how many bytes each value has. Not `nbytes`, which depends on how Arrow came to hold it."""
    if pa.types.is_string(values.type):
        found: np.ndarray = pc.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    elif pa.types.is_list(values.type):
        ends = np.cumsum(lengths := pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False))
        total = np.concatenate([[0], np.cumsum(_sizes(values.flatten()))])
        found = total[ends] - total[ends - lengths]
    elif pa.types.is_struct(values.type):
        found = sum(map(_sizes, values.flatten()), np.zeros(len(values), np.int64))
    else:
        found = np.full(len(values), 8, np.int64)
    return found
