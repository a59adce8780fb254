"""All measures of finished outputs as one JSON document, and the document as a table for a terminal.

A value is averaged over trials (the same run with other seeds) by prompt, then over the prompts that every trial
finished, with a 95 % bootstrap interval over prompts. Cheap measures take every row; those that ask a model take a
sample of `sample` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aisp_dist.analysis.compare import words_of
from aisp_dist.analysis.evaluate import outputs, texts
from aisp_dist.analysis.evaluate.outputs import Output, Row, Table
from aisp_dist.analysis.judge import Pair, Verdict, win_rate
from aisp_dist.analysis.metrics import Interval, spread
from aisp_dist.config import ConfigError, Generator
from aisp_dist.records import Prompt
from aisp_dist.rewards import RewardError, RewardFn

CORRELATION = "reward_length_correlation"


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


def evaluate(trials: Sequence[Output], asked: Asked, against: Output | None = None) -> dict[str, Any]:
    """The document. trials: finished outputs of one run with different seeds. against: one of another method on the
    same prompts. Raises ConfigError where the prompts are not the same."""
    tables = [outputs.read(trial) for trial in trials]
    for trial, table in zip(trials[1:], tables[1:], strict=True):
        outputs.check_prompts(trials[0], tables[0], trial, table)
    shared = [id for id in tables[0].ids if all(id in table.ids for table in tables)]
    if not shared:
        raise ConfigError("no prompt is done in every trial, so there is nothing to average; see each one's failed/")
    finished = sum((table.finish for table in tables), start=type(tables[0].finish)())
    document: dict[str, Any] = {
        "prompts": len(shared),
        "left_out": len(set().union(*(table.ids for table in tables))) - len(shared),
        "trials": len(trials),
        "measures": _cheap(tables, shared, asked.seed),
        "reward_std_over_trials": _deviation(tables, shared),
        "finish_reasons": {reason: count / finished.total() for reason, count in sorted(finished.items())},
        "against": None,
        **dict.fromkeys(("kl", "flips", "win_rate", "projections")),
        "omitted": {},
    }
    other = None if against is None else outputs.read(against)
    if against is not None and other is not None:
        outputs.check_prompts(trials[0], tables[0], against, other)
        document["against"] = _against(tables, shared, against, other)
    drawn = np.random.default_rng(asked.seed).choice(len(shared), min(asked.sample, len(shared)), replace=False)
    ids = [shared[place] for place in sorted(drawn)]
    sampled = [outputs.rows(trial, table, ids) for trial, table in zip(trials, tables, strict=True)]
    document["sampled"] = len(ids)
    _add_coherence(document, trials, sampled, asked.embed)
    _add_rewards(document, trials, sampled, asked.rewards)
    theirs = {row["id"]: row["base_completion"] for row in sampled[0]}
    if against is not None and other is not None:
        both = [id for id in ids if id in other.ids]
        theirs = {row["id"]: words_of(row["completion"]) for row in outputs.rows(against, other, both)}
    _add_win_rate(document, trials[0], sampled[0], theirs, "base" if against is None else str(against), asked)
    if asked.generator is None:
        document["omitted"] |= dict.fromkeys(("kl", "flips", "projections"), "they ask the base model: --no-model")
    else:
        from aisp_dist.analysis.evaluate import search  # the base model's part, with torch

        found, omitted = search.measures(trials, sampled, asked.generator, asked.seed)
        document |= found
        document["omitted"] |= omitted
    return document


def _mean(trials: Iterable[np.ndarray]) -> np.ndarray:
    """[P] means over trials, NaN where one has no value."""
    mean: np.ndarray = np.mean(list(trials), axis=0)
    return mean


def measure(selected: np.ndarray, base: np.ndarray) -> dict[str, Interval | None]:
    """One entry of `measures`; the difference is paired."""
    return {"selected": spread(selected), "base": spread(base), "difference": spread(selected - base)}


def _cheap(tables: Sequence[Table], ids: Sequence[str], seed: int) -> dict[str, dict[str, Interval | None]]:
    def pair(name: str) -> tuple[np.ndarray, np.ndarray]:
        selected, base = (_mean(t.values(name, ids, base=side) for t in tables) for side in (False, True))
        return selected, base

    found = {name: measure(*pair(name)) for name in tables[0].selected}
    sides = [(reward, length) for reward, length in zip(pair("reward"), pair("tokens"), strict=True)]
    names = ("selected", "base", "difference")
    return found | {CORRELATION: dict(zip(names, texts.correlations(*sides, seed=seed), strict=True))}


def _deviation(tables: Sequence[Table], ids: Sequence[str]) -> float | None:
    """Standard deviation over trials of the average reward (Kanai et al., Table 1)."""
    means = [float(table.values("reward", ids).mean()) for table in tables]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None


def _against(tables: Sequence[Table], ids: Sequence[str], place: Output, other: Table) -> dict[str, Any]:
    both = [id for id in ids if id in other.ids]
    names = [name for name in tables[0].selected if name in other.selected]
    differences = {
        name: spread(_mean(t.values(name, both) for t in tables) - other.values(name, both)) for name in names
    }
    return {"output": str(place), "prompts": len(both), "differences": differences}


def _add_coherence(
    document: dict[str, Any], trials: Sequence[Output], sampled: Sequence[list[Row]], embed: texts.Embed | None
) -> None:
    if embed is None:
        document["omitted"]["coherence"] = f"it needs --embeddings, as {texts.SIMCSE}, which ARGS and RE-Control use"
        return

    def side(column: str) -> np.ndarray:
        asked = [[_asked(trial.prompt(row)) for row in rows] for trial, rows in zip(trials, sampled, strict=True)]
        said = [[words_of(row[column]) for row in rows] for rows in sampled]
        return _mean(texts.coherence(embed, *pair) for pair in zip(asked, said, strict=True))

    document["measures"]["coherence"] = measure(side("completion"), side("base_completion"))


def _asked(prompt: Prompt) -> str:
    """A prompt as one text: what all its messages say, without the words that mark their roles."""
    return prompt.content if isinstance(prompt.content, str) else "\n".join(text for _, text in prompt.content)


def _add_rewards(
    document: dict[str, Any], trials: Sequence[Output], sampled: Sequence[list[Row]], rewards: Mapping[str, RewardFn]
) -> None:
    for name, score in rewards.items():
        reasons: list[str] = []
        values = [
            [_scores(score, trial.prompt(row), row, reasons) for row in rows]
            for trial, rows in zip(trials, sampled, strict=True)
        ]
        document["measures"][f"reward {name}"] = measure(*_mean(np.array(v, dtype=np.float64) for v in values).T)
        if reasons:
            count = 2 * sum(map(len, sampled))
            document["omitted"][f"reward {name}"] = outputs.left_out(reasons, count, "answers")


def _scores(score: RewardFn, prompt: Prompt, row: Row, reasons: list[str]) -> tuple[float, float]:
    """Scores of the selected and the base answer, NaN where there is none."""
    try:
        found = score(prompt, [words_of(row["completion"]), row["base_completion"]])
    except RewardError as error:
        reasons += [str(error)] * 2
        return float("nan"), float("nan")
    reasons += [one.reason for one in found if one.reason is not None]
    selected, base = (float("nan") if one.value is None else one.value for one in found)
    return selected, base


def _add_win_rate(
    document: dict[str, Any], output: Output, rows: Sequence[Row], theirs: Mapping[str, str], against: str, asked: Asked
) -> None:
    """The first trial's selected answers against others by id: trials of one prompt are no independent comparisons."""
    if asked.judge is None:
        document["omitted"]["win_rate"] = "it needs --judge URL and --judge-model NAME"
        return
    pairs = [
        Pair(row["id"], _asked(output.prompt(row)), words_of(row["completion"]), theirs[row["id"]])
        for row in rows
        if row["id"] in theirs
    ]
    verdicts = asked.judge(pairs)
    reasons = [verdict.reason or "" for verdict in verdicts if verdict.outcome == "unparsed"]
    if reasons:
        document["omitted"]["win_rate"] = outputs.left_out(reasons, len(pairs), "comparisons")
    if len(reasons) < len(pairs):
        rate = win_rate(verdicts)
        shares = {"win": rate.win.mean, "tie": rate.tie.mean, "loss": rate.loss.mean, "unparsed": rate.unparsed}
        document["win_rate"] = {"against": against, **shares, "interval": [rate.win.low, rate.win.high]}


def text(document: Mapping[str, Any]) -> str:
    """The document as a table for a terminal."""
    rows = [("", "base", "selected", "difference")]
    for name, sides in document["measures"].items():
        rows.append((name, *(str(Interval(*sides[s])) if sides[s] else "" for s in ("base", "selected", "difference"))))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    out = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    trials, left = document["trials"], document["left_out"]
    out.append(f"{document['prompts']} prompts, {trials} trial{'s' * (trials > 1)}, {document['sampled']} sampled")
    if left:
        out.append(f"{left} prompts are not done in every trial and are left out")
    if trials > 1:
        out.append(f"standard deviation of the average reward over trials: {document['reward_std_over_trials']:.4f}")
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
    if found := document["projections"]:
        out.append(f"pre-logits of {found[0]['token']!r}, {found[0]['positions']} positions, distance from normal:")
        out += [f"  {one['name']}: base {one['base']['ks']:.3f}, moved {one['moved']['ks']:.3f}" for one in found]
    return "\n".join([*out, *(f"left out: {name}: {why}" for name, why in document["omitted"].items())])
