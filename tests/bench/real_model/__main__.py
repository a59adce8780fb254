"""Tune every arm on the tuning prompts, run it on the report prompts, and write the tables; without Ray.

    AISP_TEST_DATA=... python -m tests.bench.real_model --model DIRECTORY --out outputs/real_model

What is left to do and about how long it takes is printed first (--estimate: and nothing else). The search is that of
`aisp_dist.relabel`, prompt by prompt. Each finished prompt is a line of OUT/STAGE/TASK/ARM/SEED.jsonl and is not
searched again, so the same command resumes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_dist.align import align_input, tokens_of
from aisp_dist.config import Run, load
from aisp_dist.data import prompts
from aisp_dist.local import LocalBackend
from aisp_dist.methods.limit import diversity
from aisp_dist.records import Candidate, Done, Prompt, Score
from tests.bench.real_model import rewards, table, tasks

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """One arm with one setting and one seed on the prompts of one stage."""

    stage: str
    task: str
    place: str  # of the arm, and in tuning of the setting
    method: dict[str, Any]
    seed: int
    rows: list[tasks.Line]

    def file(self, out: Path) -> Path:
        return out / self.stage / self.task / self.place / f"{self.seed}.jsonl"

    def left(self, out: Path) -> list[tasks.Line]:
        """The prompts without a line yet. Raises ValueError for lines of another method."""
        found = table.read(self.file(out))
        other = [r for r in found if r["method"] != self.method]
        if other:
            raise ValueError(f"{self.file(out)} has {other[0]['method']}, not {self.method}; give another --out")
        done = {record["id"] for record in found}
        return [row for row in self.rows if row["id"] not in done]


def main(args: Sequence[str]) -> None:
    options = _parser().parse_args(args)
    out = options.out
    for task in options.task or list(tasks.SPLITS):
        parts = tasks.split(task, tasks.lines(task, options.data))
        tuning, report = parts["tune"][: options.tuning_prompts], parts["report"][: options.prompts]
        arms = {name: arm for name, arm in tasks.ARMS.items() if not options.arms or name in options.arms}
        controls = {c: of for c, of in tasks.CONTROLS.items() if of in arms and not options.no_controls}
        trials = {
            name: [
                Job("tune", task, f"{name}/{i}", arm.method(point, options.tuning_samples), 0, tuning)
                for i, point in enumerate(arm.points)
            ]
            for name, arm in arms.items()
        }
        _estimate(options, task, [job for of in trials.values() for job in of], (len(arms) + len(controls), report))
        if options.estimate or options.table:
            continue
        backend = None
        for name in arms:
            backend = _work(options, trials[name], backend)
        chosen = {name: table.best_trial([job.file(out) for job in of]) for name, of in trials.items()}
        _write(out / "tune" / task / "chosen.json", chosen)
        methods = {name: arm.method(arm.points[chosen[name]], options.samples) for name, arm in arms.items()}
        methods |= {control: methods[of] | {"shuffle_rewards": True} for control, of in controls.items()}
        for seed in range(options.seeds):
            backend = _work(
                options, [Job("report", task, name, m, seed, report) for name, m in methods.items()], backend
            )
        if backend is not None:
            backend.close()
    if not options.estimate:
        found = table.tables(out, options.samples)
        _write(out / "table.json", found)
        print(table.markdown(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real_model", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory, hub id or package:file.gguf of the base model")
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    data = os.environ.get("AISP_TEST_DATA")
    parser.add_argument("--data", type=Path, default=Path(data or ".", "data"), help="directory with the prompts")
    parser.add_argument("--task", action="append", choices=list(tasks.SPLITS), help="only this; may be repeated")
    parser.add_argument("--arms", action="append", choices=list(tasks.ARMS), help="only this; may be repeated")
    parser.add_argument("--no-controls", action="store_true", help="without the arms with shuffled rewards")
    parser.add_argument("--prompts", type=int, default=48, help="report prompts, at most 48")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the report")
    parser.add_argument("--samples", type=int, default=64, help="samples of a prompt")
    parser.add_argument("--tokens", type=int, default=96, help="longest answer, in tokens")
    parser.add_argument("--tuning-prompts", type=int, default=16, help="tuning prompts, at most 30")
    parser.add_argument("--tuning-samples", type=int, default=32, help="samples of a tuning prompt")
    parser.add_argument("--dtype", default="auto", help="of the base model, as generator.dtype")
    parser.add_argument("--together", type=int, default=1, help="prompts in flight; seconds are measured with 1 alone")
    parser.add_argument("--speed", type=float, default=200.0, help="tokens a second that the estimate reckons with")
    parser.add_argument("--estimate", action="store_true", help="say what is left to do, and end")
    parser.add_argument("--table", action="store_true", help="write the tables of the results that exist, and end")
    return parser


def _estimate(options: argparse.Namespace, task: str, trials: list[Job], report: tuple[int, list[Any]]) -> None:
    """Every answer is reckoned at its greatest length, and what continues another answer as a whole one."""
    arms, rows = report
    left = {
        "tuning": sum(len(job.left(options.out)) for job in trials) * options.tuning_samples,
        "report": (arms * options.seeds * len(rows) - table.finished(options.out, task)) * options.samples,
    }
    for stage, samples in left.items():
        hours = samples * options.tokens / options.speed / 3600
        print(f"{task}, {stage}: at most {samples:,} samples, {samples * options.tokens:,} tokens, {hours:.1f} h")
    sys.stdout.flush()


def _work(options: argparse.Namespace, jobs: list[Job], backend: Timed | None) -> Timed | None:
    """Run what is left of the jobs, with one backend for all of a task."""
    for job in jobs:
        if not (rows := job.left(options.out)):
            continue
        source = options.out / "prompts" / f"{job.stage}-{job.task}-{job.place.replace('/', '-')}.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values = tasks.run_values(job.task, source, options.model, options.tokens, options.dtype)
        run = load.check(values | {"method": job.method, "seed": job.seed})
        backend = backend or Timed(run, HERE)
        start = time.perf_counter()
        asyncio.run(_search(job, run, backend, options))
        print(f"{job.file(options.out)}: {len(rows)} prompts in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return backend


class Timed(LocalBackend):
    """Notes when each call for scores of a prompt was answered."""

    def __init__(self, run: Run, base_dir: Path) -> None:
        super().__init__(run, base_dir)
        self.scored: dict[str, list[float]] = defaultdict(list)

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        found = await super().score(reward, prompt, responses)
        self.scored[prompt.id].append(time.perf_counter())
        return found


async def _search(job: Job, run: Run, backend: Timed, options: argparse.Namespace) -> None:
    turn, of = asyncio.Semaphore(options.together), {row["id"]: row for row in job.rows}
    file = job.file(options.out)
    file.parent.mkdir(parents=True, exist_ok=True)

    async def one(line: Any) -> None:
        async with turn:
            backend.scored.pop(line.id, None)
            start = time.perf_counter()
            done = await align_input(run, line, backend.tokenizer, backend.context_length, backend)
            if isinstance(done, Done):
                found = await _record(run, done, backend, of[line.id], start)
            else:
                found = {"failed": done.reason}
            record = {"id": line.id, "method": job.method, "together": options.together} | found
            with file.open("a", encoding="utf-8") as end:
                end.write(json.dumps(record, ensure_ascii=False) + "\n")

    async with asyncio.TaskGroup() as group:
        for line in prompts.read(run.prompts):
            group.create_task(one(line))


async def _record(run: Run, done: Done, backend: Timed, row: tasks.Line, start: float) -> dict[str, Any]:
    """What the tables need of a prompt: of every sample its reward, its tokens and when it was scored; all measures of
    each sample that was the best so far, and of the base answer."""
    tokens = tokens_of(run, done.prompt, backend.tokenizer, backend.context_length)
    ends = backend.scored[row["id"]][len(run.rewards) - 1 :: len(run.rewards)]  # of each iteration

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
    return {
        "rewards": [c.reward for c in done.candidates],
        "drawn": [len(c.token_ids) - n for c, n in zip(done.candidates, given, strict=True)],
        "seconds": [ends[c.iteration] - start for c in done.candidates],
        "best": best,
        "base": await measured(done.base),
    }


def _write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
