"""From the configuration and the cluster's machines to a plan of actors. Pure: resources in, a plan or a readable
shortfall out, so that no actor waits for a machine that will not come.

    replicas, num_gpus (numbers or auto) + machines --> fractions --> packed GPU by GPU --> Plan, or ConfigError

A plan packs every actor onto one machine and every fraction onto one GPU; a model that is split over GPUs takes whole
ones of one machine. Fractions that share a GPU are started
together in one bundle (cluster.py), because Ray by itself may spread 0.6 + 0.4 + 0.6 + 0.4 so that the last one waits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from aisp_dist.config import ConfigError, ModelReward, Replicas, Run

GENERATOR = "generator"
Resources = Mapping[str, float]  # of one machine, as Ray names them: CPU, GPU, accelerator_type:L4
_TINY = 1e-6
_LEAST = 0.05  # of a GPU; a smaller share would hold no model worth one
_MOST = 1 << 16  # replicas of a role
_TRIES = 2000  # placements that the search for a packing may try


@dataclass(frozen=True, slots=True)
class Group:
    """Equal actors: `role` is generator or a reward's name; resources are those of one actor. needed: the run begins
    when so many are up. memory: the share of its GPU's or, without one, its machine's memory that one actor may use."""

    role: str
    replicas: int
    needed: int
    num_cpus: float
    num_gpus: float
    accelerator: str | None
    memory: float = 1.0

    @property
    def threads(self) -> int:
        """CPU threads of the actor's torch. Resources must not change rows, and the engine's bits are equal for one and
        two threads but were seen to differ for more: a generator has at most two, a scorer one."""
        return 2 if self.role == GENERATOR and self.num_cpus >= 2 else 1


Seat = tuple[str, int]  # role and number of one actor
_Place = tuple[float, float, int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that fractions share: the actors on it, with their shares."""

    machine: int
    index: int
    seats: tuple[tuple[Seat, float], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """groups: generators first. shared: the GPUs that hold fractions. idle: GPUs without an actor. notes: what a user
    should know before anything loads."""

    groups: tuple[Group, ...]
    shared: tuple[Gpu, ...] = ()
    idle: int = 0
    notes: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """The plan for a reader, before anything loads."""
        for g in self.groups:
            role = g.role if g.role == GENERATOR else f"scorer-{g.role}"
            each = f"{g.num_cpus:g} CPU, {g.num_gpus:g} GPU each"
            yield f"{role}: {g.replicas} actor{'s' * (g.replicas > 1)} with {each}"
        for gpu in self.shared:
            shares = ", ".join(f"{role}-{i} {share:.0%}" for (role, i), share in gpu.seats)
            yield f"machine {gpu.machine}, GPU {gpu.index}: {shares}"
        yield from self.notes


@dataclass(frozen=True, slots=True)
class _Actor:
    seat: Seat
    num_cpus: float
    num_gpus: float
    accelerator: str | None
    alone: bool  # no other replica of its role shares its GPU: two of one model would only halve each other


def plan(
    run: Run,
    machines: Sequence[Resources],
    coordinators: int = 1,
    sizes: Mapping[str, int] | None = None,
    busy: Mapping[str, float] | None = None,
) -> Plan:
    """The actors of a run.

    machines: the resources of each machine. sizes: bytes of each role's weights where known; a model of unknown size
    counts as the largest. busy: seconds that one replica of each role works for a sample, as a pilot measured them;
    `replicas: auto` follows their ratio.

    Raises ConfigError that names what is short, by how much, and which key to change.
    """
    wanted = {GENERATOR: run.runtime.generators, **{name: run.replicas(name) for name in run.rewards}}
    models = {name for name, reward in run.rewards.items() if isinstance(reward, ModelReward)}
    models |= set() if run.generator.endpoint else {GENERATOR}
    notes = []
    autoscaling = run.runtime.autoscaling
    for role, asked in wanted.items():
        _check(role, asked, machines, coordinators, autoscaling)
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    shares = {role: 1.0 if role in models and (gpus or autoscaling) else 0.0 for role in wanted}
    shares |= {role: float(asked.num_gpus) for role, asked in wanted.items() if asked.num_gpus != "auto"}
    if split := run.generator.gpus > 1 and shares[GENERATOR] > 0:
        shares[GENERATOR] = float(run.generator.gpus)
    if autoscaling:
        groups = [_group(role, asked, _count(asked), shares[role]) for role, asked in wanted.items()]
        notes.append(
            "machines may still join (runtime.autoscaling): actors wait for them, for at most timeouts.startup"
        )
        return Plan(tuple(groups), notes=tuple(notes))
    if run.generator.endpoint and wanted[GENERATOR].replicas == "auto":  # max_parallel says how much is asked
        wanted[GENERATOR] = wanted[GENERATOR].model_copy(update={"replicas": 1})
    auto = [role for role, asked in wanted.items() if asked.num_gpus == "auto" and role in models] if gpus else []
    if split and gpus:
        auto.remove(GENERATOR)
    counts = {role: _count(asked) for role, asked in wanted.items()}
    seats = _share(wanted, counts, shares, auto, machines, sizes or {})
    if seats is None:
        raise ConfigError(_shortfall(wanted, counts, shares, machines))
    filled = [role for role, asked in wanted.items() if asked.replicas == "auto"]
    if filled:
        counts = _fill(wanted, counts, shares, filled, machines, busy)
        seats = _pack(_actors(wanted, counts, shares), machines)
        assert seats is not None  # _fill tried it
        if busy is None:
            notes.append(
                "replicas: auto without a measured ratio: one actor for each reward, generators fill the rest; "
                "`aisp compare` on this output measures the ratio"
            )
    on_cpu = Counter(seats[seat][0] for seat in seats if seat[0] in models and not shares[seat[0]])
    groups = [
        replace(_group(role, asked, counts[role], shares[role]), memory=_memory(shares[role], on_cpu))
        for role, asked in wanted.items()
    ]
    shared = _shared(seats, shares)
    used = {(machine, gpu) for machine, held in seats.values() for gpu in held}
    idle = gpus - len(used)
    if idle and not run.generator.endpoint:
        notes.append(
            f"{idle} of {gpus} GPU{'s' * (gpus > 1)} stay idle; runtime.generators.replicas: auto would use "
            f"{'them' if idle > 1 else 'it'}"
        )
    return Plan(tuple(groups), shared, idle, tuple(notes))


def _check(role: str, asked: Replicas, machines: Sequence[Resources], coordinators: int, autoscaling: bool) -> None:
    """Raise ConfigError for a wish that no cluster, or not this one, could meet."""
    if asked.needed < coordinators:
        raise ConfigError(
            f"runtime.shards: {coordinators} coordinators, and {role} has {asked.needed} replicas; each coordinator "
            "needs one of its own: raise replicas, or lower shards"
        )
    if asked.accelerator and not autoscaling and not any(_has(machine, asked.accelerator) for machine in machines):
        kinds = {name.removeprefix(_KIND) for machine in machines for name in machine if name.startswith(_KIND)}
        raise ConfigError(
            f"runtime, {role}: accelerator {asked.accelerator!r} is on no machine of the cluster "
            f"(there: {', '.join(sorted(kinds)) or 'none'}); name one that is, or leave it null"
        )


_KIND = "accelerator_type:"


def _has(machine: Resources, accelerator: str | None) -> bool:
    return accelerator is None or f"{_KIND}{accelerator}" in machine


def _count(asked: Replicas) -> int:
    return 1 if asked.replicas == "auto" else asked.replicas


def _group(role: str, asked: Replicas, count: int, share: float) -> Group:
    return Group(role, count, min(asked.at_least or count, count), asked.num_cpus, share, asked.accelerator)


def _memory(share: float, on_cpu: Counter[int]) -> float:
    return min(share, 1.0) if share else 1 / max(on_cpu.values(), default=1)


def _actors(wanted: Mapping[str, Replicas], counts: Mapping[str, int], shares: Mapping[str, float]) -> list[_Actor]:
    """The actors without which the run does not begin."""
    return [
        _Actor((role, i), asked.num_cpus, shares[role], asked.accelerator, asked.num_gpus == "auto")
        for role, asked in wanted.items()
        for i in range(min(asked.at_least or counts[role], counts[role]))
    ]


def _share(
    wanted: Mapping[str, Replicas],
    counts: Mapping[str, int],
    shares: dict[str, float],
    auto: Sequence[str],
    machines: Sequence[Resources],
    sizes: Mapping[str, int],
) -> dict[Seat, tuple[int, tuple[int, ...]]] | None:
    """Give the `auto` roles whole GPUs, in their order, as far as there are some; the others fractions in proportion to
    their models' sizes, as large as fits. Fills in `shares`; answers where each actor sits, None where nothing fits."""
    most = max((size for size in sizes.values()), default=1) or 1
    need = {
        role: (sizes.get(role) or most) * (2 if role == GENERATOR else 1) for role in auto
    }  # its rows need room too
    for whole in range(len(auto), -1, -1):
        rest = auto[whole:]
        shares |= dict.fromkeys(auto[:whole], 1.0)
        if not rest:
            if (seats := _pack(_actors(wanted, counts, shares), machines)) is not None:
                return seats
            continue
        largest = max(need[role] for role in rest)
        for hundredths in range(100, int(100 * _LEAST) - 1, -1):  # of the largest model of these
            for role in rest:
                shares[role] = max(_LEAST, math.floor(hundredths * need[role] / largest) / 100)
            if (seats := _pack(_actors(wanted, counts, shares), machines)) is not None:
                return seats
    shares |= dict.fromkeys(auto, 1.0)  # for the message
    return None


def _fill(
    wanted: Mapping[str, Replicas],
    counts: Mapping[str, int],
    shares: Mapping[str, float],
    filled: Sequence[str],
    machines: Sequence[Resources],
    busy: Mapping[str, float] | None,
) -> dict[str, int]:
    """As many replicas of the `auto` roles as the cluster holds, in the ratio of their busy seconds; then more
    generators. Without measured seconds: one of each, then generators."""
    best = dict(counts)

    def largest(tried: Callable[[int], Mapping[str, int]]) -> dict[str, int]:
        """tried(k) for the largest k that fits; what fits with more of something fits with less."""
        low, high = 0, 1
        while high < _MOST and _pack(_actors(wanted, tried(high), shares), machines) is not None:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            fits = _pack(_actors(wanted, tried(middle), shares), machines) is not None
            low, high = (middle, high) if fits else (low, middle)
        return dict(tried(low))

    seconds = {role: busy.get(role, 0.0) for role in filled} if busy else {}
    if longest := max(seconds.values(), default=0.0):
        share = {role: s / longest for role, s in seconds.items()}
        best = largest(lambda k: best | {role: max(1, math.ceil(s * k - 1e-9)) for role, s in share.items()})
    if GENERATOR in filled:
        generators = best[GENERATOR]
        best = largest(lambda k: best | {GENERATOR: generators + k})
    return best


def _pack(actors: Sequence[_Actor], machines: Sequence[Resources]) -> dict[Seat, tuple[int, tuple[int, ...]]] | None:
    """A machine for every actor, and its GPU where it has one: by a best fit of the largest first that goes back where
    it ends. None where there is none, or none was found in so many tries."""
    order = sorted(actors, key=lambda a: (a.num_gpus, a.num_cpus), reverse=True)
    cpus = [machine.get("CPU", 0.0) for machine in machines]
    free = [[1.0] * int(machine.get("GPU", 0)) for machine in machines]
    roles: list[list[Counter[str]]] = [[Counter() for _ in gpus] for gpus in free]  # on each GPU
    seats: dict[Seat, tuple[int, tuple[int, ...]]] = {}
    tries = 0

    def options(actor: _Actor) -> list[_Place]:
        """Places that differ: what is left of the GPU, of the CPUs, machine, GPUs."""
        found: dict[tuple[float, float, int, bool], _Place] = {}
        for m, machine in enumerate(machines):
            if cpus[m] < actor.num_cpus - _TINY or not _has(machine, actor.accelerator):
                continue
            if not actor.num_gpus:
                found.setdefault((len(free[m]), cpus[m], -1, True), (len(free[m]), cpus[m], m, ()))
            if actor.num_gpus > 1:
                whole = [g for g, left in enumerate(free[m]) if left >= 1 - _TINY]
                if len(whole) >= actor.num_gpus - _TINY:
                    gpus = tuple(whole[: round(actor.num_gpus)])
                    found.setdefault((len(whole), cpus[m], len(free[m]), False), (len(whole), cpus[m], m, gpus))
                continue
            for g, left in enumerate(free[m]) if actor.num_gpus else ():
                if left >= actor.num_gpus - _TINY and not (actor.alone and roles[m][g][actor.seat[0]]):
                    found.setdefault((round(left, 6), cpus[m], len(free[m]), False), (left, cpus[m], m, (g,)))
        return sorted(found.values())

    def take(m: int, gpus: tuple[int, ...], actor: _Actor, sign: int) -> None:
        cpus[m] -= sign * actor.num_cpus
        for g in gpus:
            free[m][g] -= sign * min(actor.num_gpus, 1.0)
            roles[m][g][actor.seat[0]] += sign

    stack: list[tuple[list[_Place], tuple[int, tuple[int, ...]] | None]] = []
    if not order:
        return {}
    stack.append((options(order[0]), None))
    while stack:
        left, taken = stack.pop()
        actor = order[len(stack)]
        if taken is not None:
            take(*taken, actor, -1)
        if not left or (tries := tries + 1) > max(_TRIES, 2 * len(order)):
            continue
        (_, _, m, gpus), *rest = left
        take(m, gpus, actor, 1)
        seats[actor.seat] = m, gpus
        stack.append((rest, (m, gpus)))
        if len(stack) == len(order):
            return seats
        stack.append((options(order[len(stack)]), None))
    return None


def _shared(seats: Mapping[Seat, tuple[int, tuple[int, ...]]], shares: Mapping[str, float]) -> tuple[Gpu, ...]:
    held: dict[tuple[int, int], list[tuple[Seat, float]]] = {}
    for seat, (machine, gpus) in seats.items():
        if 0 < shares[seat[0]] < 1:
            held.setdefault((machine, gpus[0]), []).append((seat, shares[seat[0]]))
    return tuple(Gpu(m, g, tuple(sorted(held[m, g]))) for m, g in sorted(held))


def _shortfall(
    wanted: Mapping[str, Replicas],
    counts: Mapping[str, int],
    shares: Mapping[str, float],
    machines: Sequence[Resources],
) -> str:
    actors = _actors(wanted, counts, shares)
    needed = Counter(actor.seat[0] for actor in actors)
    for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        each = {role: getattr(actor, key) for actor in actors for role in (actor.seat[0],) if getattr(actor, key)}
        total = sum(needed[role] * value for role, value in each.items())
        there = sum(machine.get(kind, 0) for machine in machines)
        if total > there + _TINY:
            parts = ", ".join(f"{role} {needed[role]} x {value:g}" for role, value in each.items())
            return (
                f"runtime: the actors need {total:g} {kind} ({parts}) and the cluster has {there:g}; "
                f"lower replicas, at_least or {key}, or add machines"
            )
    asked = ", ".join(
        f"{role} {needed[role]} x {asked.num_cpus:g} CPU + {shares[role]:g} GPU"
        + (f" on {asked.accelerator}" if asked.accelerator else "")
        for role, asked in wanted.items()
    )
    listed = ", ".join(
        f"{machine.get('CPU', 0):g} CPU + {machine.get('GPU', 0):g} GPU"
        + "".join(f" ({name.removeprefix(_KIND)})" for name in machine if name.startswith(_KIND))
        for machine in machines
    )
    return (
        f"runtime: the actors fit no machine-by-machine placement ({asked}; machines: {listed}): one actor runs on one "
        "machine and a fraction on one GPU; lower replicas, num_cpus or num_gpus, or add a machine that has both"
    )
