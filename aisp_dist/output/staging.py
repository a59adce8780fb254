"""Staged segments: files of finished rows that wait for the rest of their part. A segment begins with a line that holds
the hash of everything after it. Arrow IPC streams follow, zstd-compressed: the inputs that have rows here (ordinal and
digest, with the fingerprint as metadata), then the rows of data, failed and candidates.

A segment that is torn, damaged or has another schema is reported, and its rows are computed again.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from aisp_dist.output.filesystem import Fence, Place
from aisp_dist.output.schema import Row, Tables

_INPUTS = pa.schema([("source_index", pa.int64()), ("digest", pa.string())])
_NAME = re.compile(r"seg-\d{6,}-[0-9a-zA-Z]+")
_MAGIC = b"aisp-segment-1 "
_ZSTD = pa.ipc.IpcWriteOptions(compression="zstd")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """The rows of one finished input: one of data/ or failed/, and perhaps one of candidates/."""

    source_index: int
    digest: str
    data: Row | None = None
    failed: Row | None = None
    candidates: Row | None = None


@dataclass(frozen=True)
class Segment:
    """digests: the inputs' digests by ordinal. tables: rows of data, failed and candidates."""

    name: str
    fingerprint: str
    digests: dict[int, str]
    tables: Tables


def folder(part: int) -> str:
    return f".staging/part-{part:06d}"


def names(place: Place, part: int) -> list[str]:
    """The part's segment files in the order they were written."""
    return [name for name in place.names(folder(part)) if _NAME.fullmatch(name)]


def write(
    place: Place,
    part: int,
    owner: str,
    fingerprint: str,
    schemas: Tables,
    rows: Sequence[Finished],
    fence: Fence | None = None,
) -> None:
    """Add a segment to a part. Its name has the owner, so that an orphan cannot overwrite another run's segment. fence:
    as in Place.write."""
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
    number = max((int(name.split("-")[1]) for name in names(place, part)), default=-1) + 1
    place.write(f"{folder(part)}/seg-{number:06d}-{owner}", _MAGIC + _hash(payload) + b"\n" + payload, fence)


def read(place: Place, part: int, schemas: Tables | None = None) -> list[Segment]:
    """The undamaged segments of a part, oldest first; of these schemas, if given."""
    found = (_read(place, part, name, schemas) for name in names(place, part))
    return [segment for segment in found if segment is not None]


def discard(place: Place, part: int, names: Collection[str]) -> None:
    """Remove segments of a part. Only these names, since another owner may stage there by now."""
    place.clear(folder(part), names)


def _read(place: Place, part: int, name: str, schemas: Tables | None) -> Segment | None:
    path = f"{folder(part)}/{name}"
    data = place.read(path)
    if data is None:
        return None  # a commit has just removed it
    header, _, payload = data.partition(b"\n")
    if header != _MAGIC + _hash(payload):
        _log.warning("%s/%s is damaged (its checksum does not match); its rows are computed again", place, path)
        return None
    source = pa.BufferReader(payload)
    inputs, *tables = [pa.ipc.open_stream(source).read_all() for _ in range(4)]
    if schemas is not None and tuple(table.schema for table in tables) != schemas:
        _log.warning("%s/%s was written with another schema; its rows are computed again", place, path)
        return None
    digests = dict(zip(inputs["source_index"].to_pylist(), inputs["digest"].to_pylist(), strict=True))
    return Segment(name, inputs.schema.metadata[b"fingerprint"].decode(), digests, Tables(*tables))


def _hash(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=32).hexdigest().encode()
