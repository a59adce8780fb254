"""Arms of a comparison, and what their tables say side by side: means over the same prompts with paired intervals.
Reads finished outputs; runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aisp_dist.config import Aisp, BestOfN, ConfigError, Gaussian, Method, Nucleus, Run
from aisp_dist.metrics import Interval, diversity, interval
from aisp_dist.place import Place
from aisp_dist.summary import words

AISP, TOP_P, GAUSSIAN, SHUFFLED, BASE = (
    "aisp",
    "best-of-n top-p",
    "best-of-n gaussian",
    "aisp, rewards shuffled",
    "base",
)


def arms(run: Run) -> dict[str, Method]:
    """The methods that compare runs, all at the same number of samples. What the configuration's own method does not
    say (the nucleus of an AISP configuration, say) is the method's default."""
    own = run.method
    size = {"num_samples": own.num_samples, "num_iterations": own.num_iterations}
    aisp = own if isinstance(own, Aisp) else Aisp(**size)
    nucleus, gaussian = Nucleus(top_p=0.95), Gaussian(gaussian=aisp.sigma2)
    if isinstance(own, BestOfN) and isinstance(own.sampling_, Nucleus):
        nucleus = own.sampling_
    if isinstance(own, BestOfN) and isinstance(own.sampling_, Gaussian):
        gaussian = own.sampling_
    return {
        TOP_P: BestOfN(**size, sampling_=nucleus),
        GAUSSIAN: BestOfN(**size, sampling_=gaussian),
        AISP: aisp.model_copy(update={"shuffle_rewards": False}),
        SHUFFLED: aisp.model_copy(update={"shuffle_rewards": True}),
    }


@dataclass(frozen=True)
class Arm:
    """Means of one arm over the prompts that every arm finished. versus: AISP's reward minus this arm's, paired."""

    name: str
    prompts: int
    samples: float
    reward: Interval
    versus: Interval
    nll: Interval
    diversity: Interval
    num_tokens: float
    held_out: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Every arm, and the prompt on which AISP loses most to best-of-n top-p, with both answers.
    left_out: prompts that failed in some arm."""

    arms: tuple[Arm, ...]
    loss: dict[str, Any] | None
    left_out: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def compare(outputs: Mapping[str, Sequence[Place]], held_out: Sequence[str]) -> Comparison:
    """`outputs`: for each arm its finished outputs, one a seed. Values are averaged over seeds, then over prompts."""
    tables = {arm: [_rows(path) for path in paths] for arm, paths in outputs.items()}
    everything = [rows.keys() for seeds in tables.values() for rows in seeds]
    if not set.intersection(*map(set, everything)):
        raise ConfigError(
            "no prompt was finished by every arm: nothing to compare; the reasons are in each arm's failed/"
        )
    shared = sorted(set.intersection(*map(set, everything)), key=list(everything[0]).index)
    seen = set.union(*map(set, everything))

    def column(arm: str, value: Any) -> np.ndarray:  # [P], mean over seeds
        by_seed: np.ndarray = np.array([[value(rows[id]) for id in shared] for rows in tables[arm]], dtype=np.float64)
        mean: np.ndarray = by_seed.mean(axis=0)
        return mean

    aisp = column(AISP, lambda row: row["reward"])
    found = []
    for name in (BASE, *tables):
        base = name == BASE
        arm, prefix = (AISP, "base_") if base else (name, "")
        reward = column(arm, lambda row, p=prefix: _number(row[f"{p}reward"]))
        finite = np.isfinite(reward)
        found.append(
            Arm(
                name=name,
                prompts=int(finite.sum()),
                samples=1.0 if base else float(column(arm, lambda row: row["samples_spent"]).mean()),
                reward=interval(reward[finite]),
                versus=interval((aisp - reward)[finite]),
                nll=interval(column(arm, lambda row, p=prefix: row[f"{p}nll"])),
                diversity=interval(
                    column(arm, lambda row, b=base: diversity(words_of(row["base_completion" if b else "completion"])))
                ),
                num_tokens=float(column(arm, lambda row, p=prefix: row[f"{p}num_tokens"]).mean()),
                held_out={
                    reward_name: interval(values[np.isfinite(values)])
                    for reward_name in held_out
                    for values in [column(arm, lambda row, p=prefix, n=reward_name: _score(row[f"{p}rewards"], n))]
                    if np.isfinite(values).any()
                },
            )
        )
    return Comparison(tuple(found), _loss(tables, shared), len(seen) - len(shared))


def _rows(output: Place) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in output.dataset("data").to_table().to_pylist()}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _score(scores: Sequence[Mapping[str, Any]], name: str) -> float:
    return _number(next((score["value"] for score in scores if score["name"] == name), None))


def words_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _loss(tables: Mapping[str, Sequence[Mapping[str, Any]]], shared: Sequence[str]) -> dict[str, Any] | None:
    ours, theirs = tables[AISP][0], tables[TOP_P][0]
    worst = min(shared, key=lambda id: ours[id]["reward"] - theirs[id]["reward"], default=None)
    if worst is None or ours[worst]["reward"] >= theirs[worst]["reward"]:
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
    """The comparison as a table for a terminal."""
    names = list(dict.fromkeys(name for arm in result.arms for name in arm.held_out))
    heads = [
        "",
        "samples",
        "reward",
        "AISP minus it",
        *(f"held out: {n}" for n in names),
        "NLL / token",
        "diversity",
        "tokens",
    ]
    rows = [heads]
    for arm in result.arms:
        cells = [arm.name, f"{arm.samples:g}", str(arm.reward), "" if arm.name == AISP else str(arm.versus)]
        cells += [str(arm.held_out[n]) if n in arm.held_out else "" for n in names]
        rows.append([*cells, str(arm.nll), str(arm.diversity), f"{arm.num_tokens:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    out = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    if result.left_out:
        out.append(f"{result.left_out} prompts failed in some arm and are left out of all")
    if result.loss is None:
        out.append("on no prompt does AISP lose to best-of-n top-p")
    else:
        loss = result.loss
        out += [
            "",
            "where AISP loses most to best-of-n top-p:",
            f"prompt     {loss['prompt']}",
            f"aisp       {loss['aisp']}   [{loss['aisp_reward']:.3f}]",
            f"best-of-n  {loss['best_of_n']}   [{loss['best_of_n_reward']:.3f}]",
        ]
    return "\n".join(out)
