"""What moves a step besides noise: the ascent of RE-Control, which the device does for all rows at once, and the choice
of ARGS, which asks reward models row by row on the host. Knows no rows, only what it is handed of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from aisp_dist import rewards, value
from aisp_dist.config import Args, ReControl, Run
from aisp_dist.engine.lm import LM
from aisp_dist.records import Prompt, Round, TokenReward

# The trajectory's name, its prompt, its text with each candidate -> one reward each, None where there is none.
Judge = Callable[[tuple[str, int], Prompt, Sequence[str]], list[float | None]]


class Unscored(RuntimeError):
    """No candidate of a step has a finite reward."""


@dataclass(frozen=True, eq=False)
class Guide:
    """value: of RE-Control. judge: of ARGS."""

    value: value.Value | None = None
    judge: Judge | None = None


def load(run: Run, base_dir: Path, device: torch.device) -> Guide:
    """What the run's method needs inside a generator. Raises ConfigError for a reward that cannot be loaded."""
    if isinstance(run.method, ReControl):
        return Guide(value=value.load(run.method.value, device))
    if isinstance(run.method, Args):
        return Guide(judge=_judge(run, base_dir, str(device)))
    return Guide()


def _judge(run: Run, base_dir: Path, device: str) -> Judge:
    scorers = {
        name: (reward.weight, rewards.load(name, reward, base_dir, device, run.prompts.keep))
        for name, reward in run.rewards.items()
        if reward.use == "select"
    }

    def judge(trajectory: tuple[str, int], prompt: Prompt, texts: Sequence[str]) -> list[float | None]:
        totals: list[float | None] = [0.0] * len(texts)
        applied = [False] * len(texts)
        for weight, score in scorers.values():
            growing = getattr(score, "growing", None)  # a model's: it keeps what the text begins with
            found = growing(trajectory, prompt, texts) if growing else score(prompt, texts)
            for i, one in enumerate(found):
                total = totals[i]
                if one.reason is not None:
                    totals[i] = None
                elif one.value is not None and total is not None:
                    totals[i], applied[i] = total + weight * one.value, True
        return [total if known else None for total, known in zip(totals, applied, strict=True)]

    return judge


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
        lm.tokenizer.decode(tokens if token in end_ids else [*tokens, token], skip_special_tokens=True)
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
