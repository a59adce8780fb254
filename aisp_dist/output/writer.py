"""The rows of an output directory: which inputs still need one, staging of finished rows, commit of whole parts.

Part k of data/, failed/ and candidates/ holds the inputs k * rows_per_file <= source_index < (k + 1) * rows_per_file in
input order. Its range is open from `plan` to its commit:

    plan -> missing -> add -> buffer -> flush -> .staging/part-k/seg-* -> commit -> {candidates, failed, data}/part-k

Replacing data/part-k is the commit. It comes last and has the range in its metadata: before it the old part counts,
after it the new one. Staged segments are removed after the commit, so a process that is killed at any moment leaves
every finished row in a part or in a segment, and the next process merges both: a done row beats a failed one (done rows
are never computed again), of two done rows the earlier one counts, committed before staged, and of two failed ones the
later. So a repeated merge changes nothing.

Knows no machines and no models; asks `still_owner` who owns the output, at the last moment before each change: a write
that hangs while the output changes hands finds that out (Place.write). On S3 that is the version of the object, so
what may still land is an object that is new and stays the only one: a segment, whose done rows count less than what is
committed, or failed rows of a part that the later owner committed without any, which the next `plan` finds and the
commit after it removes.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from aisp_dist.config import ConfigError
from aisp_dist.output import manifest, parts, schema, staging
from aisp_dist.output.filesystem import Place
from aisp_dist.output.kept_columns import ColumnType
from aisp_dist.output.lease import LeaseLost
from aisp_dist.output.parts import Header, Standing
from aisp_dist.output.schema import Kind
from aisp_dist.output.staging import Finished
from aisp_dist.records import Done, Input, Result

_log = logging.getLogger(__name__)


class Unfinished(RuntimeError):
    """The run ended with inputs that have no row. The same command resumes it."""


class Counts(NamedTuple):
    """Numbers of inputs: planned; with a done or a failed row, staged or committed; in committed parts."""

    planned: int
    done: int
    failed: int
    committed: int


@dataclass
class _Open:
    """The range of a part that is not committed, or will be committed again. missing: ordinals without a row. failed:
    ordinals with a failed row. committed: how many inputs the committed part has."""

    start: int
    end: int
    digest: str
    missing: set[int]
    failed: set[int]
    committed: int


class Store:
    """The rows of one run. One thread consumes `plan`, any thread may call `add`, and one other thread calls `flush`
    and `finish`. Nothing is written before the first flush.

    candidates, trace: what `save` keeps of a finished prompt. still_owner: False once another run has taken the output.
    shard: (i, n), only the parts k with k % n == i; inputs of other parts are read and skipped. Stores of different
    shards of one n may write at the same time, and together they write what the store of (0, 1) writes.
    """

    def __init__(
        self,
        place: Place,
        rows_per_file: int,
        kind: Kind,
        columns: Mapping[str, ColumnType],
        fingerprint: str,
        run_id: str,
        model: str,
        candidates: Literal["all", "none"] | tuple[int, int],
        trace: bool,
        still_owner: Callable[[], bool],
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._place, self._rows_per_file, self._shard = place, rows_per_file, shard
        self._kind, self._columns, self._schemas = kind, columns, schema.schemas(kind, columns)
        self._fingerprint, self._run_id, self._model = fingerprint, run_id, model
        self._candidates, self._trace = candidates, trace
        self._still_owner = still_owner
        self._writer = secrets.token_hex(4)
        self._lock = threading.Lock()  # of what follows
        self._open: dict[int, _Open] = {}
        self._buffer: dict[int, list[Finished]] = {}
        self._closed = Counts(0, 0, 0, 0)
        self._planned_to = 0  # ordinals below it have been read
        self._input_ended = False
        self._io = threading.Lock()  # one flush at a time

    def plan(self, inputs: Iterable[Input], retry_failed: bool = False) -> Iterator[Input]:
        """The inputs that have no row yet, in order; with `retry_failed` also those with a failed row. An input that
        cannot be written as a row comes as a BadInput; the caller adds a Failed for every BadInput.

        Reads the inputs of one part ahead, and only the metadata of parts that are complete. Raises ConfigError where
        inputs, fingerprint or schema differ from those of the rows that are there.
        """
        lines = iter(inputs)
        part = 0
        staged = set(self._place.names(".staging"))  # later segments belong to parts that are open already
        failed = set(self._place.names("failed"))
        while (chunk := list(islice(lines, self._rows_per_file))) or part == 0:
            if self._owns(part):
                there = f"part-{part:06d}" in staged, f"part-{part:06d}.parquet" in failed
                yield from self._open_part(part, chunk, retry_failed, *there)
            part += 1
        self._input_ended = True

    def add(self, result: Result) -> bool:
        """Take a finished input. Returns False and does nothing where it has a row already."""
        line = result.prompt
        row = self._finished(result)
        part = line.source_index // self._rows_per_file
        with self._lock:
            if line.source_index >= self._planned_to or not self._owns(part):
                raise ValueError(f"source_index {line.source_index} was never planned")
            opened = self._open.get(part)
            if opened is None or line.source_index not in opened.missing:
                return False
            opened.missing.remove(line.source_index)
            if row.failed is not None:
                opened.failed.add(line.source_index)
            self._buffer.setdefault(part, []).append(row)
        return True

    def flush(self) -> None:
        """Stage added rows and commit the parts that are complete. Raises LeaseLost where another run has taken the
        output. After an OSError nothing is lost: the next flush writes it."""
        with self._io:
            self._check_owner()
            with self._lock:
                whole = sorted(part for part, opened in self._open.items() if not opened.missing)
                waiting = {part: list(rows) for part, rows in self._buffer.items()}
            for part, rows in sorted(waiting.items()):
                known = self._writer, self._fingerprint, self._schemas
                staging.write(self._place, part, *known, rows, self._check_owner)
                with self._lock:
                    del self._buffer[part][: len(rows)]
                    if not self._buffer[part]:
                        del self._buffer[part]
            for part in whole:
                self._commit(part)
            if whole:
                manifest.write_card(self._place)

    def finish(self) -> None:
        """Flush for the last time. Raises Unfinished where an input has no row."""
        self.flush()
        with self._lock:
            missing = sorted(ordinal for opened in self._open.values() for ordinal in opened.missing)
        if missing or not self._input_ended:
            what = f"{len(missing)} inputs have no row, first line {missing[0]}" if missing else "inputs are left"
            raise Unfinished(f"{self._place}: {what}; the same command resumes")

    def settled(self) -> bool:
        """Whether every part that `plan` has reached is committed and stays as it is."""
        with self._lock:
            return not self._open

    def counts(self) -> Counts:
        with self._lock:
            planned, done, failed, committed = self._closed
            for opened in self._open.values():
                bad = len(opened.failed)
                done += opened.end - opened.start - len(opened.missing) - bad
                failed += bad
                committed += opened.committed
        return Counts(planned, done, failed, committed)

    def _owns(self, part: int) -> bool:
        index, count = self._shard
        return part % count == index

    def _finished(self, result: Result) -> Finished:
        line = result.prompt
        if isinstance(result, Done):
            data = schema.done_row(result, self._kind, self._columns, self._model, self._run_id)
            candidates = schema.candidates_row(result, self._candidates, self._trace)
            return Finished(line.source_index, line.digest, data=data, candidates=candidates)
        failed = schema.failed_row(result, self._kind, self._columns, self._run_id)
        return Finished(line.source_index, line.digest, failed=failed)

    def _open_part(
        self, part: int, chunk: Sequence[Input], retry_failed: bool, staged: bool, failures: bool
    ) -> Iterator[Input]:
        """staged, failures: whether the part has segments, and a file in failed/."""
        start = part * self._rows_per_file
        stop = start + len(chunk)
        for ordinal, line in enumerate(chunk, start):
            if line.source_index != ordinal:
                raise ValueError(f"input {line.id} has source_index {line.source_index} in place {ordinal}")
        standing = parts.read_standing(self._place, part)
        if standing is not None:
            self._check_standing(part, standing, chunk)
        old_end = start if standing is None else standing.header.end
        old_done = 0 if standing is None else standing.num_done
        old_failed = old_end - start - old_done
        staged |= standing is not None and failures and not old_failed  # another owner's, written late: commit again
        if standing is not None and old_end >= stop and not staged and not (retry_failed and old_failed):
            with self._lock:
                self._planned_to = stop
                self._close(old_done, old_failed, planned=len(chunk))
            return
        done, failed = self._finished_ordinals(part, old_end, chunk) if staged or standing else (set(), set())
        if retry_failed:
            failed = {ordinal for ordinal in failed if ordinal >= stop}
        end = max(stop, old_end)
        shorter = standing is not None and stop < old_end
        digest = standing.header.digest if standing is not None and shorter else parts.range_digest(chunk)
        missing = set(range(start, end)) - done - failed
        todo = sorted(ordinal for ordinal in missing if ordinal < stop)
        with self._lock:
            self._open[part] = _Open(start, end, digest, missing, failed & set(range(start, end)), old_end - start)
            self._planned_to = stop
            self._closed = self._closed._replace(planned=self._closed.planned + len(chunk))
        yield from (schema.writable(chunk[ordinal - start]) for ordinal in todo)

    def _check_standing(self, part: int, standing: Standing, chunk: Sequence[Input]) -> None:
        """Raise ConfigError unless a committed part is one of this run's and of these inputs."""
        name, header = f"data/part-{part:06d}", standing.header
        self._check_fingerprint(name, header.fingerprint)
        if standing.schema != self._schemas.data:
            ours, theirs = set(self._schemas.data), set(standing.schema)
            names = sorted({field.name for field in ours ^ theirs}) or ["the order of its columns"]
            raise ConfigError(f"output: {name} has another schema, in {', '.join(names)}; give another output")
        num_old = header.end - header.start
        if len(chunk) >= num_old:
            same = parts.range_digest(chunk[:num_old]) == header.digest
        else:  # the digest covers inputs that a smaller limit does not read: compare what there is, the ids
            rows = parts.read_rows(self._place, part, header.end, self._schemas, ["source_index", "id"])
            ids = {row["source_index"]: row["id"] for row in (*rows.data.to_pylist(), *rows.failed.to_pylist())}
            same = all(ids.get(line.source_index) in (None, schema.as_utf8(line.id)) for line in chunk)
        if not same:
            raise ConfigError(
                f"prompts: {name} was computed from other inputs (some of lines {header.start} to {header.end - 1} "
                "have changed since); restore the input, or give another output"
            )

    def _check_fingerprint(self, name: str, found: str) -> None:
        if found != self._fingerprint:
            raise ConfigError(
                f"output: {name} belongs to a run with fingerprint {found}, this one has {self._fingerprint}; "
                "give another output"
            )

    def _finished_ordinals(self, part: int, old_end: int, chunk: Sequence[Input]) -> tuple[set[int], set[int]]:
        """Ordinals of a part that are done and that are failed, in the committed part and in segments."""
        rows = parts.read_rows(self._place, part, old_end, self._schemas, ["source_index"])
        done, failed = parts.ordinals(rows.data), parts.ordinals(rows.failed)
        digests = {line.source_index: line.digest for line in chunk}
        for segment in staging.read(self._place, part, self._schemas):
            self._check_fingerprint(f".staging/part-{part:06d}", segment.fingerprint)
            for ordinal, digest in segment.digests.items():
                if digests.get(ordinal, digest) != digest:
                    raise ConfigError(
                        f"prompts: line {ordinal} has changed since it was computed; restore the input, or give "
                        "another output"
                    )
            done |= parts.ordinals(segment.tables.data)
            failed |= parts.ordinals(segment.tables.failed)
        return done, failed - done

    def _commit(self, part: int) -> None:
        opened = self._open[part]
        names = staging.names(self._place, part)
        staged = staging.read(self._place, part, self._schemas)
        rows = [segment.tables for segment in staged]
        if opened.committed or not staged:
            rows.insert(0, parts.read_rows(self._place, part, opened.start + opened.committed, self._schemas))
        tables = parts.merge(rows, opened.end)
        lost = set(range(opened.start, opened.end)) - parts.ordinals(tables.data) - parts.ordinals(tables.failed)
        if lost:
            _log.warning("part %d: %d finished rows cannot be read again; not committed", part, len(lost))
            with self._lock:
                opened.missing |= lost
                opened.failed -= lost
            return
        header = Header(opened.start, opened.end, opened.digest, self._fingerprint, self._run_id)
        header = header._replace(candidates=tables.candidates.num_rows)
        built = {
            name: parts.encode(table, header)
            for name, table in tables._asdict().items()
            if table.num_rows or name == "data"
        }
        for name in ("candidates", "failed", "data"):  # data is the commit
            if name in built:
                self._place.write(parts.name(name, part), built[name], self._check_owner)
            else:
                self._place.remove(parts.name(name, part), self._check_owner)
        with self._lock:
            del self._open[part]
            self._close(tables.data.num_rows, tables.failed.num_rows)
        self._check_owner()
        kept = {segment.name for segment in staged if max(segment.digests) >= opened.end}
        staging.discard(self._place, part, [name for name in names if name not in kept])

    def _close(self, num_done: int, num_failed: int, planned: int = 0) -> None:
        before, done, failed, committed = self._closed
        total = committed + num_done + num_failed
        self._closed = Counts(before + planned, done + num_done, failed + num_failed, total)

    def _check_owner(self) -> None:
        if not self._still_owner():
            raise LeaseLost(f"{self._place}: another run has taken this output; this one stops without writing to it")
