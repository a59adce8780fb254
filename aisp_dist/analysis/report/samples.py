"""The answers that the page shows side by side: which prompts, their texts, and the JSON that carries them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from aisp_dist.analysis import outputs
from aisp_dist.analysis.arms import BASE
from aisp_dist.analysis.report.contents import Contents

_LONGEST = 20_000  # characters of a text; of a longer one the page says how many are missing
_COLUMNS = ["id", "prompt"]
_COLUMNS += [side + name for name in ("completion", "reward", "rewards", "nll", "num_tokens") for side in ("", "base_")]


def collect(contents: Contents, rival: str, count: int) -> dict[str, Any]:
    """Answers of the first seeds on at most `count` prompts: those on which the main arm gains most on the rival, those
    on which it loses most, and the rest evenly between."""
    first, base = {name: seeds[0] for name, seeds in contents.arms.items()}, rival == BASE
    theirs = first[contents.main if base else rival].values("reward", contents.ids, base)
    gain = np.nan_to_num(first[contents.main].values("reward", contents.ids) - theirs)
    order = np.argsort(-gain, kind="stable")
    ids = contents.ids[order[_spread(len(order), count)]]
    rows = {name: outputs.rows(columns, ids, _COLUMNS) for name, columns in first.items()}
    prompts = [
        {
            "id": ours["id"],
            "prompt": _turns(ours["prompt"]),
            "answers": [_answer(ours, "base_"), *(_answer(rows[name][i], "") for name in first)],
        }
        for i, ours in enumerate(rows[contents.main])
    ]
    names = [BASE, *first]
    main, other = names.index(contents.main), names.index(rival)
    return {"arms": names, "main": main, "rival": other, "left_out": len(order) - len(ids), "prompts": prompts}


def script(answers: dict[str, Any]) -> str:
    """The answers as JSON for a script element: no text in it can end the element, since it has no angle bracket,
    ampersand, line end of JavaScript or byte beyond ASCII."""
    text = json.dumps(answers, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _spread(total: int, count: int) -> np.ndarray:
    """Places in an order of `total`: a third from each end, the rest evenly between."""
    if total <= count:
        return np.arange(total)
    third = count // 3
    middle = np.linspace(third, total - third - 1, count - 2 * third).round().astype(int)
    return np.concatenate([np.arange(third), middle, np.arange(total - third, total)])


def _answer(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {
        "text": _short(outputs.answer(row[f"{prefix}completion"])),
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
