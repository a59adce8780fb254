"""The engine against itself: whether all rows fit, and whether bits are a row's own. Shapes: B rows, D hidden size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from aisp_dist.analysis.doctor import Check, judge
from aisp_dist.config import ConfigError, Generator, Run, Search
from aisp_dist.engine import memory
from aisp_dist.engine.attention import TILE, Pass
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM
from aisp_dist.engine.sizes import has_experts
from aisp_dist.engine.step import ENDED, STEP
from aisp_dist.records import BASE_ITERATION, Prompt, Rates, Round, Sampling, TopP, Trajectory, Weights

Key = tuple[str, int, int]  # prompt id, iteration, sample
Decoded = Mapping[Key, tuple[Trajectory, list[Any]]]  # with something of its state at every step
Rendered = tuple[Prompt, tuple[int, ...]]


def fits(settings: Generator, lm: LM, longest: int) -> Check:
    """Whether all rows of the run and its longest prompt have room, at the run's own max_new_tokens."""
    num_rows = settings.batch_rows + -settings.batch_rows % TILE
    need = memory.parts(lm, num_rows, settings.max_new_tokens, longest, num_rows // 4)
    cuda = lm.device.type == "cuda"
    free = torch.cuda.mem_get_info(lm.device)[0] if cuda else psutil.virtual_memory().available
    sums = ", ".join(f"{name} {size / 1e9:.2g}" for name, size in need.items())
    figure = f"GB by formula: {sums}; free beside the weights: {free / 1e9:.3g}"
    try:
        capacity = memory.store(lm, num_rows, settings.max_new_tokens).capacity
    except ConfigError as error:
        return Check("memory", "FAILED", figure, str(error))
    finally:
        torch.cuda.empty_cache()
    return judge("memory", capacity >= longest, figure, f"Prompts of over {capacity} tokens fail; lower batch_rows")


def ends(lm: LM) -> Check:
    """What ends a response, and whether the checkpoint says so itself."""
    names = lm.tokenizer.convert_ids_to_tokens(sorted(lm.eos_ids))
    figure = f"a response ends at {' or '.join(map(repr, names)) or 'nothing but its length'}"
    if lm.turn_end is None:
        return Check("end tokens", "ok", figure)
    figure += f"; {lm.tokenizer.convert_ids_to_tokens(lm.turn_end)!r} is the chat template's alone"
    advice = "Add it to eos_token_id in the checkpoint's generation_config.json: other tools write on past it"
    return Check("end tokens", "note", figure, advice)


def peak(engine: Engine) -> Check:
    """On a GPU, whether the formula held."""
    need = memory.parts(engine.lm, len(engine.rows), engine.max_new_tokens, 0, len(engine.rows) // 4)
    need["suffixes"] = sum(x.nbytes for pair in getattr(engine.kv, "store", ()) for x in pair)  # and prompts
    most, total = torch.cuda.max_memory_allocated(engine.lm.device), sum(need.values())
    figure = f"{most / 1e9:.2f} GB allocated at most, {total / 1e9:.2f} by formula"
    return judge("peak memory", most <= total, figure, "Should a run be out of memory, lower batch_rows", "note")


def rounds(run: Run, some: Sequence[Rendered], steps: int, num_rows: int) -> list[Round]:
    """The run's own sampling under a control of random weights, in uneven groups, and a base answer: somewhat more
    trajectories than rows."""
    sampling, num, draw = run.method.sampling(), run.method.num_samples, torch.Generator().manual_seed(0)
    rates = run.method.rates() if isinstance(run.method, Search) else Rates()
    if rates.noise is not None:  # what each prompt would find for itself: some value does for the promises
        sampling = replace(sampling, sigma2=0.5)
    if rates.drawing is not None:
        sampling = replace(sampling, decode=TopP(0.9, 1.0))
    weights = [(2 * torch.randn(num, generator=draw)).softmax(0) for _ in range(3 if sampling.sigma2 else 0)]
    trace = tuple(Weights(tuple(w.tolist()), tuple(1 + i % steps for i in range(num))) for w in weights)
    groups = [(2, num_rows // 2 + 1), (1, num_rows // 3 + 1), (BASE_ITERATION, 1), (0, num_rows // 4 + 1), (3, 1)]
    asked = []
    for at, (iteration, size) in enumerate(groups):
        prompt, tokens = some[at % len(some)]
        base = iteration == BASE_ITERATION
        drawn = (Sampling(), ()) if base else (sampling, trace[:iteration])
        asked.append(Round(run.seed, prompt.id, tokens, iteration, 0, size, *drawn))
    return asked


def decode(engine: Engine, asked: Sequence[Round], of: Callable[[torch.Tensor], Any], every: int = 0) -> Decoded:
    """Decodes rounds outside of CUDA graphs, the next one submitted `every` so many steps (0: all at once), and keeps
    of(z) of every row at every step."""
    batch, waiting, seen = engine.batch, list(asked), dict[tuple[Key, int], Any]()
    made: dict[Key, tuple[Trajectory, list[Any]]] = {}
    own, replay = batch.states, engine.replay

    def states(attend: Callable[[torch.Tensor], Pass], first: bool) -> torch.Tensor:
        z_BD = own(attend, first)
        kept, table = of(z_BD), batch.rows_BF.tolist()
        for slot, row in enumerate(engine.rows):
            if row and not table[slot][ENDED]:
                seen[(row.job.round.prompt_id, row.job.round.iteration, row.sample), table[slot][STEP]] = kept[slot]
        return z_BD

    batch.states, engine.replay = states, None  # type: ignore[method-assign]
    try:
        while waiting or engine.busy:
            for _ in range(min(len(waiting), 1 if every else len(waiting))):
                engine.submit(waiting.pop(0))
            for _ in range(every or 1):
                for round, rollout in engine.step():
                    for t in rollout.trajectories:
                        key = round.prompt_id, round.iteration, t.sample
                        made[key] = t, [seen[key, step] for step in range(1, len(t.token_ids) + 1)]
    finally:
        batch.states, engine.replay = own, replay  # type: ignore[method-assign]
    return made


def digests(z_BD: torch.Tensor) -> list[int]:
    """A number for the bits of each row."""
    bits_BD = z_BD.contiguous().view({2: torch.int16, 4: torch.int32}[z_BD.element_size()]).long()
    odd_D = torch.randint(1 << 62, (z_BD.shape[1],), generator=torch.Generator().manual_seed(0)) | 1
    answer: list[int] = (bits_BD * odd_D.to(z_BD.device)).sum(-1).tolist()
    return answer


def schedule(engine: Engine, asked: Sequence[Round], alone: Decoded) -> Iterator[Check]:
    """Whether bits are those of every round alone: in any company; twice; on two threads or in CUDA graphs."""
    mixed = [*asked[::2][::-1], *asked[1::2]]
    parts = [replace(r, start=a, stop=b) for r in mixed for a, b in ((2, r.stop), (0, min(2, r.stop))) if a < b]
    ways = {"together": (asked, 0), "shuffled and late": (mixed, 3), "in other groups": (parts, 0)}
    answers = {way: decode(engine, order, digests, every) for way, (order, every) in ways.items()}
    yield same("schedule", alone, answers, engine.lm, "a row depends on what is decoded beside it")
    again = {"a second time": decode(engine, asked, digests)}
    yield same("repetition", answers["together"], again, engine.lm, "this hardware gives other bits every time")
    if engine.replay:
        bare: Decoded = {key: (trajectory, []) for key, (trajectory, _) in alone.items()}
        runs = {way: _unwatched(engine, asked) for way in ("recorded", "replayed")}
        yield same("CUDA graphs", bare, runs, engine.lm, "a graph does not do what its steps do")
    else:
        torch.set_num_threads(2)
        threaded = decode(engine, asked[1:3], digests)
        torch.set_num_threads(1)
        single, meaning = {key: alone[key] for key in threaded}, "runtime.generators.num_cpus must be 1 here"
        yield same("threads", single, {"on two threads": threaded}, engine.lm, meaning)


def _unwatched(engine: Engine, asked: Sequence[Round]) -> Decoded:
    answers = zip(asked, engine.run(asked), strict=True)
    return {(r.prompt_id, r.iteration, t.sample): (t, []) for r, answer in answers for t in answer.trajectories}


def same(name: str, expected: Decoded, answers: Mapping[str, Decoded], lm: LM, meaning: str) -> Check:
    """Whether every answer has the bits of the expected one: tokens, costs and, where they were kept, states."""
    states = sum(len(kept) for _, kept in expected.values())
    size = f"{len(expected)} trajectories" + f" ({states} states)" * bool(states)
    for way, decoded in answers.items():
        if different := [key for key in expected if expected[key] != decoded[key]]:
            (one, was), (other, now) = expected[different[0]], decoded[different[0]]
            pairs = list(zip(was or one.token_ids, now or other.token_ids, strict=False))
            step = next((i for i, (a, b) in enumerate(pairs, 1) if a != b), len(pairs))
            at = "prompt {!r}, iteration {}, sample {}".format(*different[0])
            figure = f"{len(different)} of {size} differ {way}, first {at}, step {step}"
            decoder: Any = lm.decoder
            if has_experts(decoder.config.to_dict()):
                return Check(name, "note", figure, "Mixtures of experts are outside the promise of equal rows")
            return Check(name, "FAILED", figure, f"The same run would not give the same rows: {meaning}. Report this")
    return Check(name, "ok", f"{size}: the same bits {', '.join(answers)}")
