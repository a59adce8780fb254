"""The records that parts and processes exchange. Frozen, with plain Python values only, so that each pickles small and
can be written as JSON. Nothing here knows Ray, torch or Parquet.

    Prompt -> Round -> Rollout (Trajectory ...) -> Score ... -> Done | Failed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Message = tuple[str, str]  # (role, content)
Finish = Literal["stop", "length"]

BASE_ITERATION = -1  # the iteration number of the base answer, which is greedy and without control


class Late(Exception):
    """A request took longer than its limit. The process that served it is healthy."""


class _Record:
    """Pickles as its class and its values. A dataclass with slots takes twice as long by default, and a coordinator
    reads thousands of records a second."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        names: tuple[str, ...] = self.__slots__
        return type(self), tuple([getattr(self, name) for name in names])


@dataclass(frozen=True, slots=True)
class Prompt(_Record):
    """One readable line of the input.

    id: the user's own, or a hash of `content` and `columns` with an occurrence number (data/prompts.py).
    source_index: number of the input line, from 0. Bad lines count, so it is the row's place in the output too.
    content: messages for chat, shp and hh; the text itself for raw.
    columns: the `prompts.keep` columns, in that order. Function rewards receive them.
    digest: hash of everything else but source_index, which a changed input line changes.
    original: the last answer of the dialogue, which `prompts.drop_last_answer` removed.
    """

    id: str
    source_index: int
    content: str | tuple[Message, ...]
    columns: tuple[tuple[str, Any], ...] = ()
    digest: str = ""
    original: str | None = None


@dataclass(frozen=True, slots=True)
class BadInput:
    """An input line that cannot become a Prompt and becomes a failed row. content: as much as could be read."""

    id: str
    source_index: int
    reason: str
    content: str | tuple[Message, ...] | None = None
    columns: tuple[tuple[str, Any], ...] = ()
    digest: str = ""


Input = Prompt | BadInput


@dataclass(frozen=True, slots=True)
class TopP(_Record):
    """Nucleus sampling: the smallest set of tokens with probability >= p at this temperature."""

    p: float
    temperature: float


@dataclass(frozen=True, slots=True)
class TokenReward(_Record):
    """ARGS: of the `candidates` likeliest tokens, the one with the largest logit + weight * reward of the text so far
    with that token."""

    candidates: int
    weight: float


@dataclass(frozen=True, slots=True)
class Ascent(_Record):
    """RE-Control: the pre-logits move `steps` steps of `step_size` up the gradient of a value network."""

    steps: int
    step_size: float
    published: bool


@dataclass(frozen=True, slots=True)
class Sampling(_Record):
    """How the trajectories of a round are drawn.

    sigma2: variance of the noise on the pre-logits, (3); 0 switches control off.
    noise: its covariance over time (engine/noise.py); parameter is ar1's rho or the mixture's share.
    decode: None is greedy (5); TopP draws tokens from the controlled logits.
    after_eos: v_t after a sample's end: `full` draws it (18), `marginal` integrates it out (Rao-Blackwell).
    mean: decode under the control alone, without noise, which shows what the trace has learnt.
    guide: what else changes a step, inside the generator.
    likelihood: also measure Trajectory.nll.
    """

    sigma2: float = 0.0
    noise: Literal["independent", "ar1", "shared", "mixture"] = "independent"
    parameter: float = 0.0
    alpha: float = 1.0
    decode: TopP | None = None
    after_eos: Literal["full", "marginal"] = "full"
    mean: bool = False
    guide: TokenReward | Ascent | None = None
    likelihood: bool = False


@dataclass(frozen=True, slots=True)
class Rates(_Record):
    """How much a sampling may change a prompt's base answer: the share of its tokens that come out differently, by the
    noise (which gives sigma2) and by drawing (which gives top_p). None: leave the sampling's own number."""

    noise: float | None = None
    drawing: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration(_Record):
    """A request for a prompt's own sampling: `sampling` with `rates` turned into numbers, from the base model's
    probabilities over `base_tokens`, its greedy answer."""

    seed: int
    prompt_id: str
    prompt_tokens: tuple[int, ...]
    base_tokens: tuple[int, ...]
    sampling: Sampling
    rates: Rates


@dataclass(frozen=True, slots=True)
class Weights(_Record):
    """One finished iteration in the trace: w_i (fp32 values) and the lengths T_i in tokens."""

    weights: tuple[float, ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Round(_Record):
    """A request for trajectories `start <= i < stop` of one iteration of one prompt. Together with the model it decides
    every bit of the answer, since the control u^k is rebuilt from seed, prompt id, sampling and the trace of weights.

    prompt: only where a guide reads it. starts: the first tokens of each trajectory, which are given and not decoded;
    () where none has any, as in every round with noise.
    """

    seed: int
    prompt_id: str
    prompt_tokens: tuple[int, ...]
    iteration: int
    start: int
    stop: int
    sampling: Sampling
    trace: tuple[Weights, ...] = ()
    prompt: Prompt | None = field(default=None, compare=False)
    starts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Trajectory(_Record):
    """One decoded answer.

    token_ids: generated tokens, with the end token. text: without special tokens, cut before a stop string.
    control_cost: sum_t m_t . e_t; control_sq: sum_t |m_t|^2; both in whitened coordinates (engine/noise.py), over all
    steps for `full`, over t <= T_i for `marginal`.
    nll: mean negative log-likelihood of its tokens under the base model without control, in nats; None where the
    round's sampling does not measure it.
    """

    sample: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: Finish
    control_cost: float = 0.0
    control_sq: float = 0.0
    nll: float | None = None


@dataclass(frozen=True, slots=True)
class Rollout(_Record):
    """The answer to a Round: trajectories in sample order. u_sq: sum_t |m_t|^2 of the control over all steps, which
    gives KL(Q_u || P) = u_sq / (2 sigma^2)."""

    trajectories: tuple[Trajectory, ...]
    u_sq: float = 0.0


@dataclass(frozen=True, slots=True)
class Score(_Record):
    """One reward of one response. value None without a reason: the reward does not apply (TRL's None). value None with
    a reason: quarantined, such as NaN."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored trajectory.

    text: what rewards saw; stripped thinking is in the tokens alone. reward: the combined one; None where quarantined,
    with the reason. nll: as it was drawn, per token, in nats, where method.limit needs it. within: whether it meets
    method.limit; only then may it be selected or continued.
    """

    iteration: int
    sample: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Finish
    reward: float | None
    rewards: tuple[tuple[str, float | None], ...]
    reason: str | None = None
    nll: float | None = None
    within: bool = True

    @property
    def eligible_reward(self) -> float | None:
        return self.reward if self.within else None


@dataclass(frozen=True, slots=True)
class Iteration:
    """One finished iteration: its trace entry and diagnostics.

    ess: effective sample size. kl: KL(Q_u || P) of the control that proposed it, in nats. mean_reward, best_reward: of
    its finite rewards within method.limit; None if there are none. sigma2, top_p: of its sampling. parents, given:
    where samples continue earlier answers, the place of each one's parent among all candidates (-1: none) and how many
    of its tokens were given; else ().
    """

    weights: tuple[float, ...]
    lengths: tuple[int, ...]
    ess: float
    kl: float
    mean_reward: float | None
    best_reward: float | None
    sigma2: float = 0.0
    top_p: float | None = None
    parents: tuple[int, ...] = ()
    given: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Original:
    """Scores of the answer that a prompt came with: combined (None where quarantined or not applicable), and raw."""

    reward: float | None
    rewards: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A relabelled prompt, which becomes one row of data/ and, with save.candidates, one of candidates/.

    best: the selected candidate, with the held-out rewards too. base: the greedy answer without control, which is
    never selected. nll, base_nll: their negative log-likelihood per token under the base model, in nats; nll is None
    where rescoring selected another answer than the search did.
    curve: best reward after each iteration; None before the first finite one.
    prompt_hash: of the prompt's token ids, so that a changed template or tokenizer shows.
    original: scores of `prompt.original`, if there is one.
    """

    prompt: Prompt
    prompt_tokens: int
    best: Candidate
    base: Candidate
    nll: float | None
    base_nll: float
    samples_spent: int
    quarantined: int
    curve: tuple[float | None, ...]
    candidates: tuple[Candidate, ...] = ()
    trace: tuple[Iteration, ...] = ()
    prompt_hash: str = ""
    original: Original | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """An input without an answer, and the reason. Only what is wrong with the input itself ends here, no fault."""

    prompt: Input
    reason: str


Result = Done | Failed
