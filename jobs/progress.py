"""How far a run is: for people a bar on a terminal, else a plain line every few seconds; for programs metrics.jsonl."""

from __future__ import annotations

import json
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from aisp_dist import prompts
from aisp_dist.config import ConfigError, Run
from aisp_dist.place import Place

_PLAIN, _TERMINAL = 5.0, 0.5  # seconds between updates
_REMOTE = 60.0  # seconds between lines of metrics.jsonl where each is a copy of the whole


class Total:
    """The number of input lines, counted beside the run: None until known."""

    def __init__(self, run: Run) -> None:
        self.value: int | None = None
        threading.Thread(target=self._count, args=(run,), daemon=True).start()

    def _count(self, run: Run) -> None:
        with suppress(ConfigError):  # the run itself says what is wrong with the input
            self.value = sum(1 for _ in prompts.read(run.prompts))


class Progress:
    """Takes the coordinator's counts as they come. `with Progress(...) as progress: session.relabel(..., progress)`."""

    def __init__(self, output: Place, run: Run, title: str = "") -> None:
        self.output, self.total, self.title = output, Total(run), title
        self.began = self.shown = self.logged = time.monotonic()
        self.first: dict[str, Any] | None = None
        self.now: dict[str, Any] = {}
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
        if self.now:
            say(self.line())
            self._log()

    def __call__(self, now: dict[str, Any]) -> None:
        self.first = self.first or now
        self.now = now
        time_now = time.monotonic()
        if time_now - self.shown >= (_PLAIN if self.bar is None else _TERMINAL):
            self.shown = time_now
            if self.bar is None:
                say(self.line())
            else:
                done = now["done"] + now["failed"]
                self.bar.update(self.task, completed=done, total=self.total.value, description=self.line())
        if time_now - self.logged >= (_REMOTE if self.output.remote else _PLAIN):
            self.logged = time_now
            self._log()

    def _log(self) -> None:
        entry = {"time": time.time(), "seconds": self.seconds, "total": self.total.value, **self.now}
        try:
            self.output.append("metrics.jsonl", f"{json.dumps(entry)}\n".encode())
        except OSError as error:  # the rows do not wait for it
            say(f"cannot write metrics.jsonl: {error}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def finished(self) -> int:
        """Prompts that this command finished, resumed ones not counted."""
        first = self.first or self.now
        return sum(self.now.get(key, 0) - first.get(key, 0) for key in ("done", "failed"))

    def line(self) -> str:
        now, total, seconds = self.now, self.total.value, self.seconds
        finished = now["done"] + now["failed"]
        parts = [f"{self.title}{finished}/{'?' if total is None else total} prompts"]
        if self.finished and total is not None and finished < total:
            parts.append(f"{(total - finished) * seconds / self.finished:.0f} s left")
        parts += [f"{now[key] / seconds:.0f} {key}/s" for key in ("samples", "tokens")]
        if now["reward_gain"] is not None:
            parts.append(f"reward {now['reward_gain']:+.3g} over base")
        parts += [f"{now[key]} {key}" for key in ("failed", "quarantined", "restarts") if now[key]]
        return ", ".join(parts)


def say(line: str) -> None:
    """One line for the human, beside whatever the command prints as its result."""
    print(line, file=sys.stderr, flush=True)
