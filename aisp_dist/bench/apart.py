"""Contenders in processes of their own. Each loads its models once and then waits for work, so that contenders can take
turns without sharing threads, memory or settings of a library."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import psutil

from aisp_dist.config import ConfigError

Work = Callable[..., dict[str, Any]]
_END = 30.0  # seconds that a process may take to leave


@dataclass(frozen=True)
class Turn:
    """One turn of a contender: wall-clock seconds, CPU seconds of its process and all below it, and its answer."""

    seconds: float
    cpu_seconds: float
    answer: dict[str, Any]


class Apart:
    """`with Apart(load) as contender: contender(...)` runs what `load()` yields in another process.

    load: a function that can be pickled; it answers a context manager whose value is the work. Entering raises a
    ConfigError of the other process again, and RuntimeError with the traceback for any other error; so does a call."""

    def __init__(self, load: Callable[[], AbstractContextManager[Work]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, self.theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.theirs, load))
        self.loading = 0.0  # seconds
        self.below: dict[int, psutil.Process] = {}  # every process that was seen below it

    def __enter__(self) -> Apart:
        start = time.perf_counter()
        self.process.start()
        self.theirs.close()  # so that the end of the process is the end of the pipe
        try:
            self._answer()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.loading = time.perf_counter() - start
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.is_alive():
            with suppress(OSError):
                self.pipe.send(None)
            self.process.join(_END)
        self._tree()
        for process in self.below.values():
            with suppress(psutil.Error):
                process.kill()
        self.process.join()

    def __call__(self, *args: Any) -> Turn:
        cpu, start = self._cpu_seconds(), time.perf_counter()
        self.pipe.send(args)
        answer = self._answer()
        return Turn(time.perf_counter() - start, self._cpu_seconds() - cpu, answer)

    def _answer(self) -> dict[str, Any]:
        try:
            error, value = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(_END)
            raise RuntimeError(f"a contender's process ended with code {self.process.exitcode}") from None
        if error is not None:
            raise error(value)
        answer: dict[str, Any] = value
        return answer

    def _cpu_seconds(self) -> float:
        total = 0.0
        for process in self._tree():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self.process.pid)
            found = [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.below.update((process.pid, process) for process in found)
        return found


def _serve(pipe: Connection, load: Callable[[], AbstractContextManager[Work]]) -> None:
    os.dup2(2, 1)  # the document alone goes to stdout
    try:
        with load() as work:
            pipe.send((None, {}))
            while (args := pipe.recv()) is not None:
                pipe.send((None, work(*args)))
    except ConfigError as error:
        pipe.send((ConfigError, str(error)))
    except EOFError:
        pass  # the bench is gone
    except Exception:
        pipe.send((RuntimeError, traceback.format_exc()))
