"""The engine's speed beside other ways to decode the same trajectories, and what its parts cost.

    workload -> model -> for each repetition: rounds, noise -> contenders in turns -> ratios, agreement

A repetition has prompts and noise of its own, the same for all contenders.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from statistics import mean, median
from typing import Any

import torch

from aisp_dist.bench import command, paired, peers
from aisp_dist.bench.workload import ITERATION, Workload, drive, noise_of, warm
from aisp_dist.config import ConfigError
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM
from aisp_dist.records import Weights

SUITES = {  # model, prompt tokens, new tokens, prompts in flight
    "cpu": [
        ("llama:512/8/16k", 512, 64, 1),
        ("llama:256/6/8k", 1024, 128, 1),
        ("gpt2:512/8/16k", 512, 64, 1),
        ("qwen3:256/6/4k", 512, 128, 1),
        ("gemma3:256/6/32k", 1024, 64, 1),
    ],
    "gpu": [("llama3-8b", 500, 128, 8), ("llama3-8b", 2000, 128, 8)],
}
# Of tokens, in fp32. Rounding turns a close argmax here and there, and with it the rest of its row; a fault most rows.
AGREE = 0.9


def measure(options: Namespace) -> dict[str, Any]:
    device, machine = paired.place(options.device, options.threads)
    parts = {"control_cost": _control_cost, "mixed": _mixed, "varied": _varied}
    chosen = [name for name in parts if getattr(options, name)] or ["beside_peers"]
    found = []
    for name, work in [(part, work) for part in chosen for work in workloads(options, part)]:
        paired.say(f"{name}: {work}")
        figures = parts.get(name, _beside_peers)(work, work.load(device), options)
        found.append({"part": name, **asdict(work), **figures})
    return {**machine, "agrees": all(one["agrees"] for one in found), "configurations": found}


def workloads(options: Namespace, part: str) -> Iterator[Workload]:
    """The suite or the sweep. Raises ConfigError where flags exclude each other."""
    given = [n for n in ("model", "shape", "prompt_tokens", "new_tokens", "dtype") if getattr(options, n)]
    if given and (options.suite or given[:2] == ["model", "shape"]):
        first = f"--suite {options.suite}" if options.suite else "--model"
        raise ConfigError(f"{first} excludes --{given[0 if options.suite else 1].replace('_', '-')}; leave one out")
    num, filling = {"mixed": (8, 2), "varied": (32, 2)}.get(part, (1, None))  # prompts; how many of them fill the rows
    models, lengths = options.model or options.shape or ["llama:512/8/16k"], options.prompt_tokens or [512]
    sweep = SUITES.get(options.suite) or itertools.product(models, lengths, options.new_tokens or [64], [num])
    dtype = options.dtype or ("bfloat16" if options.suite == "gpu" else "float32")
    for (name, length, steps, num), samples in itertools.product(sweep, options.samples or [32]):
        for prompts in options.prompts or [num]:
            for rows in options.batch_rows or [samples * min(prompts, filling or prompts)]:
                yield Workload(name, bool(options.model), length, steps, samples, prompts, rows, dtype)


def _beside_peers(work: Workload, lm: LM, options: Namespace) -> dict[str, Any]:
    """Ours, and each peer with its ratio (its seconds over ours) and agreement (share of tokens that equal ours)."""
    device, ask, twin = lm.device, partial(work.rounds, lm.vocab_size), work.causal(lm.device)
    before = paired.allocated(device)
    room = 2 * work.prompts * work.prompt_tokens  # the rest of a GPU is the peers'
    engine = Engine(lm, work.batch_rows, work.new_tokens, prompt_tokens=room)
    warm(engine, ask(options.repeat)[:1])
    kept = paired.allocated(device) - before
    weights = sum(p.numel() * p.element_size() for p in twin.parameters())

    def prepare(peer: peers.Peer, repetition: int, steps: int = work.new_tokens) -> Callable[[], peers.Tokens]:
        rounds = ask(repetition)
        prompts_PL = torch.tensor([round.prompt_tokens for round in rounds], device=device)
        return partial(peer, prompts_PL, noise_of(rounds, steps, lm))

    contenders: dict[str, paired.Prepare] = {"ours": lambda repetition: partial(drive, engine, ask(repetition))}
    result: dict[str, Any] = {}
    for name in options.peers:
        if isinstance(peer := _peer(name, work, twin), str):
            result[name] = peer
        else:
            prepare(peer, options.repeat, min(2, work.new_tokens))()  # warms up
            contenders[name] = partial(prepare, peer)
    runs = paired.alternate(contenders, options.repeat, device)

    for name, timed in runs.items():
        seconds = paired.spread([run.seconds for run in timed])
        rate = work.samples * work.prompts / seconds["median"]
        peak = weights + max(run.peak_bytes for run in timed) + (kept if name == "ours" else 0)
        result[name] = {
            "seconds": seconds,
            "trajectories_per_second": rate,
            "tokens_per_second": rate * work.new_tokens,
            "peak_memory_bytes": peak if device.type == "cuda" else None,
        }
        if name != "ours":
            result[name] |= paired.ratios(timed, runs["ours"])
        if name not in ("ours", "vllm"):
            both = zip(runs["ours"], timed, strict=True)
            result[name]["agreement"] = mean(paired.equal_share(a.answer.tokens(), b.answer) for a, b in both)
    ours = result["ours"]
    ours["prefill_seconds"] = median(run.answer.first for run in runs["ours"])  # and the first tokens
    ours["decode_seconds"] = ours["seconds"]["median"] - ours["prefill_seconds"]
    ours["slot_utilisation"] = mean(run.answer.utilisation for run in runs["ours"])
    ours["roofline_share"] = None
    if device.type == "cuda":
        best = roofline(twin, work, options.bandwidth, options.flops)
        ours["roofline_share"] = best * (work.new_tokens - runs["ours"][0].answer.first_steps) / ours["decode_seconds"]
    checked = work.dtype == "float32" and "generate" in runs  # in other dtypes no two ways agree
    return {**result, "checked": checked, "agrees": not checked or result["generate"]["agreement"] >= AGREE}


def _peer(name: str, work: Workload, twin: Any) -> peers.Peer | str:
    if name == "generate":
        return partial(peers.generate, twin)
    if name == "vllm":
        twin.config.architectures = [type(twin).__name__]  # a made config says none
        source = work.model if work.checkpoint else twin.config
        return peers.sampling(source, work.dtype, work.batch_rows, work.prompt_tokens + work.new_tokens)
    return partial(peers.repeated, twin, static=name == "repeated_static")


def roofline(model: Any, work: Workload, bandwidth: float, flops: float) -> float:
    """Seconds of a step of all trajectories with every prompt's KV read once, on average over the steps: the weights'
    part, then the attention's, each bound by bytes or by arithmetic."""
    config, rows = model.config.get_text_config(), work.samples * work.prompts
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    item = getattr(torch, work.dtype).itemsize
    cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size * item
    weights = sum(p.numel() for p in model.parameters())
    if model.get_input_embeddings().weight is not model.get_output_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()  # looked up, not multiplied
    keys = (work.prompts * work.prompt_tokens + rows * work.new_tokens / 2) * cached
    scores = 4 * config.num_hidden_layers * heads * size * rows * (work.prompt_tokens + work.new_tokens / 2)
    products = max(weights * item / bandwidth, 2 * weights * rows / flops)
    return float(products + max(keys / bandwidth, scores / flops))


def _control_cost(work: Workload, lm: LM, options: Namespace) -> dict[str, Any]:
    """AISP's fifth iteration over the same one without control (best-of-n Gaussian), prompts prefilled and the fold of
    the iterations before the last one known, as in a run."""
    drawn = torch.randn(ITERATION, work.samples, generator=torch.Generator().manual_seed(0)).softmax(-1).tolist()
    known = tuple(Weights(tuple(weights), (work.new_tokens,) * work.samples) for weights in drawn)

    def prepare(engine: Engine, repetition: int, trace: tuple[Weights, ...]) -> Callable[[], Any]:
        rounds = [replace(round, trace=trace) for round in work.rounds(lm.vocab_size, repetition)]
        warm(engine, [replace(round, iteration=ITERATION - 1, trace=trace[:-1]) for round in rounds])
        return partial(drive, engine, rounds)

    both = _compared(
        work, lm, options, 1 << 20, aisp=partial(prepare, trace=known), gaussian=partial(prepare, trace=())
    )
    return both | {"agreement": None, "agrees": True}  # they decode different things


def _mixed(work: Workload, lm: LM, options: Namespace) -> dict[str, Any]:
    """Prompts of a quarter of the length up to all of it in random order, over the same ones sorted by length."""
    grid = torch.linspace(max(1, work.prompt_tokens // 4), work.prompt_tokens, work.prompts).long()

    def prepare(engine: Engine, repetition: int, order: bool) -> Callable[[], Any]:
        shuffled = grid[torch.randperm(work.prompts, generator=torch.Generator().manual_seed(repetition))]
        rounds = work.rounds(lm.vocab_size, repetition, shuffled.tolist())
        return partial(drive, engine, sorted(rounds, key=lambda r: len(r.prompt_tokens)) if order else rounds)

    return _compared(work, lm, options, mixed=partial(prepare, order=False), sorted=partial(prepare, order=True))


def _varied(work: Workload, lm: LM, options: Namespace) -> dict[str, Any]:
    """Responses of about a third of the length, or ended by it. Without refill, over with it: a batch of prompts enters
    when the one before it is done."""
    shuffled = torch.randperm(lm.vocab_size, generator=torch.Generator().manual_seed(0)).tolist()
    lm = replace(lm, eos_ids=frozenset(shuffled[: 3 * lm.vocab_size // work.new_tokens]))
    together = max(1, work.batch_rows // work.samples)

    def prepare(engine: Engine, repetition: int, refill: bool) -> Callable[[], Any]:
        rounds = work.rounds(lm.vocab_size, repetition)
        batches = [rounds[i : i + together] for i in range(0, len(rounds), together)]
        return partial(drive, engine, rounds) if refill else partial(drive, engine, *batches)

    return _compared(work, lm, options, lockstep=partial(prepare, refill=False), refill=partial(prepare, refill=True))


def _compared(work: Workload, lm: LM, options: Namespace, idle_tokens: int = 0, **contenders: Any) -> dict[str, Any]:
    """Two contenders on one engine, the first over the second; no prompt stays prefilled for the next, if that is 0."""
    engine = Engine(lm, work.batch_rows, work.new_tokens, idle_tokens=idle_tokens)
    warm(engine, work.rounds(lm.vocab_size, options.repeat)[:1])
    prepared = {name: partial(prepare, engine) for name, prepare in contenders.items()}
    runs = paired.alternate(prepared, options.repeat, lm.device)
    result: dict[str, Any] = {
        name: {
            "seconds": paired.spread([run.seconds for run in timed]),
            "slot_utilisation": mean(run.answer.utilisation for run in timed),
        }
        for name, timed in runs.items()
    }
    first, second = runs.values()
    equal = mean(paired.equal_share(a.answer.tokens(), b.answer.tokens()) for a, b in zip(first, second, strict=True))
    result |= {"of": " / ".join(runs), **paired.ratios(first, second)}
    return result | {"agreement": equal, "agrees": equal == 1}


if __name__ == "__main__":
    command.main("decode")
