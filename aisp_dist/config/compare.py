"""What a comparison and a tuning run. Neither changes a row of the run itself."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

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


Positive = list[float]


class Grids(Section):
    """Values that tuning tries; its search between them goes from the smallest to the largest. Defaults: the paper's
    (arXiv 2510.26219), lambda as a fraction of effective sample size, which is free of the reward's unit."""

    sigma2: Positive = doc("of AISP and of Gaussian best-of-n", [0.1, 0.3, 0.5, 0.7])
    lambda_: Positive | None = doc("of AISP, in units of the reward; null: tune ess", None, alias="lambda")
    ess: Positive = doc("of AISP, where lambda is null", [0.05, 0.1, 0.2, 0.4])
    alpha: Positive = doc("of AISP", [0.99, 0.999, 0.9999, 0.99999])
    flip_rate: Positive = doc("of AISP that branches, of its draws", [0.2, 0.3, 0.4])
    branch: Positive = doc("of AISP that branches: effective number of answers continued", [4.0, 8.0, 16.0])
    temperature: Positive = doc("of best-of-n", [0.4, 0.6, 0.8, 1.0])
    top_p: Positive = doc("of best-of-n", [0.7, 0.8, 0.9, 0.95])
    weight: Positive = doc("of ARGS", [1e-5, 1e-3, 0.1, 1.0, 10.0, 1e3])
    step_size: Positive = doc("of RE-Control", [0.1, 0.3, 1.0, 3.0])

    @model_validator(mode="after")
    def usable(self) -> Grids:
        for name, values in self:
            upper = 1.0 if name in ("ess", "flip_rate", "alpha", "top_p") else float("inf")
            below = name in ("ess", "flip_rate")  # 1 itself is no value of these
            least = 1.0 if name == "branch" else 0.0
            bad = [v for v in values or () if not 0 < v <= upper or v < least or (below and v == upper)]
            if values is not None and (not values or bad or len(set(values)) < len(values)):
                raise ValueError(
                    f"{name.rstrip('_')} is {values}; give at least one value, each once, above 0"
                    + (f" and at most {upper:g}" if upper == 1 else "")
                )
        return self


class Tune(Section):
    """How `aisp tune` searches each method's settings."""

    prompts: int = doc("prompts of a trial: those after the first compare.prompts of the input", 10, ge=1)
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
    grids: Grids = Field(default=Grids(), description="the values that are tried")
