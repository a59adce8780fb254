"""What the tables of a comparison's arms say side by side: means over the same prompts with paired intervals.
Reads finished outputs; runs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aisp_dist import methods
from aisp_dist.analysis.arms import AISP, BASE, TOP_P
from aisp_dist.analysis.metrics import Interval, diversity, interval, spread
from aisp_dist.analysis.summary import words
from aisp_dist.config import ConfigError, Method
from aisp_dist.output import log
from aisp_dist.output.filesystem import Place

_COLUMNS = ["id", "prompt", "samples_spent", "curve"]
_COLUMNS += [b + n for n in ("reward", "rewards", "nll", "num_tokens", "completion") for b in ("", "base_")]
Row = Mapping[str, Any]
Value = Callable[[Row], float]


@dataclass(frozen=True)
class Arm:
    """Means of one arm over the prompts that every arm finished, averaged over seeds first.

    versus, nll_versus: the main arm's reward and NLL minus this arm's, paired by prompt. won: the share of prompts on
    which the main arm's reward is higher, ties half. auc: the best reward so far, averaged over the sample budget.
    std: of the mean reward over seeds. model_tokens, reward_calls: of a prompt (methods.spent); seconds: of the arm's
    run, alone on the cluster, None where it keeps no metrics.
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
class Comparison:
    """Every arm, and the prompt on which the main arm loses most to best-of-n, with both answers. left_out: prompts
    that failed in some arm."""

    main: str
    arms: tuple[Arm, ...]
    loss: dict[str, Any] | None
    left_out: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Table:
    """One finished output: its rows, ids that failed, the lengths of its samples by iteration, its method and how long
    it took."""

    rows: Mapping[str, Row]
    failed: frozenset[str]
    lengths: Mapping[str, Sequence[Sequence[int]]]
    method: Method | None
    seconds: float | None


def compare(
    outputs: Mapping[str, Sequence[Place]],
    held_out: Sequence[str],
    main: str = AISP,
    found: Mapping[str, Method] | None = None,
    limit: int | None = None,
) -> Comparison:
    """`outputs`: for each arm its finished outputs, one a seed. found: the arms' methods, for what they cost. limit: of
    the inputs, where an output has more. Raises ConfigError where the outputs have no prompt in common."""
    tables = {arm: [_read(place, (found or {}).get(arm), limit) for place in places] for arm, places in outputs.items()}
    everything = [table.rows.keys() for seeds in tables.values() for table in seeds]
    shared = sorted(set.intersection(*map(set, everything)), key=list(everything[0]).index)
    if not shared:
        raise ConfigError(
            "no prompt was finished by every arm: nothing to compare; the reasons are in each arm's failed/"
        )

    def column(arm: str, value: Value) -> np.ndarray:  # [seeds, P]
        return np.array([[value(t.rows[id]) for id in shared] for t in tables[arm]], dtype=np.float64)

    def mean(arm: str, value: Value) -> np.ndarray:  # [P]
        over_seeds: np.ndarray = column(arm, value).mean(axis=0)
        return over_seeds

    ours, our_nll = (mean(main, _number(name)) for name in ("reward", "nll"))
    our_held_out = {n: mean(main, _score("rewards", n)) for n in held_out}
    arms = []
    for name in (BASE, *tables):
        base = name == BASE
        arm, prefix = (main, "base_") if base else (name, "")
        by_seed = column(arm, _number(f"{prefix}reward"))
        reward, nll = by_seed.mean(axis=0), mean(arm, _number(f"{prefix}nll"))
        finite = np.isfinite(reward)
        scores = {n: mean(arm, _score(f"{prefix}rewards", n)) for n in held_out}
        costs = [] if base else [_costs(table, shared) for table in tables[name]]
        arms.append(
            Arm(
                name=name,
                prompts=int(finite.sum()),
                samples=1.0 if base else float(mean(arm, _number("samples_spent")).mean()),
                reward=spread(reward),
                versus=spread(ours - reward),
                won=float(((ours > reward) + (ours == reward) / 2)[finite].mean()) if finite.any() else None,
                nll=spread(nll),
                nll_versus=spread(our_nll - nll),
                diversity=interval(mean(arm, _diversity(f"{prefix}completion"))),
                num_tokens=float(mean(arm, _number(f"{prefix}num_tokens")).mean()),
                held_out={n: cell for n, v in scores.items() if (cell := spread(v))},
                held_out_versus={n: cell for n, v in scores.items() if (cell := spread(our_held_out[n] - v))},
                std=float(by_seed[:, finite].mean(axis=1).std(ddof=1)) if len(by_seed) > 1 and finite.any() else None,
                auc=None if base else _auc(tables[name], shared),
                model_tokens=_mean([cost.model_tokens for cost in costs if cost]),
                reward_calls=_mean([cost.reward_calls for cost in costs if cost]),
                seconds=_mean([table.seconds for table in tables[name] if table.seconds]) if not base else None,
            )
        )
    seen = set[str]().union(*(t.rows.keys() | t.failed for seeds in tables.values() for t in seeds))
    return Comparison(main, tuple(arms), _loss(tables, shared, main), len(seen) - len(shared))


def _read(output: Place, method: Method | None, limit: int | None) -> _Table:
    def table(folder: str, columns: Sequence[str]) -> list[Row]:
        if not output.names(folder):
            return []
        there = output.dataset(folder)
        wanted = [name for name in (*columns, "source_index") if name in there.schema.names]
        rows: list[Row] = there.to_table(columns=wanted).to_pylist()
        return rows if limit is None else [row for row in rows if row["source_index"] < limit]

    rows = {row["id"]: row for row in table("data", _COLUMNS)}
    traces = {row["id"]: row["trace"] for row in table("candidates", ["id", "trace"]) if row["trace"]}
    lengths = {id: [iteration["lengths"] for iteration in trace] for id, trace in traces.items()}
    failed = frozenset(row["id"] for row in table("failed", ["id"]))
    return _Table(rows, failed, lengths, method, log.seconds(output))


def _costs(table: _Table, shared: Sequence[str]) -> methods.Spent | None:
    """Means over prompts; None where the output keeps no traces."""
    if table.method is None or not all(id in table.lengths for id in shared):
        return None
    each = [methods.spent(table.method, table.lengths[id]) for id in shared]
    return methods.Spent(*(np.mean([getattr(c, f) for c in each]) for f in ("samples", "model_tokens", "reward_calls")))


def _auc(tables: Sequence[_Table], shared: Sequence[str]) -> float | None:
    """The best reward so far, averaged over iterations, seeds and prompts; None for methods of one iteration. A prompt
    that stopped early has its last value from there on."""
    curves = [row.get("curve") or [] for table in tables for row in (table.rows[id] for id in shared)]
    spend = tables[0].method.spend if tables[0].method else None
    most = (spend and spend.max_iterations) or (tables[0].method.num_iterations if tables[0].method else 0)
    longest = max(most, *map(len, curves))
    if longest < 2:
        return None
    padded = [[_or_nan(r) for r in (*c, *[c[-1]] * (longest - len(c)))] for c in curves if c]
    return float(np.nanmean(padded))


def _mean(values: Sequence[float | None]) -> float | None:
    return float(np.mean(values)) if values else None  # type: ignore[arg-type]


def _number(name: str) -> Value:
    return lambda row: _or_nan(row[name])


def _score(name: str, reward: str) -> Value:
    return lambda row: _or_nan(next((score["value"] for score in row[name] if score["name"] == reward), None))


def _diversity(name: str) -> Value:
    return lambda row: diversity(words_of(row[name]))


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def words_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _loss(tables: Mapping[str, Sequence[_Table]], shared: Sequence[str], main: str) -> dict[str, Any] | None:
    if TOP_P not in tables or main == TOP_P:
        return None
    ours, theirs = tables[main][0].rows, tables[TOP_P][0].rows  # of the first seed
    worst = min(shared, key=lambda id: ours[id]["reward"] - theirs[id]["reward"])
    if ours[worst]["reward"] >= theirs[worst]["reward"]:
        return None
    a, b = ours[worst], theirs[worst]
    return {
        "prompt": words(a["prompt"]),
        "aisp": words(a["completion"]),
        "aisp_reward": a["reward"],
        "best_of_n": words(b["completion"]),
        "best_of_n_reward": b["reward"],
    }


def text(result: Comparison) -> str:
    """The comparison as two tables for a terminal: what the arms reach, and what that costs."""
    main = result.main
    names = list(dict.fromkeys(name for arm in result.arms for name in arm.held_out))
    reach = [["", "samples", "reward", f"{main} minus it", *(f"held out: {n}" for n in names), "NLL / token", "div"]]
    spend = [["", "std", "area", f"{main} wins", "tokens", "drawn tokens", "reward calls", "seconds"]]
    for arm in result.arms:
        ours = arm.name == main
        cells = [arm.name, f"{arm.samples:g}", _short(arm.reward), "" if ours else _short(arm.versus)]
        cells += [_short(arm.held_out[n]) if n in arm.held_out else "" for n in names]
        reach.append([*cells, _short(arm.nll), f"{arm.diversity.mean:.2f}"])
        quality = ("" if v is None else f"{v:.2f}" for v in (arm.std, arm.auc))
        costs = ("" if v is None else f"{v:.0f}" for v in (arm.model_tokens, arm.reward_calls, arm.seconds))
        spend.append(
            [arm.name, *quality, "" if ours or arm.won is None else f"{arm.won:.0%}", f"{arm.num_tokens:.0f}", *costs]
        )
    out = [*aligned(reach), "", *aligned(spend)]
    out.append("std: of the mean reward over seeds. area: the best reward so far, averaged over the samples.")
    out.append("drawn tokens, reward calls: of a prompt. seconds: of the arm")
    most = max(arm.prompts for arm in result.arms)
    left_out = f"; {result.left_out} that failed in some arm are left out" if result.left_out else ""
    out.append(f"over {most} prompts{left_out}")
    for arm in result.arms:
        if arm.prompts < most:
            out.append(f"{arm.name}: over the {arm.prompts} of them with a reward")
    if loss := result.loss:
        out += [
            "",
            f"where {main} loses most to {TOP_P}:",
            f"prompt     {loss['prompt']}",
            f"{main:10} {loss['aisp']}   [{loss['aisp_reward']:.3f}]",
            f"best-of-n  {loss['best_of_n']}   [{loss['best_of_n_reward']:.3f}]",
        ]
    elif any(arm.name == TOP_P for arm in result.arms):
        out.append(f"on no prompt does {main} lose to {TOP_P} (first seed)")
    return "\n".join(out)


def _short(cell: Interval | None) -> str:
    return "" if cell is None else f"{cell.mean:.2f} [{cell.low:.2f}, {cell.high:.2f}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
