"""The state of all rows on the model's device, and the step that gives each row one token:

    states (z) -> control (z + v) -> logits -> select (y) -> record

On a GPU a step reads no value back to the host. A step may be of the first rows only (widths.py); empty slots among
them take part and change nothing. A row ends here by an end token or by length. Knows nothing of rounds or stop
strings. Equation numbers: Kanai et al., arXiv 2510.26219.

Shapes: B rows, R some of them, D hidden size, V vocabulary, T steps (max_new_tokens), F plans (kinds of sampling),
A controls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from aisp_dist.engine import noise, nucleus
from aisp_dist.engine.attention import Pass
from aisp_dist.engine.laps import Laps
from aisp_dist.engine.lm import LM
from aisp_dist.records import Ascent, Sampling, TopP

if TYPE_CHECKING:
    from aisp_dist.methods.value import Value

Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits [B, V], tokens [B] -> tokens [B]

# Columns of the table of rows. step: t of the token that a row gets next, from 1; of its last token once it has ended.
# finite: whether the last logits were. token: the last one. length: of its prompt in tokens. plan, control: its lines
# in Plans and Controls. key0, key1, word: the key and the sample word of its noise.
STEP, ENDED, FINITE, TOKEN, LENGTH, PLAN, CONTROL, KEY0, KEY1, WORD = range(10)
_EMPTY = (1, 1, 1, *[0] * 7)
_BY_ROW = ("rows_BF", "z0_BD", "filter_BD", "dots_BT", "nll_BT")
_DRAWN = 32  # rows whose tokens are drawn or measured together: a measure takes 16 bytes for each logit


class Seat(NamedTuple):
    """What a row starts from. slot: its place among the rows; length: of its prompt; plan, control: lines in Plans and
    Controls; key, word: of its noise; z_D: z_0, the prompt's last hidden state; start: its given first tokens, which
    have passed through the model already; nll: theirs, where measured."""

    slot: int
    length: int
    plan: int
    control: int
    key: tuple[int, int]
    word: int
    z_D: torch.Tensor
    start: tuple[int, ...] = ()
    nll: Sequence[float] = ()


class Plans:
    """The kinds of sampling that rows use, one line of each table for a kind. Line 0 is greedy without control."""

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.lines: dict[Sampling, int] = {}
        self.num_steps, self.device = num_steps, device
        self._make(16)
        self.line(Sampling())

    def line(self, sampling: Sampling) -> int:
        """The line of a kind of sampling, added if it is missing."""
        if sampling not in self.lines:
            if len(self.lines) == len(self.sigma_F):
                known, self.lines = self.lines, {}
                self._make(2 * len(self.sigma_F))
                for old in known:
                    self.line(old)
            at = self.lines[sampling] = len(self.lines)
            made = noise.time_filter(sampling, self.num_steps, self.device)
            draw = sampling.decode or TopP(1e-6, 1.0)  # on a GPU a greedy row is drawn too, and not read
            self.feed_FT[at], self.gain_FT[at], self.keep_F[at] = made.feed, made.gain, made.keep
            self.sigma_F[at] = 0.0 if sampling.mean else math.sqrt(sampling.sigma2)
            self.draws_F[at] = sampling.decode is not None
            self.p_F[at], self.temperature_F[at] = draw.p, draw.temperature
            self.ascends_F[at] = isinstance(sampling.guide, Ascent)
        return self.lines[sampling]

    def _make(self, capacity: int) -> None:
        self.ascends_F = torch.zeros(capacity, dtype=torch.bool, device=self.device)
        self.feed_FT, self.gain_FT = torch.zeros(2, capacity, self.num_steps, device=self.device)
        self.keep_F, self.sigma_F = torch.zeros(2, capacity, device=self.device)
        self.draws_F = torch.zeros(capacity, dtype=torch.bool, device=self.device)
        self.p_F, self.temperature_F = torch.ones(2, capacity, dtype=torch.float64, device=self.device)


class Controls:
    """The controls m [T, D] under which rows are decoded, by line. Line 0 is no control, all zeros. `free`: lines that
    `put` may use; whoever put a control gives its line back there."""

    def __init__(self, capacity: int, num_steps: int, dim: int, device: torch.device) -> None:
        self.m_ATD = torch.zeros(capacity + 1, num_steps, dim, device=device)
        self.free = list(range(capacity, 0, -1))

    def put(self, m_TD: torch.Tensor) -> int:
        """Stores m and answers its line."""
        if not self.free:
            size = len(self.m_ATD)
            self.free = list(range(size, 2 * size))[::-1]
            self.m_ATD = torch.cat([self.m_ATD, torch.zeros_like(self.m_ATD)])
        line = self.free.pop()
        self.m_ATD[line] = m_TD
        return line


class Batch:
    """The state of all rows. end_ids: tokens that end a response. value: the value network of RE-Control."""

    def __init__(
        self, lm: LM, num_rows: int, num_steps: int, end_ids: frozenset[int], value: Value | None = None
    ) -> None:
        self.lm, self.num_steps, self.value, self.laps = lm, num_steps, value, Laps()
        device, dim = lm.device, lm.hidden_size
        self.plans, self.controls = Plans(num_steps, device), Controls(num_rows // 4, num_steps, dim, device)
        self.rows_BF = torch.tensor([_EMPTY] * num_rows, device=device)
        self.z0_BD = torch.zeros(num_rows, dim, dtype=lm.dtype, device=device)
        self.filter_BD = torch.zeros(num_rows, dim, device=device)
        self.dots_BT = torch.zeros(num_rows, num_steps, dtype=torch.float64, device=device)  # m_t . e_t
        self.nll_BT = torch.zeros(num_rows, num_steps, dtype=torch.float64, device=device)  # of tokens, where measured
        self.ends_V = torch.zeros(lm.vocab_size, dtype=torch.bool, device=device)
        self.ends_V[sorted(end for end in end_ids if end < lm.vocab_size)] = True

    def first(self, rows: int) -> Batch:
        """The first rows of this batch, as a view: what becomes of them becomes of this batch's."""
        view = copy.copy(self)
        for name in _BY_ROW:
            setattr(view, name, getattr(self, name)[:rows])
        return view

    def seat(self, seats: Sequence[Seat]) -> None:
        """Puts new trajectories into their slots, at the step after their given tokens."""
        device = self.rows_BF.device
        slots = torch.tensor([seat.slot for seat in seats], device=device)
        rows = [
            (len(s.start) + 1, 0, 1, s.start[-1] if s.start else 0, s.length, s.plan, s.control, *s.key, s.word)
            for s in seats
        ]
        self.rows_BF[slots] = torch.tensor(rows, device=device)
        self.z0_BD[slots] = torch.stack([seat.z_D for seat in seats])
        self.filter_BD[slots] = 0
        for seat in seats:
            if seat.nll:
                self.nll_BT[seat.slot, : len(seat.nll)] = torch.tensor(seat.nll, dtype=torch.float64, device=device)

    def clear(self, slots: Sequence[int]) -> None:
        """Empties rows."""
        self.rows_BF[slots] = torch.tensor(_EMPTY, device=self.rows_BF.device)

    def step(
        self,
        attend: Pass | None,
        *,
        controlled: bool,
        drawn: bool,
        measured: bool = False,
        ascent: Ascent | None = None,
        choose: Choose | None = None,
    ) -> None:
        """One token for every row that has not ended.

        attend: the decode pass; None if every row is at its first step, whose state is known. controlled, drawn,
        measured: whether any row is under control, draws its tokens, or has its likelihood under the base model
        measured. ascent: how rows of RE-Control climb the value network. choose: replaces tokens, given all
        logits."""
        lap = self.laps.lap
        base_BD = self.states(attend).float()
        lap("decoder")
        z_BD = self.control(base_BD) if controlled else base_BD
        if ascent is not None:
            z_BD = self.ascend(z_BD, ascent)
        if z_BD is not base_BD:
            lap("control")
        logits_BV = self.lm.logits(z_BD)
        lap("head")
        token_B, finite_B = self.select(logits_BV, drawn)
        if choose:
            token_B = choose(logits_BV, token_B)
        lap("draw")
        if measured:
            self.measure(logits_BV if z_BD is base_BD else self.lm.logits(base_BD), token_B)
            lap("likelihood")
        self.record(token_B, finite_B)

    def ascend(self, z_BD: torch.Tensor, ascent: Ascent) -> torch.Tensor:
        """z [B, D], in which rows of RE-Control are moved up the value network."""
        assert self.value is not None
        climbs_B = self.plans.ascends_F[self.rows_BF[:, PLAN]]
        return torch.where(climbs_B[:, None], self.value.ascend(z_BD, ascent.steps, ascent.step_size), z_BD)

    def states(self, attend: Pass | None) -> torch.Tensor:
        """z [B, D]: the stored z_0 of rows at their first step, a pass of the decoder for the others."""
        if attend is None:
            return self.z0_BD
        step_B, token_B, length_B = (self.rows_BF[:, x] for x in (STEP, TOKEN, LENGTH))
        position_B = length_B + (step_B - 2).clamp(min=0)
        z_BTD = self.lm.states(attend, token_B[:, None], position_B[:, None])
        z_BD: torch.Tensor = torch.where(step_B[:, None] == 1, self.z0_BD, z_BTD[:, 0])
        return z_BD

    def control(self, z_BD: torch.Tensor) -> torch.Tensor:
        """z + v [B, D] in fp32, (3), with v_t = (L (m + e))_t of each row. Keeps m_t . e_t in `dots_BT`."""
        plan_B, at_B, control_B = (self.rows_BF[:, PLAN], self.rows_BF[:, STEP] - 1, self.rows_BF[:, CONTROL])
        e_BD = self.plans.sigma_F[plan_B][:, None] * noise.white(*self._counter(), z_BD.shape[1])
        m_BD = self.controls.m_ATD[control_B, at_B]
        feed_B, gain_B = self.plans.feed_FT[plan_B, at_B], self.plans.gain_FT[plan_B, at_B]
        v_BD: torch.Tensor = feed_B[:, None] * self.filter_BD + gain_B[:, None] * (m_BD + e_BD)
        self.filter_BD.mul_(self.plans.keep_F[plan_B][:, None]).add_(v_BD)
        self.dots_BT.scatter_(1, at_B[:, None], (m_BD.double() * e_BD.double()).sum(-1, keepdim=True))
        return z_BD + v_BD

    def select(self, logits_BV: torch.Tensor, drawn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """y [B], the argmax (5) with ties to the lowest id, or a keyed draw; and whether the logits are finite [B], for
        which the largest is enough: it is NaN or +inf if any logit is."""
        finite_B = logits_BV.amax(-1).isfinite()
        if not drawn:
            return logits_BV.argmax(-1), finite_B
        plan_B = self.rows_BF[:, PLAN]
        draws_B = self.plans.draws_F[plan_B]
        given = logits_BV, self.plans.p_F[plan_B], self.plans.temperature_F[plan_B], noise.uniform(*self._counter())
        on_cpu = logits_BV.device.type == "cpu"
        if not on_cpu or draws_B.all():  # on a GPU, how many rows draw would be a value to wait for
            drawn_B = torch.cat([nucleus.draw(*part) for part in zip(*(x.split(_DRAWN) for x in given), strict=True)])
            return drawn_B if on_cpu else torch.where(draws_B, drawn_B, logits_BV.argmax(-1)), finite_B
        token_B = torch.zeros_like(plan_B)
        drawing_R = draws_B.nonzero()[:, 0]  # of no empty slot: its logits are all equal, which is the longest draw
        for rows in torch.split(drawing_R, _DRAWN):
            token_B[rows] = nucleus.draw(*(x[rows] for x in given))
        others = (~draws_B).nonzero()[:, 0]
        token_B[others] = logits_BV[others].argmax(-1)
        return token_B, finite_B

    def measure(self, logits_BV: torch.Tensor, token_B: torch.Tensor) -> None:
        """Keeps -log P_LLM(y_t | x, y_<t), from the base model's logits, in `nll_BT`."""
        parts = zip(torch.split(logits_BV, _DRAWN), torch.split(token_B, _DRAWN), strict=True)
        nll_B = torch.cat([nucleus.nll(part, token) for part, token in parts])
        self.nll_BT.scatter_(1, self.rows_BF[:, STEP, None] - 1, nll_B[:, None])

    def record(self, token_B: torch.Tensor, finite_B: torch.Tensor) -> None:
        """Keeps the tokens, marks rows that end, and moves the others on. An empty slot stays at its first step."""
        step_B, ended_B, last_B = (self.rows_BF[:, x] for x in (STEP, ENDED, TOKEN))
        token_B = torch.where(ended_B == 1, last_B, token_B)
        self.rows_BF[:, FINITE] = finite_B
        ended_B.copy_((ended_B == 1) | self.ends_V[token_B] | (step_B == self.num_steps))
        last_B.copy_(token_B)
        step_B.add_(1 - ended_B)

    def _counter(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Key [B, 2], step [B] and sample word [B] of the rows' random numbers."""
        return self.rows_BF[:, KEY0 : KEY1 + 1], self.rows_BF[:, STEP], self.rows_BF[:, WORD]
