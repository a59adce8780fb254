"""The engine behind an actor: rounds come in at any time and share its rows; each leaves when its own is done."""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from aisp_dist.config import Run
from aisp_dist.records import Rates, Rollout, Round, Sampling

T = TypeVar("T")


class Generator:
    """One replica of the base model.

    A thread owns the engine and steps it while there is work; the actor's event loop only passes rounds in and answers
    out. An error of one request goes back to its caller; an error of a step concerns every row, so the process ends and
    the callers repeat their rounds elsewhere.
    """

    def __init__(self, run: Run, base_dir: Path, name: str, threads: int) -> None:
        self.run, self.base_dir, self.name, self.threads = run, base_dir, name, threads
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.waiting: dict[Round, list[asyncio.Future[Rollout]]] = {}
        self.turns = 0  # of the engine's thread
        self.working = False
        self.busy_seconds = 0.0
        self.began = time.monotonic()

    def __repr__(self) -> str:
        return self.name

    async def load(self) -> int | None:
        """Load the model; answers its context length in tokens. Raises ConfigError for one that cannot be used."""
        import torch
        from transformers.utils.logging import disable_progress_bar

        from aisp_dist.engine import decode, model
        from aisp_dist.rewards import stepwise

        settings = self.run.generator
        torch.set_num_threads(self.threads)
        disable_progress_bar()  # noise in job logs
        lm = await asyncio.to_thread(model.load, settings)
        guided = await asyncio.to_thread(stepwise.load, self.run, self.base_dir, lm.device)
        sizes = settings.batch_rows, settings.max_new_tokens
        self.engine = decode.Engine(lm, *sizes, settings.stop, guide=guided)
        self.began = time.monotonic()
        threading.Thread(target=self._run, name="engine", daemon=True).start()
        what = f"{settings.model}, {lm.dtype}, {len(self.engine.rows)} rows, {self.threads} threads"
        print(f"{self.name}: {what}, context {lm.context_length or 'unlimited'}", file=sys.stderr)
        return lm.context_length

    async def rollout(self, round: Round) -> Rollout:
        """Decode a round. Raises ValueError for one that the model cannot take."""
        answer: asyncio.Future[Rollout] = asyncio.get_running_loop().create_future()

        def submit() -> None:
            try:
                if round not in self.waiting:  # the same round twice is decoded once
                    self.engine.submit(round)
                self.waiting.setdefault(round, []).append(answer)
            except Exception as error:
                _settle(answer, None, error)

        def leave() -> None:
            waiting = self.waiting.get(round, [])
            if answer in waiting:
                waiting.remove(answer)
                if not waiting:  # nobody else wants it: its rows go to others
                    self.engine.cancel(round)
                    del self.waiting[round]

        self.inbox.put(submit)
        try:
            return await answer
        except asyncio.CancelledError:
            self.inbox.put(leave)
            raise

    async def nll(self, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]) -> list[float]:
        """The base model's mean negative log-likelihood per token of each response, in nats."""
        return await self._between_steps(lambda: [self.engine.nll(prompt_tokens, response) for response in responses])

    async def calibrate(self, sampling: Sampling, rates: Rates, *prompt: Any) -> Sampling:
        """See engine/calibrate.py; prompt: its key, its tokens, its base answer."""
        from aisp_dist.engine.calibrate import calibrate

        return await self._between_steps(lambda: calibrate(self.engine.lm, sampling, rates, *prompt))

    async def _between_steps(self, ask: Callable[[], T]) -> T:
        """What `ask` answers on the engine's thread."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def measure() -> None:
            try:
                _settle(answer, ask(), None)
            except Exception as error:
                _settle(answer, None, error)

        self.inbox.put(measure)
        return await answer

    async def health(self) -> dict[str, float]:
        """See fleet.Replica. row_steps / row_slots: the share of rows that held a trajectory while decoding."""
        return {
            "progress": self.turns,
            "busy": float(self.working),
            "busy_seconds": self.busy_seconds,
            "up_seconds": time.monotonic() - self.began,
            "row_steps": self.engine.row_steps,
            "row_slots": self.engine.steps * len(self.engine.rows),
        }

    def _run(self) -> None:
        from aisp_dist.engine.decode import DecodeError

        try:
            while True:
                work = None if self.engine.busy else self.inbox.get()
                began, self.working = time.monotonic(), True
                if work is not None:
                    work()
                while not self.inbox.empty():
                    self.inbox.get()()
                try:
                    for round, rollout in self.engine.step():
                        for answer in self.waiting.pop(round, ()):
                            _settle(answer, rollout, None)
                except DecodeError as error:  # this round only; the others go on
                    for answer in self.waiting.pop(error.round, ()):
                        _settle(answer, None, ValueError(str(error)))
                self.turns += 1
                self.busy_seconds += time.monotonic() - began
                self.working = self.engine.busy
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def _settle(answer: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    """Hand a value or an error from the engine's thread to the event loop that awaits it."""

    def settle() -> None:
        if not answer.done():  # the caller may have given up
            answer.set_exception(error) if error else answer.set_result(value)

    answer.get_loop().call_soon_threadsafe(settle)
