"""The comparison table: what the arms reach and what they cost, as means over the same prompts with paired intervals.
`aisp compare`, `aisp report` and `aisp lm-eval` all take it from here. Reads finished outputs; runs nothing.

Shapes: P prompts that every arm finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from aisp_dist.analysis import outputs
from aisp_dist.analysis.arms import BASE, TOP_P
from aisp_dist.analysis.metrics import Interval, interval, spread
from aisp_dist.analysis.outputs import Columns, Row
from aisp_dist.analysis.summary import one_line
from aisp_dist.config import ConfigError
from aisp_dist.output import log

_COST = ("auc", "model_tokens", "reward_calls", "seconds")  # fields of Arm that the base answers do not have


@dataclass(frozen=True)
class Arm:
    """Means of one arm over the prompts that every arm finished, averaged over seeds first.

    prompts: those with a reward. versus, nll_versus, held_out_versus: the main arm minus this one, paired by prompt.
    won: share of prompts on which the main arm's reward is higher, ties half. std: of the mean reward over seeds. auc:
    the best reward so far, averaged over the iterations that a prompt may have; None where that is one. Of a prompt:
    num_tokens of the answer, model_tokens that the base model generated (without tokens that were given, as continued
    answers have them), reward_calls, texts that each selecting reward has read. seconds: of the arm's run. None where
    the output does not keep what the figure needs.
    """

    name: str
    prompts: int
    samples: float
    reward: Interval | None
    versus: Interval | None
    won: float | None
    nll: Interval | None
    nll_versus: Interval | None
    diversity: Interval
    num_tokens: float
    held_out: dict[str, Interval]
    held_out_versus: dict[str, Interval]
    std: float | None
    auc: float | None
    model_tokens: float | None
    reward_calls: float | None
    seconds: float | None


@dataclass(frozen=True)
class Originals:
    """The answers that the dialogues came with (prompts.drop_last_answer), on the prompts where they, the greedy answer
    and the main arm's have a reward. Mean rewards; better, equal: shares of the prompts on which the main arm's reward
    is higher, and the same."""

    prompts: int
    original: Interval
    base: Interval
    main: Interval
    better: float
    equal: float


@dataclass(frozen=True)
class Comparison:
    """Every arm, the greedy answers first. loss: the prompt on which the main arm loses most to best-of-n (first seed),
    with both answers. left_out: prompts that failed in some arm. originals: None where no prompt came with an answer
    that has a reward."""

    main: str
    arms: tuple[Arm, ...]
    loss: dict[str, Any] | None
    left_out: int
    originals: Originals | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self)


def compare(arms: Mapping[str, Sequence[Columns]], main: str) -> Comparison:
    """arms: the finished outputs of each arm, one for each seed, with the measure `diversity`. The base answers are
    those of the main arm's outputs. Raises ConfigError where the outputs have no prompt in common."""
    everything = [columns for seeds in arms.values() for columns in seeds]
    shared = outputs.in_all(everything)
    if shared.empty:
        raise ConfigError("no prompt was finished by every arm; the reasons are in each arm's failed/")

    def mean(arm: str, measure: str, base: bool = False) -> np.ndarray:  # [P]
        over_seeds: np.ndarray = np.mean([c.values(measure, shared, base) for c in arms[arm]], axis=0)
        return over_seeds

    held_out = {name: f"reward {name}" for name in arms[main][0].output.held_out}
    ours = {measure: mean(main, measure) for measure in ("reward", "nll", *held_out.values())}
    found = []
    for name in (BASE, *arms):
        base = name == BASE
        seeds, arm = arms[main if base else name], main if base else name
        by_seed = np.array([c.values("reward", shared, base) for c in seeds])
        reward, nll = by_seed.mean(axis=0), mean(arm, "nll", base)
        finite = np.isfinite(reward)
        won = ((ours["reward"] > reward) + (ours["reward"] == reward) / 2)[finite]
        scores = {n: mean(arm, measure, base) for n, measure in held_out.items()}
        versus = {n: spread(ours[held_out[n]] - values) for n, values in scores.items()}
        found.append(
            Arm(
                name=name,
                prompts=int(finite.sum()),
                samples=1.0 if base else _mean([c.about("samples_spent", shared).mean() for c in seeds]) or 0.0,
                reward=spread(reward),
                versus=spread(ours["reward"] - reward),
                won=float(won.mean()) if won.size else None,
                nll=spread(nll),
                nll_versus=spread(ours["nll"] - nll),
                diversity=interval(mean(arm, "diversity", base)),
                num_tokens=float(mean(arm, "tokens", base).mean()),
                held_out={n: cell for n, values in scores.items() if (cell := spread(values))},
                held_out_versus={n: cell for n, cell in versus.items() if cell},
                std=float(by_seed[:, finite].mean(axis=1).std(ddof=1)) if len(seeds) > 1 and won.size else None,
                **(dict.fromkeys(_COST) if base else _cost(seeds, shared)),
            )
        )
    seen = outputs.in_any([ids for columns in everything for ids in (columns.rows.index, columns.failed)])
    originals = _originals(arms[main], shared)
    return Comparison(main, tuple(found), _loss(arms, shared, main), len(seen) - len(shared), originals)


def _originals(seeds: Sequence[Columns], shared: Any) -> Originals | None:
    if any(("original", "reward") not in columns.rows for columns in seeds):
        return None
    sides = [[c.rows[side, "reward"].loc[shared] for c in seeds] for side in ("original", "base", "selected")]
    original, base, main = rewards = np.mean(np.array(sides, dtype=np.float64), axis=1)  # 3 sides x [P]
    both = np.isfinite(rewards).all(axis=0)
    if not both.any():
        return None
    gains = (main - original)[both]
    means = [interval(side[both]) for side in (original, base, main)]
    better, equal = float((gains > 0).mean()), float((gains == 0).mean())
    return Originals(int(both.sum()), means[0], means[1], means[2], better, equal)


def originals_table(result: Comparison, digits: int = 3) -> list[list[str]]:
    """The head, and the mean rewards of original, base and main arm; empty where no prompt came with an answer."""
    found = result.originals
    if found is None:
        return []
    rows = {"original": found.original, BASE: found.base, result.main: found.main}
    return [["", "reward"], *([name, _cell(cell, digits)] for name, cell in rows.items())]


def originals_text(result: Comparison) -> str:
    """How often the main arm is better, in a sentence; empty where no prompt came with an answer."""
    found = result.originals
    if found is None:
        return ""
    return (
        f"{found.prompts} prompts came with an answer; {result.main} is better for {found.better:.1%} of them, equal "
        f"for {found.equal:.1%}"
    )


def _cost(seeds: Sequence[Columns], shared: Any) -> dict[str, float | None]:
    drawn = [_drawn_tokens(c).reindex(shared).mean(skipna=False) for c in seeds]
    calls = [_reward_calls(c, shared, tokens) for c, tokens in zip(seeds, drawn, strict=True)]
    iterations = max(c.output.most_iterations for c in seeds)
    return {
        "auc": _mean([c.about("area", shared).mean() for c in seeds]) if iterations > 1 else None,
        "model_tokens": _mean(drawn),
        "reward_calls": _mean(calls),
        "seconds": _mean([math.nan if (s := log.seconds(c.output.place)) is None else s for c in seeds]),
    }


def _drawn_tokens(columns: Columns) -> Any:
    """By id, tokens that the base model generated for a prompt's samples; only prompts whose trace is kept."""

    def of(step: Row) -> int:
        return sum(step["lengths"]) - sum(step["given"])

    names = ["id", "trace.list.element.lengths", "trace.list.element.given"]
    found = [pd.Series(dtype="float64")]
    for batch in outputs.batches(columns.output.place, "candidates", names):
        rows = [row for row in batch.to_pylist() if row["trace"]]
        found.append(pd.Series([sum(map(of, r["trace"])) for r in rows], [r["id"] for r in rows], "float64"))
    return pd.concat(found)


def _reward_calls(columns: Columns, shared: Any, drawn_tokens: float) -> float:
    """Every sample is read once, and some methods ask for rewards at every token beside that."""
    method, samples = columns.output.run.method, float(columns.about("samples_spent", shared).mean())
    per_token = method.reward_calls_per_token
    return samples + (per_token * drawn_tokens if per_token else 0.0)  # drawn_tokens is NaN where no trace is kept


def _mean(values: Sequence[float]) -> float | None:
    """Over seeds; None where one is not known."""
    mean = float(np.mean(values))
    return None if math.isnan(mean) else mean


def _loss(arms: Mapping[str, Sequence[Columns]], shared: Any, main: str) -> dict[str, Any] | None:
    if TOP_P not in arms or main == TOP_P:
        return None
    ours, theirs = arms[main][0], arms[TOP_P][0]
    gains = ours.values("reward", shared) - theirs.values("reward", shared)
    worst = int(gains.argmin())
    if gains[worst] >= 0:
        return None
    (a,), (b,) = (outputs.rows(c, [shared[worst]], ["prompt", "completion", "reward"]) for c in (ours, theirs))
    return {
        "prompt": one_line(a["prompt"]),
        "main": one_line(a["completion"]),
        "main_reward": a["reward"],
        "best_of_n": one_line(b["completion"]),
        "best_of_n_reward": b["reward"],
    }


def table(result: Comparison, digits: int = 3) -> list[list[str]]:
    """The head and a row for each arm. A cell is empty where its value is not known or compares the main arm with
    itself."""
    main, names = result.main, list(dict.fromkeys(name for arm in result.arms for name in arm.held_out))
    head = ["", "samples", "reward", f"{main} minus it", f"won by {main}", *(f"held out: {name}" for name in names)]
    head += ["NLL / token", "diversity", "tokens", "std over seeds", "area", "drawn tokens", "reward calls", "seconds"]
    rows = [head]
    for arm in result.arms:
        ours = arm.name == main
        row = [arm.name, f"{arm.samples:g}", _cell(arm.reward, digits)]
        row += ["", ""] if ours else [_cell(arm.versus, digits), "" if arm.won is None else f"{arm.won:.0%}"]
        row += [_cell(arm.held_out.get(name), digits) for name in names]
        row += [_cell(arm.nll, digits), f"{arm.diversity.mean:.{digits}f}", f"{arm.num_tokens:.1f}"]
        row += ["" if value is None else f"{value:.{digits}f}" for value in (arm.std, arm.auc)]
        row += ["" if value is None else f"{value:.0f}" for value in (arm.model_tokens, arm.reward_calls, arm.seconds)]
        rows.append(row)
    return rows


def text(result: Comparison) -> str:
    """The comparison for a terminal: the table in two halves, what the arms reach and what that costs."""
    rows, main = table(result, digits=2), result.main
    half = rows[0].index("tokens")
    out = [*aligned([row[:half] for row in rows]), "", *aligned([[row[0], *row[half:]] for row in rows])]
    out.append("std: of the mean reward over seeds. area: the best reward so far, averaged over the samples.")
    out.append("drawn tokens, reward calls: of a prompt. seconds: of the arm")
    most = max(arm.prompts for arm in result.arms)
    left_out = f"; {result.left_out} that failed in some arm are left out" if result.left_out else ""
    out.append(f"over {most} prompts{left_out}")
    out += [f"{arm.name}: over the {arm.prompts} of them with a reward" for arm in result.arms if arm.prompts < most]
    if result.originals:
        out += ["", originals_text(result), *aligned(originals_table(result, digits=2))]
    if loss := result.loss:
        out += [
            "",
            f"where {main} loses most to {TOP_P}:",
            f"prompt     {loss['prompt']}",
            f"{main:10} {loss['main']}   [{loss['main_reward']:.3f}]",
            f"best-of-n  {loss['best_of_n']}   [{loss['best_of_n_reward']:.3f}]",
        ]
    elif main != TOP_P and any(arm.name == TOP_P for arm in result.arms):
        out.append(f"on no prompt does {main} lose to {TOP_P} (first seed)")
    return "\n".join(out)


def _cell(cell: Interval | None, digits: int) -> str:
    return "" if cell is None else f"{cell.mean:.{digits}f} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with columns below each other, the first to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
