"""The engine against transformers: whether another copy of the model, run by transformers alone on the tokens that the
engine chose, has the engine's states and would have chosen the same.

Shapes: T steps, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aisp_dist.analysis.doctor import Check, allowed, judge, own_model
from aisp_dist.config import Generator
from aisp_dist.engine import checkpoints, noise, quantized
from aisp_dist.engine.control import rebuild
from aisp_dist.records import Round, Trajectory

_OFTEN = 0.02  # of many tokens may be others where transformers' own ways agree on all; of few, three
_ADVICE = "The engine decodes this model wrongly: use another one or another dtype, and report this"


class Row(NamedTuple):
    """A trajectory that the engine decoded greedily, and its states z [T, D] in fp32 on the CPU."""

    round: Round
    trajectory: Trajectory
    z_TD: torch.Tensor


def own_generator(settings: Generator, place: torch.device) -> Any:
    where = checkpoints.locate("generator.model", settings.model, "generator")
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    options = quantized.options(settings, AutoConfig.from_pretrained(where, **source), place)
    own = own_model(AutoModelForCausalLM, where, settings, place, **options)
    if settings.fp32_head:
        own.set_output_embeddings(copy.deepcopy(own.get_output_embeddings()).float())
    return own


def exactness(own: Any, rows: Sequence[Row]) -> Iterator[Check]:
    """Holds the states against transformers' dense forward, and that against its own way of decoding, one by one on a
    cache. A token may be another than its argmax by as much as logits may differ, and not much more often than those
    two ways choose differently."""
    ours = theirs = spread = scale = 0.0
    flips = 0
    gaps: list[float] = []  # of a chosen token's logit to the largest
    for row in rows:
        v_TD = control(row, row.z_TD.shape[1])
        (z_TD, logits_TV), (cached_TD, cached_TV) = (forced(own, row, v_TD, cached) for cached in (False, True))
        ours, theirs = max(ours, _relative(row.z_TD, z_TD)), max(theirs, _relative(cached_TD, z_TD))
        spread = max(spread, float((cached_TV - logits_TV).abs().max()))
        scale = max(scale, float(logits_TV.abs().max()))
        flips += int((cached_TV.argmax(1) != logits_TV.argmax(1)).sum())
        chosen_T1 = logits_TV.gather(1, torch.tensor(row.trajectory.token_ids)[:, None])
        gaps += (logits_TV.amax(1) - chosen_T1[:, 0]).tolist()
    bound = allowed(theirs, own.dtype)
    figure = f"|dz|/|z| up to {ours:.2g} in {len(gaps)} steps, {bound:.2g} allowed, transformers' two ways {theirs:.2g}"
    yield judge("exact states", ours <= bound, figure, _ADVICE)
    other, bound = [gap for gap in gaps if gap > 0], 2 * allowed(spread, own.dtype, scale)
    figure = f"{len(gaps) - len(other)} of {len(gaps)} are transformers' argmax of W(z + v)"
    figure += f", others up to {max(other):.2g} below it, {bound:.2g} allowed" if other else ""
    figure += f"; its two ways choose {flips} differently" if other or flips else ""
    good = max(gaps) <= bound and len(other) <= 3 * (1 + flips) + _OFTEN * len(gaps)
    yield judge("exact tokens", good, figure, _ADVICE)


@torch.inference_mode()
def forced(own: Any, row: Row, v_TD: torch.Tensor, cached: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """z [T, D] and the logits of z + v [T, V] on a row's tokens, in fp32 on the CPU."""
    prompt, tokens = row.round.prompt_tokens, row.trajectory.token_ids
    pieces = [(prompt, 1), *(((t,), 1) for t in tokens[:-1])] if cached else [((*prompt, *tokens[:-1]), len(tokens))]
    states: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []

    def add(_: Any, __: Any, out: Any) -> Any:
        z_TD = out.last_hidden_state[0, -width:]
        v = v_TD[len(states) : len(states) + width].to(z_TD.device)
        states.extend(z_TD.float().cpu())
        out.last_hidden_state = (z_TD.float() + v).to(own.get_output_embeddings().weight.dtype)[None]
        return out

    hook, past = own.get_decoder().register_forward_hook(add), None
    for ids, width in pieces:  # noqa: B007, `add` reads it
        out = own(input_ids=torch.tensor([ids], device=own.device), past_key_values=past, use_cache=cached)
        past = out.past_key_values if cached else None
        logits.append(out.logits[0].float().cpu())
    hook.remove()
    return torch.stack(states), torch.cat(logits)


def control(row: Row, dim: int) -> torch.Tensor:
    """v [T, D] of a row, (3), made on the CPU."""
    round, steps = row.round, len(row.trajectory.token_ids)
    if not round.sampling.sigma2:
        return torch.zeros(steps, dim)
    known = rebuild(round, steps, dim, torch.device("cpu"))
    key = torch.tensor(noise.prompt_key(round.seed, round.prompt_id))
    word = torch.tensor(noise.sample_word(round.iteration, row.trajectory.sample))
    e_TD = math.sqrt(round.sampling.sigma2) * noise.white(key, torch.arange(1, steps + 1), word, dim)
    state, v = torch.zeros(1, dim), []
    for t in range(steps):
        v_1D, state = known.filter.step((known.m_TD + e_TD)[t : t + 1], state, torch.tensor([t + 1]))
        v.append(v_1D)
    return torch.cat(v)


def _relative(z_TD: torch.Tensor, expected_TD: torch.Tensor) -> float:
    """The largest distance of a step."""
    worst = float(((z_TD - expected_TD).norm(dim=-1) / expected_TD.norm(dim=-1)).max())
    return worst if math.isfinite(worst) else math.inf
