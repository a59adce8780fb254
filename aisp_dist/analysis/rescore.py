"""Other rewards over the stored candidates of a finished prompt. Pure: a row in, a Result out; knows neither files nor
models.

Where fewer candidates were kept than drawn (save.candidates other than `all`), the answer is the best of those kept,
`curve` is the best so far among them, `quarantined` counts only them, standardized rewards take mean and deviation
from those kept of the first iteration, and a trace entry whose samples are not all there has no rewards. ESS, KL,
weights and `samples_spent` describe the search and stay.

An answer that ends inside its thinking (generator.thinking: strip) has no text to score, so it keeps its null reward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

from aisp_dist.config import Run
from aisp_dist.data import thinking
from aisp_dist.data.thinking import UNFINISHED
from aisp_dist.output import fingerprint
from aisp_dist.records import BASE_ITERATION, Candidate, Done, Failed, Iteration, Original, Prompt, Result, Score
from aisp_dist.rewards.combine import Frozen, combine

Row = Mapping[str, Any]
Scorer = Callable[[str, Sequence[str]], list[Score]]  # reward name, texts


def unchanged(old: Mapping[str, Any], new: Mapping[str, Any]) -> frozenset[str]:
    """Names of the rewards whose scores stay the same: settings (except `weight` and `use`) and digests are equal. old,
    new: the components of the fingerprints. Another version of vLLM, as of transformers, leaves them the same."""

    def identity(components: Mapping[str, Any], name: str) -> tuple[Any, ...]:
        known = fingerprint.reward_settings(components["rewards"][name], None)  # 0.1.0 has names of files there too
        settings = {key: value for key, value in known.items() if key not in ("weight", "use")}
        keys = (f"rewards.{name}", f"rewards.{name}.chat_template")
        return settings, [components["digests"].get(key) for key in keys]

    both = old["rewards"].keys() & new["rewards"].keys()
    return frozenset(name for name in both if identity(old, name) == identity(new, name))


def rescore(run: Run, prompt: Prompt, row: Row, kept: Row, known: Collection[str], score: Scorer) -> Result:
    """The row of data/ and its row of candidates/, of which at least one was kept, under the rewards of `run`.

    known: rewards whose stored scores hold. Failed where no candidate has a finite reward. `nll` is None where another
    answer than the row's own is selected: only the base model knows it.
    """
    drawn: Sequence[Row] = kept["candidates"]
    texts = [c["text"] for c in drawn] + [row["base_completion"]]
    place = {(c["iteration"], c["sample"]): i for i, c in enumerate(drawn)}
    old_best, base_at = place.get((row["best_iteration"], row["best_sample"])), len(drawn)
    selecting = {name: reward for name, reward in run.rewards.items() if reward.use == "select"}
    no_answer = _no_answer(run, row, drawn)
    table: dict[str, list[Score | None]] = {}
    for name, settings in run.rewards.items():
        stored = _stored(name, settings.use, row, drawn, old_best) if name in known else [None] * len(texts)
        table[name] = [null if s is None else s for s, null in zip(stored, no_answer, strict=True)]
    base_values = _values(row["base_rewards"])
    if all(name in known and base_values.get(name, 0.0) is None for name in selecting):
        for name in selecting:  # quarantined or not applicable: either way there is no base reward
            table[name][base_at] = Score(None)

    def scores(name: str, which: Sequence[int]) -> list[Score]:
        """Scores of these texts; those that are not stored are asked for."""
        missing = [i for i in which if table[name][i] is None]
        for i, found in zip(missing, score(name, [texts[i] for i in missing]) if missing else [], strict=True):
            table[name][i] = found
        return [one for i in which if (one := table[name][i]) is not None]

    raw = {name: scores(name, range(len(texts))) for name in selecting}
    frozen: Frozen = None
    combined: list[Score] = []
    for _, group in groupby(range(len(drawn)), key=lambda i: drawn[i]["iteration"]):
        iteration = list(group)
        of_it = {name: [values[i] for i in iteration] for name, values in raw.items()}
        found, frozen = combine(selecting, run.combine, of_it, frozen)
        combined += found
    (base_total,), _ = combine(selecting, run.combine, {name: [values[-1]] for name, values in raw.items()}, frozen)

    def raws(i: int) -> tuple[tuple[str, float | None], ...]:
        return tuple((name, values[i].value) for name, values in raw.items())

    candidates = []
    for i, (c, total) in enumerate(zip(drawn, combined, strict=True)):
        new = {"token_ids": tuple(c["token_ids"]), "reward": total.value, "rewards": raws(i), "reason": total.reason}
        candidates.append(Candidate(**{**c, **new}))
    finite = [(reward, -i) for i, c in enumerate(candidates) if (reward := c.eligible_reward) is not None]
    if not finite and any(c.reward is not None for c in candidates):
        return Failed(prompt, "no candidate that was kept is within method.limit")
    if not finite:
        return Failed(prompt, f"no candidate has a finite reward; the first says: {candidates[0].reason}")
    at = -max(finite)[1]  # the earliest of equals
    reports = {name: scores(name, [at, base_at]) for name in run.rewards if name not in selecting}
    extra = [tuple((name, pair[side].value) for name, pair in reports.items()) for side in (0, 1)]
    selected = candidates[at]
    stays = old_best is not None and selected.token_ids == candidates[old_best].token_ids
    return Done(
        prompt=prompt,
        prompt_tokens=row["prompt_tokens"],
        prompt_hash=row["prompt_hash"],
        best=replace(selected, rewards=(*selected.rewards, *extra[0])),
        base=Candidate(
            BASE_ITERATION,
            0,
            row["base_completion"],
            (0,) * row["base_num_tokens"],  # only their number is stored, and only that is used
            "stop",
            base_total.value,
            (*raws(base_at), *extra[1]),
        ),
        nll=row["nll"] if stays else None,
        base_nll=row["base_nll"],
        samples_spent=row["samples_spent"],
        quarantined=sum(c.reason is not None for c in candidates),
        curve=tuple(_best(c for c in candidates if c.iteration <= k) for k in range(len(row["curve"]))),
        candidates=tuple(candidates),
        trace=tuple(_iteration(k, step, candidates) for k, step in enumerate(kept["trace"])),
        original=_original(run, prompt, row, known, frozen, score),
    )


def _original(
    run: Run, prompt: Prompt, row: Row, known: Collection[str], frozen: Frozen, score: Scorer
) -> Original | None:
    """Scores of the answer that the prompt came with. A stored null of a reward that selects is asked for again, since
    it does not say whether the reward is quarantined or does not apply."""
    if prompt.original is None:
        return None
    stored, texts = _values(row["original_rewards"]), [prompt.original]
    if run.generator.thinking == "strip":
        try:
            texts = [thinking.answer(prompt.original, run.generator.thinking_tags)]
        except thinking.Unfinished:
            texts = []

    selecting = {name: reward for name, reward in run.rewards.items() if reward.use == "select"}

    def ask(name: str) -> Score:
        if not texts:
            return Score(None, UNFINISHED)
        if name in known and name in stored and (stored[name] is not None or name not in selecting):
            return Score(stored[name])
        return score(name, texts)[0]

    found = {name: ask(name) for name in (*selecting, *(name for name in run.rewards if name not in selecting))}
    (total,), _ = combine(selecting, run.combine, {name: [found[name]] for name in selecting}, frozen)
    return Original(total.value, tuple((name, one.value) for name, one in found.items()))


def _no_answer(run: Run, row: Row, drawn: Sequence[Row]) -> list[Score | None]:
    """For each candidate and, last, the base answer: a null score where it ends inside its thinking, else None. The
    base answer's reason is not stored, but no reward was asked for a text without an answer: a base answer whose scores
    are all null counts as one."""
    if run.generator.thinking == "keep":
        return [None] * (len(drawn) + 1)
    scored = row["base_reward"] is not None or any(s["value"] is not None for s in row["base_rewards"])
    found: list[Score | None] = []
    for c in drawn:
        ends = UNFINISHED in (c["reason"] or "") and not c["within"]
        found.append(_score(c["rewards"][0]["name"], _values(c["rewards"]), c["reason"]) if ends else None)
    return [*found, None if scored else Score(None, UNFINISHED)]


def _stored(
    name: str, use: Literal["select", "report"], row: Row, drawn: Sequence[Row], best: int | None
) -> list[Score | None]:
    """The stored score of each candidate and, last, of the base answer; None where the reward must be asked. A null is
    a reward that does not apply or a quarantined one. A candidate's reason says which; nothing does for the base answer
    and for held-out rewards, and a report needs no distinction."""
    found = [_score(name, _values(c["rewards"]), c["reason"]) for c in drawn]
    selected_by = found[0] is not None

    def held(scores: Sequence[Row], null_applies_not: bool) -> Score | None:
        value = _values(scores).get(name)
        return Score(value) if value is not None or use == "report" or null_applies_not else None

    if best is not None and not selected_by:  # then it was held out, and asked for what was selected
        found[best] = held(row["rewards"], False)
    return [*found, held(row["base_rewards"], selected_by and row["base_reward"] is not None)]


def _values(scores: Sequence[Row]) -> dict[str, float | None]:
    return {score["name"]: score["value"] for score in scores}


def _score(name: str, values: Mapping[str, float | None], reason: str | None) -> Score | None:
    """reason: as combine.py joins those of quarantined rewards, `name: reason; name: reason`."""
    if name not in values or values[name] is not None or reason is None:
        return Score(values[name]) if name in values else None
    told = re.split(f"(?:^|; )({'|'.join(map(re.escape, values))}): ", reason)
    return Score(None, dict(zip(told[1::2], told[2::2], strict=True)).get(name))


def _iteration(k: int, step: Row, candidates: Sequence[Candidate]) -> Iteration:
    drawn = [c for c in candidates if c.iteration == k]
    whole = len(drawn) == len(step["lengths"])
    finite = [reward for c in drawn if (reward := c.eligible_reward) is not None] if whole else []
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in step.items()}
    values |= {"mean_reward": sum(finite) / len(finite) if finite else None, "best_reward": max(finite, default=None)}
    return Iteration(**values)


def _best(candidates: Iterable[Candidate]) -> float | None:
    return max((r for c in candidates if (r := c.eligible_reward) is not None), default=None)
