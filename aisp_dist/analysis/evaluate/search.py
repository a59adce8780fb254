"""Measures of sampled rows by the base model: states.py over prompts and seeds, or why a measure is left out.

Shapes: P prompts, K iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from aisp_dist.analysis.evaluate import states
from aisp_dist.analysis.evaluate.evaluated import last_round
from aisp_dist.analysis.evaluate.texts import left_out
from aisp_dist.analysis.metrics import interval, spread
from aisp_dist.analysis.outputs import Output, Row
from aisp_dist.config import Algorithm1, ConfigError, Generator
from aisp_dist.data.render import Unrenderable, render
from aisp_dist.engine import model
from aisp_dist.engine.lm import LM
from aisp_dist.records import Round

Answer = tuple[Row, Round]  # a sampled row, and the round after its last iteration


def measures(
    runs: Sequence[Output], sampled: Sequence[list[Row]], generator: Generator
) -> tuple[dict[str, Any], dict[str, str]]:
    """`kl` and `flips` as far as the outputs keep what they need, and what is left out, with the reason. Raises
    ConfigError for a base model that cannot be used."""
    lm, method = model.load(generator), runs[0].run.method
    by_seed = [
        [(row, last_round(run, row, _tokens(lm, run, row))) for row in rows]
        for run, rows in zip(runs, sampled, strict=True)
    ]
    everything = [answer for answers in by_seed for answer in answers]
    found: dict[str, Any] = {}
    omitted: dict[str, str] = {}
    searches, noisy = isinstance(method, Algorithm1), any(round.sampling.sigma2 for _, round in everything)
    traced = not searches or all(row["trace"] for row, _ in everything)
    no_trace = "the output keeps no trace of the search; a run with save.trace: true does"
    if not searches:
        omitted["kl"] = f"undefined for {method.name}: its answer is not drawn under one control; nll is there"
    elif not traced:
        omitted["kl"] = no_trace
    else:
        found["kl"], reasons = _kl(lm, by_seed, generator)
        if reasons:
            omitted["kl"] = left_out(reasons, len(everything))
    if not noisy:
        omitted["flips"] = f"{method.name} puts no noise on the pre-logits"
    elif not traced:
        omitted["flips"] = no_trace
    elif any(row["tokens"] is None for row, _ in everything):
        omitted["flips"] = "the output keeps no tokens of its selected answers; save.candidates: {top_bottom: 1} does"
    else:
        found["flips"] = _flips(lm, by_seed, generator.max_new_tokens)
    return found, omitted


def _tokens(lm: LM, output: Output, row: Row) -> tuple[int, ...]:
    """The prompt's tokens as in the run. Raises ConfigError where there is another number of them."""
    max_tokens = output.run.prompts.max_tokens
    if lm.context_length is not None:
        max_tokens = min(max_tokens, lm.context_length - output.run.generator.max_new_tokens)
    try:
        tokens = render(output.prompt(row), output.run.prompts, lm.tokenizer, max_tokens)
    except Unrenderable:
        tokens = ()
    if len(tokens) != row["prompt_tokens"]:
        raise ConfigError(
            f"prompt {row['id']!r} of {output} has {len(tokens)} tokens now and had {row['prompt_tokens']} in the "
            "run: other versions of the software render it differently; install those of run.json, or give --no-model"
        )
    return tokens


def _kl(lm: LM, by_seed: Sequence[list[Answer]], settings: Generator) -> tuple[dict[str, Any] | None, list[str]]:
    """Means over seeds, then over the prompts that have an answer under the control with every seed; the reasons of
    those that have none."""
    found, reasons = [], []
    for answers in by_seed:
        drawn = states.drawn(lm, [round for _, round in answers], settings.max_new_tokens, settings.stop)
        reasons += [why for why in drawn.values() if isinstance(why, str)]
        values = {}
        for _, round in answers:
            if not isinstance(tokens := drawn[round.prompt_id], str):
                values[round.prompt_id] = states.kl(lm, round, tokens, settings.max_new_tokens)
        found.append(pd.DataFrame(values, index=["estimate", "exact", "control"]))
    means = sum(found).dropna(axis=1) / len(found)
    return (None if means.empty else {name: interval(x.to_numpy()) for name, x in means.iterrows()}), reasons


def _flips(lm: LM, by_seed: Sequence[list[Answer]], num_steps: int) -> list[dict[str, Any]]:
    """Flip rates by iteration, over the prompts whose search got there: method.spend ends each when it will."""

    def of_row(row: Row, round: Round) -> list[float]:
        z_TD = states.states(lm, round.prompt_tokens, row["tokens"])
        plain_T, best = states.argmax(lm, z_TD), (row["best_iteration"], row["best_sample"])
        moves = states.moves(lm, round, len(row["curve"]), num_steps, best)
        return [states.flips(lm, plain_T, z_TD, v_TD) for v_TD in moves]

    found = [pd.DataFrame([of_row(*answer) for answer in answers]) for answers in by_seed]  # [P, K]
    rates_PK = pd.concat(found).groupby(level=0).mean()  # over the seeds that got there
    return [{"iteration": k, "rate": spread(x.to_numpy()), "prompts": int(x.count())} for k, x in rates_PK.items()]
