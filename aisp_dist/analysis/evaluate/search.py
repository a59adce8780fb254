"""Measures of sampled rows by the base model: states.py over prompts and trials, or why a measure is left out.

Shapes: P prompts, K iterations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from aisp_dist.analysis.evaluate import projections, states
from aisp_dist.analysis.evaluate.texts import left_out
from aisp_dist.analysis.evaluate.trials import last_round
from aisp_dist.analysis.metrics import interval, spread
from aisp_dist.analysis.outputs import Output, Row
from aisp_dist.config import ConfigError, Generator, Search
from aisp_dist.data.render import Unrenderable, render
from aisp_dist.engine import model
from aisp_dist.engine.lm import LM
from aisp_dist.records import Round


class _Answer(NamedTuple):
    """A sampled row, and the round after its last iteration."""

    row: Row
    round: Round


def measures(
    trials: Sequence[Output], sampled: Sequence[list[Row]], generator: Generator, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """`kl`, `flips` and `projections` as far as the outputs keep what they need, and what is left out, with the reason.
    Raises ConfigError for a base model that cannot be used."""
    lm, method = model.load(generator), trials[0].run.method
    answers = [
        [_Answer(row, last_round(trial, row, _tokens(lm, trial, row))) for row in rows]
        for trial, rows in zip(trials, sampled, strict=True)
    ]
    everything = [answer for trial in answers for answer in trial]
    found: dict[str, Any] = {}
    omitted: dict[str, str] = {}
    untraced = isinstance(method, Search) and not all(answer.row["trace"] for answer in everything)
    trace = "the output keeps no trace of the search; a run with save.trace: true does"
    moved_by_noise = any(answer.round.sampling.sigma2 for answer in everything)
    if not isinstance(method, Search):
        omitted["kl"] = f"undefined for {method.kind}: its answer is not drawn under one control; nll is there"
    elif not moved_by_noise:
        omitted["kl"] = "undefined with sigma2: 0, since there is no control; nll is there"
    elif untraced:
        omitted["kl"] = trace
    else:
        found["kl"], reasons = _kl(lm, answers, generator)
        if reasons:
            omitted["kl"] = left_out(reasons, len(everything))
    if not moved_by_noise:
        why = f"{method.kind} with these settings moves no pre-logits by noise"
    elif untraced:
        why = trace
    elif any(answer.row["tokens"] is None for answer in everything):
        why = "the output keeps no tokens of its selected answers; a run with save.candidates: {top_bottom: 1} does"
    else:
        found["flips"], moved = _flips(lm, answers, generator.max_new_tokens)
        found["projections"] = _projections(lm, moved, seed)
        if found["projections"] is None:
            omitted["projections"] = f"no token comes {projections.LEAST} times in the sampled answers"
        return found, omitted
    return found, omitted | {"flips": why, "projections": why}


def _tokens(lm: LM, output: Output, row: Row) -> tuple[int, ...]:
    """The prompt's tokens as in the run. Raises ConfigError where there is another number of them."""
    limit = output.run.prompts.max_tokens
    if lm.context_length is not None:
        limit = min(limit, lm.context_length - output.run.generator.max_new_tokens)
    try:
        tokens = render(output.prompt(row), output.run.prompts, lm.tokenizer, limit)
    except Unrenderable:
        tokens = ()
    if len(tokens) != row["prompt_tokens"]:
        raise ConfigError(
            f"prompt {row['id']!r} of {output} has {len(tokens)} tokens now and had {row['prompt_tokens']} in the "
            "run: other versions of the software render it differently; install those of run.json, or give --no-model"
        )
    return tokens


def _kl(lm: LM, answers: Sequence[list[_Answer]], settings: Generator) -> tuple[dict[str, Any] | None, list[str]]:
    values: list[dict[str, tuple[float, float, float]]] = []
    reasons: list[str] = []
    for trial in answers:
        drawn = states.drawn(lm, [answer.round for answer in trial], settings.max_new_tokens, settings.stop)
        reasons += [why for why in drawn.values() if isinstance(why, str)]
        values.append(
            {
                round.prompt_id: states.kl(lm, round, tokens, settings.max_new_tokens)
                for _, round in trial
                if not isinstance(tokens := drawn[round.prompt_id], str)
            }
        )
    ids = [id for id in values[0] if all(id in trial for trial in values)]
    if not ids:
        return None, reasons
    means = np.mean([[trial[id] for id in ids] for trial in values], axis=0)
    return {name: interval(x) for name, x in zip(("estimate", "exact", "control"), means.T, strict=True)}, reasons


_Moved = list[tuple[list[int], np.ndarray, np.ndarray]]  # tokens of a selected answer, z [T, D] and v [T, D]


def _flips(lm: LM, answers: Sequence[list[_Answer]], num_steps: int) -> tuple[list[dict[str, Any]], _Moved]:
    """Flip rates by iteration, over the prompts whose search got there: method.spend ends each when it will."""
    moved: _Moved = []

    def of_row(row: Row, round: Round) -> dict[int, float]:
        best = row["best_iteration"], row["best_sample"]
        z_TD = states.states(lm, round.prompt_tokens, row["tokens"])
        plain_T = states.argmax(lm, z_TD)
        rates = {}
        for k, v_TD in enumerate(states.moves(lm, round, len(row["curve"]), num_steps, best)):
            rates[k] = states.flips(lm, plain_T, z_TD, v_TD)
            if k == best[0]:
                moved.append((row["tokens"], z_TD.cpu().numpy(), v_TD[: len(z_TD)].cpu().numpy()))
        return rates

    by_trial = [pd.DataFrame({round.prompt_id: of_row(row, round) for row, round in trial}).T for trial in answers]
    rates_PK = pd.concat(by_trial).groupby(level=0).mean().sort_index(axis=1)  # over the trials that got there
    found = [{"iteration": k, "rate": spread(x.to_numpy()), "prompts": int(x.count())} for k, x in rates_PK.items()]
    return found, moved


def _projections(lm: LM, moved: _Moved, seed: int) -> list[dict[str, Any]] | None:
    """Of the token that the selected answers have most often (end tokens aside; of equals the smallest id): z where it
    was produced, and z + v with the noise that produced it."""
    counts = Counter(token for tokens, *_ in moved for token in tokens if token not in lm.eos_ids)
    token, count = min(counts.items(), key=lambda entry: (-entry[1], entry[0]), default=(0, 0))
    if count < projections.LEAST:
        return None
    here = [np.array(tokens) == token for tokens, *_ in moved]
    z_MD = np.concatenate([z[at] for at, (_, z, _) in zip(here, moved, strict=True)])
    v_MD = np.concatenate([v[at] for at, (*_, v) in zip(here, moved, strict=True)])
    return projections.project(z_MD, z_MD + v_MD, lm.tokenizer.decode([token]), seed)
