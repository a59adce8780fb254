"""All checks of a run, one after the other, and what they are made on: prompts of the run, and the answers to them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from aisp_dist import rewards
from aisp_dist.analysis.doctor import Check, decoding, exact, free, scoring
from aisp_dist.config import ConfigError, Prompts, Replicas, Run
from aisp_dist.data import prompts, render
from aisp_dist.engine import model
from aisp_dist.engine.decode import DecodeError, Engine
from aisp_dist.records import Prompt

_READ, _RESPONSES = 16, 6  # input lines looked at; responses to a prompt that are scored

Say = Callable[[str], None]
Made = tuple[list[exact.Row], list[scoring.Request]]


def examine(run: Run, base_dir: Path, steps: int, say: Say) -> Iterator[Check]:
    """Every check, in order. run: with paths that this process can open; steps: tokens of a response, at most the
    run's. Raises ConfigError for what `align` would refuse too."""
    requests: list[scoring.Request] = []
    place, threads = device(run.runtime.generators), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        try:
            rows, requests = yield from _decoding(run, place, min(steps, run.generator.max_new_tokens), say)
            free()
            say(
                "generator: loading it as transformers has it; the engine is gone, so it needs no more memory than that"
            )
            yield from exact.exactness(exact.own_generator(run.generator, place), rows)
        except DecodeError as error:
            yield Check("decoding", "FAILED", str(error), "Such prompts would become failed rows")
        for name, settings in run.rewards.items():
            free()
            say(f"reward {name}: loading and scoring")
            place = device(run.replicas(name))
            load = partial(rewards.load, name, base_dir=base_dir, device=str(place), columns=run.prompts.keep)
            yield from scoring.check(name, settings, place, load, requests)
    finally:
        torch.set_num_threads(threads)


def device(wanted: Replicas) -> torch.device:
    """Where such an actor would be."""
    return torch.device("cuda" if torch.cuda.is_available() and wanted.num_gpus != 0 else "cpu")


def _decoding(run: Run, place: torch.device, steps: int, say: Say) -> Generator[Check, None, Made]:
    """The checks of an engine that is gone after them; answers rows for exact.py and requests for scoring.py."""
    say(f"generator: loading {run.generator.model} on {place}")
    lm = model.load(run.generator, place)
    longest = min(run.prompts.max_tokens, (lm.context_length or 1 << 31) - run.generator.max_new_tokens)
    some = sample(run.prompts, lm.tokenizer, longest)
    yield decoding.ends(lm)
    yield decoding.fits(run.generator, lm, longest)
    engine = Engine(lm, run.generator.batch_rows, steps, run.generator.stop, idle_tokens=0)
    asked = decoding.rounds(run, some, steps, len(engine.rows))
    say(f"generator: {sum(r.stop - r.start for r in asked)} trajectories of up to {steps} tokens, in several ways")
    alone = {key: made for round in asked for key, made in decoding.decode(engine, [round], decoding.digests).items()}
    yield from decoding.schedule(engine, asked, alone)
    if place.type == "cuda":
        yield decoding.peak(engine)
    greedy = replace(asked[0], stop=2, sampling=replace(asked[0].sampling, decode=None))
    few = [replace(greedy, prompt_id=prompt.id, prompt_tokens=tokens) for prompt, tokens in some]
    by_id = {round.prompt_id: round for round in few}
    decoded = decoding.decode(engine, few, lambda z_BD: z_BD.to("cpu", torch.float32, copy=True))
    rows = [exact.Row(by_id[key[0]], trajectory, torch.stack(z)) for key, (trajectory, z) in decoded.items()]
    texts = {prompt.id: dict[str, None]() for prompt, _ in some}
    for key, (trajectory, _) in alone.items():
        texts[key[0]][trajectory.text] = None
    return rows, [(prompt, list(texts[prompt.id])[:_RESPONSES]) for prompt, _ in some]


def sample(settings: Prompts, tokenizer: Any, longest: int) -> list[decoding.Rendered]:
    """The shortest, the middle and the longest of the first prompts that can be rendered."""
    found: list[decoding.Rendered] = []
    reason = "none can be read"
    for line in islice(prompts.read(settings), _READ):
        try:
            found += [(line, render.render(line, settings, tokenizer, longest))] if isinstance(line, Prompt) else []
        except render.Unrenderable as error:
            reason = str(error)
    if not found:
        raise ConfigError(f"prompts.source: {settings.source!r}, the first {_READ} lines: {reason}; mend one of them")
    found.sort(key=lambda pair: len(pair[1]))
    return [found[i] for i in sorted({0, len(found) // 2, len(found) - 1})]
