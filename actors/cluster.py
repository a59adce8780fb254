"""Where plain classes become Ray actors: names, resources, start, restart, and which errors are faults of a machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError

from actors.generator import Generator
from actors.placement import Group
from actors.pool import Fault, Pool
from actors.scorer import Scorer
from aisp_dist.config import ConfigError, Run

log = logging.getLogger("aisp")


def is_fault(error: BaseException) -> bool:
    """True for a process or node that went away; False for an exception that the method raised itself."""
    if isinstance(error, RayTaskError):
        return isinstance(error.cause, (RayActorError, WorkerCrashedError, MemoryError))
    return isinstance(error, RayError)


class RayReplica:
    """One actor by its lasting name; a restart replaces the process under it."""

    def __init__(
        self, name: str, cls: type, args: tuple[Any, ...], group: Group, startup: float, mask_gpus: bool
    ) -> None:
        self.name, self.cls, self.args, self.startup = name, cls, args, startup
        self.options: dict[str, Any] = {
            "num_cpus": group.num_cpus,
            "num_gpus": group.num_gpus,
            "max_restarts": 0,
            "max_concurrency": 1000 if cls is Generator else 1,
        }
        if group.accelerator:
            self.options["accelerator_type"] = group.accelerator
        if mask_gpus and not group.num_gpus:  # else it would inherit every GPU of its machine
            self.options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        self.starts = 0
        self.handle: Any = None

    async def start(self) -> Any:
        """Create the process and await its load(). Raises ConfigError from the load, Fault after `startup` seconds."""
        name = self.name if not self.starts else f"{self.name}-restart-{self.starts}"
        self.starts += 1
        self.handle = ray.remote(self.cls).options(name=name, **self.options).remote(*self.args)
        try:
            return await asyncio.wait_for(self.call("load"), self.startup)
        except TimeoutError:
            raise Fault(
                f"{self.name} did not start within runtime.timeouts.startup = {self.startup:g} s; "
                "see its log in the Ray dashboard, or raise the value"
            ) from None
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise ConfigError(str(error.cause)) from None
            raise
        except RayError as error:
            raise Fault(f"{self.name} died while it started: {str(error).splitlines()[0]}") from None

    async def call(self, method: str, *args: Any) -> Any:
        ref = getattr(self.handle, method).remote(*args)
        try:
            return await ref
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise

    async def restart(self, reason: str) -> None:
        self.stop()
        await self.start()
        log.warning("%s: a fresh process is up (start %d)", self.name, self.starts)

    def stop(self) -> None:
        if self.handle is not None:
            ray.kill(self.handle)


async def start_pools(
    run: Run, groups: Sequence[Group], base_dir: Path, window: int, suffix: str = ""
) -> tuple[Mapping[str, Pool], int | None]:
    """All replicas of a run, started side by side, as a pool for each role; and the base model's context length.
    suffix: of the actors' names, for another try beside actors that are not gone yet."""
    timeouts = run.runtime.timeouts
    mask = ray.cluster_resources().get("GPU", 0) > 0
    replicas: dict[str, list[RayReplica]] = {}
    for group in groups:
        for i in range(group.replicas):
            if group.role == "generator":
                name, cls = f"generator-{i}{suffix}", cast(type, Generator)
                args: tuple[Any, ...] = (run.generator, name, group.threads)
            else:
                name, cls = f"scorer-{group.role}-{i}{suffix}", Scorer
                args = (group.role, run.rewards[group.role], base_dir, run.prompts.keep, name, group.threads)
            replica = RayReplica(name, cls, args, group, timeouts.startup, mask)
            replicas.setdefault(group.role, []).append(replica)
    started = await asyncio.gather(*(r.start() for rs in replicas.values() for r in rs))
    pools = {
        role: Pool(
            members,
            limit=2 * window if role == "generator" else 1,
            timeout=timeouts.round if role == "generator" else timeouts.reward,
            retries=run.runtime.retries,
            is_fault=is_fault,
            timeout_is_content=role != "generator",
        )
        for role, members in replicas.items()
    }
    return pools, started[0]
