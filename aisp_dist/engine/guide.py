"""What changes a step besides noise: RE-Control moves the states of all rows at once on the device (methods/value.py);
ARGS chooses the token of one row by asking reward models on the host. Knows nothing of slots or batches.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aisp_dist.data.detokenize import text_after
from aisp_dist.engine.lm import LM
from aisp_dist.methods.value import Value
from aisp_dist.records import Prompt, Round, TokenReward

# Trajectory (prompt id, sample), its prompt, its text with each candidate token -> a reward for each text, None for one
# that has no reward. Raises Unscored.
TextReward = Callable[[tuple[str, int], Prompt, Sequence[str]], list[float | None]]


class Unscored(RuntimeError):
    """No candidate of a step has a finite reward."""


@dataclass(frozen=True, eq=False)
class Guide:
    """value: the value network of RE-Control. reward: what scores texts for ARGS."""

    value: Value | None = None
    reward: TextReward | None = None


def choose(
    reward: TextReward,
    lm: LM,
    end_ids: frozenset[int],
    round: Round,
    sample: int,
    tokens: list[int],
    logits_V: torch.Tensor,
) -> int:
    """The next token by ARGS-greedy (Khanov et al. 2024, algorithm 1): of the likeliest tokens, the one with the
    largest logit + weight * reward of the text that ends with it; of equal ones the likelier. tokens: those so far. A
    token that ends the response adds nothing to its text. Raises Unscored."""
    guide = round.sampling.guide
    assert isinstance(guide, TokenReward) and round.prompt is not None
    logits, ids = logits_V.topk(min(guide.candidates, len(logits_V)))
    candidates = ids.tolist()
    texts = [
        text_after(lm.tokenizer, round.prompt_tokens, tokens if token in end_ids else [*tokens, token], cut=True)
        for token in candidates
    ]
    found = reward((round.prompt_id, sample), round.prompt, texts)
    scores = [
        float("-inf") if r is None else logit + guide.weight * r
        for logit, r in zip(logits.tolist(), found, strict=True)
    ]
    best = max(range(len(scores)), key=scores.__getitem__)
    if scores[best] == float("-inf"):
        raise Unscored(f"no candidate of token {len(tokens) + 1} has a finite reward")
    return int(candidates[best])
