"""What an engine has in flight: trajectories, the rounds that they are of, and what the rounds of a prompt share."""

from __future__ import annotations

from dataclasses import dataclass, field

from aisp_dist.engine import starts
from aisp_dist.engine.attention import Prefix
from aisp_dist.engine.control import Control
from aisp_dist.records import Round, Trajectory


@dataclass(eq=False)
class Shared:
    """What the rounds of a prompt share. age: smaller for older prompts; prefix: None until prefilled; tiles, control:
    of the latest round; rounds: number in flight, 0 for an idle prompt."""

    tokens: tuple[int, ...]
    age: int
    prefix: Prefix | None = None
    tiles: starts.Tiles = field(default_factory=dict)
    control: Control | None = None
    rounds: int = 0


@dataclass(eq=False)
class Job:
    """A round in flight. key: of its noise; line: of its control in the batch, 0 for none; done: finished trajectories
    by sample."""

    round: Round
    prompt: Shared
    key: tuple[int, int]
    control: Control | None = None
    line: int = 0
    done: dict[int, Trajectory] = field(default_factory=dict)


@dataclass(eq=False)
class Row:
    """A trajectory, waiting or in a slot. age: its prompt's, then its own; start: its given tokens; tokens: those that
    it has, its start included; reached: how many it had when it was preempted."""

    age: tuple[int, int]
    job: Job
    sample: int
    start: tuple[int, ...]
    tokens: list[int]
    reached: int = 0
