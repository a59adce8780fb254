"""Generators and scorers that only say how long they would take, on a virtual clock: an event loop whose time jumps to
the next timer when nothing is ready, with the work of threads done inline.

The time of a generator's step follows from the rows in it, a prompt is prefilled once per replica, a finished row makes
room at once. Replicas die at random and are restarted in `startup` seconds, or hang until a timeout finds them.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import selectors
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.fleet import Replica
from actors.pool import Pool
from aisp_dist.records import Prompt, Rollout, Round, Score, Trajectory
from tests.bench.roofline import KEPT, Plan


class _Clock(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is ready and no timer runs: the simulated run waits forever")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while nothing is ready to run, and then it jumps. Work for threads is done inline."""

    def __init__(self) -> None:
        self.clock = _Clock()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


class Dead(Exception):
    """A simulated process is gone."""


@dataclass
class Processor:
    """The coordinator's one core: it does one thing after the other."""

    free: float = 0.0
    busy: float = 0.0

    async def use(self, seconds: float) -> None:
        if seconds:
            now = asyncio.get_running_loop().time()
            self.free, self.busy = max(now, self.free) + seconds, self.busy + seconds
            await asyncio.sleep(self.free - now)


class Simulated:
    """A replica that waits instead of working. `at`: when it is done with everything it was given so far."""

    def __init__(self, name: str, plan: Plan, core: Processor) -> None:
        self.name, self.plan, self.core = name, plan, core
        self.random = random.Random(f"{plan.seed} {name}")
        self.loop = asyncio.get_running_loop()
        self.work = 0.0  # busy seconds, those that are scheduled included
        self.starts = 0
        self._start()

    def _start(self) -> None:
        self.up, self.hangs, self.at = True, False, self.loop.time()
        self.asked: dict[asyncio.Future[Any], asyncio.TimerHandle | None] = {}
        self.warm: OrderedDict[str, None] = OrderedDict()
        if self.plan.deaths:
            self.end = self.loop.call_later(self.random.expovariate(self.plan.deaths / 3600), self._die)

    def _die(self) -> None:
        self.up, self.hangs = False, self.random.random() < self.plan.stalls
        self._drop()

    def _drop(self) -> None:
        asked, self.asked = self.asked, {}
        for answer, timer in asked.items():
            if timer:
                timer.cancel()
            if not self.hangs and not answer.done():
                answer.set_exception(Dead(f"{self.name} died"))

    async def call(self, method: str, *args: Any) -> Any:
        if method != "nll":  # a round is a rollout and its scores
            await self.core.use(self.plan.coordinator / 2)
        answer = self.loop.create_future()
        if self.up:
            self.asked[answer] = None
            getattr(self, method)(answer, *args)
        elif not self.hangs:
            raise Dead(f"{self.name} is dead")
        return await answer

    async def health(self) -> dict[str, float]:
        if self.hangs:
            await self.loop.create_future()
        if not self.up:
            raise Dead(f"{self.name} is dead")
        return {"busy": bool(self.asked), "progress": self.busy()}

    async def restart(self, reason: str) -> None:
        """The first start, without a reason, takes no time: the simulated run begins after it."""
        self.stop()
        await asyncio.sleep(self.plan.startup if reason else 0)
        self.starts += 1
        self._start()

    def stop(self) -> None:
        self.up = self.hangs = False
        self._drop()
        if self.plan.deaths:
            self.end.cancel()

    def _take(self, seconds: float) -> None:
        """Occupy the replica for these seconds."""
        self.at = max(self.at, self.loop.time()) + seconds
        self.work += seconds

    def _answer(self, answer: asyncio.Future[Any], value: Any) -> None:
        """Answer when the replica is done with everything it has."""

        def settle() -> None:
            if self.asked.pop(answer, None) and not answer.done():
                answer.set_result(value)

        self.asked[answer] = self.loop.call_at(self.at, settle)

    def busy(self) -> float:
        """Seconds of work done until now."""
        return self.work - max(0.0, self.at - self.loop.time())


class Scorer(Simulated):
    def score(self, answer: asyncio.Future[Any], prompt: Prompt, responses: Sequence[str]) -> None:
        tokens = self.plan.bundle * sum(len(text) for text in responses)
        if prompt.id not in self.warm:
            tokens += self.plan.prompt_tokens
            while self.warm and (len(self.warm) + 1) * self.plan.prompt_tokens > KEPT:
                self.warm.popitem(last=False)
        self.warm[prompt.id] = None
        self.warm.move_to_end(prompt.id)
        self._take(self.plan.read(tokens))
        self._answer(answer, [Score(float(i)) for i in range(len(responses))])


@dataclass
class _Asked:
    """A round in a generator: its answer, its lengths, and how many of its trajectories are running or waiting."""

    answer: asyncio.Future[Any]
    lengths: list[int]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.lengths)


class Generator(Simulated):
    """Steps are counted, not computed: every running row gets a token in each, so a row that enters at step a with
    length l leaves at a + l. Between two changes of the rows every step takes the same time."""

    rows = 0.0  # integral over time of the share of rows that are filled
    count = 0  # rows so far; breaks ties in the heap

    def _start(self) -> None:
        super()._start()
        self.step = 0.0
        self.running: list[tuple[float, int, _Asked]] = []  # step at which the row ends
        self.waiting: deque[tuple[int, _Asked]] = deque()
        self.slots = self.plan.batch_rows // self.plan.bundle
        self.seconds = [self.plan.step(k * self.plan.bundle) for k in range(self.slots + 1)]
        self.timer: asyncio.TimerHandle | None = None

    def rollout(self, answer: asyncio.Future[Any], round: Round) -> None:
        self._pass()
        if round.prompt_id not in self.warm:
            self.warm[round.prompt_id] = None
            self._take(self.plan.read(self.plan.prompt_tokens))
        asked = _Asked(answer, self.plan.lengths(round))
        self.waiting.extend((length, asked) for length in asked.lengths)
        self._turn()

    def nll(self, answer: asyncio.Future[Any], tokens: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        self._pass()
        self._take(self.plan.read(sum(map(len, responses))))
        self._answer(answer, [0.0] * len(responses))
        self._turn()

    def _pass(self) -> None:
        """Bring the rows to the present."""
        now = self.loop.time()
        if self.running and now > self.at:
            self.step += (now - self.at) / self.seconds[len(self.running)]
            self.rows += (now - self.at) * len(self.running) / self.slots
            self.work += now - self.at
            self.at = now

    def _turn(self) -> None:
        self._pass()
        while self.running and self.running[0][0] <= self.step + 1e-6:
            asked = heapq.heappop(self.running)[2]
            asked.left -= 1
            if not asked.left and not asked.answer.done():
                self.asked.pop(asked.answer, None)
                asked.answer.set_result(Rollout(tuple(map(_trajectory, range(len(asked.lengths)), asked.lengths))))
        while self.waiting and len(self.running) < self.slots:
            self.at = max(self.at, self.loop.time())
            length, asked = self.waiting.popleft()
            self.count += 1
            heapq.heappush(self.running, (self.step + length, self.count, asked))
        if self.timer:
            self.timer.cancel()
        if self.running:
            wait = (self.running[0][0] - self.step) * self.seconds[len(self.running)]
            self.timer = self.loop.call_at(self.at + wait, self._turn)

    def _drop(self) -> None:
        self._pass()
        self.running, self.waiting = [], deque()
        if self.timer:
            self.timer.cancel()
        super()._drop()

    def busy(self) -> float:
        self._pass()
        return super().busy()


def _trajectory(sample: int, length: int) -> Trajectory:
    """Only the length matters: one character per token."""
    return Trajectory(sample, (0,) * length, "." * length, "stop")


async def pooled(replicas: Sequence[Replica], max_calls: int, timeout: float | None, **settings: Any) -> Pool:
    """A pool with all its replicas started."""
    pool = Pool(replicas, max_calls=max_calls, timeout=timeout, **settings)
    await pool.fleet.ready(len(replicas))
    return pool
