"""Answers as AlpacaEval takes them (github.com/tatsu-lab/alpaca_eval): one JSON list of {dataset, instruction, output,
generator}, which `alpaca_eval --model_outputs FILE` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aisp_dist.analysis.compare import words_of


def alpaca_eval(rows: Iterable[Mapping[str, Any]], generator_name: str) -> list[dict[str, str]]:
    """Rows of data/ (raw or chat) as AlpacaEval's records, in order. dataset: the kept column of that name, which
    AlpacaEval's own prompts have; `unknown` without it. Raises ValueError for a prompt of several turns."""
    return [
        {
            "dataset": str(row.get("dataset") or "unknown"),
            "instruction": _instruction(row),
            "output": words_of(row["completion"]),
            "generator": generator_name,
        }
        for row in rows
    ]


def _instruction(row: Mapping[str, Any]) -> str:
    """The one question of the prompt. AlpacaEval matches answers by it, so it must be the dataset's own text."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message["role"] != "system"]
    if [message["role"] for message in turns] != ["user"]:
        raise ValueError(
            f"prompt {row['id']} has the turns {', '.join(message['role'] for message in turns)}; AlpacaEval takes one "
            "question of a user"
        )
    return str(turns[0]["content"])
