"""Guard rails: what an answer may not have paid for its reward with. Nothing here changes a row."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from aisp_dist.config.base import Section, doc


class Guard(Section):
    """Bounds on means over the selected answers; a null one is not watched."""

    max_truncated: float | None = doc("largest share that ends by length, cut at max_new_tokens", None, ge=0, lt=1)
    max_repetition: float | None = doc("largest mean share of 4-grams that have come before", None, ge=0, lt=1)
    max_length_correlation: float | None = doc(
        "largest correlation of gains in reward and in length", None, ge=-1, lt=1
    )
    held_out_gain: float | None = doc("smallest mean gain over the base answer of each held-out reward", None)
    action: Literal["warn", "stop"] = doc(
        "warn: the summary says so; stop: the run ends once 200 prompts, or all, are finished, exit code 1", "warn"
    )

    @model_validator(mode="after")
    def whole(self) -> Guard:
        if self.action == "stop" and not self.watches:
            raise ValueError("action is stop, but every bound is null, so nothing would ever stop; give one")
        return self

    @property
    def watches(self) -> bool:
        bounds = (self.max_truncated, self.max_repetition, self.max_length_correlation, self.held_out_gain)
        return any(bound is not None for bound in bounds)
