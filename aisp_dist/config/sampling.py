"""Settings that several methods share: noise, draws, weights, limits and the stopping rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from aisp_dist.config.base import Section, doc
from aisp_dist.records import TopP

Count = Annotated[int, Field(ge=1, lt=1 << 16)]
Share = Annotated[float, Field(ge=0, le=1)]


class Ess(Section):
    ess: float = doc("effective sample size to reach, as a fraction of num_samples", gt=0, lt=1)


class Deviations(Section):
    sd: float = doc("multiple of the standard deviation of a prompt's rewards so far", gt=0)


class FlipRate(Section):
    flip_rate: float = doc("share of the base answer's tokens that come out differently", gt=0, lt=1)


class Ar1(Section):
    ar1: float = doc("correlation of neighbouring steps", ge=0, lt=1)


class Mixture(Section):
    mixture: float = doc("share of the variance that is one vector for all steps", ge=0, lt=1)


class Nucleus(Section):
    top_p: float = doc("smallest probability mass that is kept", gt=0, le=1)
    temperature: float = doc("softmax temperature", 1.0, gt=0)

    def record(self) -> TopP:
        return TopP(self.top_p, self.temperature)


class Gaussian(Section):
    gaussian: float = doc("variance of the noise on the pre-logits; decoding is greedy", gt=0, le=1e12)


class Limit(Section):
    """How far from the base model an answer may be. An answer beyond the limit is kept as a candidate, but the search
    neither selects it nor learns from it."""

    nll: float | None = doc(
        "largest rise of the base model's NLL per token over the base answer's, in nats", None, ge=0
    )
    diversity: float | None = doc("smallest product of the shares of distinct 2-, 3- and 4-grams", None, gt=0, le=1)

    @model_validator(mode="after")
    def bounded(self) -> Limit:
        if self.nll is None and self.diversity is None:
            raise ValueError("nll and diversity are null, so nothing is limited; give one, or leave limit out")
        return self


def needs_likelihood(limit: Limit | None) -> bool:
    """Whether a limit is on the base model's likelihood of answers, which costs time."""
    return limit is not None and limit.nll is not None


class Spend(Section):
    """A stopping rule for each prompt. It reads this prompt's rewards alone, so a row does not depend on other rows."""

    target: float | None = doc("stop when the best reward reaches this", None)
    plateau: int | None = doc("stop after this many iterations without a better answer", None, ge=1)
    min_gain: float = doc("smallest rise of the best reward that counts as better, in units of the reward", 0.0, ge=0)
    expected_gain: float | None = doc(
        "stop when another iteration is expected to add less than this to the best reward, in standard deviations of "
        "the prompt's rewards",
        None,
        gt=0,
    )
    max_iterations: Count | None = doc("most iterations if nothing stops a prompt earlier; null: num_iterations", None)

    @model_validator(mode="after")
    def bounded(self) -> Spend:
        if self.target is None and self.plateau is None and self.expected_gain is None:
            raise ValueError(
                "target, plateau and expected_gain are null, so nothing stops early; give one, or leave out spend"
            )
        if self.plateau is None and self.expected_gain is None and self.max_iterations is not None:
            raise ValueError(
                f"max_iterations is {self.max_iterations} without plateau or expected_gain, so every prompt would run "
                "up to it; give one, or raise num_iterations"
            )
        if self.plateau is None and self.min_gain:
            raise ValueError(f"min_gain is {self.min_gain:g} without plateau, where it has no effect; give plateau")
        return self
