"""Rewards: one file per kind, and their combination. A reward is a function of a prompt and responses; importing this
package loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from aisp_dist.config import HttpReward, ModelReward, Reward
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards.function import RewardError

__all__ = ["RewardError", "RewardFn", "load"]

# One Score per response, in order. Raises RewardError where it has no answer at all for this prompt. A model's has
# `close`, which ends the processes behind it.
RewardFn = Callable[[Prompt, Sequence[str]], list[Score]]


def load(
    name: str,
    settings: Reward,
    base_dir: Path | None = None,
    device: str | None = None,
    columns: Sequence[str] = (),
    seconds: float = math.inf,
    share: float = 1.0,
) -> RewardFn:
    """The reward called `name` in the configuration, ready to score. base_dir: where function paths start, the
    configuration's directory (default: the current one). device: of a model, as torch names it (default: cuda where
    there is one, else cpu). columns: prompts.keep, what functions are handed. seconds: how long a server may
    take for the responses of one call; see http.load. share: of a GPU's memory, for a model that vLLM scores. Raises
    ConfigError."""
    if isinstance(settings, ModelReward):
        from aisp_dist.rewards import model

        return model.load(name, settings, device, share)
    if isinstance(settings, HttpReward):
        from aisp_dist.rewards import http

        return http.load(name, settings, seconds)
    from aisp_dist.rewards import function

    return function.load(name, settings, base_dir, columns)
