"""Tune every arm on the tuning prompts, run it on the report prompts, and write the tables; without Ray.

    AISP_TEST_DATA=... python -m tests.bench.real_model --model DIRECTORY --out outputs/real_model

What is left to do and about how long it takes is printed first (--estimate: and nothing else). The search is that of
`aisp_dist.relabel`. A prompt is searched by all arms before the next one is begun, so a run that is interrupted has
whole prompts. Each finished search is a line of OUT/STAGE/TASK/ARM/SEED.jsonl and is not repeated, so the same command
resumes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from aisp_dist.align import align_input, tokens_of
from aisp_dist.config import Run, load
from aisp_dist.data import prompts
from aisp_dist.local import LocalBackend
from aisp_dist.methods.limit import diversity
from aisp_dist.records import Candidate, Done, Input, Prompt, Score
from tests.bench.real_model import noisy, rewards, table, tasks

HERE = Path(__file__).parent
STAGES = ("tune", "report", "sensitivity")


@dataclass(frozen=True)
class Job:
    """One arm with one setting and one seed on the prompts of one stage."""

    stage: str
    task: str
    place: str  # of the arm, and in tuning of the setting
    method: dict[str, Any]
    seed: int
    rows: list[tasks.Line]
    tokens: int  # of the longest answer

    def file(self, out: Path) -> Path:
        return out / self.stage / self.task / self.place / f"{self.seed}.jsonl"

    def left(self, out: Path) -> list[tasks.Line]:
        """The prompts without a line yet. Raises ValueError for lines of another method or length."""
        found, mine = table.read(self.file(out)), (self.method, self.tokens)
        other = [of for r in found if (of := (r["method"], r["longest"])) != mine]
        if other:
            raise ValueError(f"{self.file(out)} has {other[0]}, not {mine}; give another --out")
        done = {record["id"] for record in found}
        return [row for row in self.rows if row["id"] not in done]


def main(args: Sequence[str]) -> None:
    options = parser().parse_args(args)
    out, backend = options.out, None
    stages = options.stage or ["tune", "report"]
    try:
        for task in [] if options.table else options.task or list(tasks.SPLITS):
            parts = tasks.split(task, tasks.lines(task, options.data))
            tuning, asked = parts["tune"][: options.tuning_prompts], parts["report"][: options.prompts]
            tried, other = trials(options, task, tuning), _sensitivity(options, task, tuning)
            flat = [job for of in tried.values() for job in of]
            _estimate(options, task, {"tune": flat, "sensitivity": other}, stages, len(asked))
            if options.estimate:
                continue
            if "tune" in stages:
                backend = work(options, flat, backend)
                place = out / "tune" / task / "chosen.json"
                known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
                write(place, known | chosen(out, tried))
            if "report" in stages:
                backend = work(options, jobs(options, "report", task, asked, chosen(out, tried)), backend)
            if "sensitivity" in stages:
                backend = work(options, other, backend)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        sys.exit(130)
    finally:
        if backend is not None:
            backend.close()
    if not options.estimate:
        for stage, samples in (("report", options.samples), ("sensitivity", options.tuning_samples)):
            if stage in stages and (found := table.tables(out, samples, stage, names(options))):
                write(out / f"{stage}.json", found)
                print(table.markdown(found))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.bench.real_model", description=__doc__.splitlines()[0])
    made.add_argument("--model", required=True, help="directory, hub id or package:file.gguf of the base model")
    made.add_argument("--out", type=Path, required=True, help="directory of the results")
    data = os.environ.get("AISP_TEST_DATA")
    made.add_argument("--data", type=Path, default=Path(data or ".", "data"), help="directory with the prompts")
    made.add_argument("--task", action="append", choices=list(tasks.SPLITS), help="only this; may be repeated")
    made.add_argument("--stage", action="append", choices=STAGES, help="only this; may be repeated (tune, report)")
    known = [*tasks.ARMS, *tasks.FIXED]
    made.add_argument("--arms", action="append", choices=known, help="only this; may be repeated")
    controlled = list(tasks.CONTROLS.values())
    made.add_argument("--control", action="append", choices=controlled, help="only this arm's; may be repeated")
    made.add_argument("--no-controls", action="store_true", help="without the arms with shuffled rewards")
    made.add_argument("--prompts", type=int, default=48, help="report prompts, at most 48")
    made.add_argument("--seeds", type=int, default=1, help="seeds of the report")
    made.add_argument("--samples", type=int, default=64, help="samples of a prompt")
    made.add_argument("--tokens", type=int, default=96, help="longest answer, in tokens")
    made.add_argument("--tuning-prompts", type=int, default=16, help="tuning prompts, at most 30")
    made.add_argument("--tuning-samples", type=int, default=32, help="samples of a tuning prompt")
    made.add_argument("--settings", type=int, default=4, help="settings that are tried of each arm: its first")
    made.add_argument("--dtype", default="auto", help="of the base model, as generator.dtype")
    made.add_argument("--together", type=int, default=1, help="searches in flight; seconds are measured with 1 alone")
    made.add_argument("--speed", type=float, default=200.0, help="tokens a second that the estimate reckons with")
    made.add_argument("--estimate", action="store_true", help="say what is left to do, and end")
    made.add_argument("--table", action="store_true", help="write the tables of the results that exist, and end")
    return made


def names(options: argparse.Namespace) -> list[str]:
    """The arms of the report: what was asked for, or all that are tuned; and their controls."""
    arms = [name for name in (*tasks.ARMS, *tasks.FIXED) if name in (options.arms or tasks.ARMS)]
    controlled = [] if options.no_controls else options.control or arms
    return arms + [control for control, of in tasks.CONTROLS.items() if of in arms and of in controlled]


def trials(options: argparse.Namespace, task: str, rows: list[tasks.Line]) -> dict[str, list[Job]]:
    """The tuning of each arm that is tuned."""
    return {
        name: [
            Job("tune", task, f"{name}/{i}", arm.method(point, options.tuning_samples), 0, rows, options.tokens)
            for i, point in enumerate(arm.points[: options.settings])
        ]
        for name, arm in tasks.ARMS.items()
        if name in names(options)
    }


def chosen(out: Path, trials: dict[str, list[Job]]) -> dict[str, int]:
    return {name: table.best_trial([job.file(out) for job in of]) for name, of in trials.items()}


def jobs(
    options: argparse.Namespace, stage: str, task: str, rows: list[tasks.Line], settings: dict[str, int]
) -> list[Job]:
    """The arms with the settings that tuning has chosen."""
    arms, found = tasks.ARMS | tasks.FIXED, []
    for name in names(options):
        arm = arms[of := tasks.CONTROLS.get(name, name)]
        method = arm.method(arm.points[settings.get(of, 0)], options.samples)
        method |= {"shuffle_rewards": True} if of != name else {}
        found += [Job(stage, task, name, method, seed, rows, options.tokens) for seed in range(options.seeds)]
    return found


def _sensitivity(options: argparse.Namespace, task: str, rows: list[tasks.Line]) -> list[Job]:
    found = {name: arm.method(arm.points[0], options.tuning_samples) for name, arm in tasks.SENSITIVITY.items()}
    return [Job("sensitivity", task, name, method, 0, rows, options.tokens) for name, method in found.items()]


def _estimate(
    options: argparse.Namespace, task: str, tuning: dict[str, list[Job]], stages: Sequence[str], prompts: int
) -> None:
    """Every answer is reckoned at its greatest length, and what continues another answer as a whole one."""
    for stage in (stage for stage in STAGES if stage in stages):
        if stage == "report":  # its settings may not be known yet
            done = sum(table.finished(options.out, task, name) for name in names(options))
            samples = max(0, len(names(options)) * options.seeds * prompts - done) * options.samples
        else:
            samples = sum(len(job.left(options.out)) for job in tuning[stage]) * options.tuning_samples
        print(f"{task}, {stage}: at most {spending(options, samples)}", flush=True)


def spending(options: argparse.Namespace, samples: int) -> str:
    tokens = samples * options.tokens
    return f"{samples:,} samples, {tokens:,} tokens, {tokens / options.speed / 3600:.1f} h"


def work(options: argparse.Namespace, jobs: Sequence[Job], backend: LocalBackend | None) -> LocalBackend | None:
    """Do what is left of the jobs, all of them on a prompt before the next prompt. The model is loaded once."""
    left = {(row["id"], place) for place, job in enumerate(jobs) for row in job.left(options.out)}
    if not left:
        return backend
    first = jobs[0]
    source = options.out / "prompts" / f"{first.stage}-{first.task}.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in first.rows), encoding="utf-8")
    values = tasks.run_values(first.task, source, options.model, options.tokens, options.dtype)
    runs = [_settings(values, job) for job in jobs]
    if backend is None:
        backend = LocalBackend(load.check(values | {"method": first.method} | tasks.all_rewards()), HERE)
    queue = []
    for turn, (line, row) in enumerate(zip(prompts.read(runs[0].prompts), first.rows, strict=True)):
        for place in (*range(turn % len(jobs), len(jobs)), *range(turn % len(jobs))):  # no arm is always the first
            if (row["id"], place) in left:
                queue.append((jobs[place], runs[place], line, row))
    try:
        asyncio.run(_search_all(queue, backend, options))
    except BaseException:  # Ctrl-C too: an engine that is still at work would crash the interpreter as it ends
        backend.close()
        raise
    return backend


def _settings(values: dict[str, Any], job: Job) -> Run:
    """The configuration of a job. noise_rate is not a key of one."""
    method = {key: value for key, value in job.method.items() if key != "noise_rate"}
    run = load.check(values | {"method": method, "seed": job.seed})
    return run if method == job.method else run.model_copy(update={"method": noisy.Noisy(**job.method)})


class Timed:
    """A backend for one search, which notes when each call for scores was answered."""

    def __init__(self, backend: LocalBackend, longest: int) -> None:
        self.backend, self.scored = backend, list[float]()
        self.rollout = partial(noisy.rollout, backend, longest)
        self.nll, self.calibrate = backend.nll, backend.calibrate

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        found = await self.backend.score(reward, prompt, responses)
        self.scored.append(time.perf_counter())
        return found


async def _search_all(
    work: Sequence[tuple[Job, Run, Input, tasks.Line]], backend: LocalBackend, options: argparse.Namespace
) -> None:
    turn, began, finished, tokens = asyncio.Semaphore(options.together), time.perf_counter(), 0, 0

    async def one(job: Job, run: Run, line: Input, row: tasks.Line) -> None:
        nonlocal finished, tokens
        async with turn:
            timed, start = Timed(backend, job.tokens), time.perf_counter()
            done = await align_input(run, line, backend.tokenizer, backend.context_length, timed)
            if isinstance(done, Done):
                found = await _record(run, done, timed, row, start)
            else:
                found = {"failed": done.reason}
            record = {"id": line.id, "method": job.method, "longest": job.tokens, "together": options.together} | found
            file = job.file(options.out)
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as end:
                end.write(json.dumps(record, ensure_ascii=False) + "\n")
            finished, tokens = finished + 1, tokens + sum(found.get("drawn", ()))
            seconds = time.perf_counter() - began
            said = f"{finished} of {len(work)}: {job.stage}, {job.task}, {job.place}, prompt {line.id}"
            print(f"{said}; {seconds:.0f} s, {tokens:,} tokens", file=sys.stderr, flush=True)

    async with asyncio.TaskGroup() as group:
        for item in work:
            group.create_task(one(*item))


async def _record(run: Run, done: Done, backend: Timed, row: tasks.Line, start: float) -> dict[str, Any]:
    """What the tables need of a prompt: of every sample its reward, its tokens and when it was scored; all measures of
    each sample that was the best so far, and of the base answer."""
    tokens = tokens_of(run, done.prompt, backend.backend.tokenizer, backend.backend.context_length)
    ends = backend.scored[len(run.rewards) - 1 :: len(run.rewards)]  # of each iteration

    async def measured(answer: Candidate) -> dict[str, Any]:
        (nll,) = await backend.nll(row["id"], tokens, [answer.token_ids])
        parts = dict(answer.rewards)
        found = {"reward": answer.reward, "nll": nll, "diversity": diversity(answer.text), **parts}
        found |= {"tokens": len(answer.token_ids), "words": len(answer.text.split())}
        found |= {"copied": rewards.copied(answer.text, row["prompt"])}
        if "checks" in row:
            found["strict"] = float(parts["followed"] == 1)
        else:
            found["lexicon"] = rewards.lexicon(answer.text)
        return found | {"text": answer.text}

    best, highest = [], float("-inf")
    for at, one in enumerate(done.candidates):
        if one.eligible_reward is not None and one.eligible_reward > highest:
            highest = one.eligible_reward
            best.append({"at": at} | await measured(one))
    given = [length for step in done.trace for length in step.given or [0] * len(step.lengths)]
    some = done.candidates[int.from_bytes(blake2b(done.prompt.id.encode()).digest()) % len(done.candidates)]
    return {
        "some": {"reward": some.reward, "text": some.text},  # one of them at random
        "rewards": [c.reward for c in done.candidates],
        "drawn": [len(c.token_ids) - n for c, n in zip(done.candidates, given, strict=True)],
        "seconds": [ends[c.iteration] - start for c in done.candidates],
        "best": best,
        "base": await measured(done.base),
    }


def write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
