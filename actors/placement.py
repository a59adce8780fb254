"""From the configuration and the cluster's resources to actors. Pure: a dictionary in, a plan or a readable shortfall
out, so that nothing ever waits for a machine that will not come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aisp_dist.config import ConfigError, ModelReward, Replicas, Run


@dataclass(frozen=True, slots=True)
class Group:
    """Equal actors: `role` is generator or a reward's name; resources are for one actor. needed: so many must be there
    for the run to begin."""

    role: str
    replicas: int
    needed: int
    num_cpus: float
    num_gpus: float
    accelerator: str | None

    @property
    def threads(self) -> int:
        """CPU threads of the actor's torch. Resources must not change rows, and the engine's bits are equal for one and
        two threads but were seen to differ for more: a generator has at most two, a scorer one."""
        return 2 if self.role == "generator" and self.num_cpus >= 2 else 1


def plan(
    run: Run,
    resources: Mapping[str, float],
    coordinators: int = 1,
    machines: Sequence[Mapping[str, float]] = (),
) -> tuple[Group, ...]:
    """The actors of a run, generators first. `resources`: ray.cluster_resources(); `machines`: those
    of each machine, if known.

    Raises ConfigError naming what is short, by how much, and which key to change.
    """
    groups = [_group("generator", run.runtime.generators, True, resources)]
    for name, reward in run.rewards.items():
        groups.append(_group(name, run.replicas(name), isinstance(reward, ModelReward), resources))
    for group in groups:
        if group.needed < coordinators:
            raise ConfigError(
                f"runtime.shards: {coordinators} coordinators, and {group.role} has {group.needed} replicas; each "
                "coordinator needs one of its own: raise replicas, or lower shards"
            )
    for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        wanted = sum(g.needed * getattr(g, key) for g in groups)
        if wanted > resources.get(kind, 0) + 1e-9:
            parts = ", ".join(f"{g.role} {g.needed} x {getattr(g, key):g}" for g in groups if getattr(g, key))
            raise ConfigError(
                f"runtime: the actors need {wanted:g} {kind} ({parts}) and the cluster has {resources.get(kind, 0):g}; "
                f"lower replicas, at_least or {key}, or add machines"
            )
    for g in groups:
        fits = (m.get("CPU", 0) >= g.num_cpus and m.get("GPU", 0) >= g.num_gpus for m in machines)
        if machines and not any(fits):
            raise ConfigError(
                f"runtime, {g.role}: one actor takes {g.num_cpus:g} CPU and {g.num_gpus:g} GPU, and no machine of the "
                "cluster has both; lower num_cpus or num_gpus, or add a larger machine"
            )
    return tuple(groups)


def _group(role: str, wanted: Replicas, model: bool, resources: Mapping[str, float]) -> Group:
    if wanted.accelerator and f"accelerator_type:{wanted.accelerator}" not in resources:
        there = sorted(r.removeprefix("accelerator_type:") for r in resources if r.startswith("accelerator_type:"))
        raise ConfigError(
            f"runtime, {role}: accelerator {wanted.accelerator!r} is on no machine of the cluster "
            f"(there: {', '.join(there) or 'none'}); name one that is, or leave it null"
        )
    auto = 1.0 if model and resources.get("GPU", 0) > 0 else 0.0
    num_gpus = auto if wanted.num_gpus == "auto" else float(wanted.num_gpus)
    if num_gpus > 1 and num_gpus != int(num_gpus):
        raise ConfigError(f"runtime, {role}: num_gpus is {num_gpus:g}; above 1 it must be whole")
    return Group(role, wanted.replicas, wanted.needed, wanted.num_cpus, num_gpus, wanted.accelerator)
