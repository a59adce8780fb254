"""All measures of finished outputs as one JSON document, and the document as a table for a terminal.

A value is averaged over the seeds of a run by prompt, then over the prompts that are done with every seed, with a 95 %
bootstrap interval over prompts. Measures of numbers and texts take every row; those that ask a model take `sample`
prompts.

Shapes: P prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aisp_dist.analysis import outputs
from aisp_dist.analysis.compare import aligned
from aisp_dist.analysis.evaluate import evaluated, texts
from aisp_dist.analysis.judge import Pair, Verdict, win_rate
from aisp_dist.analysis.metrics import Interval, diversity, repetition, spread
from aisp_dist.analysis.outputs import Columns, Output, Row
from aisp_dist.config import ConfigError, Generator
from aisp_dist.records import Prompt
from aisp_dist.rewards import RewardError, RewardFn

CORRELATION = "reward_length_correlation"
TEXTS = {"diversity": diversity, "repetition": repetition, "immediate_repeat": texts.immediate_repeat}


@dataclass(frozen=True)
class Asked:
    """What to measure beyond the rows. generator: with a path that can be opened; None asks no base model. rewards:
    further held-out ones, ready to score. judge: compares pairs of answers."""

    sample: int = 64
    seed: int = 0
    generator: Generator | None = None
    embed: texts.Embed | None = None
    rewards: Mapping[str, RewardFn] = field(default_factory=dict)
    judge: Callable[[Sequence[Pair]], list[Verdict]] | None = None


def evaluate(runs: Sequence[Output], asked: Asked, against: Output | None = None) -> dict[str, Any]:
    """The document. runs: finished outputs of one run with different seeds. against: one of another method on the same
    prompts. Raises ConfigError where the prompts are not the same."""
    tables = [outputs.read(run, TEXTS) for run in runs]
    for table in tables[1:]:
        outputs.check_prompts(tables[0], table)
    shared = outputs.in_all(tables)
    if shared.empty:
        raise ConfigError("no prompt is done with every seed, so there is nothing to average; see each one's failed/")
    ends = sum((Counter(table.rows["about", "finish_reason"]) for table in tables), start=Counter[str]())
    document: dict[str, Any] = {
        "prompts": len(shared),
        "left_out": len(outputs.in_any([table.rows.index for table in tables])) - len(shared),
        "trials": len(runs),  # seeds, by the name that scripts know
        "measures": _measures(tables, shared, asked.seed),
        "reward_std_over_trials": _deviation(tables, shared),
        "finish_reasons": {reason: count / ends.total() for reason, count in sorted(ends.items())},
        "against": None,
        **dict.fromkeys(("kl", "flips", "win_rate")),
        "omitted": {},
    }
    other = None if against is None else outputs.read(against, TEXTS)
    if other is not None:
        outputs.check_prompts(tables[0], other)
        document["against"] = _against(tables, shared, other)
    drawn = np.random.default_rng(asked.seed).choice(len(shared), min(asked.sample, len(shared)), replace=False)
    ids = [shared[place] for place in sorted(drawn)]
    sampled = [evaluated.rows(table, ids) for table in tables]
    document["sampled"] = len(ids)
    _add_coherence(document, runs, sampled, asked.embed)
    _add_rewards(document, runs, sampled, asked.rewards)
    theirs = {row["id"]: row["base_completion"] for row in sampled[0]}
    if other is not None:
        both = outputs.rows(other, [id for id in ids if id in other.rows.index], ["id", "completion"])
        theirs = {row["id"]: outputs.answer(row["completion"]) for row in both}
    _add_win_rate(document, runs[0], sampled[0], theirs, "base" if against is None else str(against), asked)
    if asked.generator is None:
        document["omitted"] |= dict.fromkeys(("kl", "flips"), "they ask the base model: --no-model, or a server")
    else:
        from aisp_dist.analysis.evaluate import search  # the base model's part, with torch

        found, omitted = search.measures(runs, sampled, asked.generator)
        document |= found
        document["omitted"] |= omitted
    return document


def _mean(of_seeds: Iterable[np.ndarray]) -> np.ndarray:
    """[P] means over seeds, NaN where one has no value."""
    mean: np.ndarray = np.mean(list(of_seeds), axis=0)
    return mean


def measure(selected: np.ndarray, base: np.ndarray) -> dict[str, Interval | None]:
    """One entry of `measures`; the difference is paired."""
    return {"selected": spread(selected), "base": spread(base), "difference": spread(selected - base)}


def _measures(tables: Sequence[Columns], ids: Any, seed: int) -> dict[str, dict[str, Interval | None]]:
    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        selected, base = (_mean(t.values(name, ids, base) for t in tables) for base in (False, True))
        return selected, base

    found = {name: measure(*pair(name)) for name in tables[0].rows["selected"]}
    sides = [(reward, length) for reward, length in zip(pair("reward"), pair("tokens"), strict=True)]
    names = ("selected", "base", "difference")
    return found | {CORRELATION: dict(zip(names, texts.correlations(*sides, seed=seed), strict=True))}


def _deviation(tables: Sequence[Columns], ids: Any) -> float | None:
    """Standard deviation over seeds of the average reward (Kanai et al., Table 1)."""
    means = [float(table.values("reward", ids).mean()) for table in tables]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def _against(tables: Sequence[Columns], ids: Any, other: Columns) -> dict[str, Any]:
    both = ids[ids.isin(other.rows.index)]
    names = [name for name in tables[0].rows["selected"] if name in other.rows["selected"]]
    differences = {
        name: spread(_mean(t.values(name, both) for t in tables) - other.values(name, both)) for name in names
    }
    return {"output": str(other.output), "prompts": len(both), "differences": differences}


def _add_coherence(
    document: dict[str, Any], runs: Sequence[Output], sampled: Sequence[list[Row]], embed: texts.Embed | None
) -> None:
    if embed is None:
        document["omitted"]["coherence"] = f"it needs --embeddings, as {texts.SIMCSE}, which ARGS and RE-Control use"
        return

    def side(column: str) -> np.ndarray:
        asked = [[_asked(run.prompt(row)) for row in rows] for run, rows in zip(runs, sampled, strict=True)]
        said = [[outputs.answer(row[column]) for row in rows] for rows in sampled]
        return _mean(texts.coherence(embed, *pair) for pair in zip(asked, said, strict=True))

    document["measures"]["coherence"] = measure(side("completion"), side("base_completion"))


def _asked(prompt: Prompt) -> str:
    """A prompt as one text: what all its messages say, without the words that mark their roles."""
    return prompt.content if isinstance(prompt.content, str) else "\n".join(text for _, text in prompt.content)


def _add_rewards(
    document: dict[str, Any], runs: Sequence[Output], sampled: Sequence[list[Row]], rewards: Mapping[str, RewardFn]
) -> None:
    for name, score in rewards.items():
        reasons: list[str] = []
        values = [
            [_scores(score, run.prompt(row), row, reasons) for row in rows]
            for run, rows in zip(runs, sampled, strict=True)
        ]
        document["measures"][f"reward {name}"] = measure(*_mean(np.array(v, dtype=np.float64) for v in values).T)
        if reasons:
            count = 2 * sum(map(len, sampled))
            document["omitted"][f"reward {name}"] = texts.left_out(reasons, count, "answers")


def _scores(score: RewardFn, prompt: Prompt, row: Row, reasons: list[str]) -> tuple[float, float]:
    """Scores of the selected and the base answer, NaN where there is none."""
    try:
        found = score(prompt, [outputs.answer(row["completion"]), row["base_completion"]])
    except RewardError as error:
        reasons += [str(error)] * 2
        return float("nan"), float("nan")
    reasons += [one.reason for one in found if one.reason is not None]
    selected, base = (float("nan") if one.value is None else one.value for one in found)
    return selected, base


def _add_win_rate(
    document: dict[str, Any], output: Output, rows: Sequence[Row], theirs: Mapping[str, str], against: str, asked: Asked
) -> None:
    """The first seed's selected answers against others by id: those of one prompt are no independent comparisons."""
    if asked.judge is None:
        document["omitted"]["win_rate"] = "it needs --judge URL and --judge-model NAME"
        return
    pairs = [
        Pair(row["id"], _asked(output.prompt(row)), outputs.answer(row["completion"]), theirs[row["id"]])
        for row in rows
        if row["id"] in theirs
    ]
    verdicts = asked.judge(pairs)
    reasons = [verdict.reason or "" for verdict in verdicts if verdict.outcome == "unparsed"]
    if reasons:
        document["omitted"]["win_rate"] = texts.left_out(reasons, len(pairs), "comparisons")
    if len(reasons) < len(pairs):
        rate = win_rate(verdicts)
        shares = {"win": rate.win.mean, "tie": rate.tie.mean, "loss": rate.loss.mean, "unparsed": rate.unparsed}
        document["win_rate"] = {"against": against, **shares, "interval": [rate.win.low, rate.win.high]}


def text(document: Mapping[str, Any]) -> str:
    """The document as a table for a terminal."""
    rows = [("", "base", "selected", "difference")]
    for name, sides in document["measures"].items():
        rows.append((name, *(str(Interval(*sides[s])) if sides[s] else "" for s in ("base", "selected", "difference"))))
    out = aligned(rows)
    count, left = document["trials"], document["left_out"]
    out.append(f"{document['prompts']} prompts, {count} seed{'s' * (count > 1)}, {document['sampled']} sampled")
    if left:
        out.append(f"{left} prompts are not done with every seed and are left out")
    if count > 1:
        out.append(f"standard deviation of the average reward over seeds: {document['reward_std_over_trials']:.4f}")
    ends = document["finish_reasons"].items()
    out.append("selected answers end by " + ", ".join(f"{why} {share:.1%}" for why, share in ends))
    if other := document["against"]:
        out += ["", f"selected answers minus those of {other['output']}, {other['prompts']} prompts"]
        out += [f"  {name}: {Interval(*found)}" for name, found in other["differences"].items() if found]
    if won := document["win_rate"]:
        shares = ", ".join(f"{what} {won[what]:.1%}" for what in ("win", "tie", "loss"))
        low, high = won["interval"]
        out.append(
            f"judge, against {won['against']}: {shares}, unparsed {won['unparsed']}; win [{low:.1%}, {high:.1%}]"
        )
    if kl := document["kl"]:
        out.append("KL in nats: " + ", ".join(f"{name} {Interval(*found)}" for name, found in kl.items()))
    if flips := document["flips"]:
        out.append("flip rate by iteration: " + ", ".join(f"{one['rate'][0]:.3f}" for one in flips))
    return "\n".join([*out, *(f"left out: {name}: {why}" for name, why in document["omitted"].items())])
