"""One engine and any number of callers: a thread owns the engine and steps it while there is work; an event loop only
passes requests in and answers out. Rounds share the engine's rows, and each leaves as soon as it is done."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from aisp_dist.engine.calibrate import calibrate
from aisp_dist.engine.decode import DecodeError, Engine
from aisp_dist.engine.rows import Row
from aisp_dist.philox import prompt_key
from aisp_dist.records import Calibration, Late, Rollout, Round, Sampling

T = TypeVar("T")


class Closed(RuntimeError):
    """The engine's thread has ended, so there is no answer."""


class Service:
    """Answers requests with one engine until `close`.

    limit: seconds that a trajectory may be decoded, from the moment it gets a row of the engine; a round with a slower
    one fails with Late. Time in which a trajectory waits for a row does not count, whatever else is asked.
    An error of one request goes to its caller. An error of a step concerns every row: the thread ends, `broken` is
    called with the error on that thread, and every open request fails with Closed.
    """

    def __init__(
        self,
        engine: Engine,
        limit: float = math.inf,
        broken: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self.engine, self.limit, self.broken = engine, limit, broken
        self._done = 0  # steps, and likelihoods between them
        self.busy_seconds = 0.0
        self._began = time.monotonic()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: dict[Round, list[asyncio.Future[Rollout]]] = {}
        self._open: set[asyncio.Future[Any]] = set()
        self._rows: dict[Row, float] = {}  # in the engine now, and since when
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def rollout(self, round: Round) -> Rollout:
        """Decode a round. Raises ValueError for one that the model cannot take or finish."""

        def submit(answer: asyncio.Future[Rollout]) -> None:
            if round not in self._waiting:  # the same round twice is decoded once
                self.engine.submit(round)
            self._waiting.setdefault(round, []).append(answer)

        def leave(answer: asyncio.Future[Rollout]) -> None:
            callers = self._waiting.get(round, [])
            if answer in callers:
                callers.remove(answer)
                if not callers:  # nobody wants it any more: its rows go to others
                    self.engine.cancel(round)
                    del self._waiting[round]

        return await self._ask(submit, leave)

    async def nll(self, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]) -> list[float]:
        """The base model's mean negative log-likelihood per token of each response, in nats."""

        def measure() -> list[float]:
            found = []
            for response in responses:
                found.append(self.engine.nll(prompt_tokens, response))
                self._done += 1
            return found

        return await self._between_steps(measure)

    async def calibrate(self, request: Calibration) -> Sampling:
        """See engine/calibrate.py."""
        key = prompt_key(request.seed, request.prompt_id)
        asked = request.sampling, request.rates, key, request.prompt_tokens, request.base_tokens
        return await self._between_steps(lambda: calibrate(self.engine.lm, *asked))

    @property
    def work(self) -> int:
        """Units done, which a caller sees grow while the engine works, in the middle of a step too."""
        return self._done + self.engine.passes

    def figures(self) -> dict[str, float]:
        """What grows: seconds at work and alive, rows that held a trajectory and all rows, over all steps; and the
        seconds of each part of a step (laps.PARTS), as part_NAME."""
        return {
            **{f"part_{part}": seconds for part, seconds in self.engine.batch.laps.seconds.items()},
            "busy_seconds": self.busy_seconds,
            "up_seconds": time.monotonic() - self._began,
            "row_steps": self.engine.row_steps,
            "row_slots": self.engine.steps * len(self.engine.rows),
        }

    @property
    def busy(self) -> bool:
        """Whether a request has no answer yet."""
        return bool(self._open)

    def close(self) -> None:
        """End the thread, after the step that it is in. Open requests fail with Closed."""
        self._inbox.put(None)
        self._thread.join()

    async def _between_steps(self, measure: Callable[[], T]) -> T:
        return await self._ask(lambda answer: _settle(answer, measure(), None))

    async def _ask(
        self,
        submit: Callable[[asyncio.Future[T]], None],
        leave: Callable[[asyncio.Future[T]], None] = lambda answer: None,
    ) -> T:
        """What a request is answered. `submit` and, for a caller that gives up, `leave` run on the engine's thread."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def begin() -> None:
            try:
                submit(answer)
            except Exception as error:
                _settle(answer, None, error)

        self._open.add(answer)
        try:
            if self._error is not None:
                raise self._error
            self._inbox.put(begin)
            return await answer
        except asyncio.CancelledError:
            self._inbox.put(lambda: leave(answer))
            raise
        finally:
            self._open.discard(answer)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            error: BaseException = Closed("the engine was closed")
        except BaseException as failure:
            error = failure
            self.broken(failure)
        self._error = Closed(f"{type(error).__name__}: {error}")
        for answer in list(self._open):
            _settle(answer, None, self._error)

    def _turn(self) -> bool:
        """Take in what has come, then one step. False once closed."""
        requests = [] if self.engine.busy else [self._inbox.get()]
        began = time.monotonic()
        while not self._inbox.empty():
            requests.append(self._inbox.get())
        for request in requests:
            if request is None:
                return False
            request()
        try:
            for round, rollout in self.engine.step():
                for answer in self._waiting.pop(round, ()):
                    _settle(answer, rollout, None)
        except DecodeError as error:  # about one round; the others go on
            for answer in self._waiting.pop(error.round, ()):
                _settle(answer, None, ValueError(str(error)))
        now = time.monotonic()
        self._rows = {row: self._rows.get(row, now) for row in self.engine.rows if row}
        for round in {row.job.round for row, since in self._rows.items() if now - since > self.limit}:
            self.engine.cancel(round)
            for answer in self._waiting.pop(round):
                _settle(answer, None, Late(f"an answer was not finished after {self.limit:g} s of decoding"))
        self._done += 1
        self.busy_seconds += now - began
        return True


def _settle(answer: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    """Hand a value or an error from the engine's thread to the event loop that awaits it."""

    def settle() -> None:
        if not answer.done():  # the caller may have given up
            answer.set_exception(error) if error else answer.set_result(value)

    with suppress(RuntimeError):  # the caller's loop has ended
        answer.get_loop().call_soon_threadsafe(settle)
