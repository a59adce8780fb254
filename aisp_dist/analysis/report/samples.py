"""The answers that the page shows side by side: which prompts, their texts, and the JSON that carries them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc

from aisp_dist.analysis.arms import BASE
from aisp_dist.analysis.compare import words_of
from aisp_dist.analysis.report.sources import Seed, Source

_LONGEST = 20_000  # characters of a text; what is cut off is said


def collect(source: Source, rival: str, count: int) -> dict[str, Any]:
    """Answers of the first seeds on at most `count` prompts: those on which the main arm gains most on the rival, those
    on which it loses most, and the rest evenly between."""
    first = {name: seeds[0] for name, seeds in source.arms.items()}
    shared, base = source.shared, rival == BASE
    theirs = first[source.main if base else rival].table.values("reward", shared, base=base)
    gain = np.nan_to_num(first[source.main].table.values("reward", shared) - theirs)
    order = np.argsort(-gain, kind="stable")
    ids = [shared[i] for i in order[_spread(len(order), count)]]
    rows = {name: {row["id"]: row for row in _rows(seed, ids)} for name, seed in first.items()}
    prompts = []
    for id in ids:
        ours = rows[source.main][id]
        said = [_answer(ours, "base_"), *(_answer(rows[name][id], "") for name in first)]
        prompts.append({"id": id, "prompt": _turns(ours["prompt"]), "answers": said})
    names = [BASE, *first]
    main, other = names.index(source.main), names.index(rival)
    return {"arms": names, "main": main, "rival": other, "left_out": len(shared) - len(ids), "prompts": prompts}


def script(answers: dict[str, Any]) -> str:
    """JSON that nothing in it can end: no angle bracket, ampersand, line end of JavaScript or byte beyond ASCII."""
    text = json.dumps(answers, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _spread(total: int, count: int) -> np.ndarray:
    """Places in an order of `total`: a third from each end, the rest evenly between."""
    if total <= count:
        return np.arange(total)
    third = count // 3
    middle = np.linspace(third, total - third - 1, count - 2 * third).round().astype(int)
    return np.concatenate([np.arange(third), middle, np.arange(total - third, total)])


def _rows(seed: Seed, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
    columns = ["id", "prompt", "completion", "base_completion"]
    columns += [prefix + name for name in ("reward", "rewards", "nll", "num_tokens") for prefix in ("", "base_")]
    data = seed.output.place.dataset("data")
    for batch in data.to_batches(columns=columns, filter=pc.field("id").isin(list(ids)), batch_size=1024):
        yield from batch.to_pylist()


def _answer(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "text": _short(words_of(row[f"{prefix}completion"])),
        "reward": row[f"{prefix}reward"],
        "nll": row[f"{prefix}nll"],
        "tokens": row[f"{prefix}num_tokens"],
        "scores": {score["name"]: score["value"] for score in row[f"{prefix}rewards"]},
    }


def _turns(prompt: Any) -> str:
    if isinstance(prompt, str):
        return _short(prompt)
    return _short("\n".join(f"{message['role']}: {message['content']}" for message in prompt))


def _short(text: str) -> str:
    cut = len(text) - _LONGEST
    return text if cut <= 0 else f"{text[:_LONGEST]} … ({cut} more characters are in the output)"
