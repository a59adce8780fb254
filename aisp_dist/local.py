"""A run in this process, without Ray: the base model and the rewards as a Backend, and rows out of prompts.

relabel -> [window of prompts -> align_input -> LocalBackend] -> rows in input order
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from aisp_dist import endpoint, placement, rewards
from aisp_dist.align import RowError, Tokens, align_input, first_prompts, probe, reason, window
from aisp_dist.config import ConfigError, Run, Runtime, load
from aisp_dist.data import prompts
from aisp_dist.data.sources import Line, Source
from aisp_dist.engine import decode, model, sizes
from aisp_dist.engine.service import Closed, Service
from aisp_dist.output import fingerprint, schema
from aisp_dist.placement import GENERATOR
from aisp_dist.records import Calibration, Done, Input, Prompt, Result, Rollout, Round, Sampling, Score
from aisp_dist.rewards import stepwise
from aisp_dist.rewards.client import Unavailable
from aisp_dist.vllm import service as serving
from aisp_dist.vllm.choice import here, resolve
from aisp_dist.vllm.start import start

T = TypeVar("T")
Row = dict[str, Any]
Given = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]  # a text, messages, or an input line with its columns

# Whatever was asked; every other error is about the request.
_FAULTS = (MemoryError, torch.OutOfMemoryError, Unavailable, Closed, serving.Dead, serving.Disobeyed)


Served = serving.Service | endpoint.Service


class LocalBackend:
    """The base model and the rewards of a run, loaded into this process. Implements align.Backend.

    run: with its paths resolved (fingerprint.locate). device: of all models, as torch names it (default: the first GPU,
    else the CPU). served: vLLM's engine or a server, where that decodes. Raises ConfigError for a model or function
    that cannot be used. `close` ends its threads and every engine of vLLM, `served` too, as an error here does.
    """

    def __init__(self, run: Run, base_dir: Path, device: str | None = None, served: Served | None = None) -> None:
        self.service: Service | Served
        self.context_length: int | None
        self.rewards: dict[str, rewards.RewardFn] = {}
        self.threads: dict[str, ThreadPoolExecutor] = {}
        with ExitStack() as opened:
            if served is not None:
                opened.callback(served.close)
            share = shares(run, device)
            if served is not None:
                self.service, self.tokenizer = served, served.served.tokenizer
                self.context_length = served.served.context_length
            else:
                settings = run.generator
                lm = model.load(settings, device)
                guide = stepwise.load(run, base_dir, lm.device)
                self.tokenizer, self.context_length = lm.tokenizer, lm.context_length
                limits = settings.batch_rows, settings.max_new_tokens
                engine = decode.Engine(lm, *limits, settings.stop, guide=guide, memory_share=share[GENERATOR])
                self.service = Service(engine)
                opened.callback(self.service.close)
            for name, reward in run.rewards.items():
                score = rewards.load(name, reward, base_dir, device, run.prompts.keep, share=share[name])
                if close := getattr(score, "close", None):
                    opened.callback(close)
                # One thread a reward: what a function keeps between its calls, an event loop say, belongs to a thread.
                self.threads[name] = ThreadPoolExecutor(1, thread_name_prefix=f"reward-{name}")
                opened.callback(self.threads[name].shutdown, cancel_futures=True)
                self.rewards[name] = score
            self._opened = opened.pop_all()
        _backends.add(self)

    async def rollout(self, round: Round) -> Rollout:
        return await _answer(self.service.rollout(round))

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        loop = asyncio.get_running_loop()

        async def ask() -> list[Score]:
            return await loop.run_in_executor(self.threads[reward], self.rewards[reward], prompt, responses)

        return await _answer(ask())

    async def nll(self, prompt_id: str, prompt_tokens: Tokens, responses: Sequence[Tokens]) -> list[float]:
        return await _answer(self.service.nll(prompt_tokens, responses))

    async def calibrate(self, request: Calibration) -> Sampling:
        return await _answer(self.service.calibrate(request))

    def close(self) -> None:
        """End the threads, after what they are in the middle of, and the engines."""
        self._opened.close()
        _backends.discard(self)


_backends: set[LocalBackend] = set()  # not closed yet
_generators: WeakSet[Generator[Row, None, None]] = WeakSet()  # that relabel answered; closing one again does nothing


@atexit.register
def _close() -> None:
    """Before Python ends: it ends daemon threads where they are, and inside torch that aborts the process."""
    for rows in list(_generators):
        with suppress(ValueError):  # a daemon thread is reading it, which the end of its backend stops
            rows.close()
    for backend in list(_backends):
        backend.close()


os.register_at_fork(after_in_child=_generators.clear)  # the threads, and vLLM's processes, are those of the parent
os.register_at_fork(after_in_child=_backends.clear)


def shares(run: Run, device: str | None = None) -> dict[str, float]:
    """The part of the memory that each model of a run may use in one process, by role: of the first GPU, where all of
    them are, or else of the machine. run: located. Divided as a cluster of that one GPU would be (placement.plan)."""
    gpus = 0 if device == "cpu" else min(1, here().gpus)
    whole = run.generator.model_copy(update={"tensor_parallel": 1, "pipeline_parallel": 1})
    alone = run.model_copy(update={"generator": whole, "runtime": Runtime()})
    found = sizes.of_models(run)
    if GENERATOR in found:
        found[GENERATOR] //= run.generator.gpus
    plan = placement.plan(alone, [{"CPU": float(1 + len(run.rewards)), "GPU": gpus}], sizes=found)
    return {group.role: group.memory for group in plan.groups}


async def _answer(call: Coroutine[Any, Any, T]) -> T:
    try:
        return await call
    except _FAULTS:
        raise
    except Exception as error:  # here is no other process that could confirm it
        raise RowError(reason(error)) from error


def relabel(
    config: str | PathLike[str] | Mapping[str, Any] | Run, given: Iterable[Given] | None = None
) -> Generator[Row, None, None]:
    """See aisp_dist.relabel."""
    run, base_dir = load.read(config)
    if isinstance(given, str | Mapping):
        raise ConfigError(f"prompts is one {type(given).__name__}; give a list of prompts")
    if given is not None and not isinstance(given, Sequence):
        if not isinstance(given, Iterable):
            raise ConfigError(f"prompts is {given!r}, of type {type(given).__name__}; give a list of prompts")
        given = list(given)  # it is read more than once
    if given is not None and run.prompts.format != "chat" and not all(isinstance(p, str | Mapping) for p in given):
        raise ConfigError(f"prompts: messages need prompts.format: chat, not {run.prompts.format}")
    rows = _rows(run, base_dir, given)
    _generators.add(rows)
    return rows


def _rows(run: Run, base_dir: Path, given: Sequence[Given] | None) -> Generator[Row, None, None]:
    run, choice = resolve(run, None, here)
    run = fingerprint.pin(run, {})
    located = fingerprint.locate(run, base_dir)
    sample = prompts.sample(located.prompts) if given is None else _inputs(located, given)
    columns = schema.column_types(run.prompts.keep, sample, run.prompts.drop_last_answer)
    model = fingerprint.model_name(run)
    first = None if given is None else prompts.first_digest(_inputs(located, list(islice(given, 1))))
    run_id = fingerprint.fingerprint(
        fingerprint.components(run, located, base_dir, first, choice.component, choice.version)
    )[:12]
    kind: schema.Kind = "raw" if run.prompts.format == "raw" else "chat"
    empty = dict.fromkeys(schema.schemas(kind, columns).data.names)

    def row(result: Result) -> Row:
        if isinstance(result, Done):
            return schema.done_row(result, kind, columns, model, run_id) | {"reason": None}
        return empty | schema.failed_row(result, kind, columns, run_id) | {"model": model}

    with _one_thread(), _event_loop() as loop, _backend(located, base_dir, loop) as backend:
        searched: deque[Future[Result]] = deque()
        asyncio.run_coroutine_threadsafe(
            probe(located, first_prompts(_inputs(located, given)), backend.score), loop
        ).result()
        try:
            for line in _inputs(located, given):
                if len(searched) == window(run):
                    yield row(searched.popleft().result())
                line = schema.writable(line)
                search = align_input(located, line, backend.tokenizer, backend.context_length, backend)
                searched.append(asyncio.run_coroutine_threadsafe(search, loop))
            while searched:
                yield row(searched.popleft().result())
        finally:
            for future in searched:
                future.cancel()


def _inputs(run: Run, given: Sequence[Given] | None) -> Iterator[Input]:
    if given is None:
        return prompts.read(run.prompts)
    settings = prompts.whole(run.prompts)
    rows = (dict(one) if isinstance(one, Mapping) else {settings.column: one} for one in given)
    return prompts.read(settings, Source(("prompts",), (Line(0, number, row) for number, row in enumerate(rows, 1))))


@contextmanager
def _backend(run: Run, base_dir: Path, loop: asyncio.AbstractEventLoop) -> Iterator[LocalBackend]:
    served: Served | None = None
    if run.generator.engine == "endpoint":
        connected = endpoint.connect(run.generator, run.prompts.max_tokens, run.runtime.timeouts.round)
        served = asyncio.run_coroutine_threadsafe(connected, loop).result()
    if run.generator.engine == "vllm":
        started = start(run.generator, run.prompts.max_tokens, share=shares(run)[GENERATOR])
        served = asyncio.run_coroutine_threadsafe(started, loop).result()
    backend = LocalBackend(run, base_dir, None, served)
    try:
        yield backend
    finally:
        backend.close()


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own: the caller's thread may run one already, as in Jupyter."""

    async def end_tasks() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="relabel", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        asyncio.run_coroutine_threadsafe(end_tasks(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


_num_threads: list[int] = []  # of torch, as each generator found it
_num_threads_lock = threading.Lock()


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch on one CPU thread, as in the processes of a run: the bits of its sums depend on the number. Of generators
    that overlap, the last to end restores what the first found."""
    with _num_threads_lock:
        _num_threads.append(torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _num_threads_lock:
            found = _num_threads.pop()
            if not _num_threads:
                torch.set_num_threads(found)
