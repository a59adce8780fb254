"""Rewards, by kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator

from aisp_dist.config.base import Section, doc


class RewardBase(Section):
    weight: float = doc("factor in weighted_sum", 1.0)
    use: Literal["select", "report"] = doc("report: held out; scored on the results, never selects", "select")


class ModelReward(RewardBase):
    """A sequence-classification reward model with one output."""

    kind: Literal["model"] = doc("a reward model", "model")
    model: str = doc("demo, demo-judge, a local path, or a hub id")
    revision: str | None = doc("hub revision; resolved once and re-used by a resume", None)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = doc("auto: the checkpoint's own", "auto")
    max_tokens: int = doc("longest input; a longer prompt is cut from its left, the response never", 2048, ge=1)
    batch_rows: int = doc("responses scored together", 32, ge=1)
    trust_remote_code: bool = doc("run code that comes with the checkpoint", False)


class FunctionReward(RewardBase):
    """A Python function with TRL's signature: f(prompts, completions, **columns) -> list of float or None."""

    kind: Literal["function"] = doc("a Python function", "function")
    function: str = doc("file.py:function, relative to the config file, or module:function")


Reward = Annotated[ModelReward | FunctionReward, Discriminator("kind")]
