"""A cluster with this run's actors on it, and an output filled while a human watches."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
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
from aisp_dist.align import window
from aisp_dist.analysis.guard import GuardStop
from aisp_dist.config import ConfigError, Run
from aisp_dist.output import lease, manifest
from aisp_dist.output.filesystem import Place
from jobs import cost, prepare
from jobs.cli import Exit
from jobs.prepare import Prepared
from jobs.progress import Progress

_POLL = 0.5  # seconds between looks at the run, and at whether somebody wants it to stop
_PATIENCE = 30.0  # seconds of waiting without a word
_STOP = 60.0  # seconds that the last flush may take


class Interrupted(Exit):
    """SIGINT or SIGTERM came; what is finished is to be written."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(128 + number, f"{name}: stopped; the same command goes on from what is written")


@dataclass
class _Shard:
    """A coordinator and what it has been asked. share: its one of so many; carried: figures of those that died before
    it; deaths: since rows were last committed."""

    index: int
    share: tuple[int, int]
    coordinator: Any = None
    starts: int = 0
    deaths: int = 0
    run: Any = None
    asked: Any = None  # for figures, and since when
    since: float = 0.0
    figures: Counts = field(default_factory=Counts)
    carried: Counts = field(default_factory=Counts)


class Session:
    """`with Session(...)` starts Ray, coordinators, generators and scorers, and ends with all of them gone.

    share: this session's one of so many shards; None: all of runtime.shards, with a coordinator each."""

    def __init__(self, prepared: Prepared, say: Callable[[str], None], share: tuple[int, int] | None = None) -> None:
        self.prepared, self.say = prepared, say
        count = prepared.run.runtime.shards
        self.owned = share or (0, 1)
        self.shards = [_Shard(0, share)] if share else [_Shard(i, (i, count)) for i in range(count)]
        self.first_prompt = ""
        self.signal: int | None = None

    def __enter__(self) -> Session:
        import ray

        from actors import cluster, placement

        connect(self.prepared.run, self.say)
        # Set after ray.init, whose own handler ends the process; only noted, since an exception raised inside Ray's
        # compiled code comes out as SystemError.
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            run = self.prepared.located
            pilot = Place.at(run.output, run.runtime.storage_options) / "compare"
            self.plan = placement.plan(run, machines, len(self.shards), prepare.model_sizes(run), cost.measured(pilot))
            for line in self.plan.lines():
                self.say(line)
            self.bundles = cluster.reserve(self.plan, run.runtime.timeouts.startup)
            self.say(f"loading models, for at most {self.prepared.run.runtime.timeouts.startup:g} s")
            for shard in self.shards:
                self._start(shard)
            for shard in self.shards:
                self._up(shard)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        import ray

        ray.shutdown()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def relabel(self, prepared: Prepared, table: Table, progress: Progress) -> None:
        """Fill one output: take it, describe it, run, and leave it resumable. Raises Exit, ConfigError."""
        from actors.cluster import differing_nodes

        with lease.Lease.take(prepared.output, say=self.say, shard=self.owned).beating() as mine:
            if nodes := differing_nodes(mine):
                raise ConfigError(
                    f"output: {prepared.output} is not the same place on {', '.join(nodes)} as here; give a directory "
                    "that all machines share, or a URI such as s3://bucket/path"
                )
            manifest.write_run(prepared.output, prepared.record())
            self._fill([replace(table, lease=mine, shard=shard.share) for shard in self.shards], progress)

    def trial(self, table: Table, prompts: int) -> tuple[Counts, float, int]:
        """Search the first prompts for real, into a directory that is gone afterwards: figures, seconds, bytes. By the
        first coordinator alone."""
        with tempfile.TemporaryDirectory(prefix="aisp-trial-") as folder:
            output = Place.at(folder)
            few = table.run.prompts.model_copy(update={"limit": min(prompts, table.run.prompts.limit or prompts)})
            run = table.run.model_copy(update={"output": folder, "prompts": few})
            with lease.Lease.take(output).beating() as mine, Progress(output, run, "trial: ") as progress:
                manifest.write_run(output, self.prepared.record())
                self._fill([replace(table, run=run, output=output, lease=mine, shard=(0, 1))], progress)
            assert progress.now is not None
            return progress.now, progress.seconds, sum(file.stat().st_size for file in Path(folder).glob("*/*.parquet"))

    def _fill(self, tables: Sequence[Table], progress: Progress) -> None:
        """Every table by its coordinator. One that dies or freezes is started again from what is written."""
        import ray
        from ray.exceptions import RayActorError

        shards = self.shards[: len(tables)]
        for shard, table in zip(shards, tables, strict=True):
            shard.figures = shard.carried = Counts()
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

    def _look(self, shard: _Shard, table: Table, progress: Progress, limit: float) -> None:
        """Take in a shard's figures if they come within `limit` seconds. Kills a coordinator that does not give them
        for timeouts.stall: it is frozen."""
        if shard.asked is None:
            total = share(progress.counted.value, self.prepared.run.save.rows_per_file, table.shard)
            shard.asked, shard.since = self._ask(shard, total), time.monotonic()
        if self._await([shard.asked], limit):
            asked, shard.asked = shard.asked, None
            now: Counts = self._value(asked)
            if now.committed > shard.figures.committed:
                shard.deaths = 0
            shard.figures = now
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
        """Wait until a coordinator and its actors are there, and say now and then what for; another one where it dies
        or freezes meanwhile."""
        import ray
        from ray.exceptions import RayActorError

        began = time.monotonic()
        while True:
            try:
                if self._await([shard.run], _PATIENCE):
                    self.first_prompt = self._value(shard.run)
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

    def _died(self, shard: _Shard, error: Exception) -> None:
        """Start another. Raises Exit where too many died without a row committed between."""
        shard.deaths += 1
        if shard.deaths > self.prepared.run.runtime.retries:
            raise Exit(1, f"coordinator {shard.index} died {shard.deaths} times; the same command goes on") from error
        self.say("the coordinator died; starting it again from what is written")
        shard.carried += shard.figures.grown()
        shard.figures = Counts()
        self._start(shard)

    def _await(self, refs: list[Any], limit: float) -> bool:
        """Whether all are there within so many seconds. Raises Interrupted."""
        import ray

        deadline = time.monotonic() + limit
        while True:
            if self.signal is not None:
                number, self.signal = self.signal, None  # one signal interrupts one wait: what follows is the way out
                raise Interrupted(number)
            left = max(0.0, min(_POLL, deadline - time.monotonic()))
            if len(ray.wait(refs, num_returns=len(refs), timeout=left)[0]) == len(refs):
                return True
            if time.monotonic() >= deadline:
                return False

    def _value(self, ref: Any) -> Any:
        """What a call that has ended answered. Raises what the coordinator raised as ConfigError or Exit; RayActorError
        where the coordinator is gone."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

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
            raise Exit(1, f"{type(cause).__name__}: {cause}; the same command goes on from what is finished") from error
        except RayError as error:
            raise Exit(1, f"{type(error).__name__}: {error}; the same command goes on") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def _sum(shards: Sequence[_Shard]) -> Counts:
    return sum((shard.carried + shard.figures for shard in shards), Counts())


def connect(run: Run, say: Callable[[str], None]) -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that is large enough for the run's actors."""
    import ray

    # Not in a checkout of ours, installed from it or not: there the folders are the packages.
    hidden = [name for name in ("actors", "jobs") if (Path.cwd() / name).is_dir()]
    if hidden and not Path("aisp_dist", "align.py").is_file() and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        raise ConfigError(
            f"the current directory has a folder {hidden[0]!r}, which Ray's workers would import in place of ours; "
            "start from another directory"
        )
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    about = ray.job_config.JobConfig(metadata={"job_name": f"aisp {Path(run.output).name}", "output": run.output})
    quiet = {"log_to_driver": True, "logging_level": "error", "namespace": f"aisp-{os.getpid()}", "job_config": about}
    if "RAY_ADDRESS" in os.environ:
        _reach(os.environ["RAY_ADDRESS"])
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # then the working directory has our modules
        here = Path(__file__).parent.parent
        modules = [] if in_job else [str(here / name) for name in ("aisp_dist", "actors", "jobs")]
        _init(runtime_env={"py_modules": modules} if modules else None, **quiet)
        say(f"joined the Ray cluster at {os.environ['RAY_ADDRESS']}")
        return
    everything = [run.runtime.generators, *(run.replicas(name) for name in run.rewards)]
    wanted = sum((1 if each.replicas == "auto" else each.replicas) * each.num_cpus for each in everything)
    cpus = max(os.cpu_count() or 1, int(-(-wanted // 1)))  # Ray's CPUs are tokens; on one machine they may be shared
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 starves actors beside any other process
    context = _init(address="local", num_cpus=cpus, include_dashboard=None, **quiet)
    board = f", dashboard at http://{context.dashboard_url}" if context.dashboard_url else ""
    say(f"started a local Ray with {cpus} CPU{board}")


def _init(**options: Any) -> Any:
    """ray.init, of which what goes wrong in starting or joining is one readable line. Raises Exit."""
    import ray

    try:
        return ray.init(**options)
    except Exception as error:
        raise Exit(1, f"Ray did not start, or cannot be joined: {' '.join(str(error).split())[:500]}") from error


def _reach(address: str) -> None:
    """Raise ConfigError where nobody listens at host:port; Ray itself would try for minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto`, or what Ray will explain
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS: nobody answers at {address} ({error}); start the cluster, or unset it for a local one"
        ) from None
