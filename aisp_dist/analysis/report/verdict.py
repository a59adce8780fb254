"""What the comparison of the arms says in sentences, and what speaks against trusting it. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aisp_dist.analysis.arms import BASE

_FEW = 30  # prompts; below, the intervals of skewed values are still too narrow
Json = Mapping[str, Any]
Cell = Sequence[float] | None  # mean, low, high of a paired difference, main arm minus the other


@dataclass(frozen=True)
class Verdict:
    """says: which arm wins at equal samples, and whether rewards that were not optimised agree. warnings: what does not
    support it. rival: the arm with the highest reward among those with the main arm's samples, or base where there is
    none."""

    says: tuple[str, ...]
    warnings: tuple[str, ...]
    rival: str


def verdict(arms: Sequence[Json], main: str, budgets: Mapping[str, int], shuffled: Collection[str]) -> Verdict:
    """arms: as in comparison.json. budgets: samples of a prompt by arm. shuffled: arms that saw shuffled rewards."""
    by_name = {arm["name"]: arm for arm in arms}
    same = [n for n in by_name if n not in (main, BASE, *shuffled) and budgets[n] == budgets[main]]
    if same:
        rival = max(same, key=lambda name: by_name[name]["reward"][0])
        first = _wins(main, budgets[main], {name: by_name[name]["versus"] for name in same})
    else:
        rival, gain = BASE, by_name[BASE]["versus"]
        told = {"higher": "is higher", "lower": "is lower", "undecided": "is not shown to differ"}[_side(gain)]
        first = (
            f"No other method with {budgets[main]} samples a prompt is shown, so nobody wins at equal samples; against "
            f"one greedy answer of the base model, {main} {told} ({_cell(gain)}) in reward."
        )
    says = [first, *_agreement(main, rival, by_name[rival])]
    return Verdict(tuple(says), tuple(_warnings(main, same, by_name, shuffled)), rival)


def _wins(main: str, samples: int, gains: Mapping[str, Cell]) -> str:
    told = {
        "higher": f"{main} reaches a higher reward than",
        "lower": f"{main} reaches a lower reward than",
        "undecided": f"no difference is established between {main} and",
    }
    sides = {side: [f"{n} ({_cell(cell)})" for n, cell in gains.items() if _side(cell) == side] for side in told}
    parts = [f"{told[side]} {_listed(names)}" for side, names in sides.items() if names]
    outcome = f"{main} does not win" if sides["lower"] else "There is no clear winner"
    if not sides["lower"] and not sides["undecided"]:
        outcome = f"{main} wins"
    return f"{outcome} at {samples} samples a prompt: {'; '.join(parts)}."


def _agreement(main: str, rival: str, other: Json) -> list[str]:
    side, says = _side(other["versus"]), []
    for name, cell in other["held_out_versus"].items():
        held = _side(cell)
        if held == side:
            agrees = "establishes no difference either" if side == "undecided" else "agrees"
        elif held == "undecided":
            agrees = "does not establish it"
        else:
            agrees = "does establish one" if side == "undecided" else "disagrees"
        says.append(f"The held-out reward {name} {agrees}: {main} minus {rival} is {_cell(cell)}.")
    if not other["held_out_versus"]:
        says.append("No held-out reward was reported (a reward with use: report), so nothing independent confirms it.")
    if other["nll_versus"] is None:
        return [*says, "The base model's likelihood of the answers is not known, as after rescoring."]
    like = {"higher": "less likely", "lower": "more likely", "undecided": "no less and no more likely"}
    nll = other["nll_versus"]
    says.append(
        f"To the base model its answers are {like[_side(nll)]} than those of {rival}: NLL differs by {_cell(nll)} nats "
        "per token."
    )
    return says


def _warnings(main: str, same: Sequence[str], by_name: Mapping[str, Json], shuffled: Collection[str]) -> list[str]:
    base, others = by_name[BASE], [by_name[name] for name in (*same, *shuffled) if name != main]
    found = [
        f"The gain over {name} is {_cell(by_name[name]['versus'])}, which is not above zero: a search that "
        "saw shuffled rewards does as well, so the gain is not shown to come from the rewards."
        for name in shuffled
        if name != main and _side(by_name[name]["versus"]) != "higher"
    ]
    for score, cell in base["held_out_versus"].items():
        gained = [(arm["name"], arm["held_out_versus"][score]) for arm in others if _side(arm["versus"]) == "higher"]
        if unsupported := [f"{name} ({_cell(held)})" for name, held in gained if _side(held) != "higher"]:
            found.append(
                f"The held-out reward {score} does not support the gain over {_listed(unsupported)}: the search may "
                "exploit its own reward."
            )
        if _side(cell) != "higher":
            found.append(f"By the held-out reward {score}, {main} is not shown to beat one base answer: {_cell(cell)}.")
    if far := [f"{a['name']} ({_cell(a['nll_versus'])})" for a in others if _side(a["nll_versus"]) == "higher"]:
        found.append(
            f"The answers of {main} are less likely to the base model than those of {_listed(far)}, in nats per token: "
            "a high reward for unlikely text is a sign of an exploited reward. Read some of them below."
        )
    if by_name[main]["prompts"] < _FEW:
        found.append(
            f"Only {by_name[main]['prompts']} prompts: too few to decide on, and where rewards are skewed, the "
            "intervals of so few come out too narrow."
        )
    return found


def _side(cell: Cell) -> str:
    """By the interval."""
    if cell is None:
        return "undecided"
    return "higher" if cell[1] > 0 else "lower" if cell[2] < 0 else "undecided"


def _cell(cell: Cell) -> str:
    return "unknown" if cell is None else "{:+.3f}\u00a0[{:+.3f},\u00a0{:+.3f}]".format(*cell)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
