"""What align and compare share: from a checked configuration to running actors, and an output filled while a human
watches. Everything that can be refused is refused before anything is written."""

from __future__ import annotations

import itertools
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from aisp_dist import checkpoints, fingerprint, lease, manifest, prompts, schema
from aisp_dist.config import ConfigError, ModelReward, Run
from jobs.cli import Exit

_SAMPLE = 1000  # input lines that decide the types of kept columns


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check that needs no model. `located`: with paths that other processes can open."""

    run: Run
    located: Run
    base_dir: Path
    output: Path
    components: dict[str, Any]
    columns: dict[str, schema.ColumnType]

    @property
    def fingerprint(self) -> str:
        return fingerprint.fingerprint(self.components)

    def record(self) -> dict[str, Any]:
        """run.json. No environment variables: they hold secrets."""
        return {
            "config": self.run.model_dump(mode="json", by_alias=True),
            "fingerprint": self.fingerprint,
            "run_id": self.fingerprint[:12],
            "components": self.components,
            "rows_per_file": self.run.save.rows_per_file,
            "columns": self.columns,
            "base_dir": str(self.base_dir),
            "directory": str(Path.cwd()),
            "command": sys.argv,
            "same_rows": self._same_rows(),
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
            "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "platform": platform.platform()},
        }

    def _same_rows(self) -> str:
        if all(isinstance(reward, ModelReward) for reward in self.run.rewards.values()):
            return "bit for bit on the same kind of hardware and software"
        return "bit for bit on the same kind of hardware and software, as far as the function rewards are deterministic"


_PACKAGES = ("aisp-dist", "ray", "torch", "transformers", "datasets", "pyarrow", "tokenizers")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check(run: Run, base_dir: Path) -> Run:
    """The checks that need neither torch nor a cluster; answers the located run. Raises ConfigError."""
    check_output(run)
    located = fingerprint.locate(run, base_dir)
    schema.schemas("chat", dict.fromkeys(run.prompts.keep, "string"))
    next(prompts.read(located.prompts), None)
    return located


def check_output(run: Run) -> None:
    """Raise ConfigError for an output that cannot be written, or that a Ray job would lose."""
    output = Path(run.output)
    if not output.is_absolute() and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ConfigError(
            f"output: {run.output!r} is relative, and a Ray job runs in a temporary copy that is deleted; "
            "give an absolute path, as in --output /data/run1"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output: {run.output!r} is a file; give a directory")
    parent = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"output: {str(parent)!r} is not writable; give a directory that is")


def prepare(run: Run, base_dir: Path) -> Prepared:
    """Check, pin what `null` revisions stand for (as the output pinned them before, if it exists), and fingerprint.

    Raises ConfigError, for an output of another fingerprint or a live owner too.
    """
    check_output(run)
    output = Path(run.output).absolute()
    before = manifest.read_run(output)
    run = _pin(run, before["config"] if before else {})
    located = check(run, base_dir)
    if before:
        columns = before["columns"]
    else:
        columns = schema.column_types(run.prompts.keep, itertools.islice(prompts.read(located.prompts), _SAMPLE))
    prepared = Prepared(run, located, base_dir, output, fingerprint.components(run, located, base_dir), columns)
    if before:
        manifest.check_resume(before, prepared.record())
    owner = lease.read_owner(output)
    if owner is not None and owner.alive():
        raise ConfigError(f"output: {output} is owned by a live run ({owner}); wait for it, or stop it")
    return prepared


def _pin(run: Run, before: dict[str, Any]) -> Run:
    """The run with the revision of every hub model that has none: what the output used before, else today's commit."""

    def pinned(key: str, role: checkpoints.Role, model: Any, old: dict[str, Any]) -> Any:
        place = checkpoints.locate(f"{key}.model", model.model, role)
        if model.revision is not None or Path(place).is_dir():
            return model
        known = old.get("revision") if old.get("model") == model.model else None
        return model.model_copy(update={"revision": known or checkpoints.commit(f"{key}.model", place, None)})

    rewards = {
        name: pinned(f"rewards.{name}", "reward", reward, before.get("rewards", {}).get(name, {}))
        if isinstance(reward, ModelReward)
        else reward
        for name, reward in run.rewards.items()
    }
    generator = pinned("generator", "generator", run.generator, before.get("generator", {}))
    return run.model_copy(update={"generator": generator, "rewards": rewards})


class Session:
    """A cluster with this run's coordinator on it. `with Session(...)` ends with the actors gone."""

    def __init__(self, prepared: Prepared, say: Callable[[str], None]) -> None:
        self.prepared, self.say = prepared, say
        self.coordinator: Any = None
        self.starts = 0

    def __enter__(self) -> Session:
        import ray

        from actors import placement

        connect(self.prepared.run, self.say)
        self.groups = placement.plan(self.prepared.run, ray.cluster_resources())
        for group in self.groups:
            self.say(
                f"{group.role}: {group.replicas} actor{'s' * (group.replicas > 1)} with {group.num_cpus:g} CPU, "
                f"{group.num_gpus:g} GPU each"
            )
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        import ray

        ray.shutdown()

    def start(self) -> None:
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
        self.wait(self.coordinator.load.remote())

    def wait(self, ref: Any, tick: Callable[[], None] = lambda: None, every: float = 1.0) -> Any:
        """The value of a call on the coordinator, calling `tick` meanwhile. What the coordinator raised becomes
        ConfigError or Exit; a coordinator that died is ActorDiedError."""
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        from actors.coordinator import Stopped, TooManyFailed

        while True:
            try:
                return ray.get(ref, timeout=every)
            except GetTimeoutError:
                tick()
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ConfigError):
                    raise ConfigError(str(cause)) from None
                if isinstance(cause, TooManyFailed):
                    raise Exit(3, str(cause)) from None
                if isinstance(cause, Stopped):
                    raise KeyboardInterrupt from None
                raise Exit(1, f"{type(cause).__name__}: {cause}; the same command goes on from what is finished") from error

    def first_prompt(self) -> str:
        return str(self.wait(self.coordinator.first_prompt.remote()))

    def relabel(self, prepared: Prepared, retry_failed: bool, tick: Callable[[dict[str, Any]], None]) -> None:
        """Fill one output: take it, describe it, run, and on the way out leave it resumable."""
        import ray
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        from actors.coordinator import Table

        with terminating(), lease.Lease.take(prepared.output, say=self.say).beating() as mine:
            manifest.write_run(prepared.output, prepared.record())
            table = Table(
                prepared.located, prepared.output, prepared.columns, prepared.fingerprint,
                prepared.run.generator.model, mine, retry_failed,
            )
            for attempt in itertools.count():
                try:
                    self.wait(self.coordinator.relabel.remote(table), lambda: tick(self.progress()))
                    tick(self.progress())
                    return
                except (KeyboardInterrupt, Terminated):
                    self.say("stopping: writing what is finished; the same command goes on from there")
                    ray.get(self.coordinator.stop.remote(), timeout=60)
                    raise
                except (ActorDiedError, ActorUnavailableError) as error:
                    if attempt == prepared.run.runtime.retries:
                        raise Exit(1, f"the coordinator died {attempt + 1} times; the same command resumes") from error
                    self.say("the coordinator died; starting it again from what is written")
                    self.start()

    def progress(self) -> dict[str, Any]:
        import ray

        now: dict[str, Any] = ray.get(self.coordinator.progress.remote(), timeout=60)
        return now


def connect(run: Run, say: Callable[[str], None]) -> None:
    """Join the cluster at RAY_ADDRESS, or start a local one that is large enough for the run's actors."""
    import ray

    quiet = {"log_to_driver": True, "logging_level": "error", "namespace": f"aisp-{os.getpid()}"}
    if "RAY_ADDRESS" in os.environ:
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


class Terminated(BaseException):
    """SIGTERM: write what is finished, then leave with exit code 143."""


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread while this is open."""

    def raise_(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_)  # after ray.init, whose own handler would end the process
    try:
        yield
    except Terminated:
        raise Exit(143, "terminated; the same command goes on from what is finished") from None
    finally:
        signal.signal(signal.SIGTERM, before)
