"""In the worker: the control of the rows of a batch and the tokens that are chosen for them, from their requests alone.
Knows no vLLM.

    h -> h + v (3) -> logits -> greedy (5), or the token of a keyed draw, or a forced one

A row's v, draws and forced tokens are functions of its request and its step, so a request that vLLM preempts and
computes again goes on as it was. Equation numbers: Kanai et al., arXiv 2510.26219.

Shapes: N rows of a batch, R some of them, D hidden size, T steps, V vocabulary.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from aisp_dist.engine import control, noise, nucleus
from aisp_dist.records import Round
from aisp_dist.vllm.requests import Spec

Head = Callable[[torch.Tensor], torch.Tensor]
_CONTROLS = 1 << 30  # bytes of the latest controls, kept to continue from
_WORK = 16  # controls' worth of memory while one is rebuilt
_BEHIND = 2  # steps after which a flag is read without waiting for the device


def control_bytes(batch: int, steps: int, dim: int) -> int:
    """What controls take at most, of each GPU. batch: rows, each of which may have another one."""
    one = 4 * steps * dim
    return max(_CONTROLS, batch * one) + _WORK * one


@dataclass(eq=False)
class Row:
    """A request in flight. counter: key and sample word of its random numbers. memory: where its noise acts on later
    steps, the filter's state after step `at`. states: its hidden states so far, where they are kept."""

    spec: Spec
    counter: tuple[int, int, int]
    sigma: float
    control: control.Control | None
    states: list[torch.Tensor]
    at: int = 0
    memory: torch.Tensor | None = None

    @property
    def draws(self) -> bool:
        return self.spec.round is not None and self.spec.round.sampling.decode is not None

    @property
    def remembers(self) -> bool:
        return self.memory is not None

    def forced(self, step: int) -> int | None:
        return self.spec.forced[step - 1] if step <= len(self.spec.forced) else None


class At(NamedTuple):
    """A row of the batch that wants something: its place there, and the step of the token that it gets next."""

    place: int
    row: Row
    step: int


class Logits(NamedTuple):
    """sampled: what the next tokens are the argmax of. base: what their log-probabilities are taken of, without
    control; the same tensor where nothing is measured."""

    base: torch.Tensor
    sampled: torch.Tensor


@dataclass
class Finite:
    """Which requests had logits that are not finite. Flags travel to the host while later steps run."""

    waiting: deque[tuple[list[str | None], torch.Tensor, torch.cuda.Event | None]] = field(default_factory=deque)
    broken: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def put(self, names: list[str | None], finite_N: torch.Tensor) -> None:
        """names: of a batch's requests; None for one that nobody will ask about."""
        if finite_N.is_cuda:
            host = torch.empty_like(finite_N, device="cpu", pin_memory=True)
            host.copy_(finite_N, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self.waiting.append((names, host, event))
        else:
            self.waiting.append((names, finite_N, None))
        self.read(_BEHIND)

    def read(self, behind: int = 0) -> None:
        while len(self.waiting) > behind:
            names, finite, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            if not bool(finite.all()):
                flags = zip(names, finite.tolist(), strict=True)
                self.broken |= {name: None for name, good in flags if name is not None and not good}
        while len(self.broken) > 1 << 12:  # of requests that nobody asked about
            self.broken.popitem(last=False)

    def take(self, names: Sequence[str]) -> list[bool]:
        """For each request, whether all its logits were finite; forgets them."""
        self.read()
        return [self.broken.pop(name, self) is self for name in names]


class Rows:
    """All of our requests in flight. head: hidden states to logits, of the base model.
    batch: rows at most, which bounds the requests whose states wait to be asked for: the service has at most twice so
    many in flight, and those that were cancelled are the oldest."""

    def __init__(self, head: Head, dim: int, device: torch.device, batch: int) -> None:
        self.head, self.dim, self.device, self.most_kept = head, dim, device, 2 * batch + 32
        self.rows: dict[str, Row | None] = {}  # by vLLM's own name of a request
        self.controls: OrderedDict[tuple[int, str, int], control.Control] = OrderedDict()
        self.kept: OrderedDict[str, list[torch.Tensor]] = OrderedDict()
        self.finite = Finite()

    def row(self, name: str, spec: Callable[[], Spec | None]) -> Row | None:
        """The row of a request, made when it is first seen."""
        if name not in self.rows:
            told = spec()
            self.rows[name] = None if told is None else self._make(told)
        return self.rows[name]

    def forget(self, alive: Callable[[str], bool]) -> None:
        """Drops requests that have ended, whose controls take memory. Before those of a batch are asked for."""
        self.rows = {name: row for name, row in self.rows.items() if alive(name)}

    def logits(self, h_ND: torch.Tensor, rows: Sequence[Row | None], lengths: Sequence[int]) -> Logits | None:
        """The logits of a batch. lengths: tokens of each row's sequence before the one that comes now. None where no
        row wants anything. A row whose prompt is still being read is at a step < 1 and is left alone."""
        both = enumerate(zip(rows, lengths, strict=True))
        at = [At(i, row, length - row.spec.prompt_length + 1) for i, (row, length) in both if row]
        at = [one for one in at if one.step >= 1]
        if not at:
            return None
        for one in at:
            if one.row.spec.kept and one.row.forced(one.step) is not None:
                self._keep(one, h_ND)
        moved = [one for one in at if one.row.control is not None and one.step <= one.row.spec.steps]
        z_ND = self._moved(h_ND, moved) if moved else h_ND
        sampled_NV = self.head(z_ND)
        if sampled_NV is None:  # of a tensor-parallel rank that samples nothing
            return Logits(sampled_NV, sampled_NV)
        self._flag(at, sampled_NV)
        measured = [one for one in at if one.row.spec.measured]
        base_NV = self._base(h_ND, sampled_NV, measured, {one.place for one in moved})
        return Logits(base_NV, self._chosen(at, sampled_NV, apart=bool(measured) and base_NV is sampled_NV))

    def control(self, round: Round, steps: int) -> control.Control:
        """The control of a round, continued from the prompt's latest one where its trace extends that."""
        name = round.seed, round.prompt_id, steps
        made = control.rebuild(round, steps, self.dim, self.device, self.controls.get(name))
        self.controls[name] = made
        self.controls.move_to_end(name)
        while len(self.controls) > max(1, _CONTROLS // (4 * steps * self.dim)):
            self.controls.popitem(last=False)
        return made

    def _make(self, spec: Spec) -> Row:
        round, made, counter, sigma = spec.round, None, (0, 0, 0), 0.0
        if round is not None:
            word = noise.sample_word(round.iteration, round.start)
            counter = (*noise.prompt_key(round.seed, round.prompt_id), word)
            if round.sampling.sigma2:
                made = self.control(round, spec.steps)
                sigma = 0.0 if round.sampling.mean else math.sqrt(round.sampling.sigma2)
        row = Row(spec, counter, sigma, made, [])
        if made is not None and bool(made.filter.feed.any()):
            row.memory = torch.zeros(self.dim, device=self.device)
        return row

    def _moved(self, h_ND: torch.Tensor, at: Sequence[At]) -> torch.Tensor:
        """z + v, (3), of the rows under control; h itself stays as it is."""
        places = torch.tensor([one.place for one in at], device=self.device)
        v_RD = self._moves(at)
        if len(at) == len(h_ND):
            return (h_ND.float() + v_RD).to(h_ND.dtype)
        return h_ND.index_copy(0, places, (h_ND[places].float() + v_RD).to(h_ND.dtype))

    def _moves(self, at: Sequence[At]) -> torch.Tensor:
        """v [R, D], v_t = (L (m + e))_t."""
        counter = torch.tensor([(*one.row.counter, one.step) for one in at], device=self.device)
        sigma_R = torch.tensor([one.row.sigma for one in at], device=self.device)
        x_RD = sigma_R[:, None] * noise.white(counter[:, :2], counter[:, 3], counter[:, 2], self.dim)
        controls = [one.row.control for one in at]
        if any(made is not None and made.trace for made in controls):
            m_RD = torch.stack([made.m_TD[one.step - 1] for made, one in zip(controls, at, strict=True) if made])
            x_RD = m_RD + x_RD
        remembering = [i for i, one in enumerate(at) if one.row.remembers]
        if not remembering:
            return x_RD
        for i in remembering:
            if at[i].row.at != at[i].step - 1:
                self._roll(at[i].row, at[i].step)
        states, filters = [at[i].row.memory for i in remembering], [at[i].row.control.filter for i in remembering]  # type: ignore[union-attr]
        steps = [at[i].step for i in remembering]
        state_RD = torch.stack([s for s in states if s is not None])
        feed_R = torch.stack([f.feed[t - 1] for f, t in zip(filters, steps, strict=True)])
        gain_R = torch.stack([f.gain[t - 1] for f, t in zip(filters, steps, strict=True)])
        keep_R = torch.tensor([f.keep for f in filters], device=self.device)
        v_RD = feed_R[:, None] * state_RD + gain_R[:, None] * x_RD[remembering]
        after_RD = keep_R[:, None] * state_RD + v_RD
        for i, state in zip(remembering, after_RD, strict=True):
            at[i].row.memory, at[i].row.at = state, at[i].step
        x_RD[remembering] = v_RD
        return x_RD

    def _roll(self, row: Row, step: int) -> None:
        """The filter's state before a step, from the first one on, for a row that was preempted."""
        made, steps = row.control, torch.arange(1, step, device=self.device)
        assert made is not None
        key, word = torch.tensor(row.counter[:2], device=self.device), torch.tensor(row.counter[2], device=self.device)
        x_TD = made.m_TD[: step - 1] + row.sigma * noise.white(key, steps, word, self.dim)
        state_1D = torch.zeros(1, self.dim, device=self.device)
        for t in range(step - 1):
            _, state_1D = made.filter.step(x_TD[t : t + 1], state_1D, steps[t : t + 1])
        row.memory, row.at = state_1D[0], step - 1

    def _flag(self, at: Sequence[At], logits_NV: torch.Tensor) -> None:
        """Notes whether the logits are finite; the largest is NaN or +inf if any is."""
        names: list[str | None] = [None] * len(logits_NV)
        for one in at:
            names[one.place] = one.row.spec.name
        self.finite.put(names, logits_NV.amax(-1).isfinite())

    def _base(
        self, h_ND: torch.Tensor, logits_NV: torch.Tensor, measured: Sequence[At], moved: set[int]
    ) -> torch.Tensor:
        """The base model's logits of the measured rows; of others whatever is there."""
        both = [one.place for one in measured if one.place in moved]
        if not both:
            return logits_NV
        if len(both) == len(h_ND):
            return self.head(h_ND)
        places = torch.tensor(both, device=self.device)
        return logits_NV.index_copy(0, places, self.head(h_ND[places]))

    def _chosen(self, at: Sequence[At], logits_NV: torch.Tensor, apart: bool) -> torch.Tensor:
        """The logits in which drawn and forced tokens are the largest. apart: in a copy."""
        forced = [(one.place, token) for one in at if (token := one.row.forced(one.step)) is not None]
        drawn = [one for one in at if one.row.draws and one.row.forced(one.step) is None]
        if not forced and not drawn:
            return logits_NV
        places = torch.tensor([place for place, _ in forced] + [one.place for one in drawn], device=self.device)
        token_R = torch.tensor([token for _, token in forced], dtype=torch.long, device=self.device)
        if drawn:
            token_R = torch.cat([token_R, self._draw(drawn, logits_NV[places[len(forced) :]])])
        if apart:
            logits_NV = logits_NV.clone()
        top = torch.finfo(logits_NV.dtype).max
        logits_NV[places[: len(forced)]] = -top  # a NaN there would be the largest
        logits_NV[places, token_R] = top
        return logits_NV

    def _draw(self, at: Sequence[At], logits_RV: torch.Tensor) -> torch.Tensor:
        """Tokens [R], keyed: the local engine's for the same logits."""
        counter = torch.tensor([(*one.row.counter, one.step) for one in at], device=self.device)
        decodes = [one.row.spec.round.sampling.decode for one in at if one.row.spec.round]
        p_R, temperature_R = (
            torch.tensor([getattr(d, name) for d in decodes], dtype=torch.float64, device=self.device)
            for name in ("p", "temperature")
        )
        u_R = noise.uniform(counter[:, :2], counter[:, 3], counter[:, 2])
        logits_RV = logits_RV.float()
        parts = zip(*(torch.split(x, 32) for x in (logits_RV, p_R, temperature_R, u_R)), strict=True)
        return torch.cat([nucleus.draw(*part) for part in parts])

    def _keep(self, one: At, h_ND: torch.Tensor) -> None:
        states, name = one.row.states, one.row.spec.name
        if one.step == len(states) + 1:  # a preempted row shows some again
            states.append(h_ND[one.place].clone())
        self.kept[name] = states
        while len(self.kept) > self.most_kept:
            self.kept.popitem(last=False)
