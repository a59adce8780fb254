"""One output that a coordinator fills, and when its failed rows are too many."""

from __future__ import annotations

from dataclasses import dataclass

from aisp_dist.config import Run
from aisp_dist.data import prompts
from aisp_dist.output.filesystem import Place
from aisp_dist.output.kept_columns import ColumnType
from aisp_dist.output.lease import Lease
from aisp_dist.output.writer import Store

SETTLED = 200  # prompts before runtime.max_failed is applied


class TooManyFailed(Exception):
    """More than runtime.max_failed of the rows failed. What is finished is kept; the same command resumes."""


@dataclass(frozen=True, slots=True)
class Table:
    """run: with its paths resolved. model: the base model as the user named it. lease: needed for writing, not for
    reading. shard: (i, n), the parts k with k % n == i."""

    run: Run
    output: Place
    columns: dict[str, ColumnType]
    fingerprint: str
    model: str
    lease: Lease | None = None
    retry_failed: bool = False
    shard: tuple[int, int] = (0, 1)

    def store(self) -> Store:
        return Store(
            self.output,
            self.run.save.rows_per_file,
            "raw" if self.run.prompts.format == "raw" else "chat",
            self.columns,
            self.fingerprint,
            self.fingerprint[:12],
            self.model,
            self.run.save.keep,
            self.run.save.trace,
            self.lease.held if self.lease else lambda: False,
            self.shard,
        )

    def whole(self) -> bool:
        """Whether every input has a committed row. Writes nothing. Raises TooManyFailed where every input has one and
        too many are failed, so that the same command ends as it did before."""
        store = self.store()
        waiting = next(store.plan(prompts.read(self.run.prompts), self.retry_failed), None)
        whole = waiting is None and store.settled()
        if whole:
            check_failed(store, self.run.runtime.max_failed, "in failed/", whole=True)
        return whole


def check_failed(store: Store, allowed: float, reason: str, whole: bool = False) -> None:
    """Raise TooManyFailed where more than the share `allowed` of the rows failed, among at least SETTLED rows, or where
    a whole table has no row that is done. reason: of the last failed row."""
    counts = store.counts()
    total = counts.done + counts.failed
    if counts.failed > allowed * total and (total >= SETTLED or (whole and not counts.done)):
        raise TooManyFailed(
            f"{counts.failed} of {total} rows failed, {counts.failed / total:.1%}; runtime.max_failed allows "
            f"{allowed:.1%}, applied from {SETTLED} rows on or where no row is done. The last reason: {reason}"
        )
