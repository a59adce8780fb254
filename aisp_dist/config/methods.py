"""The search methods, by kind. num_samples x num_iterations is what a prompt spends, whatever the method."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, field_validator, model_validator

from aisp_dist.config.base import Section, doc
from aisp_dist.records import Ascent, Rates, Sampling, TokenReward, TopP


class Ess(Section):
    ess: float = doc("target effective sample size as a fraction of num_samples", gt=0, lt=1)


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


class FlipRate(Section):
    flip_rate: float = doc("share of the base answer's tokens that this changes, found for each prompt", gt=0, lt=1)


class Branch(Section):
    """From the second iteration on, samples continue earlier answers."""

    ess: float = doc("effective number of answers so far that are continued", 8.0, ge=1)


class Limit(Section):
    """How far from the base model an answer may be. What is beyond is drawn and kept as a candidate, but neither
    selected nor learnt from."""

    nll: float | None = doc("nats per token by which the base model may find it less likely than its own", None, ge=0)
    diversity: float | None = doc("least share of distinct 2-, 3- and 4-grams, their product", None, gt=0, le=1)

    @model_validator(mode="after")
    def bounded(self) -> Limit:
        if self.nll is None and self.diversity is None:
            raise ValueError("nll and diversity are null, so nothing is limited; give one, or no limit")
        return self


Count = Annotated[int, Field(ge=1, lt=1 << 16)]


class Spend(Section):
    """What a prompt spends by how its search goes: one that no longer improves stops before num_iterations, one that
    still does may go on to max_iterations. A rule of each prompt alone, so that rows do not depend on their company."""

    target: float | None = doc("stop once the best reward has reached it", None)
    plateau: int | None = doc("stop after so many iterations without a better answer", None, ge=1)
    min_gain: float = doc("what counts as better, in units of the reward", 0.0, ge=0)
    max_iterations: Count | None = doc("where plateau does not stop it, up to here; null: num_iterations", None)

    @model_validator(mode="after")
    def bounded(self) -> Spend:
        if self.target is None and self.plateau is None:
            raise ValueError("target and plateau are null, so nothing would ever stop early; give one, or no spend")
        if self.max_iterations is not None and self.plateau is None:
            raise ValueError(
                f"max_iterations is {self.max_iterations} without plateau: every prompt would go on to it; give "
                "plateau, or raise num_iterations"
            )
        return self


# What `preset: auto` says where the configuration is silent; tests/bench/population has what chose it.
AUTO: dict[str, Any] = {
    "sigma2": 0.0,
    "decode": {"flip_rate": 0.28},
    "branch": {"ess": 8.0},
}


class Search(Section):
    """What adaptive importance sampling is told (arXiv 2510.26219, Algorithm 1), whatever its budget's form."""

    preset: Literal["paper", "auto"] = doc(
        "what is not given: as the paper has it, or without any unit of a model or a reward", "paper"
    )
    sigma2: float | FlipRate = doc(
        "sigma^2, variance of the noise; or {flip_rate: share}, found for each prompt; 0 with branch: none", 0.5
    )
    lambda_: float | Ess = doc("temperature of the weights, or {ess: fraction}", Ess(ess=0.1), alias="lambda")
    alpha: float = doc("discount of the mean in the prior", 0.9999, ge=0, le=1)
    noise: Literal["independent", "shared"] | Ar1 | Mixture = doc("covariance of the noise over time", "independent")
    decode: Literal["greedy"] | Nucleus | FlipRate = doc(
        "greedy (the paper), {top_p: .8, temperature: 1.0}, or {flip_rate: share}: the top_p that does this", "greedy"
    )
    after_eos: Literal["full", "marginal"] = doc("noise after a response's end: drawn, or integrated out", "full")
    branch: Branch | None = doc("samples continue earlier answers: {ess: 8}; null: all begin anew", None)
    limit: Limit | None = doc("how far from the base model an answer may be: {nll: .3, diversity: .9}", None)
    shuffle_rewards: bool = doc("control: the update sees the rewards permuted; true ones select", False)

    @model_validator(mode="before")
    @classmethod
    def filled(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "auto":
            given = {"lambda" if key == "lambda_" else key for key in values}
            return values | {key: value for key, value in AUTO.items() if key not in given}
        return values

    @model_validator(mode="after")
    def drawn(self) -> Search:
        if self.sigma2 == 0 and not self.branch:
            raise ValueError("sigma2 is 0 without branch, so nothing would be searched; give a variance, or branch")
        if self.branch and self.decode == "greedy" and self.sigma2 == 0:
            raise ValueError(
                "branch continues an answer from where it is cut, which greedy decoding without noise would do as "
                "before; give decode: {top_p: 0.8}, or sigma2"
            )
        return self

    @field_validator("sigma2")
    @classmethod
    def variance(cls, value: float | FlipRate) -> float | FlipRate:
        if isinstance(value, float) and not 0 <= value <= 1e12:
            raise ValueError(f"sigma2 is {value:g}; it must be from 0 to 1e12, or {{flip_rate: 0.1}}")
        return value

    @field_validator("lambda_")
    @classmethod
    def positive(cls, value: float | Ess) -> float | Ess:
        if isinstance(value, float) and value <= 0:
            raise ValueError(f"lambda is {value:g}; it must be positive (the paper uses .3 to 480), or {{ess: 0.1}}")
        return value

    def rates(self) -> Rates:
        """What `sampling` leaves open, to be found for each prompt."""
        found = [x.flip_rate if isinstance(x, FlipRate) else None for x in (self.sigma2, self.decode)]
        return Rates(*found)

    def sampling(self) -> Sampling:
        """How samples are drawn, where `rates` leaves nothing open."""
        noise: Literal["independent", "shared", "ar1", "mixture"]
        match self.noise:
            case Ar1(ar1=parameter):
                noise = "ar1"
            case Mixture(mixture=parameter):
                noise = "mixture"
            case kind:
                noise, parameter = kind, 0.0
        decode = self.decode.record() if isinstance(self.decode, Nucleus) else None
        sigma2 = self.sigma2 if isinstance(self.sigma2, float) else 0.0
        return Sampling(sigma2, noise, parameter, self.alpha, decode, self.after_eos, likelihood=self.limit is not None)


class Aisp(Search):
    """Adaptive importance sampling on pre-logits (arXiv 2510.26219, Algorithm 1)."""

    kind: Literal["aisp"] = doc("the method", "aisp")
    num_samples: Count = doc("n, trajectories of an iteration", 16)
    num_iterations: Count = doc("kappa", 8)
    spend: Spend | None = doc("stop early, or go on, by how a prompt's search goes; null: num_iterations", None)


class BatchedAisp(Search):
    """Batched AISP of the paper: num_prompts prompts side by side, each with budget / num_prompts samples an iteration
    and num_prompts iterations, so that a batch takes the decoding steps of best-of-n with `budget` samples."""

    kind: Literal["batched_aisp"] = doc("the method", "batched_aisp")
    num_prompts: Count = doc("b, prompts side by side; the number of iterations too", 8)
    budget: int = doc("N, samples of a prompt; a multiple of num_prompts", 128, ge=1)
    spend: ClassVar[None] = None

    @model_validator(mode="after")
    def whole(self) -> BatchedAisp:
        if self.budget % self.num_prompts or self.budget // self.num_prompts >= 1 << 16:
            raise ValueError(
                f"budget is {self.budget} and num_prompts {self.num_prompts}; an iteration has budget / num_prompts "
                "samples, a whole number below 65536"
            )
        return self

    @property
    def num_samples(self) -> int:
        return self.budget // self.num_prompts

    @property
    def num_iterations(self) -> int:
        return self.num_prompts


class BestOfN(Section):
    """Best of num_samples x num_iterations independent candidates."""

    kind: Literal["best_of_n"] = doc("the method", "best_of_n")
    num_samples: Count = doc("candidates drawn together", 16)
    num_iterations: Count = doc("how many times; N = num_samples x num_iterations", 8)
    spend: Spend | None = doc("stop early, or go on, by how a prompt's search goes; null: num_iterations", None)
    sampling_: Nucleus | Gaussian = doc(
        "{top_p: .95, temperature: 1.0} or {gaussian: 0.5}", Nucleus(top_p=0.95), alias="sampling"
    )

    limit: Limit | None = doc("how far from the base model an answer may be: {nll: .3, diversity: .9}", None)

    def sampling(self) -> Sampling:
        measured = self.limit is not None
        if isinstance(self.sampling_, Gaussian):
            return Sampling(sigma2=self.sampling_.gaussian, likelihood=measured)
        return Sampling(decode=self.sampling_.record(), likelihood=measured)


class Args(Section):
    """ARGS-greedy (Khanov et al. 2024): each token is the argmax of its logit + weight * reward of the text up to it,
    over the likeliest tokens. One answer a prompt; the rewards with use: select run inside the generator."""

    kind: Literal["args"] = doc("the method", "args")
    num_candidates: int = doc("k, likeliest tokens whose reward is asked at every step", 32, ge=1, le=1024)
    weight: float = doc("w, factor of the reward beside the logit", 1.0, ge=0)
    num_samples: ClassVar[int] = 1
    num_iterations: ClassVar[int] = 1
    spend: ClassVar[None] = None
    limit: ClassVar[None] = None

    def sampling(self) -> Sampling:
        return Sampling(guide=TokenReward(self.num_candidates, self.weight))


class ReControl(Section):
    """RE-Control (Kong et al. 2024): every pre-logit is moved up the gradient of a value network, which
    `aisp train-value` trains for this base model and reward. One answer a prompt."""

    kind: Literal["re_control"] = doc("the method", "re_control")
    value: str = doc("directory that `aisp train-value` wrote")
    steps: int = doc("gradient steps for each token", 30, ge=1, le=10_000)
    step_size: float = doc("length of a step in units of the gradient", 1.0, gt=0)
    published: bool = doc("as the authors' code does it, its faults included", False)
    num_samples: ClassVar[int] = 1
    num_iterations: ClassVar[int] = 1
    spend: ClassVar[None] = None
    limit: ClassVar[None] = None

    def sampling(self) -> Sampling:
        return Sampling(guide=Ascent(self.steps, self.step_size, self.published))


Method = Annotated[Aisp | BatchedAisp | BestOfN | Args | ReControl, Discriminator("kind")]
