"""How much of the faster part's work is hidden behind the slower one's: searches of several prompts with decoding and
scoring in two processes, beside each of the two answering the same requests alone. No Ray: one executor each.

    python -m tests.bench.pipeline

    align (here) --- rounds ---> _advance (decoder)        align --- responses ---> _score (scorer)
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from aisp_dist import rewards
from aisp_dist.align import Tokens, align
from aisp_dist.bench import paired
from aisp_dist.bench.workload import SAMPLING
from aisp_dist.config import Aisp, Ess, Generator, ModelReward, Run
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM
from aisp_dist.engine.model import load
from aisp_dist.records import Calibration, Prompt, Rollout, Round, Sampling, Score
from jobs.bench import positive
from tests.bench import checkpoints, command

STEPS = 4  # steps of the engine before it looks for new rounds


@dataclass(frozen=True)
class Task:
    """What both processes work on. Every name gets a fresh engine and a fresh scorer, which know no prompt."""

    name: str
    run: str  # as JSON
    device: str
    threads: int

    def parsed(self) -> Run:
        torch.set_num_threads(self.threads)
        return Run.model_validate_json(self.run)


@dataclass(frozen=True)
class Requests:
    """What the searches asked of the decoder and the scorer, and the decoder's answers."""

    rounds: dict[Round, Rollout] = field(default_factory=dict)
    nlls: list[tuple[Tokens, Sequence[Tokens]]] = field(default_factory=list)
    scores: list[tuple[Prompt, Sequence[str]]] = field(default_factory=list)


def main(args: Sequence[str] | None = None) -> int:
    return command.run(parser(), measure, args)


def parser() -> argparse.ArgumentParser:
    parse = command.parser("pipeline", __doc__)
    command.model_flags(parse, "llama:256/4/4k", prompt_tokens=256, samples=16)
    parse.add_argument("--prompts", type=positive, default=8, metavar="N", help="prompts in flight")
    parse.add_argument("--iterations", type=positive, default=4, metavar="N", help="iterations of the search")
    parse.add_argument("--batch-rows", type=positive, metavar="N", help="rows of a batch; room for half the prompts")
    return parse


def measure(options: Namespace) -> dict[str, Any]:
    device, machine = paired.place(options.device, options.threads)
    rows = options.batch_rows or -(-options.prompts // 2) * options.samples  # the other prompts are being scored
    dtype = options.dtype
    size = options.shape, options.prompt_tokens + options.new_tokens + 64, getattr(torch, dtype)
    found: list[dict[str, float]] = []
    one_process: dict[str, Any] = {"max_workers": 1, "mp_context": get_context("spawn")}
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(**one_process) as decoder,
        ProcessPoolExecutor(**one_process) as scorer,
    ):
        generator, reward = (checkpoints.save(Path(folder) / k, *size, k == "reward") for k in ("generator", "reward"))
        run = Run(
            output="none",
            generator=Generator(model=generator, dtype=dtype, batch_rows=rows, max_new_tokens=options.new_tokens),
            rewards={"main": ModelReward(model=reward, dtype=dtype, batch_rows=options.samples)},
            method=Aisp(num_samples=options.samples, num_iterations=options.iterations, lambda_=Ess(ess=0.1)),
        )
        text, tokenizer = run.model_dump_json(by_alias=True), checkpoints.tokenizer(options.shape)
        for repetition in range(options.repeat):
            draw = torch.Generator().manual_seed(repetition)
            ids = torch.randint(len(tokenizer), (options.prompts, options.prompt_tokens), generator=draw).tolist()
            prompts = {Prompt(f"{p:06}", p, tokenizer.decode(row)): tuple(row) for p, row in enumerate(ids)}
            task = Task(f"{repetition}", text, str(device), options.threads)
            found.append(_repetition(task, prompts, decoder, scorer))
            paired.say(f"  {found[-1]}")
    known = ("dtype", "prompt_tokens", "new_tokens", "samples", "prompts", "iterations")
    work = {"model": options.shape, "batch_rows": rows, **{n: getattr(options, n) for n in known}}
    result = {name: paired.spread([one[name] for one in found]) for name in found[0]}
    return {**machine, **work, "agrees": result["agreement"]["min"] == 1, **result}


def _repetition(task: Task, prompts: dict[Prompt, Tokens], decoder: Executor, scorer: Executor) -> dict[str, float]:
    """Seconds of both together and of each alone, and the share of rounds that were decoded alike both times."""
    _load(task, decoder, scorer)
    start = time.perf_counter()
    asked = asyncio.run(_search(task, prompts, decoder, scorer))
    seconds = time.perf_counter() - start
    alone = replace(task, name=f"{task.name} alone")
    _load(alone, decoder, scorer)
    decode, answers = decoder.submit(_decode_alone, alone, list(asked.rounds), asked.nlls).result()
    score = scorer.submit(_score_alone, alone, asked.scores).result()
    same = [answer == again for answer, again in zip(asked.rounds.values(), answers, strict=True)]
    figures = {"together_seconds": seconds, "decode_alone_seconds": decode, "score_alone_seconds": score}
    return {**figures, "ratio": seconds / max(decode, score), "agreement": sum(same) / len(same)}


def _load(task: Task, decoder: Executor, scorer: Executor) -> None:
    """Load one model after the other: in tests both executors are threads of one process, which must not load at the
    same time."""
    decoder.submit(_warm, task).result()
    scorer.submit(_score, task, Prompt("", 0, "w9"), ["w9"]).result()


async def _search(task: Task, prompts: dict[Prompt, Tokens], decoder: Executor, scorer: Executor) -> Requests:
    """All prompts at once."""
    backend, run = TwoProcesses(task, decoder, scorer), task.parsed()
    async with asyncio.TaskGroup() as group:  # an error of one ends all
        decoding = group.create_task(backend.decode())
        await asyncio.gather(*(align(run, prompt, ids, backend) for prompt, ids in prompts.items()))
        decoding.cancel()
    return backend.asked


class TwoProcesses:
    """An align.Backend with the engine in one process and the reward in another. Keeps what it was asked."""

    def __init__(self, task: Task, decoder: Executor, scorer: Executor) -> None:
        self.task, self.decoder, self.scorer = task, decoder, scorer
        self.asked = Requests()
        self.wake = asyncio.Event()
        self.arrived: list[Round] = []
        self.waiting: dict[Round, asyncio.Future[Rollout]] = {}

    async def rollout(self, round: Round) -> Rollout:
        self.arrived.append(round)
        self.waiting[round] = answer = asyncio.get_running_loop().create_future()
        self.wake.set()
        self.asked.rounds[round] = await answer
        return self.asked.rounds[round]

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        self.asked.scores.append((prompt, responses))
        return await asyncio.get_running_loop().run_in_executor(self.scorer, _score, self.task, prompt, responses)

    async def nll(self, prompt_id: str, prompt_tokens: Tokens, responses: Sequence[Tokens]) -> list[float]:
        self.asked.nlls.append((prompt_tokens, responses))
        return await asyncio.get_running_loop().run_in_executor(self.decoder, _nll, self.task, prompt_tokens, responses)

    async def calibrate(self, request: Calibration) -> Sampling:
        raise NotImplementedError("the methods of this bench leave nothing to calibrate")

    async def decode(self) -> None:
        """Answer rounds until cancelled."""
        loop = asyncio.get_running_loop()
        while await self.wake.wait():
            some = self.arrived.copy()
            self.arrived.clear()
            for round, answer in await loop.run_in_executor(self.decoder, _advance, self.task, some):
                self.waiting.pop(round).set_result(answer)
            if not self.waiting:
                self.wake.clear()


@lru_cache(1)
def _lm(generator: str, device: str) -> LM:
    return load(Generator.model_validate_json(generator), device)


@lru_cache(1)
def _engine(task: Task) -> Engine:
    settings = task.parsed().generator
    return Engine(_lm(settings.model_dump_json(), task.device), settings.batch_rows, settings.max_new_tokens)


@lru_cache(1)
def _scorer(task: Task) -> rewards.RewardFn:
    return rewards.load("main", task.parsed().rewards["main"], device=task.device)


def _warm(task: Task) -> None:
    _engine(task).run([Round(0, "warm", (1,), 0, 0, 1, SAMPLING)])


def _advance(task: Task, arrived: Sequence[Round]) -> list[tuple[Round, Rollout]]:
    engine, finished = _engine(task), []
    for round in arrived:
        engine.submit(round)
    for _ in range(STEPS):
        finished += engine.step()
    return finished


def _nll(task: Task, prompt: Tokens, responses: Sequence[Tokens]) -> list[float]:
    return [_engine(task).nll(prompt, response) for response in responses]


def _score(task: Task, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
    return _scorer(task)(prompt, responses)


def _decode_alone(
    task: Task, rounds: Sequence[Round], nlls: Sequence[tuple[Tokens, Sequence[Tokens]]]
) -> tuple[float, list[Rollout]]:
    start = time.perf_counter()
    answers = _engine(task).run(rounds)
    for prompt, responses in nlls:
        _nll(task, prompt, responses)
    return time.perf_counter() - start, answers


def _score_alone(task: Task, scores: Sequence[tuple[Prompt, Sequence[str]]]) -> float:
    start = time.perf_counter()
    for prompt, responses in scores:
        _score(task, prompt, responses)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
