"""What a comparison and a tuning run. Neither changes a row of the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from aisp_dist.config.base import Section, doc
from aisp_dist.config.methods import Method


class Compare(Section):
    """What `aisp compare` runs side by side."""

    prompts: int = doc("number of prompts, from the first on", 64, ge=1)
    seeds: int = doc("number of seeds that every arm is repeated with", 1, ge=1)
    arms: dict[str, Method | None] = doc(
        "further methods by name; one with the name of a usual arm replaces it, and null leaves that arm out. All must "
        "spend the same number of samples, except methods that give one answer a prompt",
        {},
    )
    cases: dict[str, dict[str, Any]] = doc(
        "settings by name, merged over the configuration like a later --config file; one comparison each", {}
    )


class Tune(Section):
    """How `aisp tune` searches each method's settings."""

    prompts: int = doc(
        "prompts of a trial: those after the first compare.prompts of the input, also past prompts.limit, so that "
        "none is compared on that was tuned on",
        10,
        ge=1,
    )
    trials: int = doc("number of trials of each arm", 16, ge=1)
    search: Literal["grid", "tpe"] = doc(
        "grid: points of the grids; tpe: Optuna's tree-structured Parzen estimator", "grid"
    )
    nll_weight: float = doc(
        "price, in units of the reward, of a nat of NLL per token above the base answer's", 0.0, ge=0
    )
    max_nll: float | None = doc(
        "a trial with more nats of NLL per token above the base answer's never wins", None, ge=0
    )
    grids: dict[str, dict[str, list[float]]] = doc(
        "values to try by arm and key, in place of the arm's own grid, as {aisp: {sigma2: [0.1, 0.3], alpha: [0.99]}}",
        {},
    )

    @field_validator("grids", mode="before")
    @classmethod
    def by_arm(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and (flat := [str(k) for k, values in value.items() if isinstance(values, list)]):
            raise ValueError(
                f"{', '.join(flat)}: name the arm first, and the key as its section has it, as in "
                "{aisp: {sigma2: [0.1, 0.3], lambda.ess: [0.1, 0.2]}, best-of-n top-p: {sampling.top_p: [0.8, 0.9]}}"
            )
        return value

    @field_validator("grids")
    @classmethod
    def usable(cls, value: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
        for arm, grid in value.items():
            for key, values in grid.items():
                if not values or len(set(values)) < len(values):
                    raise ValueError(f"{arm}: {key} is {values}; give at least one value, and each once")
        return value
