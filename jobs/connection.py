"""The Ray cluster that a command runs on: joined at RAY_ADDRESS, or started for the command. Owns how it is reached and
whether it is still there; knows nothing of runs in it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from aisp_dist.config import ConfigError, Run
from jobs import tokens
from jobs.cli import Exit

_LOOK = 2.0  # seconds between looks at the cluster
_STUCK = 60.0  # seconds after which a command that waits inside Ray for a lost cluster is ended
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"


class ClusterLost(Exit):
    """The cluster has no machine any more, or cannot be reached."""

    def __init__(self, why: str) -> None:
        super().__init__(1, f"the Ray cluster is lost: {why}; the same command resumes from what is written")
        self.why = f"the Ray cluster is lost: {why}"


class Connection:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine that is large enough for the run's actors
    (`own`), and watches it from a thread. Raises Exit and ConfigError.

    A cluster of our own is lost as soon as its GCS or raylet has ended. Any cluster is lost when for timeouts.stall
    seconds its GCS has shown no living machine: until then a restarted GCS or another machine may take over.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self.own, self.stall = "RAY_ADDRESS" not in os.environ, run.runtime.timeouts.stall
        # Ray would end this process by itself after 60 s without a GCS, also for a cluster that is left behind.
        os.environ.setdefault(_RECONNECT, str(10**8 if self.own else int(self.stall + _STUCK)))
        _connect(run, say)
        children = psutil.Process().children() if self.own else []
        self.servers = {p.name(): p for p in children if p.name() in ("gcs_server", "raylet") and _lives(p)}
        self.seen = self.checked = time.monotonic()
        self.over = threading.Event()
        for loop in (self._look, self._guard):
            threading.Thread(target=loop, name="cluster", daemon=True).start()

    def check(self) -> None:
        """Raises ClusterLost."""
        self.checked = time.monotonic()
        if why := self._lost():
            raise ClusterLost(why)

    def close(self) -> None:
        import ray

        self.over.set()
        ray.shutdown()

    def _lost(self) -> str | None:
        if ended := [name for name, process in self.servers.items() if not _lives(process)]:
            return f"its {' and '.join(ended)} ended"
        if time.monotonic() - self.seen > self.stall:
            return f"it has shown no living machine for runtime.timeouts.stall = {self.stall:g} s"
        return None

    def _look(self) -> None:
        import ray

        while not self.over.wait(_LOOK):
            with suppress(Exception):
                if any(node["Alive"] for node in ray.nodes()):  # does not return while there is no GCS
                    self.seen = time.monotonic()

    def _guard(self) -> None:
        """End the process where the cluster is lost and the command waits inside Ray, which may never return."""
        while not self.over.wait(_LOOK):
            if time.monotonic() - self.checked > _STUCK and (why := self._lost()):
                print(f"aisp: {ClusterLost(why)}", file=sys.stderr, flush=True)
                os._exit(1)


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _connect(run: Run, say: Callable[[str], None]) -> None:
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
    quiet = {"log_to_driver": True, "logging_level": "error", "namespace": f"aisp-{uuid4().hex}", "job_config": about}
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
    tokens.for_own_cluster(say)
    context = _init(address="local", num_cpus=cpus, include_dashboard=None, **quiet)
    board = f", dashboard at http://{context.dashboard_url}" if context.dashboard_url else ""
    say(f"started a local Ray with {cpus} CPU{board}")


def _init(**options: Any) -> Any:
    """ray.init; raises Exit with one readable line where it fails."""
    import ray

    try:
        return ray.init(**options)
    except Exception as error:
        if isinstance(error, ConnectionError) and "RAY_ADDRESS" in os.environ:  # somebody answers: _reach
            raise Exit(1, tokens.why_not_joined(os.environ["RAY_ADDRESS"])) from error
        raise Exit(1, f"Ray did not start, or cannot be joined: {' '.join(str(error).split())[:500]}") from error


def _reach(address: str) -> None:
    """Raise ConfigError where nobody listens at host:port, since Ray would try for minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # such as `auto`: Ray will explain
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"RAY_ADDRESS: nobody answers at {address} ({error}); start the cluster, or unset it for a local one"
        ) from None
