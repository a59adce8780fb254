"""A trajectory as a vLLM request, and what a worker reads of it: `SamplingParams.extra_args["aisp"]`, plain values.

The trace of weights goes along, so a worker needs nothing from before: it rebuilds the control from the request alone,
on every tensor-parallel rank, whichever replica takes it, and after a restart. Every request is greedy for vLLM; noise,
draws and forced tokens are the worker's (rows.py), keyed by (seed, prompt, iteration, sample, step).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aisp_dist.records import Round, Sampling, TopP, Weights

if TYPE_CHECKING:
    from vllm import SamplingParams, TokensPrompt

KEY = "aisp"


@dataclass(frozen=True, slots=True)
class Spec:
    """A request in the worker.

    name: of the request, unique. prompt_length: without given tokens, so that step 1 follows it. sample: of the round,
    which has no tokens here; round None: greedy, without control. steps: T. forced: its first tokens, chosen whatever
    the logits say. measured: the log-probabilities that vLLM reports must be the base model's. kept: its hidden states
    are asked for later.
    """

    name: str
    prompt_length: int
    round: Round | None = None
    steps: int = 0
    forced: tuple[int, ...] = ()
    measured: bool = False
    kept: bool = False


def trajectory(
    round: Round,
    sample: int,
    given: Sequence[int],
    name: str,
    steps: int,
    end_ids: Sequence[int],
    stop: Sequence[str],
) -> tuple[TokensPrompt, SamplingParams]:
    """The request for one trajectory of a round that begins with given tokens. These are part of vLLM's prompt, where
    they share a prefix with others; but where the likelihood is measured they are forced, since vLLM measures what it
    decodes."""
    measured = round.sampling.likelihood
    controlled = bool(round.sampling.sigma2 or round.sampling.decode)
    spec: dict[str, Any] = {"name": name, "prompt_length": len(round.prompt_tokens), "measured": measured}
    if controlled:
        spec |= {"round": plain(round), "sample": sample, "steps": steps}
    if measured and given:
        spec["forced"], given = list(given), ()
    new = steps - len(given)
    return _request([*round.prompt_tokens, *given], new, spec, measured, list(end_ids), list(stop))


def forced(
    prompt_tokens: Sequence[int], response: Sequence[int], name: str, kept: bool = False
) -> tuple[TokensPrompt, SamplingParams]:
    """The request that decodes a given response: to measure its likelihood or, with `kept`, to see its states."""
    spec = {"name": name, "prompt_length": len(prompt_tokens), "forced": list(response), "kept": kept}
    spec["measured"] = not kept
    return _request(list(prompt_tokens), len(response), spec, not kept, [], [])


def _request(
    tokens: list[int], new: int, spec: dict[str, Any], measured: bool, end_ids: list[int], stop: list[str]
) -> tuple[TokensPrompt, SamplingParams]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=new,
        ignore_eos=True,  # the end tokens are those of the checkpoint and of the template, below
        stop_token_ids=end_ids,
        stop=stop or None,
        detokenize=bool(stop),
        logprobs=0 if measured else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={KEY: spec},
    )
    return TokensPrompt(prompt_token_ids=tokens), params


def plain(round: Round) -> dict[str, Any]:
    """A round without its tokens, as values that survive msgpack."""
    sampling = round.sampling
    how = {name: getattr(sampling, name) for name in ("sigma2", "noise", "parameter", "alpha", "after_eos", "mean")}
    how["decode"] = [sampling.decode.p, sampling.decode.temperature] if sampling.decode else None
    return {
        "seed": round.seed,
        "prompt_id": round.prompt_id,
        "iteration": round.iteration,
        "sampling": how,
        "trace": [(entry.weights, entry.lengths) for entry in round.trace],
    }


def round_of(values: Mapping[str, Any], start: int, stop: int) -> Round:
    """The round of `plain`, for samples start to stop."""
    how = dict(values["sampling"])
    how["decode"] = TopP(*how["decode"]) if how["decode"] else None
    trace = tuple(Weights(tuple(weights), tuple(lengths)) for weights, lengths in values["trace"])
    place = values["seed"], values["prompt_id"], (), values["iteration"], start, stop
    return Round(*place, Sampling(**how), trace)


def parse(params: SamplingParams | None) -> Spec | None:
    """What a request tells the worker; None for one that is not ours."""
    told = ((params and params.extra_args) or {}).get(KEY)
    if told is None:
        return None
    sample = told.get("sample", 0)
    round = round_of(told["round"], sample, sample + 1) if "round" in told else None
    flags = bool(told.get("measured")), bool(told.get("kept"))
    return Spec(told["name"], told["prompt_length"], round, told.get("steps", 0), tuple(told.get("forced", ())), *flags)
