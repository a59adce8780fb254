"""Staged segments: finished rows that wait for the rest of their part, in files that say themselves whether they are
whole. A segment is one line with the hash of all that follows, then Arrow IPC streams: the inputs it accounts for
(ordinal and digest; the fingerprint as metadata), then its rows of data, failed and candidates, zstd-compressed.

A segment that is torn, damaged or of another schema is no segment: it is reported and its rows are computed again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from aisp_dist import durable
from aisp_dist.schema import Row, Tables

_INPUTS = pa.schema([("source_index", pa.int64()), ("digest", pa.string())])
_MAGIC = b"aisp-segment-1 "
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """The rows of one finished input: one of `data` and `failed`, and perhaps one of `candidates`."""

    source_index: int
    digest: str
    data: Row | None = None
    failed: Row | None = None
    candidates: Row | None = None


@dataclass(frozen=True)
class Segment:
    """digests: of the inputs by ordinal. tables: rows of data, failed, candidates."""

    path: Path
    fingerprint: str
    digests: dict[int, str]
    tables: Tables


def folder(root: Path, part: int) -> Path:
    return root / ".staging" / f"part-{part:06d}"


def paths(root: Path, part: int) -> list[Path]:
    """The part's segment files in the order they were written."""
    return sorted(folder(root, part).glob("seg-*"))


def write(root: Path, part: int, owner: str, fingerprint: str, schemas: Tables, rows: Sequence[Finished]) -> None:
    """Add a segment to a part. `owner` is in the name, so that an orphan cannot write over another run's segment."""
    inputs = pa.Table.from_pylist(
        [{"source_index": row.source_index, "digest": row.digest} for row in rows],
        _INPUTS.with_metadata({"fingerprint": fingerprint}),
    )
    tables = [
        pa.Table.from_pylist([row for row in found if row is not None], schema)
        for found, schema in (
            ([row.data for row in rows], schemas.data),
            ([row.failed for row in rows], schemas.failed),
            ([row.candidates for row in rows], schemas.candidates),
        )
    ]
    sink = pa.BufferOutputStream()
    for table in (inputs, *tables):
        with pa.ipc.new_stream(sink, table.schema, options=_ZSTD) as stream:
            stream.write_table(table)
    payload = sink.getvalue().to_pybytes()
    durable.make_dir(folder(root, part))
    number = max((int(path.name.split("-")[1]) for path in paths(root, part)), default=-1) + 1
    durable.write(folder(root, part) / f"seg-{number:06d}-{owner}", _MAGIC + _hash(payload) + b"\n" + payload)


def read(root: Path, part: int, schemas: Tables | None = None) -> list[Segment]:
    """The sound segments of a part, of these schemas if given, oldest first."""
    found = (_read(path, schemas) for path in paths(root, part))
    return [segment for segment in found if segment is not None]


def discard(root: Path, part: int, keep: Sequence[Segment] = ()) -> None:
    """Remove a part's staging, all but the segments to keep."""
    kept = {segment.path for segment in keep}
    for path in sorted(folder(root, part).iterdir()):
        if path not in kept:
            path.unlink()
    if not kept:
        folder(root, part).rmdir()


def _read(path: Path, schemas: Tables | None) -> Segment | None:
    header, _, payload = path.read_bytes().partition(b"\n")
    if header != _MAGIC + _hash(payload):
        _log.warning("%s is damaged (its checksum does not match); its rows are computed again", path)
        return None
    source = pa.BufferReader(payload)
    inputs, *tables = [pa.ipc.open_stream(source).read_all() for _ in range(4)]
    if schemas is not None and tuple(table.schema for table in tables) != schemas:
        _log.warning("%s was written with another schema; its rows are computed again", path)
        return None
    digests = dict(zip(inputs["source_index"].to_pylist(), inputs["digest"].to_pylist(), strict=True))
    return Segment(path, inputs.schema.metadata[b"fingerprint"].decode(), digests, Tables(*tables))


def _hash(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=32).hexdigest().encode()
