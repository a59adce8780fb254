"""The decode engine: trajectories of many rounds in a batch of rows that never changes its size. Owns the slots, the
store of prefilled prompts and the step. Knows nothing of rewards, Ray or how rounds are chosen.

    submit -> waiting trajectories -> step: admit, prefill, states -> control -> logits -> select, retire -> Rollout

A row is a slot; a finished trajectory makes room for the next, of any prompt, at once. A trajectory's bits depend on
its Round, the model and the number of rows, never on what else is in flight (attention.py says how). One thread only.

Shapes: B rows, R some of them, D hidden size, V vocabulary, T steps (max_new_tokens), S suffix capacity.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from aisp_dist import noise
from aisp_dist.engine import attention
from aisp_dist.engine.control import Control, cost, rebuild, white
from aisp_dist.engine.model import LM
from aisp_dist.records import Finish, Rollout, Round, TopP, Trajectory

_HEAD_ROWS = 256  # positions per head product in nll, to bound the logits

Kind = TypeVar("Kind", bound=Hashable)


class DecodeError(RuntimeError):
    """A round that cannot be finished, for a reason that a repetition would reproduce; it is out of the engine."""

    def __init__(self, round: Round, reason: str) -> None:
        super().__init__(f"prompt {round.prompt_id!r}, iteration {round.iteration}: {reason}")
        self.round = round


@dataclass(eq=False)
class _Prompt:
    """What iterations of a prompt share: its prefix, and the control of the last one."""

    tokens: tuple[int, ...]
    age: int  # older prompts have smaller ones
    prefix: attention.Prefix | None = None
    control: Control | None = None
    rounds: int = 0  # in flight; at 0 the prompt is idle


@dataclass(eq=False)
class _Job:
    """A round in flight."""

    round: Round
    prompt: _Prompt
    key: tuple[int, int]
    control: Control | None = None
    done: dict[int, Trajectory] = field(default_factory=dict)


@dataclass(eq=False)
class Row:
    """A trajectory in a slot. step: t of the token it gets next, from 1."""

    job: _Job
    sample: int
    prefix: attention.Prefix
    step: int = 1
    tokens: list[int] = field(default_factory=list)


class Engine:
    """Decodes rounds with one model.

    batch_rows: rows decoded together, rounded up to a multiple of 32. max_new_tokens: tau. stop: strings that end a
    response; one that is a special token of the tokenizer ends it as an end token does. idle_tokens: prompts without a
    round in flight stay prefilled, the most recently used first, up to this many tokens in all.
    """

    def __init__(
        self, lm: LM, batch_rows: int, max_new_tokens: int, stop: Sequence[str] = (), idle_tokens: int = 1 << 14
    ) -> None:
        self.lm, self.max_new_tokens, self.idle_tokens = lm, max_new_tokens, idle_tokens
        special = {t.content: i for i, t in lm.tokenizer.added_tokens_decoder.items() if t.special}
        self.end_ids = lm.eos_ids | {special[s] for s in stop if s in special}
        self.stop = tuple(s for s in stop if s not in special)
        self.rows: list[Row | None] = [None] * (batch_rows + -batch_rows % attention.TILE)
        self._waiting: list[tuple[int, int, _Job, int]] = []  # a heap by age of the prompt, then of the trajectory
        self._age = itertools.count()
        self._jobs: list[_Job] = []
        self._finished: list[tuple[Round, Rollout]] = []
        self._broken: list[DecodeError] = []
        self.prompts: OrderedDict[Hashable, _Prompt] = OrderedDict()
        self.suffix: list[attention.KV] = []
        self._tokens_B = torch.zeros(len(self.rows), dtype=torch.long, device=lm.device)
        self._filter_BD = torch.zeros(len(self.rows), lm.hidden_size, device=lm.device)

    @property
    def busy(self) -> bool:
        """Whether a step has something to do or to hand out."""
        return bool(self._jobs or self._finished or self._broken)

    def submit(self, round: Round) -> None:
        """Queues a round's trajectories. Raises ValueError for a round that cannot be decoded."""
        self._check(round)
        key = (round.seed, round.prompt_id, round.prompt_tokens)
        prompt = self.prompts.setdefault(key, _Prompt(round.prompt_tokens, next(self._age)))
        self.prompts.move_to_end(key)
        prompt.rounds += 1
        job = _Job(round, prompt, noise.prompt_key(round.seed, round.prompt_id))
        self._jobs.append(job)
        for sample in range(round.start, round.stop):
            heapq.heappush(self._waiting, (prompt.age, next(self._age), job, sample))

    @torch.inference_mode()
    def step(self) -> list[tuple[Round, Rollout]]:
        """One token for every row; returns the rounds that this completed. Raises DecodeError for a round that must be
        given up; the others go on with the next call."""
        self._admit()
        if not any(self.rows):
            return self._hand_out()
        t_B = torch.tensor([row.step if row else 2 for row in self.rows], device=self.lm.device)
        z_BD = self._states(t_B)
        z_BD = self.control(z_BD, t_B)
        logits_BV = self.lm.logits(z_BD)
        self._retire(self.select(logits_BV, t_B), logits_BV)
        return self._hand_out()

    def cancel(self, round: Round) -> None:
        """Forgets a round in flight, if it is; its rows are free at the next step."""
        for job in [job for job in self._jobs if job.round == round]:
            self._waiting = sorted(entry for entry in self._waiting if entry[2] is not job)
            self.rows = [None if row and row.job is job else row for row in self.rows]
            self._leave(job)

    def run(self, rounds: Iterable[Round]) -> list[Rollout]:
        """Decodes rounds to their end, in an engine that has nothing else in flight; answers in their order."""
        if self.busy:
            raise RuntimeError("the engine is busy: finish or cancel its rounds before run()")
        rounds = list(rounds)
        for round in rounds:
            self.submit(round)
        answers: dict[Round, Rollout] = {}
        while self.busy:
            answers.update(self.step())
        return [answers[round] for round in rounds]

    @torch.inference_mode()
    def nll(self, prompt_tokens: Sequence[int], response_tokens: Sequence[int]) -> float:
        """Mean negative log-likelihood of the response under the base model, in nats per token."""
        if not prompt_tokens or not response_tokens:
            raise ValueError("nll needs at least one prompt token and one response token")
        z_TD, _ = self.lm.dense((*prompt_tokens, *response_tokens[:-1]))
        total = []
        targets = torch.split(torch.tensor(response_tokens, device=self.lm.device), _HEAD_ROWS)
        for states, target in zip(torch.split(z_TD[len(prompt_tokens) - 1 :], _HEAD_ROWS), targets, strict=True):
            total.append(self.lm.logits(states).log_softmax(-1).gather(1, target[:, None]).double().sum())
        return -float(torch.stack(total).sum()) / len(response_tokens)

    def _check(self, round: Round) -> None:
        length, context = len(round.prompt_tokens), self.lm.context_length
        if not length:
            raise ValueError("the prompt has no tokens; it needs at least one to decode from")
        if context is not None and length + self.max_new_tokens > context + 1:
            raise ValueError(
                f"{length} prompt tokens + {self.max_new_tokens} new tokens exceed the model's {context} positions; "
                "lower generator.max_new_tokens or prompts.max_tokens"
            )
        low, high, vocab = min(round.prompt_tokens), max(round.prompt_tokens), self.lm.vocab_size
        if low < 0 or high >= vocab:
            raise ValueError(
                f"prompt tokens {low} to {high} leave the model's vocabulary of {vocab}; use its tokenizer"
            )
        if not 0 <= round.start < round.stop:
            raise ValueError(f"samples {round.start} to {round.stop}: start must be below stop")
        if round.sampling.sigma2 or round.sampling.decode:
            noise.sample_word(round.iteration, round.stop - 1)
        if any(len(entry.weights) != len(entry.lengths) for entry in round.trace):
            raise ValueError("an iteration of the trace has not one length per weight")

    def _admit(self) -> None:
        """Waiting trajectories into free slots, those of the oldest prompt first: so prompts are finished one after the
        other, and a kill finds few of them half done."""
        for slot, row in enumerate(self.rows):
            if row is None and self._waiting:
                *_, job, sample = heapq.heappop(self._waiting)
                self.rows[slot] = Row(job, sample, self._prefill(job))
                self._filter_BD[slot] = 0
                for store in (x for kv in self.suffix for x in kv):
                    store[slot] = 0  # masked keys weigh 0, but 0 * NaN left by another row would not be 0

    def _prefill(self, job: _Job) -> attention.Prefix:
        """The prompt's prefix, computed alone and once for all its rows and iterations, and the round's control."""
        prompt = job.prompt
        if prompt.prefix is None:
            z_TD, dense = self.lm.dense(prompt.tokens, keep=True)
            prompt.prefix = attention.Prefix(dense.kv, len(prompt.tokens), z_TD[-1].clone())
            if not self.suffix:
                self.suffix = attention.empty_suffix(dense.kv, len(self.rows), self.max_new_tokens)
        if job.control is None and job.round.sampling.sigma2:
            device = self.lm.device
            job.control = rebuild(job.round, self.max_new_tokens, self.lm.hidden_size, device, prompt.control)
            prompt.control = job.control
        return prompt.prefix

    def _states(self, t_B: torch.Tensor) -> torch.Tensor:
        """z [B, D]: the stored z_0 for rows at their first step, a pass of the decoder for the others."""
        z_BD = torch.zeros(len(self.rows), self.lm.hidden_size, dtype=self.lm.dtype, device=self.lm.device)
        groups = {p: rows_R for p, _, rows_R in self._groups(lambda row: row.prefix if row.step > 1 else None)}
        first_R = groups.pop(None, None)
        if groups:
            lengths_B = torch.tensor([row.prefix.length if row else 0 for row in self.rows], device=self.lm.device)
            at_B = (t_B - 2).clamp(min=0)
            attend = attention.Shared(self.suffix, at_B, [(rows_R, p) for p, rows_R in groups.items() if p])
            z_BD = self.lm.states(attend, self._tokens_B[:, None], (lengths_B + at_B)[:, None])[:, 0]
        if first_R is not None:
            z_BD[first_R] = torch.stack([row.prefix.z_D for row in self.rows if row and row.step == 1])
        return z_BD

    def control(self, z_BD: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """z + v [B, D] in fp32, with v_t = L (m + e)_t of each row, (3)."""
        z_BD = z_BD.float()
        for sampling, rows, rows_R in self._groups(lambda row: row.job.round.sampling):
            controls = [row.job.control for row in rows if row.job.control]
            if controls:
                m_RD = torch.stack([c.m_TD[row.step - 1] for c, row in zip(controls, rows, strict=True)])
                e_RD = white(sampling, *self._counters(rows, t_B[rows_R]), self.lm.hidden_size)
                v_RD, state_RD = controls[0].filter.step(m_RD + e_RD, self._filter_BD[rows_R], t_B[rows_R])
                self._filter_BD[rows_R] = state_RD
                z_BD[rows_R] += v_RD
        return z_BD

    def select(self, logits_BV: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """y [B]: the argmax (5), ties to the lowest id, or a keyed draw."""
        tokens_B = logits_BV.argmax(-1)
        for decode, rows, rows_R in self._groups(lambda row: row.job.round.sampling.decode):
            if decode:
                uniform_R = noise.uniform(*self._counters(rows, t_B[rows_R]))
                tokens_B[rows_R] = draw(logits_BV[rows_R], decode, uniform_R)
        return tokens_B

    def _retire(self, tokens_B: torch.Tensor, logits_BV: torch.Tensor) -> None:
        """Appends each row's token; trajectories that end leave their slots, completed rounds leave the engine."""
        self._tokens_B = tokens_B
        finite_B = logits_BV.gather(1, tokens_B[:, None])[:, 0].isfinite()
        for slot, (token, finite) in enumerate(torch.stack([tokens_B, finite_B.long()], dim=1).tolist()):
            row = self.rows[slot]
            if row is None:
                continue
            if not finite:
                reason = f"logits at step {row.step} are not finite; try a dtype with a wider range (generator.dtype)"
                self._broken.append(DecodeError(row.job.round, reason))
                self.cancel(row.job.round)
                continue
            row.tokens.append(token)
            row.step += 1
            if ending := self._ending(row.tokens):
                self.rows[slot] = None
                self._complete(row, *ending)

    def _complete(self, row: Row, finish: Finish, text: str) -> None:
        """A row's trajectory into its round, which leaves with the last one."""
        job, tokens = row.job, tuple(row.tokens)
        costs = cost(job.control, job.round, row.sample, len(tokens)) if job.control else (0.0, 0.0)
        job.done[row.sample] = Trajectory(row.sample, tokens, text, finish, *costs)
        if len(job.done) == job.round.stop - job.round.start:
            self._leave(job)
            trajectories = tuple(job.done[sample] for sample in sorted(job.done))
            self._finished.append((job.round, Rollout(trajectories, job.control.u_sq if job.control else 0.0)))

    def _ending(self, tokens: list[int]) -> tuple[Finish, str] | None:
        """Why a trajectory of these tokens ends, and its text; None if it goes on."""
        if tokens[-1] in self.end_ids:
            return "stop", self._text(tokens[:-1])
        if self.stop:
            text = self._text(tokens)
            cuts = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
            if cuts:
                return "stop", text[: min(cuts)]
        return ("length", self._text(tokens)) if len(tokens) == self.max_new_tokens else None

    def _text(self, tokens: list[int]) -> str:
        text: str = self.lm.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _leave(self, job: _Job) -> None:
        """Ends a job's stay; idle prompts beyond `idle_tokens` are forgotten, the least recently used first."""
        self._jobs.remove(job)
        job.prompt.rounds -= 1
        idle = 0
        for key, prompt in reversed(list(self.prompts.items())):
            idle += 0 if prompt.rounds else len(prompt.tokens)
            if not prompt.rounds and idle > self.idle_tokens:
                del self.prompts[key]

    def _hand_out(self) -> list[tuple[Round, Rollout]]:
        if self._broken:
            raise self._broken.pop()
        finished, self._finished = self._finished, []
        return finished

    def _groups(self, kind: Callable[[Row], Kind]) -> Iterator[tuple[Kind, list[Row], torch.Tensor]]:
        """The occupied rows by kind, with their slots [R]."""
        slots: dict[Kind, list[int]] = defaultdict(list)
        for slot, row in enumerate(self.rows):
            if row:
                slots[kind(row)].append(slot)
        for key, members in slots.items():
            rows = [row for slot in members if (row := self.rows[slot])]
            yield key, rows, torch.tensor(members, device=self.lm.device)

    def _counters(self, rows: list[Row], t_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key [R, 2], step [R] and sample word [R] of rows' noise."""
        keys = [row.job.key for row in rows]
        words = [noise.sample_word(row.job.round.iteration, row.sample) for row in rows]
        return torch.tensor(keys, device=self.lm.device), t_R, torch.tensor(words, device=self.lm.device)


def draw(logits_RV: torch.Tensor, decode: TopP, uniform_R: torch.Tensor) -> torch.Tensor:
    """Tokens [R] by inverse CDF over the nucleus: the fewest likeliest tokens whose probability reaches p, equal ones
    in the order of their ids. fp64, so that the order of a sum cannot move a draw."""
    probability, order = (logits_RV.double() / decode.temperature).softmax(-1).sort(stable=True, descending=True)
    reached = probability.cumsum(-1)
    kept = reached - probability < decode.p
    mass_R1 = (probability * kept).sum(-1, keepdim=True)
    rank_R1 = torch.searchsorted(reached, uniform_R[:, None] * mass_R1)
    tokens_R: torch.Tensor = order.gather(1, torch.minimum(rank_R1, kept.sum(-1, keepdim=True) - 1))[:, 0]
    return tokens_R
