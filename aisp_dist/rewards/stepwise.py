"""What a method brings into a generator: the value network of RE-Control, or the selecting rewards of ARGS, which score
a text while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from aisp_dist import rewards
from aisp_dist.config import Args, ReControl, Run
from aisp_dist.engine.guide import Guide, TextReward, Unscored
from aisp_dist.methods import value
from aisp_dist.records import Prompt


def load(run: Run, base_dir: Path, device: torch.device) -> Guide:
    """What the run's method needs inside a generator. Raises ConfigError for a reward that cannot be loaded."""
    if isinstance(run.method, ReControl):
        return Guide(value=value.load(run.method.value, device))
    if isinstance(run.method, Args):
        return Guide(reward=_reward(run, base_dir, str(device)))
    return Guide()


def _reward(run: Run, base_dir: Path, device: str) -> TextReward:
    scorers = {
        name: (reward.weight, rewards.load(name, reward, base_dir, device, run.prompts.keep))
        for name, reward in run.rewards.items()
        if reward.use == "select"
    }

    def of_texts(trajectory: tuple[str, int], prompt: Prompt, texts: Sequence[str]) -> list[float | None]:
        totals: list[float | None] = [0.0] * len(texts)
        applied = [False] * len(texts)
        for weight, score in scorers.values():
            growing = getattr(score, "growing", None)  # a model's: it keeps what the text begins with
            try:
                found = growing(trajectory, prompt, texts) if growing else score(prompt, texts)
            except rewards.RewardError as error:
                raise Unscored(str(error)) from error
            for i, one in enumerate(found):
                total = totals[i]
                if one.reason is not None:
                    totals[i] = None
                elif one.value is not None and total is not None:
                    totals[i], applied[i] = total + weight * one.value, True
        return [total if known else None for total, known in zip(totals, applied, strict=True)]

    return of_texts
