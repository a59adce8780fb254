"""Checks of vLLM's engine: that company, repetition and stop strings do to its answers what the run takes for granted.
Its tokens and likelihoods are compared with transformers' by engine.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from aisp_dist.analysis.doctor import Check, engine
from aisp_dist.data.detokenize import stopped
from aisp_dist.records import Round, Trajectory
from aisp_dist.vllm.service import Service

Answers = dict[engine.Key, Trajectory]


async def decode(service: Service, asked: Sequence[Round]) -> Answers:
    """All rounds, in one batch as far as the engine's rows go."""
    found = await asyncio.gather(*(service.rollout(round) for round in asked))
    both = zip(asked, found, strict=True)
    return {(r.prompt_id, r.iteration, t.sample): t for r, rollout in both for t in rollout.trajectories}


async def company(service: Service, asked: Sequence[Round]) -> Check:
    """Whether answers are the same alone, beside others and again, from the cache. vLLM promises none of it, so the
    check only notes what differs; but the others are the rows that a run would compute again otherwise."""
    alone = {key: made for round in asked for key, made in (await decode(service, [round])).items()}
    for way in ("together", "together again"):
        made = await decode(service, asked)
        if different := [key for key in alone if alone[key].token_ids != made[key].token_ids]:
            at = "prompt {!r}, iteration {}, sample {}".format(*different[0])
            figure = f"{len(different)} of {len(alone)} answers have other tokens {way} than alone, first {at}"
            return Check("company", "note", figure, "A row that is computed again may differ; committed rows stay")
    return Check("company", "ok", f"{len(alone)} answers have the same tokens alone, together, together again")


async def stop_strings(service: Service, asked: Sequence[Round], answers: Answers) -> Check:
    """Whether an answer ends at the first token with which it holds a stop string, and is what it was up to there. The
    string is from the middle of the first answer that has one."""
    tokenizer, wrong, count = service.served.tokenizer, 0, 0
    texts = [t.text for t in answers.values() if len(t.text) > 4]
    if not texts:
        return Check("stop strings", "note", "no answer has a text to stop in", "Raise --steps")
    stop = texts[0][len(texts[0]) // 2 :][:3]
    before, service.served = service.served, replace(service.served, stop=(*service.served.stop, stop))
    try:
        for key, made in (await decode(service, asked)).items():
            (prompt,) = {round.prompt_tokens for round in asked if round.prompt_id == key[0]}
            whole, cut = answers[key].token_ids, None
            for n in range(1, len(whole) + 1):
                cut = stopped(tokenizer, prompt, whole[:n], service.served.stop)
                if cut is not None:
                    count, whole = count + 1, whole[:n]
                    break
            wrong += made.token_ids != whole or made.text != (answers[key].text if cut is None else cut)
    finally:
        service.served = before
    return engine.verdict("stop strings", not wrong, f"{wrong} of {len(answers)} answers end elsewhere; {count} stop")


async def likelihoods(service: Service, asked: Sequence[Round], answers: Answers) -> dict[engine.Key, float]:
    """-log P per token of each answer under the base model, as the engine tells it of given answers."""
    told: dict[engine.Key, float] = {}
    for round in asked:
        keys = [(round.prompt_id, round.iteration, sample) for sample in range(round.start, round.stop)]
        told |= zip(keys, await service.nll(round.prompt_tokens, [answers[key].token_ids for key in keys]), strict=True)
    return told
