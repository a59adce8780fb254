"""Measures of students on prompts that no teacher relabelled: greedy answers, their rewards by the run's configuration,
and their negative log-likelihood by the teacher, which exposes a student that earns its reward with gibberish.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aisp_dist import rewards
from aisp_dist.analysis import metrics
from aisp_dist.config import Generator, Run
from aisp_dist.data import prompts, render
from aisp_dist.engine import decode, model
from aisp_dist.records import BASE_ITERATION, Prompt, Round, Sampling

Columns = dict[str, np.ndarray]  # by measure, [P]


def answers(
    run: Run, student: Generator, asked: Sequence[Prompt]
) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
    """Prompt tokens, greedy tokens and text, by prompt."""
    lm = model.load(student)
    engine = decode.Engine(lm, run.generator.batch_rows, run.generator.max_new_tokens, run.generator.stop)
    rendered = [render.render(p, run.prompts, lm.tokenizer, run.prompts.max_tokens) for p in asked]
    rounds = [
        Round(run.seed, p.id, tokens, BASE_ITERATION, 0, 1, Sampling())
        for p, tokens in zip(asked, rendered, strict=True)
    ]
    drawn = [rollout.trajectories[0] for rollout in engine.run(rounds)]
    return [(tokens, t.token_ids, t.text) for tokens, t in zip(rendered, drawn, strict=True)]


def measure(run: Run, base_dir: Path, students: Mapping[str, str], num_prompts: int) -> dict[str, Columns]:
    """The measures of every student on the first prompts of the run's `prompts`, in input order."""
    asked = [p for p in prompts.read(run.prompts.model_copy(update={"limit": num_prompts})) if isinstance(p, Prompt)]
    scorers = {name: rewards.load(name, reward, base_dir) for name, reward in run.rewards.items()}
    teacher = decode.Engine(model.load(run.generator), 32, run.generator.max_new_tokens)
    found = {}
    for name, student in students.items():
        given = answers(run, Generator(model=student), asked)
        columns: dict[str, list[float]] = {
            "NLL by the teacher": [teacher.nll(tokens, response) for tokens, response, _ in given],
            "diversity": [metrics.diversity(text) for _, _, text in given],
            "tokens": [float(len(response)) for _, response, _ in given],
        }
        for reward, score in scorers.items():
            values = [score(p, [text])[0].value for p, (_, _, text) in zip(asked, given, strict=True)]
            columns[reward] = [float("nan") if value is None else value for value in values]
        found[name] = {column: np.array(values) for column, values in columns.items()}
    return found


def table(found: Mapping[str, Sequence[Columns]], against: str, main: str) -> list[dict[str, Any]]:
    """One row for each kind of student. found: its measures by training seed. A row has means over prompts and seeds,
    and for the reward `main` the paired difference from students of kind `against`, with 95 % bootstrap intervals over
    prompts."""

    def over_seeds(kind: str, column: str) -> np.ndarray:
        mean: np.ndarray = np.mean([columns[column] for columns in found[kind]], axis=0)
        return mean

    rows = []
    for kind, by_seed in found.items():
        cells = {column: metrics.interval(over_seeds(kind, column)) for column in by_seed[0]}
        gain = metrics.interval(over_seeds(kind, main) - over_seeds(against, main))
        seeds = float(np.std([columns[main].mean() for columns in by_seed]))
        rows.append({"student": kind, f"{main} over {against}": gain, f"{main}, std over seeds": seeds, **cells})
    return rows
