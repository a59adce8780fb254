"""What crosses a boundary between the parts. Frozen; plain Python values only, so that every record pickles small and
can be written as JSON. Nothing here knows Ray, torch or Parquet.

How a prompt travels:  Prompt -> Round -> Rollout (Trajectory ...) -> Scores -> Done | Failed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Message = tuple[str, str]  # (role, content)
Finish = Literal["stop", "length"]

BASE_ITERATION = -1  # the iteration number of the greedy, uncontrolled answer


class Late(Exception):
    """A request took longer than its limit, though the process that served it is well."""


class _Record:
    """Pickles as its class and its values: what dataclasses with slots do by themselves takes twice the time, and a
    coordinator reads thousands of these a second."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        names: tuple[str, ...] = self.__slots__
        return type(self), tuple([getattr(self, name) for name in names])


@dataclass(frozen=True, slots=True)
class Prompt(_Record):
    """One readable line of the input.

    id: the user's own, or a hash of `content` and `columns` with an occurrence number (prompts.py).
    source_index: ordinal of the line in the input, from 0; bad lines count, so it is the row's place in the output too.
    content: messages for chat, shp and hh; the text itself for raw.
    columns: the `prompts.keep` columns, in that order; handed to function rewards.
    digest: hash of everything else but source_index; a changed input line changes it.
    original: the answer that the dialogue came with, where `prompts.drop_last_answer` took it off.
    """

    id: str
    source_index: int
    content: str | tuple[Message, ...]
    columns: tuple[tuple[str, Any], ...] = ()
    digest: str = ""
    original: str | None = None


@dataclass(frozen=True, slots=True)
class BadInput:
    """A line that cannot become a Prompt; it becomes a failed row. `content` is what could be read of it."""

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
    """ARGS, argmax over the `candidates` likeliest tokens of logit + weight * reward of the text that ends there."""

    candidates: int
    weight: float


@dataclass(frozen=True, slots=True)
class Ascent(_Record):
    """RE-Control: z moved by `steps` steps of `step_size` up the gradient of a value network."""

    steps: int
    step_size: float
    published: bool


@dataclass(frozen=True, slots=True)
class Sampling(_Record):
    """How the trajectories of a round are drawn.

    sigma2: variance of the noise on the pre-logits, (3); 0 switches control off.
    noise: its covariance over time (noise.py); parameter is ar1's rho or the mixture's share.
    decode: None is greedy (5), else tokens are drawn from the controlled logits.
    after_eos: what v_t is after a sample's end: `full` draws it (18), `marginal` integrates it out (algorithm's
    Rao-Blackwell variant).
    mean: without the noise, under the control alone: what its trace has learnt.
    guide: what else moves a step, inside the generator.
    likelihood: measured too, Trajectory.nll.
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
    """What a sampling is to be for a prompt, in place of numbers with a unit: shares of the tokens of the base answer
    that would come out differently, by the noise (sigma2) and by drawing (top_p). None: as the sampling says."""

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
    """One finished iteration, as the trace keeps it: w_i (fp32 values), the lengths T_i in tokens, and how many of
    those were given; () where none was."""

    weights: tuple[float, ...]
    lengths: tuple[int, ...]
    given: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Round(_Record):
    """A request for trajectories `start <= i < stop` of one iteration of one prompt. Together with the model it decides
    every bit of the answer: the control u^k is rebuilt from seed, prompt id, sampling and the trace of weights.
    prompt: only where a guide reads it. starts: the first tokens of each trajectory, which are given and not chosen;
    () where none has any."""

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

    token_ids: generated tokens, the end token included. text: without special tokens, cut before a stop string.
    control_cost: sum_t m_t . e_t and control_sq: sum_t |m_t|^2, in whitened coordinates (noise.py), over all steps for
    `full` and over t <= T_i for `marginal`.
    nll: mean negative log-likelihood of its tokens under the base model without control, in nats, where the round's
    sampling measures it.
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
    """The answer to a Round: its trajectories in sample order, and sum_t |m_t|^2 of its control over all steps, from
    which KL(Q_u || P) = u_sq / (2 sigma^2)."""

    trajectories: tuple[Trajectory, ...]
    u_sq: float = 0.0


@dataclass(frozen=True, slots=True)
class Score(_Record):
    """What one reward says of one response. `value` None with reason None: not applicable (TRL's None). `value` None
    with a reason: quarantined (NaN, inf)."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored trajectory. `reward` is the combined one; None where quarantined, with the reason. text: what rewards
    saw; where thinking is stripped it is only in the tokens. nll: as it was drawn, per token, where method.limit asks
    for it. within: the limit, so it may be selected and continued."""

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
    """Diagnostics of one finished iteration: the trace entry, effective sample size, KL(Q_u || P) of the control that
    proposed it, mean and best of its finite rewards within the limit (None if there were none). sigma2, top_p: of its
    sampling. parents, given: where its samples continue earlier ones, the place of each among all so far (-1: none)
    and how many of its tokens were given; else ()."""

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
    """Scores of the answer that a prompt came with: combined, None where quarantined or not applicable, and raw."""

    reward: float | None
    rewards: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A relabelled prompt; becomes one row of data/ and, with save.candidates, one of candidates/.

    base: the greedy, uncontrolled answer; never eligible as best. best: the selected candidate, with the report-only
    rewards filled in too. nll / base_nll: base-model negative log-likelihood per token, in nats; nll is None where
    rescoring (rescore.py) has selected another answer than the search did, whose likelihood nobody has asked for.
    curve: best reward so far after each iteration (None while nothing finite was seen).
    prompt_hash: of the prompt's token ids, so that a template or tokenizer that changes shows.
    original: of `prompt.original`, None where there is none.
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
    """An input that has no answer, with the reason. Only errors that a fresh process reproduces end here."""

    prompt: Input
    reason: str


Result = Done | Failed
