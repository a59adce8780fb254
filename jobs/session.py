"""A cluster with this run's actors on it, and an output filled while a human watches."""

from __future__ import annotations

import itertools
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from actors.coordinator import Table
from aisp_dist import lease, manifest
from aisp_dist.config import ConfigError, Run
from jobs.cli import Exit
from jobs.prepare import Prepared

_POLL = 0.5  # seconds between looks at the run, and at whether somebody wants it to stop
_STOP = 60.0  # seconds that the last flush may take


class Interrupted(Exit):
    """SIGINT or SIGTERM came; what is finished is to be written."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(128 + number, f"{name}: stopped; the same command goes on from what is written")


class Session:
    """`with Session(...)` starts Ray, coordinator, generators and scorers, and ends with all of them gone."""

    def __init__(self, prepared: Prepared, say: Callable[[str], None]) -> None:
        self.prepared, self.say = prepared, say
        self.coordinator: Any = None
        self.starts = 0
        self.signal: int | None = None

    def __enter__(self) -> Session:
        import ray

        from actors import placement

        connect(self.prepared.run, self.say)
        # Set after ray.init, whose own handler ends the process; only noted, since an exception raised inside Ray's
        # compiled code comes out as SystemError.
        self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.groups = placement.plan(self.prepared.run, ray.cluster_resources())
            for g in self.groups:
                many = f"{g.replicas} actor{'s' * (g.replicas > 1)}"
                self.say(f"{g.role}: {many} with {g.num_cpus:g} CPU, {g.num_gpus:g} GPU each")
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        import ray

        ray.shutdown()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def first_prompt(self) -> str:
        return str(self._wait(self.coordinator.first_prompt.remote()))

    def progress(self) -> dict[str, Any]:
        """The coordinator's counts now."""
        now: dict[str, Any] = self._wait(self.coordinator.progress.remote(), limit=_STOP)
        return now

    def relabel(self, prepared: Prepared, table: Table, tick: Callable[[dict[str, Any]], None]) -> None:
        """Fill one output: take it, describe it, run, and leave it resumable. Raises Exit, ConfigError."""
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        with lease.Lease.take(prepared.output, say=self.say).beating() as mine:
            manifest.write_run(prepared.output, prepared.record())
            owned = replace(table, lease=mine)
            for attempt in itertools.count():
                try:
                    self._wait(self.coordinator.relabel.remote(owned), lambda: tick(self.progress()))
                    tick(self.progress())
                    return
                except Interrupted:
                    self.say("stopping: writing what is finished")
                    try:
                        self._wait(self.coordinator.stop.remote(), limit=_STOP)
                    except (Exit, ActorDiedError, TimeoutError):
                        self.say("left at once: what was finished since the last flush is computed again")
                    raise
                except (ActorDiedError, ActorUnavailableError) as error:
                    if attempt == prepared.run.runtime.retries:
                        raise Exit(1, f"the coordinator died {attempt + 1} times; the same command resumes") from error
                    self.say("the coordinator died; starting it again from what is written")
                    self._start()

    def _start(self) -> None:
        """Start the coordinator and, through it, generators and scorers. Raises ConfigError, Exit."""
        import ray

        from actors.cluster import start_pools
        from actors.coordinator import Coordinator, window

        run = self.prepared.located
        again = f"-again-{self.starts}" if self.starts else ""  # names of the dead are free only after a while
        self.starts += 1
        pools = partial(start_pools, run, self.groups, self.prepared.base_dir, window(run), again)
        actor = ray.remote(Coordinator).options(name=f"coordinator{again}", num_cpus=0, max_concurrency=100)
        self.coordinator = actor.remote(run, pools)
        self._wait(self.coordinator.load.remote())

    def _wait(self, ref: Any, tick: Callable[[], None] = lambda: None, limit: float = math.inf) -> Any:
        """The value of a call on the coordinator, with `tick` called meanwhile. What the coordinator raised becomes
        ConfigError or Exit. Raises Interrupted; ActorDiedError where the coordinator is gone; TimeoutError after
        `limit` seconds."""
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        from actors.coordinator import TooManyFailed

        deadline = time.monotonic() + limit
        while self.signal is None:
            try:
                return ray.get(ref, timeout=_POLL)
            except GetTimeoutError:
                tick()
                if time.monotonic() > deadline:
                    raise
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ConfigError):
                    raise ConfigError(str(cause)) from None
                if isinstance(cause, TooManyFailed):
                    raise Exit(3, str(cause)) from None
                raise Exit(
                    1, f"{type(cause).__name__}: {cause}; the same command goes on from what is finished"
                ) from error
        number, self.signal = self.signal, None  # one signal interrupts one wait: what follows is the way out
        raise Interrupted(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def connect(run: Run, say: Callable[[str], None]) -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that is large enough for the run's actors."""
    import ray

    hidden = [name for name in ("actors", "jobs") if (Path.cwd() / name).is_dir()]
    if hidden and Path.cwd() != Path(__file__).parent.parent and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        raise ConfigError(
            f"the current directory has a folder {hidden[0]!r}, which Ray's workers would import in place of ours; "
            "start from another directory"
        )
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    quiet = {"log_to_driver": True, "logging_level": "error", "namespace": f"aisp-{os.getpid()}"}
    if "RAY_ADDRESS" in os.environ:
        _reach(os.environ["RAY_ADDRESS"])
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # then the working directory has our modules
        here = Path(__file__).parent.parent
        modules = [] if in_job else [str(here / name) for name in ("aisp_dist", "actors", "jobs")]
        ray.init(runtime_env={"py_modules": modules} if modules else None, **quiet)
        say(f"joined the Ray cluster at {os.environ['RAY_ADDRESS']}")
        return
    wanted = run.runtime.generators.replicas * run.runtime.generators.num_cpus
    wanted += sum(run.replicas(name).replicas * run.replicas(name).num_cpus for name in run.rewards)
    cpus = max(os.cpu_count() or 1, int(-(-wanted // 1)))  # Ray's CPUs are tokens; on one machine they may be shared
    context = ray.init(address="local", num_cpus=cpus, include_dashboard=None, **quiet)
    board = f", dashboard at http://{context.dashboard_url}" if context.dashboard_url else ""
    say(f"started a local Ray with {cpus} CPU{board}")


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
