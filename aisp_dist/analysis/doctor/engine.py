"""Checks of the local engine against itself under other schedules, and of any engine against transformers.

Shapes: B rows, T steps, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from aisp_dist.analysis.doctor import Check
from aisp_dist.config import Run
from aisp_dist.engine.attention import Pass
from aisp_dist.engine.control import moves, rebuild
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.step import STEP, Batch
from aisp_dist.records import BASE_ITERATION, Prompt, Round, Sampling, TopP, Trajectory, Weights

Key = tuple[str, int, int]  # prompt id, iteration, sample
Decoded = dict[Key, tuple[Trajectory, torch.Tensor]]  # the states z [T, D] of its steps, on the CPU
Trajectories = Mapping[Key, tuple[Trajectory, torch.Tensor | None]]  # None: an engine that does not show them

_SPREAD = 3.0  # the engine may be so many times as far from transformers' plain way as another way of its own is
_FLOOR = 1e-5  # relative; what is allowed where those two ways agree
_LIKELY = 1e-4  # nats per token
_OFTEN = 0.02  # share of tokens that may differ though both of transformers' ways agree on all
_ADVICE = "The engine decodes this model wrongly: use another model or dtype, and report this"


def ends(tokenizer: Any, eos_ids: Collection[int], turn_end: int | None) -> Check:
    """Which tokens end a response, and whether the checkpoint declares them all: but for turn_end."""
    names = tokenizer.convert_ids_to_tokens(sorted(eos_ids))
    figure = f"a response ends at {' or '.join(map(repr, names)) or 'nothing but its length'}"
    if turn_end is None:
        return Check("end tokens", "ok", figure)
    figure += f"; only the chat template names {tokenizer.convert_ids_to_tokens(turn_end)!r}"
    advice = "Add it to eos_token_id in the checkpoint's generation_config.json: other tools write on past it"
    return Check("end tokens", "note", figure, advice)


def rounds(run: Run, prompts: Sequence[tuple[Prompt, tuple[int, ...]]], steps: int, num_rows: int) -> list[Round]:
    """Rounds with the run's own sampling, under controls of random weights, in uneven groups, and one base answer:
    somewhat more trajectories than rows, so that some start late. prompts: with their tokens."""
    sampling, rates = run.method.draws()
    num, draw = run.method.num_samples, torch.Generator().manual_seed(0)
    if rates.noise is not None:  # found for each prompt in a run; the checks need any value
        sampling = replace(sampling, sigma2=0.5)
    if rates.drawing is not None:
        sampling = replace(sampling, decode=TopP(0.9, 1.0))
    weights = [(2 * torch.randn(num, generator=draw)).softmax(0) for _ in range(3 if sampling.sigma2 else 0)]
    trace = tuple(Weights(tuple(w.tolist()), tuple(1 + i % steps for i in range(num))) for w in weights)
    groups = [(2, num_rows // 2 + 1), (1, num_rows // 3 + 1), (BASE_ITERATION, 1), (0, num_rows // 4 + 1), (3, 1)]
    asked = []
    for at, (iteration, size) in enumerate(groups):
        prompt, tokens = prompts[at % len(prompts)]
        drawn = (Sampling(), ()) if iteration == BASE_ITERATION else (sampling, trace[:iteration])
        asked.append(Round(run.seed, prompt.id, tokens, iteration, 0, size, *drawn))
    return asked


def greedy(asked: Sequence[Round], prompts: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[Round]:
    """Two samples of each prompt under the control of the first round, without draws: for `exactness`."""
    first = replace(asked[0], stop=2, sampling=replace(asked[0].sampling, decode=None))
    return [replace(first, prompt_id=prompt.id, prompt_tokens=tokens) for prompt, tokens in prompts]


def decode(engine: Engine, asked: Sequence[Round], every: int = 0) -> Decoded:
    """Decodes rounds, the next one submitted every so many steps (0: all at once), and keeps the rows' states."""
    batch, waiting, made, seen = engine.batch, list(asked), Decoded(), dict[tuple[Key, int], torch.Tensor]()
    own = batch.first

    def first(rows: int) -> Batch:
        view = own(rows)
        view.states = partial(states, view.states)  # type: ignore[method-assign]
        return view

    def states(computed: Callable[[Pass | None], torch.Tensor], attend: Pass | None) -> torch.Tensor:
        z_BD = computed(attend)
        kept, table = z_BD.to("cpu", copy=True), batch.rows_BF[:, STEP].tolist()
        for slot, row in enumerate(engine.rows):
            if row:
                seen[(row.job.round.prompt_id, row.job.round.iteration, row.sample), table[slot]] = kept[slot]
        return z_BD

    batch.first = first  # type: ignore[method-assign]
    try:
        while waiting or engine.busy:
            for _ in range(min(len(waiting), 1 if every else len(waiting))):
                engine.submit(waiting.pop(0))
            for _ in range(every or 1):
                for round, rollout in engine.step():
                    for t in rollout.trajectories:
                        key = round.prompt_id, round.iteration, t.sample
                        steps = range(1, len(t.token_ids) + 1)
                        made[key] = t, torch.stack([seen.pop((key, step)) for step in steps])
    finally:
        batch.first = own  # type: ignore[method-assign]
    return made


def schedule(engine: Engine, asked: Sequence[Round], mixture: bool) -> Check:
    """Whether tokens, costs and states have the bits of every round decoded alone: all together, in another order with
    late starters, and in other groups. mixture: the model is a mixture of experts, to which this is not promised."""
    alone = {key: made for round in asked for key, made in decode(engine, [round]).items()}
    mixed = [*asked[::2][::-1], *asked[1::2]]
    parts = [replace(r, start=a, stop=b) for r in mixed for a, b in ((2, r.stop), (0, min(2, r.stop))) if a < b]
    ways = {"together": (asked, 0), "in another order": (mixed, 3), "in other groups": (parts, 0)}
    size = f"{len(alone)} trajectories, {sum(len(z_TD) for _, z_TD in alone.values())} states"
    for way, (order, every) in ways.items():
        decoded = decode(engine, order, every)
        if different := [key for key in alone if not _same(alone[key], decoded[key])]:
            at = "prompt {!r}, iteration {}, sample {}".format(*different[0])
            figure = f"{len(different)} of {size} have other bits {way} than alone, first {at}"
            if mixture:
                return Check("schedule", "note", figure, "Mixtures of experts are outside the promise of equal rows")
            return Check("schedule", "FAILED", figure, "The same run would not give the same rows: report this")
    return Check("schedule", "ok", f"{size}: the same bits alone, {', '.join(ways)}")


def _same(one: tuple[Trajectory, torch.Tensor], other: tuple[Trajectory, torch.Tensor]) -> bool:
    return one[0] == other[0] and torch.equal(one[1], other[1])


def exactness(own: Any, asked: Sequence[Round], decoded: Trajectories) -> Iterator[Check]:
    """Compares greedy trajectories with `own`, a copy of the model that transformers alone runs on the same tokens: the
    states, where there are some, with those of one dense pass, and that pass with transformers' other way, token by
    token on a cache. A token may differ from the dense argmax by as much as the logits of both ways may, and not much
    more often."""
    width = own.config.get_text_config(decoder=True).hidden_size
    seen, ours, theirs, spread, scale = False, 0.0, 0.0, 0.0, 0.0
    flips, gaps = (
        0,
        list[float](),
    )  # tokens on which the two ways differ; distance of a chosen token's logit to the largest
    for round in asked:
        for sample in range(round.start, round.stop):
            trajectory, z_TD = decoded[round.prompt_id, round.iteration, sample]
            v_TD = torch.zeros(len(trajectory.token_ids), width)
            if round.sampling.sigma2:
                v_TD = moves(rebuild(round, len(v_TD), width, torch.device("cpu")), round, sample)
            dense_TD, dense_TV = forced(own, round.prompt_tokens, trajectory.token_ids, v_TD, cached=False)
            cached_TD, cached_TV = forced(own, round.prompt_tokens, trajectory.token_ids, v_TD, cached=True)
            theirs = max(theirs, _relative(cached_TD, dense_TD))
            if z_TD is not None:
                seen, ours = True, max(ours, _relative(z_TD.float(), dense_TD))
            spread = max(spread, float((cached_TV - dense_TV).abs().max()))
            scale = max(scale, float(dense_TV.abs().max()))
            flips += int((cached_TV.argmax(1) != dense_TV.argmax(1)).sum())
            chosen_T1 = dense_TV.gather(1, torch.tensor(trajectory.token_ids)[:, None])
            gaps += (dense_TV.amax(1) - chosen_T1[:, 0]).tolist()
    floor = max(_FLOOR, torch.finfo(own.dtype).eps)
    bound = max(_SPREAD * theirs, floor)
    figure = f"|dz|/|z| up to {ours:.2g} in {len(gaps)} steps; allowed {bound:.2g}, transformers' two ways {theirs:.2g}"
    if seen:
        yield verdict("exact states", ours <= bound, figure)
    other, bound = [gap for gap in gaps if gap > 0], 2 * max(_SPREAD * spread, floor * scale)
    figure = f"{len(gaps) - len(other)} of {len(gaps)} are transformers' argmax of W(z + v)"
    figure += f", others up to {max(other):.2g} below it, allowed {bound:.2g}" if other else ""
    figure += f"; its two ways differ on {flips}" if other or flips else ""
    good = max(gaps) <= bound and len(other) <= 3 * (1 + flips) + _OFTEN * len(gaps)
    yield verdict("exact tokens", good, figure)


def likelihoods(
    own: Any, asked: Sequence[Round], answers: Mapping[Key, Trajectory], told: Mapping[Key, float]
) -> Check:
    """Compares the likelihoods that an engine told of these answers, -log P per token under the base model, with those
    of `own`, by the dense pass; allowed is 1e-4, or what transformers' two ways differ by."""
    ours = theirs = 0.0
    for round in asked:
        for sample in range(round.start, round.stop):
            key = round.prompt_id, round.iteration, sample
            tokens = answers[key].token_ids
            still = torch.zeros(len(tokens), own.config.get_text_config(decoder=True).hidden_size)
            dense, cached = (
                float(cross_entropy(logits_TV.double(), torch.tensor(tokens)))
                for _, logits_TV in (forced(own, round.prompt_tokens, tokens, still, cached=c) for c in (False, True))
            )
            ours, theirs = max(ours, abs(told[key] - dense)), max(theirs, abs(cached - dense))
    bound = max(_SPREAD * theirs, _LIKELY, torch.finfo(own.dtype).eps)
    figure = f"|d log P| of a token up to {ours:.2g} in {len(told)} answers; allowed {bound:.2g}"
    return verdict("likelihoods", ours <= bound, figure)


def verdict(name: str, good: bool, figure: str) -> Check:
    return Check(name, "ok", figure) if good else Check(name, "FAILED", figure, _ADVICE)


@torch.inference_mode()
def forced(
    own: Any, prompt: Sequence[int], tokens: Sequence[int], v_TD: torch.Tensor, cached: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [T, D] and the logits of z + v [T, V] by transformers on given tokens, in fp32 on the CPU: in one pass, or
    token by token on its cache."""
    pieces = [(prompt, 1), *(((t,), 1) for t in tokens[:-1])] if cached else [((*prompt, *tokens[:-1]), len(tokens))]
    states, logits, width = list[torch.Tensor](), list[torch.Tensor](), 0

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


def _relative(z_TD: torch.Tensor, expected_TD: torch.Tensor) -> float:
    """The largest relative distance of a step's states."""
    worst = float(((z_TD - expected_TD).norm(dim=-1) / expected_TD.norm(dim=-1)).max())
    return worst if math.isfinite(worst) else math.inf
