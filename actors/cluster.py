"""Where plain classes become Ray actors: names, resources, start, restart, and which errors are faults of a machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.fleet import Fault, cause
from actors.generator import Generator
from actors.pool import Pool
from actors.scorer import Scorer
from aisp_dist.align import reason
from aisp_dist.config import ConfigError, Run
from aisp_dist.output.lease import Lease
from aisp_dist.placement import Group, Plan, Seat
from aisp_dist.rewards import http
from aisp_dist.rewards.client import Unavailable

log = logging.getLogger("aisp")


def is_fault(error: BaseException) -> bool:
    """True for a process or node that went away; False for an exception that the method raised itself."""
    if isinstance(error, RayTaskError):
        if type(error.cause).__name__ == "OutOfMemoryError":  # torch's, of a GPU; torch is not loaded here
            return True
        return isinstance(error.cause, (RayActorError, WorkerCrashedError, MemoryError))
    return isinstance(error, RayError)


def differing_nodes(lease: Lease, timeout: float = 30.0) -> list[str]:
    """Machines of the cluster that do not find this lease in the output: theirs is another directory. One that does not
    answer, or goes away, is not named: its actors will not come up either."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if lease.place.remote or len(nodes) < 2:
        return []
    look = ray.remote(num_cpus=0, max_retries=0)(Lease.held)
    looks = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(lease): node
        for node in nodes
    }
    seen, _ = ray.wait(list(looks), num_returns=len(looks), timeout=timeout)
    found = []
    for ref in seen:
        with suppress(RayError):
            found += [] if ray.get(ref) else [looks[ref]["NodeManagerHostname"]]
    return sorted(found)


class RayReplica:
    """One actor by its lasting name; a restart replaces the process under it."""

    def __init__(
        self,
        name: str,
        cls: type,
        args: tuple[Any, ...],
        group: Group,
        startup: float,
        mask_gpus: bool,
        bundle: PlacementGroupSchedulingStrategy | None = None,
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
        if bundle is not None:
            self.options["scheduling_strategy"] = bundle
        if mask_gpus and not group.num_gpus:  # else it would inherit every GPU of its machine
            self.options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        self.starts = 0
        self.handle: Any = None
        self.loaded: Any = None  # what load() answered
        self.waits = False  # the process is well, and the server behind it does not answer: load() is asked again

    async def restart(self, why: str) -> None:
        """A process where there was none, or another. Raises Fault after `startup` s, and ConfigError from load() of a
        first one: what a process could use before is no matter of the configuration (memory that a dead engine has not
        given back, say)."""
        if not self.waits:
            if self.handle is not None:
                ray.kill(self.handle)
            name = self.name if not self.starts else f"{self.name}-restart-{self.starts}"
            self.starts += 1
            self.handle = ray.remote(self.cls).options(name=name, **self.options).remote(*self.args)
        self.waits = False
        try:
            self.loaded = await asyncio.wait_for(self.call("load"), self.startup)
        except RayTaskError as error:  # first: one whose cause is a TimeoutError is a TimeoutError too
            if isinstance(error.cause, ConfigError) and not why:
                raise ConfigError(str(error.cause)) from None
            self.waits = isinstance(error.cause, Unavailable)
            raise Fault(f"{self.name} cannot load: {reason(cause(error))}") from error
        except TimeoutError:
            raise Fault(
                f"{self.name} did not start within runtime.timeouts.startup = {self.startup:g} s; "
                "see its log in the Ray dashboard, or raise the value"
            ) from None
        except RayError as error:
            raise Fault(f"{self.name} died while it started: {str(error).splitlines()[0]}") from None
        if why:
            log.warning("%s: a fresh process is up (start %d)", self.name, self.starts)

    async def call(self, method: str, *args: Any) -> Any:
        ref = getattr(self.handle, method).remote(*args)
        try:
            return await ref
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise

    async def health(self) -> Mapping[str, float]:
        ref = self.handle.health.options(enable_task_events=False).remote()  # too many for the dashboard's table
        counts: Mapping[str, float] = await ref
        return counts


Bundles = Mapping[Seat, PlacementGroupSchedulingStrategy]


def reserve(plan: Plan, patience: float) -> Bundles:
    """A bundle for each GPU that actors share, so that Ray puts them together as planned. Raises ConfigError where the
    cluster does not give them within `patience` seconds."""
    if not plan.shared:
        return {}
    groups = {group.role: group for group in plan.groups}
    wanted = []
    for gpu in plan.shared:
        here = [groups[role] for (role, _), _ in gpu.seats]
        bundle = {"GPU": round(sum(share for _, share in gpu.seats), 4), "CPU": sum(group.num_cpus for group in here)}
        for group in here:
            if group.accelerator:  # what Ray asks for where an actor names its accelerator
                kind = f"accelerator_type:{group.accelerator}"
                bundle[kind] = round(bundle.get(kind, 0) + 0.001, 4)
        wanted.append({name: amount for name, amount in bundle.items() if amount})
    made = placement_group(wanted, strategy="PACK")
    if not made.wait(patience):
        raise ConfigError(
            f"runtime: the cluster did not free {len(wanted)} GPUs to share within runtime.timeouts.startup = "
            f"{patience:g} s; other jobs hold them: wait for those, or lower replicas"
        )
    return {
        seat: PlacementGroupSchedulingStrategy(made, place)
        for place, gpu in enumerate(plan.shared)
        for seat, _ in gpu.seats
    }


async def start_pools(
    run: Run,
    groups: Sequence[Group],
    base_dir: Path,
    window: int,
    shard: tuple[int, int] = (0, 1),
    suffix: str = "",
    bundles: Bundles | None = None,
) -> tuple[Mapping[str, Pool], int | None]:
    """Start one coordinator's share of the run's replicas side by side.

    Returns a pool for each role, and the base model's context length. suffix: of the actors' names, for another try
    beside actors that are not gone yet. bundles: of actors that share a GPU.
    """
    timeouts = run.runtime.timeouts
    mask = ray.cluster_resources().get("GPU", 0) > 0
    pools: dict[str, Pool] = {}
    needed: dict[str, int] = {}
    for group in groups:
        replicas = []
        for i in range(shard[0], group.replicas, shard[1]):
            if group.role == "generator":
                name, cls = f"generator-{i}{suffix}", cast(type, Generator)
                args: tuple[Any, ...] = (run, base_dir, name, group)
            else:
                name, cls = f"scorer-{group.role}-{i}{suffix}", Scorer
                args = (group.role, run.rewards[group.role], base_dir, run.prompts.keep, name, group, timeouts.reward)
            bundle = (bundles or {}).get((group.role, i))
            replicas.append(RayReplica(name, cls, args, group, timeouts.startup, mask, bundle))
        decodes = group.role == "generator"
        asks = not decodes and run.rewards[group.role].kind == "http"
        limit = timeouts.reward * (http.LIMITS if asks else 1)
        pools[group.role] = Pool(
            replicas,
            max_calls=2 * window if decodes else 1,  # a scorer's timeout must be of its own request alone
            timeout=None if decodes else limit,  # a generator counts from the admission of rows, by itself
            outage=timeouts.round if decodes else timeouts.reward,
            key=f"runtime.timeouts.{'round' if decodes else 'reward'}",
            retries=run.runtime.retries,
            is_fault=is_fault,
            stall=timeouts.stall if decodes else timeouts.stall + limit,  # it answers after its request
            patience=timeouts.startup,
        )
        needed[group.role] = len(range(shard[0], group.needed, shard[1])) or 1
    await asyncio.gather(*(pool.fleet.ready(needed[role]) for role, pool in pools.items()))
    up = next(slot for slot in pools["generator"].fleet.slots if slot.up)
    return pools, cast(RayReplica, up.replica).loaded
