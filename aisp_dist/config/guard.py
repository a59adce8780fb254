"""Bounds on what a gain in reward may cost. Nothing here changes a row."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from aisp_dist.config.base import Section, doc


class Guard(Section):
    """Bounds on means over the selected answers. A bound that is null is not checked."""

    max_truncated: float | None = doc("largest share of answers that were cut at max_new_tokens", None, ge=0, lt=1)
    max_repetition: float | None = doc("largest mean share of repeated 4-grams of words in an answer", None, ge=0, lt=1)
    max_length_correlation: float | None = doc(
        "largest correlation of the gain in reward with the gain in length", None, ge=-1, lt=1
    )
    held_out_gain: float | None = doc("smallest mean gain of every held-out reward over the base answer", None)
    action: Literal["warn", "stop"] = doc(
        "warn: the summary names a broken bound; stop: it ends the run, exit code 1, from 200 prompts on",
        "warn",
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
