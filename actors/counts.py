"""The counts of a run. They are sums that grow, so that those of several coordinators add up and those of an interval
are a difference. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Counts:
    """done, failed: inputs with a row, also of earlier commands. fresh: inputs that this command finished. tokens:
    decoded; given: those of earlier answers with which answers begin. gain: sum over `gains` prompts of the selected
    reward minus the base answer's. By role: calls that wait (queued), replicas that are up (alive), seconds that
    replicas worked (busy) and existed (up). row_steps, row_slots: over the decoding steps of the generators, rows with
    a trajectory and all rows. parts: seconds of the generators' steps by part.
    """

    done: int = 0
    failed: int = 0
    committed: int = 0
    fresh: int = 0
    in_flight: int = 0
    iterations: int = 0
    samples: int = 0
    tokens: int = 0
    given: int = 0
    quarantined: int = 0
    gain: float = 0.0
    gains: int = 0
    repeats: int = 0
    restarts: int = 0
    queued: Mapping[str, float] = field(default_factory=dict)
    alive: Mapping[str, float] = field(default_factory=dict)
    busy: Mapping[str, float] = field(default_factory=dict)
    up: Mapping[str, float] = field(default_factory=dict)
    row_steps: float = 0.0
    row_slots: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return self._with(other, 1)

    def __sub__(self, earlier: Counts) -> Counts:
        return self._with(earlier, -1)

    @property
    def finished(self) -> int:
        return self.done + self.failed

    @property
    def reward_gain(self) -> float | None:
        return self.gain / self.gains if self.gains else None

    @property
    def slot_utilisation(self) -> float | None:
        return self.row_steps / self.row_slots if self.row_slots > 0 else None

    def idle(self) -> dict[str, float]:
        """Share of time, 0 to 1, that the replicas of a role had nothing to do, by role."""
        return {r: max(0.0, 1 - self.busy.get(r, 0.0) / up) for r, up in self.up.items() if up > 0}

    def grown(self) -> Counts:
        """The sums alone, without the values of a moment."""
        return replace(self, done=0, failed=0, committed=0, in_flight=0, queued={}, alive={})

    def json(self) -> dict[str, Any]:
        own: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        derived = {"reward_gain": self.reward_gain, "slot_utilisation": self.slot_utilisation, "idle": self.idle()}
        return {name: value for name, value in own.items() if name not in ("gain", "gains")} | derived

    def _with(self, other: Counts, sign: int) -> Counts:
        def both(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, Mapping):
                return {key: mine.get(key, 0) + sign * theirs.get(key, 0) for key in {**mine, **theirs}}
            return mine + sign * theirs

        return Counts(*(both(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


def seconds_left(now: Counts, pace: float, total: int | None, samples: int) -> float | None:
    """Time left at `pace` samples/s, where a prompt takes `samples`; None while the pace or the number of inputs is not
    known. It goes by samples, since prompts in flight together finish together."""
    if total is None or not pace:
        return None
    return max(0.0, (total - now.finished + now.fresh) * samples - now.samples) / pace


def gauges(now: Counts, lately: Counts, seconds: float, total: int | None, samples: int) -> dict[str, float | None]:
    """The exporter's gauges by name; None: not known yet. lately: the counts of the last `seconds`. samples: of one
    prompt."""
    idle = lately.idle()
    return {
        "in_flight": now.in_flight,
        "queued_rounds": now.queued.get("generator"),
        "queued_scores": sum(n for role, n in now.queued.items() if role != "generator"),
        "generators_alive": now.alive.get("generator"),
        "scorers_alive": sum(n for role, n in now.alive.items() if role != "generator"),
        "slot_utilisation": lately.slot_utilisation,
        "generator_idle": idle.get("generator"),
        "scorer_idle": min((share for role, share in idle.items() if role != "generator"), default=None),
        "iterations_per_second": lately.iterations / seconds,
        "tokens_per_second": lately.tokens / seconds,
        "reward_gain": now.reward_gain,
        "eta_seconds": seconds_left(now, lately.samples / seconds, total, samples),
        "total_prompts": total,
        "committed": now.committed,
        "staged": now.finished - now.committed,
    }


def share(total: int | None, rows_per_file: int, shard: tuple[int, int]) -> int | None:
    """How many of `total` inputs are in a shard's parts; None while the total is not known."""
    if total is None:
        return None
    whole, rest = divmod(total, rows_per_file)
    index, count = shard
    return len(range(index, whole, count)) * rows_per_file + (rest if whole % count == index else 0)
