"""All checks of a run, one after the other, on prompts of the run."""

from __future__ import annotations

import asyncio
import copy
import gc
from collections.abc import Callable, Iterator
from collections.abc import Generator as Iteration
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from aisp_dist import endpoint, rewards
from aisp_dist.analysis.doctor import Check, engine, served
from aisp_dist.config import ConfigError, Generator, ModelReward, Prompts, Replicas, Run
from aisp_dist.data import prompts, render
from aisp_dist.engine import model, pretrained, sizes
from aisp_dist.engine.decode import DecodeError, Engine
from aisp_dist.records import Prompt, Round
from aisp_dist.rewards.client import Unavailable
from aisp_dist.rewards.self_test import Defect
from aisp_dist.vllm.start import start

_READ = 16  # input lines from which prompts are chosen

Say = Callable[[str], None]
T = TypeVar("T")
Checked = Iteration[Check, None, T]  # yields checks, returns T


def examine(run: Run, base_dir: Path, steps: int, say: Say) -> Iterator[Check]:
    """Every check, in order. run: with paths that this process can open; base_dir: its directory; steps: tokens of a
    response, at most the run's. Raises ConfigError for what `align` would refuse too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        place = device(run.runtime.generators)
        try:
            steps = min(steps, run.generator.max_new_tokens)
            yield from _ENGINES.get(run.generator.engine, _local)(run, place, steps, say)
        except ConfigError:
            raise
        except (DecodeError, ValueError) as error:  # of the local engine, of vLLM's
            yield Check("decoding", "FAILED", str(error), "Such prompts would become failed rows")
        for name, settings in run.rewards.items():
            if isinstance(settings, ModelReward):
                _free()
                say(f"reward {name}: loading {settings.model}")
                yield reward(name, settings, base_dir, device(run.replicas(name)))
    finally:
        torch.set_num_threads(threads)


def device(wanted: Replicas) -> torch.device:
    """Where an actor with these resources would be."""
    return torch.device("cuda" if torch.cuda.is_available() and wanted.num_gpus != 0 else "cpu")


def reward(name: str, settings: ModelReward, base_dir: Path, place: torch.device) -> Check:
    """The self-test of a reward model (rewards/self_test.py), also where the run switches it off."""
    try:
        score = rewards.load(name, settings.model_copy(update={"self_test": True}), base_dir, str(place))
        score.close()  # type: ignore[attr-defined]
    except Defect as error:
        if settings.self_test:
            return Check(f"{name} self-test", "FAILED", str(error), "`aisp align` would refuse to run")
        return Check(f"{name} self-test", "note", str(error), "`aisp align` would run it all the same")
    return Check(f"{name} self-test", "ok", "no defect found in template, BOS, padding, truncation and batching")


def _local(run: Run, place: torch.device, steps: int, say: Say) -> Iterator[Check]:
    asked, decoded = yield from _decoding(run, place, steps, say)
    yield from engine.exactness(_own(run.generator, place, say), asked, decoded)


def _decoding(run: Run, place: torch.device, steps: int, say: Say) -> Checked[tuple[list[Round], engine.Decoded]]:
    """The checks of the local engine, which is gone after them. Returns greedy rounds and what it decoded of them, for
    `exactness`."""
    say(f"generator: loading {run.generator.model} on {place}")
    lm = model.load(run.generator, place)
    longest = min(run.prompts.max_tokens, (lm.context_length or 1 << 31) - run.generator.max_new_tokens)
    chosen = sample(run.prompts, lm.tokenizer, longest)
    yield engine.ends(lm.tokenizer, lm.eos_ids, lm.turn_end)
    one = Engine(lm, run.generator.batch_rows, steps, run.generator.stop, idle_tokens=0)
    asked = engine.rounds(run, chosen, steps, len(one.rows))
    say(f"generator: {sum(r.stop - r.start for r in asked)} trajectories of up to {steps} tokens, in several ways")
    decoder: Any = lm.decoder
    yield engine.schedule(one, asked, sizes.has_experts(decoder.config.to_dict()))
    greedy = engine.greedy(asked, chosen)
    return greedy, engine.decode(one, greedy)


def _vllm(run: Run, place: torch.device, steps: int, say: Say) -> Iterator[Check]:
    settings = run.generator
    say(f"generator: starting vLLM with {settings.model}")
    with asyncio.Runner() as runner:
        short = settings.model_copy(update={"max_new_tokens": steps})
        service = runner.run(start(short, run.prompts.max_tokens))
        try:
            told = service.served
            longest = min(run.prompts.max_tokens, told.context_length - steps)
            chosen = sample(run.prompts, told.tokenizer, longest)
            yield engine.ends(told.tokenizer, told.end_ids, told.turn_end)
            asked = engine.rounds(run, chosen, steps, min(told.rows, settings.batch_rows))
            say(f"generator: {sum(r.stop - r.start for r in asked)} trajectories of up to {steps} tokens, three times")
            yield runner.run(served.company(service, asked))
            greedy = engine.greedy(asked, chosen)
            answers = runner.run(served.decode(service, greedy))
            yield runner.run(served.stop_strings(service, greedy, answers))
            likely = runner.run(served.likelihoods(service, greedy, answers))
        finally:
            service.close()
    if settings.quantization:
        advice = "Run the doctor once without quantization, to see that the rest is exact"
        yield Check("exact tokens", "note", f"not compared: transformers has no {settings.quantization}", advice)
        return
    own = _own(settings, place, say)
    yield from engine.exactness(own, greedy, {key: (made, None) for key, made in answers.items()})
    yield engine.likelihoods(own, greedy, answers, likely)


def _server(run: Run, place: torch.device, steps: int, say: Say) -> Iterator[Check]:
    assert run.generator.endpoint is not None
    url = run.generator.endpoint.url

    async def greet() -> tuple[Any, frozenset[int], int | None]:
        service = await endpoint.connect(run.generator, run.prompts.max_tokens, run.runtime.timeouts.round)
        service.close()
        return service.served.tokenizer, service.served.end_ids, service.served.turn_end

    say(f"generator: asking {url}")
    try:
        yield engine.ends(*asyncio.run(greet()))
    except Unavailable as error:
        yield Check("decoding", "FAILED", str(error), "`aisp align` would wait for the server, and then end")
        return
    yield Check("decoding", "note", f"by the server at {url}, whose answers are not compared", "Its rows are its own")


_ENGINES = {"local": _local, "vllm": _vllm, "endpoint": _server}


def _own(settings: Generator, place: torch.device, say: Say) -> Any:
    _free()
    say("generator: the engine is gone; loading the model once more as transformers has it")
    return own_generator(settings, place)


def own_generator(settings: Generator, place: torch.device) -> Any:
    """The generator's model as transformers alone loads and runs it."""
    own = pretrained.weights(settings, place)
    if settings.fp32_head:
        own.set_output_embeddings(copy.deepcopy(own.get_output_embeddings()).float())
    return own


def sample(settings: Prompts, tokenizer: Any, longest: int) -> list[tuple[Prompt, tuple[int, ...]]]:
    """The shortest, the middle and the longest of the first prompts that can be rendered, with their tokens."""
    found: list[tuple[Prompt, tuple[int, ...]]] = []
    reason = "none can be read"
    for line in islice(prompts.read(settings), _READ):
        try:
            found += [(line, render.render(line, settings, tokenizer, longest))] if isinstance(line, Prompt) else []
        except render.Unrenderable as error:
            reason = str(error)
    if not found:
        raise ConfigError(f"prompts.source: {settings.source!r}, the first {_READ} lines: {reason}; fix one of them")
    found.sort(key=lambda pair: len(pair[1]))
    return [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})]


def _free() -> None:
    """Gives back the memory of a model that is no longer used."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing without a GPU
