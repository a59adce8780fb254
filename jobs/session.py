"""A run's actors on a Ray cluster, and outputs filled by them while a human watches.

Session -> Connection (Ray) -> coordinators -> generators, scorers
        -> relabel: lease, run.json, coordinator.relabel -> progress, until every shard is done
"""

from __future__ import annotations

import math
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from actors.counts import Counts, share
from actors.table import Table
from aisp_dist import placement
from aisp_dist.align import window
from aisp_dist.analysis.guard import GuardStop
from aisp_dist.config import ConfigError, Run
from aisp_dist.engine import sizes
from aisp_dist.output import lease, manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.placement import Plan
from aisp_dist.vllm.choice import Check, weakest
from jobs import cost
from jobs.cli import Exit
from jobs.connection import ClusterLost, Connection
from jobs.prepare import Prepared
from jobs.progress import Progress

_POLL = 0.5  # seconds between looks at the run, the cluster and signals
_PATIENCE = 30.0  # seconds of waiting without a message
_SETTLE = 3.0  # seconds after which an actor's end is not the first sign of its machine's
_STOP = 60.0  # seconds that the last flush may take


class Interrupted(Exit):
    """SIGINT or SIGTERM came. What is finished is written before the command ends."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(128 + number, f"{name}: stopped; the same command resumes from what is written")


@dataclass
class _Shard:
    """A coordinator and what it was asked. share: (i, n), its parts are the k with k % n == i. deaths: since rows were
    last committed. run: the call to wait for. asked: the call for counts, and since when. carried: counts of the
    coordinators that died before it."""

    index: int
    share: tuple[int, int]
    coordinator: Any = None
    starts: int = 0
    deaths: int = 0
    run: Any = None
    asked: Any = None
    since: float = 0.0
    counts: Counts = field(default_factory=Counts)
    carried: Counts = field(default_factory=Counts)


class Session:
    """`with Session(...)` connects to Ray and starts coordinators, generators and scorers; at the end all are gone. A
    cluster of our own that is lost is started again, and the run resumes.

    share: (i, n), one shard of many, with one coordinator; None: all runtime.shards, with a coordinator each."""

    def __init__(self, prepared: Prepared, say: Callable[[str], None], share: tuple[int, int] | None = None) -> None:
        self.prepared, self.say = prepared, say
        count = prepared.run.runtime.shards
        self.owned = share or (0, 1)
        self.shards = [_Shard(0, share)] if share else [_Shard(i, (i, count)) for i in range(count)]
        self.first_prompt = ""
        self.signal: int | None = None
        self.connection: Connection | None = None
        self.checks: dict[int, Check | None] = {}  # of vLLM's batch invariance, by shard
        self.losses = 0  # of the cluster, since rows were last committed

    def __enter__(self) -> Session:
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _open(self) -> None:
        """Connect and start everything. Raises ClusterLost, Exit, ConfigError."""
        while True:
            try:
                return self._start_all()
            except ClusterLost as error:
                self._lost(error)

    def _start_all(self) -> None:
        self.connection = Connection(self.prepared.run, self.say)

        self.say(self.prepared.choice.line())
        from actors import cluster  # brings Ray, after the settings that a Connection makes

        # Set after ray.init, whose own handler ends the process. The handler only notes the signal, since an exception
        # raised inside Ray's compiled code becomes a SystemError.
        for number in self.handlers:
            signal.signal(number, self._note)
        run = self.prepared.located
        self.plan = planned(run, len(self.shards))
        for line in self.plan.lines():
            self.say(line)
        self.bundles = cluster.reserve(self.plan, run.runtime.timeouts.startup)
        self.say(f"loading models, for at most {run.runtime.timeouts.startup:g} s")
        for shard in self.shards:
            self._start(shard)
        for shard in self.shards:
            self._up(shard)

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None
        for shard in self.shards:
            shard.carried += shard.counts.grown()
            shard.counts, shard.coordinator, shard.starts = Counts(), None, 0

    def _lost(self, error: ClusterLost) -> None:
        """Leave a cluster that is lost. Raises its error where it was not ours to start, or was lost too often."""
        retries = self.prepared.run.runtime.retries
        self.losses += 1
        if self.connection is None or not self.connection.own or self.losses > retries:
            raise error
        self.say(f"{error.why}; starting Ray again ({self.losses} of at most {retries} times without a committed row)")
        self._close()

    def relabel(self, prepared: Prepared, table: Table, progress: Progress) -> None:
        """Fill one output and leave it resumable. Raises Exit, ConfigError."""
        for shard in self.shards:
            shard.counts = shard.carried = Counts()
        while True:
            try:
                return self._relabel(prepared, table, progress)
            except ClusterLost as error:
                self._lost(error)
            self._open()

    def _relabel(self, prepared: Prepared, table: Table, progress: Progress) -> None:
        """Take the output, describe it, and run. A lease of its own: what is left of a lost cluster cannot write."""
        from actors.cluster import differing_nodes

        with lease.Lease.take(prepared.output, say=self.say, shard=self.owned).beating() as mine:
            if nodes := differing_nodes(mine):
                raise ConfigError(
                    f"output: {prepared.output} is not the same place on {', '.join(nodes)} as here; give a directory "
                    "that all machines share, or a URI such as s3://bucket/path"
                )
            before = manifest.read_run(prepared.output)
            manifest.write_run(prepared.output, prepared.record(weakest([*self.checks.values()]), before))
            self._fill([replace(table, lease=mine, shard=shard.share) for shard in self.shards], progress)

    def rehearse(self, table: Table, prompts: int) -> tuple[Counts, float, int]:
        """Search the first prompts for real, by the first coordinator alone, into a directory that is removed at the
        end. Returns counts, seconds and bytes."""
        with tempfile.TemporaryDirectory(prefix="aisp-rehearsal-") as folder:
            output = Place.at(folder)
            few = table.run.prompts.model_copy(update={"limit": min(prompts, table.run.prompts.limit or prompts)})
            run = table.run.model_copy(update={"output": folder, "prompts": few})
            self.shards[0].counts = self.shards[0].carried = Counts()
            with lease.Lease.take(output).beating() as mine, Progress(output, run, "rehearsal: ") as progress:
                manifest.write_run(output, self.prepared.record())
                self._fill([replace(table, run=run, output=output, lease=mine, shard=(0, 1))], progress)
            assert progress.now is not None
            return progress.now, progress.seconds, sum(file.stat().st_size for file in Path(folder).glob("*/*.parquet"))

    def _fill(self, tables: Sequence[Table], progress: Progress) -> None:
        """Have every table filled by its coordinator. One that dies or freezes is started again and resumes."""
        import ray
        from ray.exceptions import RayActorError

        shards = self.shards[: len(tables)]
        for shard, table in zip(shards, tables, strict=True):
            shard.asked, shard.run = None, shard.coordinator.relabel.remote(table)
        running = list(shards)
        try:
            while running:
                self._await([shard.run for shard in running], _POLL)
                for shard in list(running):
                    try:
                        if done := bool(ray.wait([shard.run], timeout=0)[0]):
                            self._value(shard.run)
                            running.remove(shard)
                            shard.asked = None  # what was asked before the end is not the last word
                        self._look(shard, tables[shard.index], progress, 1.0 if done else 0.0)
                    except RayActorError as error:
                        if shard in running:
                            self._died(shard, error)
                            self._up(shard)
                            shard.run = shard.coordinator.relabel.remote(tables[shard.index])
                progress(_sum(shards))
        except ClusterLost:
            raise
        except (Exit, ConfigError) as error:  # of one shard, or a signal: the others write what they have
            if isinstance(error, Interrupted):
                self.say("stopping: writing what is finished")
            stops = [shard.coordinator.stop.remote() for shard in running]
            try:
                if stops and not self._await(stops, _STOP):
                    raise TimeoutError from None
                for stop in stops:
                    self._value(stop)
                for shard in running:
                    shard.asked = None
                    self._look(shard, tables[shard.index], progress, 1.0)
                progress(_sum(shards))
            except (Exit, RayActorError, TimeoutError) as why:
                self.say(
                    f"left at once: what was finished since the last flush is computed again ({why or 'no answer'})"
                )
            raise

    def _look(self, shard: _Shard, table: Table, progress: Progress, seconds: float) -> None:
        """Take in a shard's counts if they come within so many seconds. Kills a coordinator that does not give them
        for timeouts.stall: it is frozen."""
        if shard.asked is None:
            total = share(progress.counted.value, self.prepared.run.save.rows_per_file, table.shard)
            shard.asked, shard.since = self._ask(shard, total), time.monotonic()
        if self._await([shard.asked], seconds):
            asked, shard.asked = shard.asked, None
            now: Counts = self._value(asked)
            if now.committed > shard.counts.committed:
                shard.deaths = self.losses = 0
            shard.counts = now
        elif time.monotonic() - shard.since > self.prepared.run.runtime.timeouts.stall:
            self._kill(shard)

    def _ask(self, shard: _Shard, total: int | None) -> Any:
        return shard.coordinator.progress.options(enable_task_events=False).remote(total)

    def _kill(self, shard: _Shard) -> None:
        import ray

        stall = self.prepared.run.runtime.timeouts.stall
        self.say(f"coordinator {shard.index} shows no sign of life for {stall:g} s; replacing it")
        ray.kill(shard.coordinator)
        shard.since = math.inf

    def _start(self, shard: _Shard) -> None:
        """Start a coordinator and, through it, generators and scorers; `run` is the call to wait for."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from actors.cluster import start_pools
        from actors.coordinator import Coordinator
        from actors.metrics import Exporter

        if shard.coordinator is not None:
            ray.kill(shard.coordinator)  # it may only have been out of reach: never two of one shard
        run, count = self.prepared.located, len(self.shards)
        again = f"-again-{shard.starts}" if shard.starts else ""  # a dead one's name is free only after a while
        shard.starts += 1
        split = shard.index, count
        base_dir = self.prepared.base_dir
        pools = partial(start_pools, run, self.plan.groups, base_dir, window(run), split, again, self.bundles)
        name = ("coordinator" if count == 1 else f"coordinator-{shard.index}") + again
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )  # rarely a spot machine
        options = {"name": name, "num_cpus": 0, "max_concurrency": 100, "scheduling_strategy": here}
        shard.coordinator = ray.remote(Coordinator).options(**options).remote(run, pools, Exporter, name)
        shard.asked, shard.run = None, shard.coordinator.load.remote()

    def _up(self, shard: _Shard) -> None:
        """Wait until a coordinator and its actors are up, with a message now and then. One that dies or freezes
        meanwhile is started again."""
        import ray
        from ray.exceptions import RayActorError

        began = time.monotonic()
        while True:
            try:
                if self._await([shard.run], _PATIENCE):
                    self.first_prompt = self._value(shard.run)
                    if self.prepared.choice.engine == "vllm":
                        self._take_check(shard)
                    return
                free = {kind: amount for kind, amount in ray.available_resources().items() if kind in ("CPU", "GPU")}
                room = ", ".join(f"{amount:g} {kind}" for kind, amount in free.items()) or "no CPU or GPU"
                self.say(
                    f"actors are still being placed or loaded after {time.monotonic() - began:.0f} s; free: {room}"
                )
                if not self._await([self._ask(shard, None)], self.prepared.run.runtime.timeouts.stall):
                    self._kill(shard)
            except RayActorError as error:
                self._died(shard, error)

    def _take_check(self, shard: _Shard) -> None:
        """Whether this shard's vLLM is batch invariant. Raises RayActorError."""
        asked = shard.coordinator.invariance.remote()
        found = self._value(asked) if self._await([asked], self.prepared.run.runtime.timeouts.stall) else None
        if found:
            self.say(str(found))
        self.checks[shard.index] = found

    def _died(self, shard: _Shard, error: Exception) -> None:
        """Start another. Raises Exit where too many died without a row committed, ClusterLost where it is the cluster
        that is gone."""
        deadline = time.monotonic() + (_SETTLE if self.connection and self.connection.own else 0.0)
        while time.monotonic() < deadline:
            self._check()
            time.sleep(_POLL)
        shard.deaths += 1
        if shard.deaths > self.prepared.run.runtime.retries:
            raise Exit(1, f"coordinator {shard.index} died {shard.deaths} times; the same command resumes") from error
        self.say(f"coordinator {shard.index} died; starting it again from what is written")
        shard.carried += shard.counts.grown()
        shard.counts = Counts()
        self._start(shard)

    def _await(self, refs: list[Any], seconds: float) -> bool:
        """Whether all answers are there within so many seconds. Raises Interrupted, ClusterLost."""
        import ray

        deadline = time.monotonic() + seconds
        while True:
            self._check()
            left = max(0.0, min(_POLL, deadline - time.monotonic()))
            if len(ray.wait(refs, num_returns=len(refs), timeout=left)[0]) == len(refs):
                return True
            if time.monotonic() >= deadline:
                return False

    def _check(self) -> None:
        if self.signal is not None:
            number, self.signal = self.signal, None  # one signal interrupts one wait: what follows is the way out
            raise Interrupted(number)
        if self.connection is not None:
            self.connection.check()

    def _value(self, ref: Any) -> Any:
        """The answer of a call that has ended. Raises what the coordinator raised as ConfigError or Exit, RayActorError
        where the coordinator is gone."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        from actors.fleet import Fault
        from actors.table import TooManyFailed

        try:
            return ray.get(ref)
        except RayActorError:
            raise
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ConfigError):
                raise ConfigError(str(cause)) from None
            if isinstance(cause, TooManyFailed):
                raise Exit(3, str(cause)) from None
            if isinstance(cause, GuardStop):
                raise Exit(1, str(cause)) from None
            name = "" if isinstance(cause, Fault) else f"{type(cause).__name__}: "
            raise Exit(1, f"{name}{cause}; the same command resumes from what is written") from error
        except RayError as error:
            raise Exit(1, f"{type(error).__name__}: {error}; the same command resumes") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def planned(run: Run, coordinators: int) -> Plan:
    """Where the processes of a located run will be on the cluster that is connected. Raises ConfigError."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    pilot = Place.at(run.output, run.runtime.storage_options) / "compare"
    return placement.plan(run, machines, coordinators, sizes.of_models(run), cost.measured(pilot))


def _sum(shards: Sequence[_Shard]) -> Counts:
    return sum((shard.carried + shard.counts for shard in shards), Counts())
