"""The real coordinator, pools and store on a virtual clock, with generators and scorers that only say how long they
would take: what a large cluster does, on one core.

    clock     an event loop whose time jumps to the next timer when nothing is ready; threads run inline
    service   Llama-3-8B and an 8B reward model at the roofline: the time of a step follows from the rows in it, a
              prompt is prefilled once a replica, a finished row makes room at once
    cost      each round occupies its coordinator for `coordinator` CPU seconds, one round after the other
    faults    replicas die at random, are started again in `startup` seconds, or hang until a timeout finds them

Rows are simulated `bundle` at a time (one trajectory of the records stands for so many of equal length; the base answer
too counts as so many). All randomness is keyed by the seed: the same plan gives the same figures.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import itertools
import math
import random
import selectors
import struct
import sys
import tempfile
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from actors.coordinator import Coordinator, Table, window
from actors.fleet import Replica
from actors.pool import Pool
from actors.sizing import suggest
from aisp_dist import manifest, prompts
from aisp_dist.config import ConfigError, Run
from aisp_dist.lease import Lease
from aisp_dist.place import Place
from aisp_dist.records import Prompt, Rollout, Round, Score, Trajectory
from aisp_dist.verify import verify

# Llama-3-8B: parameters of the layers and of the output layer; bytes of KV a token in bf16; 4 x layers x width, the
# operations of a row's attention to a token.
LAYERS, HEAD, KV_BYTES, ATTEND = 6.98e9, 0.525e9, 131072, 4 * 32 * 4096
KEPT = 1 << 13  # tokens of prefixes that a scorer keeps (aisp_dist/rewards/prefix.py)
FINGERPRINT = "0" * 32
LOAD = 0.7  # of a coordinator's core, beyond which prompts wait for it
TARGET = 10_000_000  # prompts of the run that is reckoned up


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster of one coordinator, its work, and its faults. Times in seconds.

    coordinator: CPU of a round. spread: response lengths are uniform from (1 - spread) x new_tokens to new_tokens.
    deaths: of a replica in an hour, of which the share `stalls` only hang. bandwidth, flops: what a GPU attains.
    queue: requests that a scorer is given at a time. bundle: rows simulated as one.
    """

    generators: int = 8
    scorers: int = 8
    prompts: int = 400
    coordinator: float = 0.0
    samples: int = 32
    iterations: int = 32
    batch_rows: int = 256
    prompt_tokens: int = 500
    new_tokens: int = 128
    spread: float = 0.5
    deaths: float = 0.0
    stalls: float = 0.1
    startup: float = 120.0
    retries: int = 3
    bandwidth: float = 4.3e12
    flops: float = 7.9e14
    queue: int = 2
    bundle: int = 8
    seed: int = 0

    def step(self, rows: float) -> float:
        """Seconds of one decoding step of `rows` rows of rows / samples prompts, each half way through its answer."""
        own = self.new_tokens * (1 - self.spread / 2) / 2
        keys = (math.ceil(rows / self.samples) * self.prompt_tokens + rows * own) * KV_BYTES
        products = max(2 * (LAYERS + HEAD) / self.bandwidth, 2 * (LAYERS + HEAD) * rows / self.flops)
        return products + max(keys / self.bandwidth, ATTEND * rows * (self.prompt_tokens + own) / self.flops)

    def read(self, tokens: float) -> float:
        """Seconds to read tokens in parallel: a prefill, or a reward model's pass."""
        return 2 * LAYERS * tokens / self.flops

    def lengths(self, round: Round) -> list[int]:
        """Of the round's trajectories, in tokens."""
        count = round.stop - round.start
        text = f"{self.seed} {round.prompt_id} {round.iteration} {round.start}"
        words = hashlib.shake_128(text.encode()).digest(4 * count)
        share = [1 - self.spread * word / (1 << 32) for word in struct.unpack(f"{count}I", words)]
        return [max(1, math.ceil(s * self.new_tokens)) for s in share]


class _Clock(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is ready and no timer runs: the simulated run waits forever")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while nothing is ready to run, and then at once. Work for threads is done inline."""

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
    """The coordinator's one core: what it does, it does one after the other."""

    free: float = 0.0
    busy: float = 0.0

    async def use(self, seconds: float) -> None:
        if seconds:
            now = asyncio.get_running_loop().time()
            self.free, self.busy = max(now, self.free) + seconds, self.busy + seconds
            await asyncio.sleep(self.free - now)


class Simulated:
    """A replica that is late instead of working: `at` is when it is done with what it was given so far."""

    def __init__(self, name: str, plan: Plan, core: Processor) -> None:
        self.name, self.plan, self.core = name, plan, core
        self.random = random.Random(f"{plan.seed} {name}")
        self.loop = asyncio.get_running_loop()
        self.work = 0.0  # seconds
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
        """The first start, without a reason, takes no time: what is simulated is the run after it."""
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
        """Occupies the replica."""
        self.at = max(self.at, self.loop.time()) + seconds
        self.work += seconds

    def _answer(self, answer: asyncio.Future[Any], value: Any) -> None:
        """When the replica is done with what it has."""

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
    """A round in a generator: its answer, its lengths, and how many of its trajectories run or wait."""

    answer: asyncio.Future[Any]
    lengths: list[int]
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.lengths)


class Generator(Simulated):
    """Steps are counted, not made: every running row gets a token in each, so a row that enters at step a with length
    l leaves at a + l. Between two changes of the rows every step takes the same time."""

    rows = 0.0  # integral over time of the share of rows that are filled
    count = 0  # rows so far; keeps the heap from comparing what cannot be

    def _start(self) -> None:
        super()._start()
        self.step = 0.0
        self.running: list[tuple[float, int, _Asked]] = []  # step of the end
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
        """Brings the rows to the present."""
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
    """Only its length matters: one character a token."""
    return Trajectory(sample, (0,) * length, "." * length, "stop")


async def pooled(replicas: Sequence[Replica], limit: int, timeout: float, **settings: Any) -> Pool:
    """A pool of replicas that it has started."""
    pool = Pool(replicas, limit=limit, timeout=timeout, **settings)
    await pool.fleet.ready(len(replicas))
    return pool


@dataclass(frozen=True)
class _Figures:
    """Of one shard. integrals: (time, prompts in flight, busy seconds in the order of PARTS), sampled. counts: in the
    order of COUNTS."""

    plan: Plan
    integrals: list[tuple[float, int, tuple[float, ...]]]
    counts: tuple[int, ...]

    def steady(self) -> tuple[int, int]:
        """First and last sample with a full window."""
        most = max(in_flight for _, in_flight, _ in self.integrals)
        full = [i for i, (_, in_flight, _) in enumerate(self.integrals) if in_flight >= 0.98 * most]
        return full[0], full[-1]


PARTS = ("generators", "rows", "scorers", "coordinator")
COUNTS = ("done", "failed", "violations", "restarts", "repeats")


def simulate(plan: Plan, shards: int = 1) -> dict[str, Any]:
    """Figures of a run by `shards` coordinators that share nothing: each has its part of replicas and prompts.
    utilisation: busy share of each kind's time; rows: of the generators' rows. Raises ConfigError."""
    for name in ("samples", "batch_rows"):
        if getattr(plan, name) % plan.bundle:
            raise ConfigError(f"--{name}: {getattr(plan, name)} is no multiple of --bundle {plan.bundle}; make it one")
    if min(plan.generators, plan.scorers, plan.prompts) < shards:
        raise ConfigError(
            f"--shards: {shards} of {plan.generators} generators, {plan.scorers} scorers and {plan.prompts} prompts; "
            "each needs one of all, so lower it or raise --gpus or --prompts"
        )
    found = []
    for k in range(shards):
        sizes = {name: (getattr(plan, name) + k) // shards for name in ("generators", "scorers", "prompts")}
        found.append(_simulate(replace(plan, **sizes, seed=plan.seed * 100_003 + k)))
    makespan = max(one.integrals[-1][0] for one in found)
    seconds = [one.integrals[hi][0] - one.integrals[lo][0] for one in found for lo, hi in [one.steady()]]
    return {
        "shards": shards,
        "makespan_seconds": makespan,
        "prompts_per_second": plan.prompts / makespan,
        "rounds_per_second": plan.prompts * (plan.iterations + 1) / makespan,
        "utilisation": _shares(found, [(0, -1)] * shards, [makespan] * shards),
        "steady_seconds": min(seconds),
        "steady_utilisation": _shares(found, [one.steady() for one in found], seconds) if min(seconds) else None,
        "gpu_seconds_per_round": {
            name: sum(one.integrals[-1][2][PARTS.index(name)] for one in found) / plan.prompts / (plan.iterations + 1)
            for name in ("generators", "scorers")
        },
        **dict(zip(COUNTS, map(sum, zip(*(one.counts for one in found), strict=True)), strict=True)),
    }


def _shares(
    found: Sequence[_Figures], between: Sequence[tuple[int, int]], seconds: Sequence[float]
) -> dict[str, float]:
    busy, there = [0.0] * len(PARTS), [0.0] * len(PARTS)
    for one, (lo, hi), passed in zip(found, between, seconds, strict=True):
        sizes = (one.plan.generators, one.plan.generators, one.plan.scorers, 1)
        for i, size in enumerate(sizes):
            busy[i] += one.integrals[hi][2][i] - one.integrals[lo][2][i]
            there[i] += size * passed
    return {name: b / t for name, b, t in zip(PARTS, busy, there, strict=True)}


def _simulate(plan: Plan) -> _Figures:
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=VirtualLoop) as runner:
        root = Path(folder)
        (root / "prompts.txt").write_text("".join(f"{i}\n" for i in range(plan.prompts)))
        run = _run(plan, root)
        return runner.run(_fill(plan, run))


def _run(plan: Plan, root: Path) -> Run:
    """The configuration; a fixed lambda, since the update's cost is part of the coordinator's seconds already."""
    return Run.model_validate(
        {
            "output": str(root / "output"),
            "prompts": {"source": str(root / "prompts.txt"), "format": "raw"},
            "generator": {
                "model": "demo",
                "batch_rows": plan.batch_rows // plan.bundle,
                "max_new_tokens": plan.new_tokens,
            },
            "rewards": {"reward": {"kind": "function", "function": "none:none"}},
            "method": {
                "kind": "aisp",
                "num_samples": plan.samples // plan.bundle,
                "num_iterations": plan.iterations,
                "lambda": 1.0,
            },
            "save": {"candidates": "none", "trace": False},
            "runtime": {
                "generators": {"replicas": plan.generators},
                "rewards": {"reward": {"replicas": plan.scorers}},
                "retries": plan.retries,
            },
        }
    )


async def _fill(plan: Plan, run: Run) -> _Figures:
    core, loop = Processor(), asyncio.get_running_loop()
    generators = [Generator(f"generator-{i}", plan, core) for i in range(plan.generators)]
    scorers = [Scorer(f"scorer-{i}", plan, core) for i in range(plan.scorers)]

    async def start() -> tuple[Mapping[str, Pool], int | None]:
        known: dict[str, Any] = {"retries": run.runtime.retries, "is_fault": lambda error: isinstance(error, Dead)}
        times = run.runtime.timeouts
        return {
            "generator": await pooled(generators, 2 * window(run), times.round, **known),
            "reward": await pooled(scorers, plan.queue, times.reward, timeout_is_content=True, **known),
        }, None

    shard, output = Coordinator(run, start), Place.at(run.output)
    integrals: list[tuple[float, int, tuple[float, ...]]] = []

    def sample() -> None:
        busy = (sum(g.busy() for g in generators), sum(g.rows for g in generators), sum(s.busy() for s in scorers))
        in_flight = len(shard.pools["generator"].home)
        integrals.append((loop.time(), in_flight, (*busy, core.busy - max(0.0, core.free - loop.time()))))

    async def watch() -> None:
        while True:
            sample()
            await asyncio.sleep(plan.step(plan.batch_rows) * plan.new_tokens)

    components = {"config": {}, "components": {}, "rows_per_file": run.save.rows_per_file}
    manifest.write_run(output, {"fingerprint": FINGERPRINT, "run_id": FINGERPRINT[:12], **components})
    lease = Lease.take(output)
    await shard.load()
    watching = asyncio.ensure_future(watch())
    await shard.relabel(Table(run, output, {}, FINGERPRINT, "simulated", lease))
    watching.cancel()
    sample()
    verdict = verify(output, prompts.read(run.prompts))
    repeats = sum(pool.repeats for pool in shard.pools.values())
    restarts = sum(replica.starts - 1 for replica in (*generators, *scorers))
    return _Figures(plan, integrals, (verdict.done, verdict.failed, len(verdict.violations), restarts, repeats))


def measure(options: Namespace) -> dict[str, Any]:
    """`aisp bench simulate`: every combination of GPUs, ratios and shards. Raises ConfigError."""
    given = vars(options)
    settings = {f.name: given[f.name] for f in fields(Plan) if f.name in given}
    found = []
    for gpus in options.gpus:
        for ratio, shards in itertools.product(options.ratio, options.shards):
            generators = max(1, min(round(gpus * ratio), gpus - 1))
            num = max(1, options.prompts * gpus // max(options.gpus))
            plan = Plan(**settings | {"generators": generators, "scorers": gpus - generators, "prompts": num})
            print(f"{gpus} GPUs, {generators} generate, {shards} shards, {num} prompts", file=sys.stderr, flush=True)
            figures = {"gpus": gpus, "generators": generators, "scorers": plan.scorers, "prompts": num}
            found.append(figures | simulate(plan, shards))
    best = max((one for one in found if one["gpus"] == max(options.gpus)), key=lambda one: one["prompts_per_second"])
    per_round = best["gpu_seconds_per_round"]
    per_sample = {name: seconds / options.samples for name, seconds in per_round.items()}
    whole = suggest(
        per_sample["generators"],
        {"scorers": per_sample["scorers"]},
        TARGET * options.samples * (options.iterations + 1),
        0,
        TARGET,
    )
    carried = sum(per_round.values()) / options.coordinator if options.coordinator else None
    return {
        "plan": settings,
        "configurations": found,
        "best": {name: best[name] for name in ("gpus", "generators", "scorers", "shards", "prompts_per_second")},
        "suggested": whole.line(),
        "gpus_that_fill_a_coordinator": carried,
        "shards_wanted": carried and {str(gpus): math.ceil(gpus / (LOAD * carried)) for gpus in options.gpus},
        "agrees": not any(one["violations"] for one in found),
    }
