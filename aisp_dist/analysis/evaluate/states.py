"""Measures of a finished answer by the base model: KL and flips. Noise and control are rebuilt from seed and trace
(engine/control.py). Numbers in parentheses: equations of Kanai et al., arXiv 2510.26219.

Shapes: T tokens of an answer, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from aisp_dist.engine import control
from aisp_dist.engine.attention import TILE
from aisp_dist.engine.decode import DecodeError, Engine
from aisp_dist.engine.lm import LM
from aisp_dist.records import Round, TopP

_HEAD_ROWS = 256  # positions per head product, to bound the logits


@torch.inference_mode()
def states(lm: LM, prompt_tokens: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
    """z [T, D] in fp32: the pre-logits without control at each token of an answer."""
    z_TD, _ = lm.dense((*prompt_tokens, *tokens[:-1]))
    return z_TD[len(prompt_tokens) - 1 :].float()


@torch.inference_mode()
def argmax(lm: LM, z_TD: torch.Tensor) -> torch.Tensor:
    """Likeliest tokens [T], (5)."""
    return torch.cat([lm.logits(part).argmax(-1) for part in torch.split(z_TD, _HEAD_ROWS)])


def moves(lm: LM, round: Round, num_iterations: int, num_steps: int, best: tuple[int, int]) -> Iterator[torch.Tensor]:
    """v [num_steps, D] for each iteration in turn: of sample 0, and of the selected sample in its iteration (`best`).
    round: with the whole trace; best-of-n has none, and its v is noise alone."""
    known = None
    for k in range(num_iterations):
        now = replace(round, iteration=k, trace=round.trace[:k])
        known = control.rebuild(now, num_steps, lm.hidden_size, lm.device, known)
        yield control.moves(known, now, best[1] if k == best[0] else 0)


def flips(lm: LM, plain_T: torch.Tensor, z_TD: torch.Tensor, v_TD: torch.Tensor) -> float:
    """Share of the steps of an answer at which argmax W z_t (plain) and argmax W (z_t + v_t) differ. z is that of the
    answer's own prefix, whichever iteration v comes from."""
    return float((plain_T != argmax(lm, z_TD + v_TD[: len(z_TD)])).double().mean())


@torch.inference_mode()
def token_kl(lm: LM, z_TD: torch.Tensor, u_TD: torch.Tensor, tokens: Sequence[int]) -> tuple[float, float]:
    """(58-63), along one answer, q = softmax(W (z + u)), p = softmax(W z): the estimate sum_t log q(y_t) - log p(y_t),
    and sum_t KL(q_t || p_t), which has the same mean over answers drawn from q and less variance. In nats."""
    estimate = exact = 0.0
    y_T1 = torch.tensor(tokens, device=lm.device)[:, None]
    parts = zip(*(torch.split(x, _HEAD_ROWS) for x in (z_TD, u_TD[: len(z_TD)], y_T1)), strict=True)
    for z, u, y in parts:
        log_q, log_p = (lm.logits(x).double().log_softmax(-1) for x in (z + u, z))
        ratio = torch.where(log_q == -torch.inf, 0.0, log_q - log_p)  # a token that is masked in one is masked in both
        exact += float((log_q.exp() * ratio).sum())
        estimate += float(ratio.gather(1, y).sum())
    return estimate, exact


def drawn(lm: LM, rounds: Sequence[Round], num_steps: int, stop: Sequence[str]) -> dict[str, tuple[int, ...] | str]:
    """By prompt id one answer y ~ softmax(W (z + u*)), where u* is the control after the whole trace of its round; or
    the reason why there is none."""
    engine = Engine(lm, TILE, num_steps, stop)
    for round in rounds:
        engine.submit(under_control(round))
    found: dict[str, tuple[int, ...] | str] = {}
    while engine.busy:
        try:
            found |= {round.prompt_id: rollout.trajectories[0].token_ids for round, rollout in engine.step()}
        except DecodeError as error:
            found[error.round.prompt_id] = str(error)
    return found


def under_control(round: Round) -> Round:
    """The round that draws one answer from softmax(W (z + u*)): no noise, temperature 1, the whole distribution."""
    sampling = replace(round.sampling, mean=True, decode=TopP(1.0, 1.0))
    return replace(round, iteration=len(round.trace), start=0, stop=1, sampling=sampling)


def kl(lm: LM, round: Round, tokens: Sequence[int], num_steps: int) -> tuple[float, float, float]:
    """token_kl of an answer drawn under u*, and KL(Q_u* || P) = sum_t |u*_t|^2 / (2 sigma^2) (in whitened coordinates
    where the noise is correlated in time). The latter bounds neither: it counts steps after the end, and moves that
    change nothing."""
    known = control.rebuild(round, num_steps, lm.hidden_size, lm.device)
    z_TD = states(lm, round.prompt_tokens, tokens)
    estimate, exact = token_kl(lm, z_TD, control.moves(known, round, None), tokens)
    return estimate, exact, known.u_sq / (2 * round.sampling.sigma2)
