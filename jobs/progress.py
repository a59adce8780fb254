"""The progress of a run: a bar on a terminal or a plain line every few seconds, and metrics.jsonl for programs."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from actors.counts import Counts, seconds_left, share
from aisp_dist.config import ConfigError, Run
from aisp_dist.data import prompts
from aisp_dist.output import log
from aisp_dist.output.filesystem import Place

_PLAIN, _TERMINAL = 5.0, 0.5  # seconds between updates
_REMOTE = 60.0  # seconds between lines of metrics.jsonl where each is a copy of the whole


class Total:
    """The number of input lines, counted while the run works; None until it is known."""

    def __init__(self, run: Run) -> None:
        self.value: int | None = None
        threading.Thread(target=self._count, args=(run,), daemon=True).start()

    def _count(self, run: Run) -> None:
        with suppress(ConfigError, OSError):  # the run reports what is wrong with the input
            self.value = prompts.count(run.prompts)


class Progress:
    """Shows and logs the coordinators' counts: `with Progress(...) as progress: session.relabel(..., progress)`."""

    def __init__(self, output: Place, run: Run, title: str = "", shard: tuple[int, int] = (0, 1)) -> None:
        self.output, self.counted, self.title = output, Total(run), title
        self.rows_per_file, self.shard = run.save.rows_per_file, shard
        self.samples_each = run.method.num_samples * run.method.num_iterations + 1  # the base answer is one
        self.command = secrets.token_hex(4)  # its name in metrics.jsonl
        self.began = self.shown = self.logged = time.monotonic()
        self.now: Counts | None = None
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self.bar = Bar(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("starting", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.now is not None:
            say(self.line(self.now))
            self._log(self.now)

    def __call__(self, now: Counts) -> None:
        self.now = now
        time_now = time.monotonic()
        if time_now - self.shown >= (_PLAIN if self.bar is None else _TERMINAL):
            self.shown = time_now
            if self.bar is None:
                say(self.line(now))
            else:
                self.bar.update(self.task, completed=now.finished, total=self.total, description=self.line(now))
        if time_now - self.logged >= (_REMOTE if self.output.remote else _PLAIN):
            self.logged = time_now
            self._log(now)

    def _log(self, now: Counts) -> None:
        left = self.seconds_left(now)
        entry = {"time": time.time(), "seconds": self.seconds, "command": self.command, "shard": list(self.shard)}
        entry |= {"total": self.total, "seconds_left": left} | now.json()
        try:
            log.append(self.output, entry)
        except OSError as error:  # rows are worth more than progress
            say(f"cannot write metrics.jsonl: {error}")

    @property
    def total(self) -> int | None:
        """Inputs of this command's shard; None while they are being counted."""
        return share(self.counted.value, self.rows_per_file, self.shard)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def seconds_left(self, now: Counts) -> float | None:
        return seconds_left(now, now.samples / self.seconds, self.total, self.samples_each)

    @property
    def samples(self) -> int:
        return self.now.samples if self.now else 0

    def line(self, now: Counts) -> str:
        total, seconds = self.total, self.seconds
        parts = [f"{self.title}{now.finished}/{'?' if total is None else total} prompts"]
        if not now.fresh:
            parts.append(f"{now.in_flight} in flight")
        elif left := self.seconds_left(now):  # before a prompt is finished, a guess would be wild
            parts.append(f"{timedelta(seconds=round(left))} left")
        parts += [f"{now.samples / seconds:.0f} samples/s", f"{now.tokens / seconds:.0f} tokens/s"]
        if now.reward_gain is not None:
            parts.append(f"reward {now.reward_gain:+.3g} over base")
        if idle := now.idle():
            parts.append("idle: " + " ".join(f"{role} {share:.0%}" for role, share in idle.items()))
        restarts = "restart" if now.restarts == 1 else "restarts"
        counts = {"failed": now.failed, "quarantined": now.quarantined, restarts: now.restarts}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
        return ", ".join(parts)


def say(line: str) -> None:
    """Print one line for people to stderr; the command's result goes to stdout."""
    print(line, file=sys.stderr, flush=True)
