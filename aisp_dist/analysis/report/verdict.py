"""What the figures of the arms say in sentences, and what speaks against trusting them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aisp_dist.analysis.arms import BASE

_FEW = 30  # prompts; below, the bootstrap's intervals are known to be too narrow
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """says: who wins at equal samples, and whether what was not optimised agrees. warnings: what does not support it.
    rival: the arm with the highest reward among those with the main arm's samples, or base where there is none."""

    says: tuple[str, ...]
    warnings: tuple[str, ...]
    rival: str


def verdict(figures: Sequence[Json], main: str, budgets: Mapping[str, int], controls: Collection[str]) -> Verdict:
    """figures: of the arms, as in comparison.json. budgets: samples of a prompt by arm. controls: arms that saw
    shuffled rewards."""
    by_name = {arm["name"]: arm for arm in figures}
    base = by_name[BASE]
    same = [n for n in by_name if n not in (main, BASE, *controls) and budgets[n] == budgets[main]]
    if same:
        rival = max(same, key=lambda name: by_name[name]["reward"][0])
        sides: dict[str, list[str]] = {"higher": [], "lower": [], "undecided": []}
        for name in same:
            sides[_side(by_name[name]["versus"])].append(f"{name} ({_cell(by_name[name]['versus'])})")
        says = [_wins(main, budgets[main], sides)]
    else:
        rival = BASE
        says = [
            f"No other method with {budgets[main]} samples a prompt is shown, so nobody wins at equal samples; "
            f"against one greedy answer of the base model, {main} {_is(base['versus'])} in reward."
        ]
    other = by_name[rival]
    says += _agreement(main, rival, other)
    return Verdict(tuple(says), tuple(_warnings(main, same, by_name, controls)), rival)


def _wins(main: str, samples: int, sides: Mapping[str, Sequence[str]]) -> str:
    told = {
        "higher": f"{main} reaches a higher reward than",
        "lower": f"{main} reaches a lower reward than",
        "undecided": f"no difference is established between {main} and",
    }
    parts = [f"{told[side]} {_listed(names)}" for side, names in sides.items() if names]
    if not sides["lower"] and not sides["undecided"]:
        winner = f"{main} wins"
    elif sides["lower"]:
        winner = f"{main} does not win"
    else:
        winner = "There is no clear winner"
    return f"{winner} at {samples} samples a prompt: {'; '.join(parts)}."


def _agreement(main: str, rival: str, other: Json) -> list[str]:
    side = _side(other["versus"])
    says = []
    for name, cell in other["held_out_versus"].items():
        held = _side(cell)
        agrees = {True: "agrees", False: "disagrees"}[held == side] if "undecided" not in (held, side) else "is open"
        if held == side == "undecided":
            agrees = "establishes no difference either"
        elif held == "undecided":
            agrees = "does not establish it"
        elif side == "undecided":
            agrees = "does establish one"
        says.append(f"The held-out reward {name} {agrees}: {main} minus {rival} is {_cell(cell)}.")
    if not other["held_out_versus"]:
        says.append("No held-out reward was reported (a reward with use: report), so nothing independent confirms it.")
    nll = other["nll_versus"]
    if nll is None:
        return [*says, "The base model's likelihood of the answers is not known, as of answers that were rescored."]
    like = {"higher": "less likely", "lower": "more likely", "undecided": "no less and no more likely"}[_side(nll)]
    says.append(
        f"To the base model its answers are {like} than those of {rival}: NLL differs by {_cell(nll)} nats per token."
    )
    return says


def _warnings(main: str, same: Sequence[str], by_name: Mapping[str, Json], controls: Collection[str]) -> list[str]:
    found = []
    others = [by_name[name] for name in (*same, *controls) if name != main]
    for name in controls:
        if name != main and _side(by_name[name]["versus"]) != "higher":
            found.append(
                f"The gain over the control {name} is {_cell(by_name[name]['versus'])}, which is not above zero: a "
                "search that saw shuffled rewards does as well, so the gain is not shown to come from the rewards."
            )
    for score in by_name[BASE]["held_out_versus"]:
        gained = [(arm["name"], arm["held_out_versus"][score]) for arm in others if _side(arm["versus"]) == "higher"]
        if open_ := [f"{name} ({_cell(cell)})" for name, cell in gained if _side(cell) != "higher"]:
            found.append(
                f"The held-out reward {score} does not support the gain over {_listed(open_)}: the search may exploit "
                "its own reward."
            )
        cell = by_name[BASE]["held_out_versus"][score]
        if _side(cell) != "higher":
            found.append(f"By the held-out reward {score}, {main} is not shown to beat one base answer: {_cell(cell)}.")
    if far := [f"{a['name']} ({_cell(a['nll_versus'])})" for a in others if _side(a["nll_versus"]) == "higher"]:
        found.append(
            f"The answers of {main} are less likely to the base model than those of {_listed(far)}, in nats per token: "
            "a high reward for unlikely text is what an exploited reward looks like. Read some of them below."
        )
    if by_name[main]["prompts"] < _FEW:
        found.append(f"Only {by_name[main]['prompts']} prompts: these intervals are too narrow to decide on.")
    return found


def _side(cell: Sequence[float] | None) -> str:
    """Of a paired difference, main arm minus the other: by its interval."""
    if cell is None:
        return "undecided"
    _, low, high = cell
    return "higher" if low > 0 else "lower" if high < 0 else "undecided"


def _is(cell: Sequence[float]) -> str:
    words = {"higher": "is higher", "lower": "is lower", "undecided": "is not shown to differ"}
    return f"{words[_side(cell)]} ({_cell(cell)})"


def _cell(cell: Sequence[float]) -> str:
    mean, low, high = cell
    return f"{mean:+.3f}\u00a0[{low:+.3f},\u00a0{high:+.3f}]"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
