"""Whether an engine's rows have the same bits whatever they share a batch with: asked of it once, before its first row.

vLLM promises that under VLLM_BATCH_INVARIANT=1, on some GPUs and for some models; here it is tried, controls and draws
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aisp_dist.records import Round, Sampling, TopP
from aisp_dist.together import together
from aisp_dist.vllm.choice import Check
from aisp_dist.vllm.service import Service

ROWS = 256  # of a check
_STEPS = 8
_LONGEST = 192  # tokens of a prompt: six blocks of the prefix cache
_KINDS = (
    Sampling(likelihood=True),
    Sampling(0.3, likelihood=True),
    Sampling(0.3, "ar1", 0.8, likelihood=True),
    Sampling(decode=TopP(0.9, 1.0), likelihood=True),
)
Row = tuple[tuple[int, ...], float | None]  # tokens, and the mean of their log-probabilities


async def check(service: Service) -> Check | None:
    """None where vLLM is not told to be batch invariant."""
    from vllm import envs

    return Check(ROWS, await difference(service, ROWS, ROWS)) if envs.VLLM_BATCH_INVARIANT else None


async def difference(service: Service, rows: int, company: int) -> str | None:
    """The first row that has other bits when it is computed again; None where all have the same. Rows of mixed lengths
    and kinds are computed four times: each alone and `company` of them at a time, without and with a prefix in the
    cache. Nothing else may be asked meanwhile."""
    served = service.served
    steps = min(_STEPS, served.max_new_tokens)
    longest = min(_LONGEST, served.context_length - steps)
    tries: dict[str, list[Row]] = {}
    service.served = replace(served, max_new_tokens=steps, stop=())
    try:
        usual = [token for token in range(served.vocab_size) if token not in served.end_ids]
        asked = [_round(i, 1 + 37 * i % longest, usual) for i in range(rows)]
        for name, size in (("alone", 1), (f"{company} together", company)):
            await service.empty()
            tries[f"{name}, not cached"] = await _compute(service, asked, size)
            tries[f"{name}, cached"] = await _compute(service, asked, size)
    finally:
        service.served = served
    first, right = next(iter(tries.items()))
    for name, found in tries.items():
        for i, (row, was) in enumerate(zip(found, right, strict=True)):
            if row != was:
                what = f"row {i} of {rows}, a prompt of {len(asked[i].prompt_tokens)} tokens"
                return f"{what}: {first}, {was[1]!r}; {name}, {row[1]!r} nats a token"
    return None


def _round(i: int, length: int, usual: Sequence[int]) -> Round:
    prompt = tuple(usual[(7919 * (i + 1) * (t + 1) + 104729 * i) % len(usual)] for t in range(length))
    return Round(0, f"row {i}", prompt, 0, 0, 1, _KINDS[i % len(_KINDS)])


async def _compute(service: Service, rounds: Sequence[Round], size: int) -> list[Row]:
    """The rounds' rows, `size` of them at a time."""
    found: list[Row] = []
    for begin in range(0, len(rounds), size):
        made = await together(*(service.rollout(round) for round in rounds[begin : begin + size]))
        found += [(one.token_ids, one.nll) for rollout in made for one in rollout.trajectories]
    return found
