"""The search methods by kind, one section each. A prompt spends num_samples x num_iterations, whatever the method.

The union `Method` at the end is the table of methods: each section names the module of aisp_dist.methods that runs it,
says how its samples are drawn, and lists the values that `aisp tune` tries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, field_validator, model_validator

from aisp_dist.config import outdated
from aisp_dist.config.base import Section, doc
from aisp_dist.config.sampling import (
    Ar1,
    Count,
    Deviations,
    Ess,
    FlipRate,
    Gaussian,
    Limit,
    Mixture,
    Nucleus,
    Share,
    Spend,
    needs_likelihood,
)
from aisp_dist.records import Ascent, Rates, Sampling, TokenReward

# The grids of arXiv 2510.26219; lambda is in units of the reward, UltraRM's and then Eurus's.
SIGMA2S, ALPHAS = (0.1, 0.3, 0.5, 0.7), (0.99, 0.999, 0.9999, 0.99999)
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 60.0, 120.0, 240.0, 480.0)
Grid = Mapping[str, tuple[float, ...]]  # values by key of the section; a key inside a key is dotted
_NUCLEUS: Grid = {"sampling.temperature": (0.4, 0.6, 0.8, 1.0), "sampling.top_p": (0.7, 0.8, 0.9, 0.95)}
_LIMIT = "how far from the base model a selected answer may be, as {nll: 0.3, diversity: 0.9}; null: no limit"
_SPEND = "stopping rule of a prompt, as {plateau: 2}; null: every prompt has num_iterations"
_SHUFFLE = "the search learns from permuted rewards, for comparison; the true rewards select"
_DRAWN = (
    "how tokens are drawn: {flip_rate: 0.28}, the top_p that does this to each prompt's base answer, or "
    "{top_p: 0.9, temperature: 1.0}"
)


class MethodSection(Section):
    """What every method's section answers. A method overrides what is different for it."""

    algorithm: ClassVar[str]  # the module of aisp_dist.methods with its propose and update
    kind: str

    @property
    def name(self) -> str:
        """What comparisons, summaries and cards call this method."""
        return self.kind.replace("_", "-") + ", rewards shuffled" * self.is_shuffled

    @property
    def is_shuffled(self) -> bool:
        return bool(getattr(self, "shuffle_rewards", False))

    @property
    def learns(self) -> bool:
        """Whether what it draws depends on the rewards of earlier answers."""
        return "shuffle_rewards" in type(self).model_fields

    def shuffled(self, shuffle: bool) -> Self:
        """This method learning from shuffled rewards or from true ones; itself where it does not learn from rewards."""
        return self.model_copy(update={"shuffle_rewards": shuffle}) if self.learns else self

    @model_validator(mode="after")
    def several_rounds(self) -> Self:
        spend: Spend | None = getattr(self, "spend", None)
        if spend and spend.expected_gain and (spend.max_iterations or getattr(self, "num_iterations", 1)) == 1:
            raise ValueError(
                "spend.expected_gain with one iteration, after which nothing is left to stop; give num_iterations: 3 "
                "or more, with fewer samples in each"
            )
        return self

    @property
    def brings(self) -> str | None:
        """What a generator loads for this method beside the base model."""
        return None

    @property
    def reward_calls_per_token(self) -> int:
        """Calls of a reward inside the generator."""
        return 0

    @property
    def prompts_together(self) -> int | None:
        """Prompts in flight on a generator; None: as many as keep its rows full."""
        return None

    def draws(self) -> tuple[Sampling, Rates]:
        """How samples are drawn, and what of it is found for each prompt."""
        raise NotImplementedError(f"{type(self).__name__}.draws")

    def grid(self) -> Grid:
        """What `aisp tune` tries."""
        raise NotImplementedError(f"{type(self).__name__}.grid")


class Algorithm1(MethodSection):
    """Algorithm 1 of arXiv 2510.26219: noise on the pre-logits whose mean moves by importance weights, greedy
    decoding."""

    algorithm = "aisp"
    required: ClassVar[Mapping[str, tuple[str, str]]]  # key: the paper's value, the default of 0.1.0

    sigma2: float | FlipRate = doc(
        "variance of the noise: a number (the paper), or {flip_rate: 0.1} (ours): found for each prompt", 0.5
    )
    lambda_: float | Ess = doc(
        "temperature of the weights: a number (the paper), or {ess: 0.1} (ours): found for each iteration",
        alias="lambda",
    )
    alpha: float = doc("discount of the mean in the prior", 0.9999, ge=0, le=1)
    noise: Literal["independent", "shared"] | Ar1 | Mixture = doc(
        "noise over time: independent (the paper), or ours: {ar1: 0.8}, {mixture: 0.9}, shared", "independent"
    )
    after_eos: Literal["full", "marginal"] = doc(
        "noise after the end of an answer: full draws it (the paper), marginal integrates it out", "full"
    )
    limit: Limit | None = doc(_LIMIT, None)
    shuffle_rewards: bool = doc(_SHUFFLE, False)

    @model_validator(mode="before")
    @classmethod
    def whole(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        if any(key in values for key in outdated.KEYS):
            raise ValueError(outdated.refusal(values))
        if missing := [key for key in cls.required if key not in values and f"{key}_" not in values]:
            paper, before = ([f"{key}: {told[i]}" for key, told in cls.required.items()] for i in range(2))
            raise ValueError(
                f"{', '.join(missing)}: missing, and kind: {cls.model_fields['kind'].default} has no default for it; "
                f"give it: the paper has {', '.join(paper)}; 0.1.0 had {', '.join(before)}"
            )
        return values

    @field_validator("sigma2")
    @classmethod
    def variance(cls, value: float | FlipRate) -> float | FlipRate:
        if isinstance(value, float) and not 0 < value <= 1e12:
            raise ValueError(f"sigma2 is {value:g}; it must be above 0 and at most 1e12, or {{flip_rate: 0.1}}")
        return value

    @field_validator("lambda_")
    @classmethod
    def positive(cls, value: float | Ess) -> float | Ess:
        if isinstance(value, float) and value <= 0:
            raise ValueError(f"lambda is {value:g}; it must be above 0 (the paper has .1 to 480), or {{ess: 0.1}}")
        return value

    def draws(self) -> tuple[Sampling, Rates]:
        noise: Literal["independent", "shared", "ar1", "mixture"]
        match self.noise:
            case Ar1(ar1=parameter):
                noise = "ar1"
            case Mixture(mixture=parameter):
                noise = "mixture"
            case kind:
                noise, parameter = kind, 0.0
        sigma2, rate = (0.0, self.sigma2.flip_rate) if isinstance(self.sigma2, FlipRate) else (self.sigma2, None)
        sampling = Sampling(
            sigma2, noise, parameter, self.alpha, after_eos=self.after_eos, likelihood=needs_likelihood(self.limit)
        )
        return sampling, Rates(noise=rate)

    def grid(self) -> Grid:
        return {"sigma2": SIGMA2S, "lambda.ess": (0.05, 0.1, 0.2, 0.4), "alpha": ALPHAS}


class Aisp(Algorithm1):
    """Adaptive importance sampling on pre-logits: Algorithm 1 of arXiv 2510.26219."""

    required: ClassVar = {
        "lambda": ("0.3 with UltraRM or 240 with Eurus", "{ess: 0.1}"),
        "num_samples": ("32", "16"),
        "num_iterations": ("32", "8"),
    }
    kind: Literal["aisp"] = doc("the method", "aisp")
    num_samples: Count = doc("samples of an iteration, the paper's n")
    num_iterations: Count = doc("iterations, the paper's kappa")
    spend: Spend | None = doc(_SPEND, None)


class BatchedAisp(Algorithm1):
    """Algorithm 1 for num_prompts prompts side by side, each with num_prompts iterations of budget / num_prompts
    samples: a batch takes the decoding steps of best-of-n with `budget` samples."""

    required: ClassVar = {
        "lambda": ("0.3 with UltraRM or 240 with Eurus", "{ess: 0.1}"),
        "num_prompts": ("8, 16, 32 or 64", "8"),
        "budget": ("128", "128"),
    }
    kind: Literal["batched_aisp"] = doc("the method", "batched_aisp")
    num_prompts: Count = doc("prompts side by side, and the number of iterations; the paper's b")
    budget: int = doc("samples of a prompt, the paper's N; a multiple of num_prompts", ge=1)
    spend: ClassVar[None] = None

    @model_validator(mode="after")
    def divides(self) -> BatchedAisp:
        if self.budget % self.num_prompts or self.budget // self.num_prompts >= 1 << 16:
            raise ValueError(
                f"budget is {self.budget} and num_prompts {self.num_prompts}; an iteration has budget / num_prompts "
                "samples, which must be a whole number below 65536"
            )
        return self

    @property
    def num_samples(self) -> int:
        return self.budget // self.num_prompts

    @property
    def num_iterations(self) -> int:
        return self.num_prompts

    @property
    def prompts_together(self) -> int | None:
        return self.num_prompts


class Population(MethodSection):
    """Samples continue earlier answers: a selection scheme over answers, without noise on the pre-logits."""

    algorithm = "population"
    kind: Literal["population"] = doc("the method", "population")
    num_samples: Count = doc("samples of an iteration", 16)
    num_iterations: Count = doc("iterations; the first draws whole answers", 16)
    ess: float = doc("effective number of earlier answers that are continued", 8.0, ge=1)
    fresh: Share | Literal["ties"] = doc(
        "share of an iteration that draws whole answers; ties: 1 / (number of levels that the rewards so far have)",
        0.0,
    )
    sampling: FlipRate | Nucleus = doc(_DRAWN, FlipRate(flip_rate=0.28))
    spend: Spend | None = doc(_SPEND, None)
    limit: Limit | None = doc(_LIMIT, None)
    shuffle_rewards: bool = doc(_SHUFFLE, False)

    def draws(self) -> tuple[Sampling, Rates]:
        return _draws(self.sampling, self.limit)

    def grid(self) -> Grid:
        return {**_drawn_grid(self.sampling), "ess": (4.0, 8.0, 16.0)}


class Qalign(MethodSection):
    """QAlign (Faria and Smith 2025): Metropolis chains over answers, whose target is the base model's distribution
    times exp(reward / beta). A move redraws the chain's answer from a random token on."""

    algorithm = "qalign"
    kind: Literal["qalign"] = doc("the method", "qalign")
    chains: Count = doc("chains side by side: the samples of an iteration", 16)
    num_iterations: Count = doc("answers that each chain draws; the first is a whole one", 16)
    beta: float | Deviations = doc(
        "temperature of the target, in units of the reward; or (ours) in deviations of the rewards so far: {sd: 0.25}",
        Deviations(sd=0.25),
    )
    sampling: FlipRate | Nucleus = doc(_DRAWN, Nucleus(top_p=0.95))
    spend: Spend | None = doc(_SPEND, None)
    limit: Limit | None = doc(_LIMIT, None)
    shuffle_rewards: bool = doc(_SHUFFLE, False)

    @model_validator(mode="after")
    def sound(self) -> Qalign:
        if isinstance(self.beta, float) and self.beta <= 0:
            raise ValueError(f"beta is {self.beta:g}; it must be above 0 (the paper has .5 and 1), or {{sd: 0.25}}")
        if self.shuffle_rewards and self.chains == 1:
            raise ValueError(
                "chains is 1 with shuffle_rewards, which permutes rewards among the chains of an iteration and would "
                "change nothing; give chains: 2 or more"
            )
        return self

    @property
    def num_samples(self) -> int:
        return self.chains

    def shuffled(self, shuffle: bool) -> Self:
        return self if self.chains == 1 else super().shuffled(shuffle)

    def draws(self) -> tuple[Sampling, Rates]:
        return _draws(self.sampling, self.limit)

    def grid(self) -> Grid:
        beta = "beta" if isinstance(self.beta, float) else "beta.sd"
        return {**_drawn_grid(self.sampling), beta: (0.1, 0.25, 0.5, 1.0)}


class BestOfN(MethodSection):
    """Best of num_samples x num_iterations independent candidates."""

    algorithm = "best_of_n"
    kind: Literal["best_of_n"] = doc("the method", "best_of_n")
    num_samples: Count = doc("candidates drawn together", 16)
    num_iterations: Count = doc("iterations; N = num_samples x num_iterations", 8)
    sampling: Nucleus | Gaussian = doc(
        "how candidates are drawn: {top_p: 0.95, temperature: 1.0}, or {gaussian: 0.5}: greedily under noise",
        Nucleus(top_p=0.95),
    )
    spend: Spend | None = doc(_SPEND, None)
    limit: Limit | None = doc(_LIMIT, None)

    @property
    def name(self) -> str:
        return "best-of-n gaussian" if isinstance(self.sampling, Gaussian) else "best-of-n top-p"

    def draws(self) -> tuple[Sampling, Rates]:
        if isinstance(self.sampling, Gaussian):
            return Sampling(self.sampling.gaussian, likelihood=needs_likelihood(self.limit)), Rates()
        return _draws(self.sampling, self.limit)

    def grid(self) -> Grid:
        return {"sampling.gaussian": SIGMA2S} if isinstance(self.sampling, Gaussian) else _NUCLEUS


class OneAnswer(MethodSection):
    """A method that decodes one answer for each prompt."""

    algorithm = "best_of_n"
    num_samples: ClassVar[int] = 1
    num_iterations: ClassVar[int] = 1
    spend: ClassVar[None] = None
    limit: ClassVar[None] = None


class Args(OneAnswer):
    """ARGS-greedy (Khanov et al. 2024): each token is the argmax, over the likeliest tokens, of its logit plus weight
    times the reward of the text up to it. The rewards with use: select run inside the generator."""

    kind: Literal["args"] = doc("the method", "args")
    num_candidates: int = doc("likeliest tokens that are scored at every step, the paper's k", 32, ge=1, le=1024)
    weight: float = doc("factor of the reward beside the logit, the paper's w", 1.0, ge=0)

    @property
    def brings(self) -> str | None:
        return "rewards"

    @property
    def reward_calls_per_token(self) -> int:
        return self.num_candidates

    def draws(self) -> tuple[Sampling, Rates]:
        return Sampling(guide=TokenReward(self.num_candidates, self.weight)), Rates()

    def grid(self) -> Grid:
        return {"weight": (1e-5, 1e-3, 0.1, 1.0, 10.0, 1e3)}


class ReControl(OneAnswer):
    """RE-Control (Kong et al. 2024): every pre-logit moves up the gradient of a value network, which
    `aisp train-value` trains for this base model and reward."""

    kind: Literal["re_control"] = doc("the method", "re_control")
    value: str = doc("directory that `aisp train-value` wrote")
    steps: int = doc("gradient steps for each token", 30, ge=1, le=10_000)
    step_size: float = doc("length of a step, in units of the gradient", 1.0, gt=0)
    published: bool = doc("ascend as the authors' code does, with its faults", False)

    @property
    def brings(self) -> str | None:
        return self.value

    def draws(self) -> tuple[Sampling, Rates]:
        return Sampling(guide=Ascent(self.steps, self.step_size, self.published)), Rates()

    def grid(self) -> Grid:
        return {"step_size": (0.1, 0.3, 1.0, 3.0)}


Method = Annotated[Aisp | BatchedAisp | Population | Qalign | BestOfN | Args | ReControl, Discriminator("kind")]


def _draws(sampling: FlipRate | Nucleus, limit: Limit | None) -> tuple[Sampling, Rates]:
    measured = needs_likelihood(limit)
    if isinstance(sampling, FlipRate):
        return Sampling(likelihood=measured), Rates(drawing=sampling.flip_rate)
    return Sampling(decode=sampling.record(), likelihood=measured), Rates()


def _drawn_grid(sampling: FlipRate | Nucleus) -> Grid:
    return {"sampling.flip_rate": (0.2, 0.3, 0.4)} if isinstance(sampling, FlipRate) else _NUCLEUS


def as_published(method: MethodSection) -> bool:
    """Whether a method is AISP with settings of arXiv 2510.26219: lambda, sigma2 and alpha are numbers of the paper's
    grids, the noise is independent and drawn to the last step, and nothing else limits or stops the search."""
    return (
        isinstance(method, Aisp | BatchedAisp)
        and method.lambda_ in LAMBDAS
        and method.sigma2 in SIGMA2S
        and method.alpha in ALPHAS
        and (method.noise, method.after_eos) == ("independent", "full")
        and (method.limit, method.spend, method.shuffle_rewards) == (None, None, False)
    )
