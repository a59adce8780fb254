"""The engine's speed beside other ways to decode the same trajectories, on the same prompts and noise.

    workload -> model -> for each repetition: rounds, noise -> contenders in turns -> ratios, agreement

A repetition has prompts and noise of its own, the same for all contenders.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from statistics import mean, median
from typing import Any

import torch

from aisp_dist.bench import paired, peers
from aisp_dist.bench.workload import Workload, drive, noise_of, warm
from aisp_dist.config import ConfigError
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM

SUITES = {  # shape, prompt tokens, new tokens
    "cpu": [
        ("llama:512/8/16k", 512, 64),
        ("llama:256/6/8k", 1024, 128),
        ("gpt2:512/8/16k", 512, 64),
        ("qwen3:256/6/4k", 512, 128),
        ("gemma3:256/6/32k", 1024, 64),
    ],
    "gpu": [("llama3-8b", 500, 128), ("llama3-8b", 2000, 128)],
}
# Of tokens, in fp32. Rounding turns a close argmax here and there, and with it the rest of its row; a fault most rows.
AGREE = 0.9


def measure(options: Namespace) -> dict[str, Any]:
    device, machine = paired.place(options.device, options.threads)
    found = []
    for work in workloads(options):
        paired.say(f"{work}")
        found.append({**asdict(work), **_beside_peers(work, work.load(device), options)})
    return {**machine, "agrees": all(one["agrees"] for one in found), "configurations": found}


def workloads(options: Namespace) -> Iterator[Workload]:
    """The suite or the sweep. Raises ConfigError where flags exclude each other."""
    given = [n for n in ("shape", "prompt_tokens", "new_tokens", "dtype") if getattr(options, n)]
    if given and options.suite:
        raise ConfigError(f"--suite {options.suite} excludes --{given[0].replace('_', '-')}; leave one out")
    shapes, lengths, gpu = options.shape or ["llama:512/8/16k"], options.prompt_tokens or [512], options.suite == "gpu"
    sweep = SUITES.get(options.suite) or itertools.product(shapes, lengths, options.new_tokens or [64])
    dtype, num = options.dtype or ("bfloat16" if gpu else "float32"), options.prompts or [8 if gpu else 1]
    for (shape, length, steps), samples, prompts in itertools.product(sweep, options.samples or [32], num):
        for rows in options.batch_rows or [samples * prompts]:
            yield Workload(shape, length, steps, samples, prompts, rows, dtype)


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
            result[name]["agreement"] = mean(paired.equal_share(a.answer.tokens, b.answer) for a, b in both)
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
    if name == "vllm":
        return peers.sampling(twin, work.dtype, work.batch_rows, work.prompt_tokens + work.new_tokens)
    return partial(peers.generate if name == "generate" else peers.repeated_static, twin)


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
