"""What moves a step besides noise: the ascent of RE-Control, which the device does for all rows at once, and the choice
of ARGS, which asks reward models row by row on the host. Knows no rows, only what it is handed of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aisp_dist.data.detokenize import text_after
from aisp_dist.engine.lm import LM
from aisp_dist.methods.value import Value
from aisp_dist.records import Prompt, Round, TokenReward

# The trajectory's name, its prompt, its text with each candidate -> one reward each, None where there is none. Raises
# Unscored.
Judge = Callable[[tuple[str, int], Prompt, Sequence[str]], list[float | None]]


class Unscored(RuntimeError):
    """A step has no candidate with a finite reward."""


@dataclass(frozen=True, eq=False)
class Guide:
    """value: of RE-Control. judge: of ARGS."""

    value: Value | None = None
    judge: Judge | None = None


def choose(
    judge: Judge, lm: LM, end_ids: frozenset[int], round: Round, sample: int, tokens: list[int], logits_V: torch.Tensor
) -> int:
    """ARGS-greedy (Khanov et al. 2024, algorithm 1): of the likeliest tokens the one with the largest logit + weight *
    reward of the text that it ends, the likelier of equals. A token that ends the response adds nothing to its text.
    Raises Unscored."""
    guide = round.sampling.guide
    assert isinstance(guide, TokenReward) and round.prompt is not None
    logits, ids = logits_V.topk(min(guide.candidates, len(logits_V)))
    candidates = ids.tolist()
    texts = [
        text_after(lm.tokenizer, round.prompt_tokens, tokens if token in end_ids else [*tokens, token], cut=True)
        for token in candidates
    ]
    found = judge((round.prompt_id, sample), round.prompt, texts)
    scores = [
        float("-inf") if r is None else logit + guide.weight * r
        for logit, r in zip(logits.tolist(), found, strict=True)
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[best] == float("-inf"):
        raise Unscored(f"no candidate of token {len(tokens) + 1} has a finite reward")
    return int(candidates[best])
