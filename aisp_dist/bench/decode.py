"""The engine's speed beside other ways to decode the same trajectories, on the same prompts and noise.

    workload -> model -> in each repetition: rounds, noise -> contenders in turns -> ratios, agreement

Every repetition has prompts and noise of its own, the same for all contenders.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import mean
from typing import Any

import torch

from aisp_dist.bench import paired, peers
from aisp_dist.bench.workload import Workload, noise_of
from aisp_dist.config import ConfigError
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Round

SUITE = [  # shape, prompt tokens, new tokens
    ("llama:512/8/16k", 512, 64),
    ("llama:256/6/8k", 1024, 128),
    ("gpt2:512/8/16k", 512, 64),
    ("qwen3:256/6/4k", 512, 128),
    ("gemma3:256/6/32k", 1024, 64),
]
# The share of equal tokens in fp32. Rounding turns a close argmax here and there, and with it the rest of that row; a
# fault changes most rows.
AGREE = 0.9


def measure(options: Namespace) -> dict[str, Any]:
    """The JSON document of `aisp bench decode`. Raises ConfigError."""
    device, machine = paired.place(options.device, options.threads)
    found = []
    for work in workloads(options):
        paired.say(f"{work}")
        found.append(asdict(work) | _beside_peers(work, device, options.peers, options.repeat))
    return {**machine, "agrees": all(one["agrees"] for one in found), "configurations": found}


def workloads(options: Namespace) -> Iterator[Workload]:
    """The suite, or every combination of the given sizes. Raises ConfigError where flags exclude each other."""
    given = [name for name in ("shape", "prompt_tokens", "new_tokens") if getattr(options, name)]
    if given and options.suite:
        raise ConfigError(f"--suite {options.suite} excludes --{given[0].replace('_', '-')}; leave one out")
    sizes = options.shape or ["llama:512/8/16k"], options.prompt_tokens or [512], options.new_tokens or [64]
    swept = SUITE if options.suite else list(itertools.product(*sizes))
    for (shape, length, steps), samples, prompts in itertools.product(swept, options.samples, options.prompts):
        for rows in options.batch_rows or [samples * prompts]:
            yield Workload(shape, length, steps, samples, prompts, rows, options.dtype)


def _beside_peers(work: Workload, device: torch.device, names: list[str], repeat: int) -> dict[str, Any]:
    """Our measures, and each peer's with its ratio (its seconds over ours) and agreement (share of tokens as ours)."""
    lm, twin = work.load(device), work.causal(device)
    engine, ask = Engine(lm, work.batch_rows, work.new_tokens), partial(work.rounds, lm.vocab_size)
    _ours(engine, [replace(ask(repeat)[0], stop=1)])  # warms up

    def prepare(peer: peers.Peer, repetition: int, steps: int = work.new_tokens) -> Callable[[], peers.Tokens]:
        rounds = ask(repetition)
        prompts_PL = torch.tensor([round.prompt_tokens for round in rounds], device=device)
        return partial(peer, prompts_PL, noise_of(rounds, steps, lm))

    contenders: dict[str, paired.Prepare] = {"ours": lambda repetition: partial(_ours, engine, ask(repetition))}
    result: dict[str, Any] = {}
    for name in names:
        if isinstance(peer := _peer(name, work, twin), str):
            result[name] = peer
        else:
            prepare(peer, repeat, min(2, work.new_tokens))()  # warms up
            contenders[name] = partial(prepare, peer)
    runs = paired.alternate(contenders, repeat, device)

    for name, timed in runs.items():
        seconds = paired.spread([run.seconds for run in timed])
        rate = work.samples * work.prompts / seconds["median"]
        measures = {"seconds": seconds, "trajectories_per_second": rate, "tokens_per_second": rate * work.new_tokens}
        result[name] = measures | (paired.ratios(timed, runs["ours"]) if name != "ours" else {})
        if name not in ("ours", "vllm"):
            both = zip(runs["ours"], timed, strict=True)
            result[name]["agreement"] = mean(paired.equal_share(a.answer, b.answer) for a, b in both)
    checked = work.dtype == "float32" and "generate" in runs  # in other dtypes no two ways agree
    return {**result, "checked": checked, "agrees": not checked or result["generate"]["agreement"] >= AGREE}


def _ours(engine: Engine, rounds: Sequence[Round]) -> peers.Tokens:
    return [list(t.token_ids) for rollout in engine.run(rounds) for t in rollout.trajectories]


def _peer(name: str, work: Workload, twin: Any) -> peers.Peer | str:
    if name == "vllm":
        return peers.vllm(twin, work.dtype, work.batch_rows, work.prompt_tokens + work.new_tokens)
    return partial(peers.generate if name == "generate" else peers.repeated_static, twin)
