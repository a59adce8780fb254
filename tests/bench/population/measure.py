"""The protocol on one machine, without a cluster: the search (`align`), engine and rewards of a run, with several
processes and several prompts at a time in each.

    python -m tests.bench.population.measure tests/bench/population/auto.yaml --workers 2

Every (case, arm, seed) is a file under the output, and is not computed again if it exists. The result is `table.json`.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aisp_dist.align import align_input, tokens_of
from aisp_dist.analysis.metrics import diversity, interval
from aisp_dist.config import Run, load
from aisp_dist.data import prompts
from aisp_dist.local import LocalBackend
from aisp_dist.records import Done, Input, Prompt, Score
from jobs import settings

BUDGETS = (8, 16, 32, 64, 128, 256, 512)
TUNING = {"skip": 0, "limit": 48}
TRIAL = {"num_samples": 16, "num_iterations": 8}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "best-of-n top-p": [
        {"sampling": {"top_p": p, "temperature": t}} for p, t in ((0.8, 1.0), (0.9, 1.0), (0.95, 1.0), (0.9, 0.8))
    ],
    "aisp": [{"sigma2": sigma2, "lambda": {"ess": 0.1}} for sigma2 in (0.1, 0.3, 0.5, 1.0)],
}
MAIN, SHUFFLED = "population", "population, rewards shuffled"
IN_FLIGHT = 40  # prompts


@dataclass(frozen=True)
class Job:
    """One method on the prompts of one case, with one seed. values: the case's configuration."""

    file: Path
    base_dir: Path
    values: dict[str, Any]


def main(args: Sequence[str]) -> None:
    parse = settings.parser("measure", "the protocol of tests/bench/population")
    parse.add_argument("--workers", type=int, default=2, help="processes")
    parse.add_argument("--case", action="append", help="only this case; may be repeated")
    parse.add_argument(
        "--table", action="store_true", help="compute nothing; write the table of the results that exist"
    )
    options, run, base_dir = settings.read(parse, args)
    cases = {n: c for n, c in settings.cases(run).items() if not options.case or n in options.case}
    out = Path(run.output)

    def job(place: str, case: Run, method: dict[str, Any], seed: int, **changes: Any) -> Job:
        values = case.model_dump(mode="json", by_alias=True)
        values = values | {"seed": seed, "method": method, "prompts": values["prompts"] | changes}
        return Job(out / place / f"{seed}.json", base_dir, values)

    trials = {
        (name, arm): [
            job(f"tune/{name}/{arm}-{i}", case, _method(case, arm) | point | TRIAL, 0, **TUNING)
            for i, point in enumerate(points)
        ]
        for name, case in cases.items()
        for arm, points in GRIDS.items()
    }
    draw = (lambda jobs, workers: None) if options.table else work
    draw([one for jobs in trials.values() for one in jobs], options.workers)
    results: dict[tuple[str, str], list[Job]] = {}
    for name, case in cases.items():
        own = case.method.model_dump(mode="json", by_alias=True)
        found = {MAIN: own, SHUFFLED: own | {"shuffle_rewards": True}}
        for arm, points in GRIDS.items():
            best = max(range(len(points)), key=lambda i: _mean(read(trials[name, arm][i].file), TRIAL, "reward"))
            found[arm] = _method(case, arm) | points[best]
        for arm, method in found.items():
            seeds = range(case.compare.seeds)
            results[name, arm] = [job(f"result/{name}/{arm}", case, method, seed) for seed in seeds]
    first = (MAIN, "best-of-n top-p")
    turns = [
        (seed > 0, arm not in first, seed, job) for (_, arm), jobs in results.items() for seed, job in enumerate(jobs)
    ]
    draw([job for *_, job in sorted(turns, key=lambda turn: turn[:3])], options.workers)
    write(out / "table.json", [row for key, jobs in results.items() for row in rows(*key, jobs, results)])


def _method(case: Run, arm: str) -> dict[str, Any]:
    method = case.compare.arms[arm]
    assert method is not None
    return method.model_dump(mode="json", by_alias=True)


def work(jobs: Iterable[Job], workers: int) -> None:
    """Run the jobs that have no file yet."""
    left = [job for job in jobs if not job.file.exists()]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for done, job in enumerate(pool.imap_unordered(search, left), 1):
            print(f"{done} of {len(left)}: {job}", file=sys.stderr, flush=True)


def search(job: Job) -> str:
    """Run a job: write its prompts' best answers at every budget to its file. Returns the file's name."""
    import torch

    torch.set_num_threads(1)
    run = load.check(job.values)
    return asyncio.run(_search(job, run, Remembering(run, job.base_dir, "cpu")))


async def _search(job: Job, run: Run, backend: Remembering) -> str:
    (held_out,) = (name for name, reward in run.rewards.items() if reward.use == "report")
    turn = asyncio.Semaphore(IN_FLIGHT)

    async def best(done: Done, budget: int) -> dict[str, Any]:
        seen = [c for c in done.candidates[:budget] if c.eligible_reward is not None]
        one = max(seen, key=lambda c: c.eligible_reward or 0.0)  # the first of equals
        tokens = tokens_of(run, done.prompt, backend.tokenizer, None)
        (other,) = await LocalBackend.score(backend, held_out, done.prompt, [one.text])  # alone: bits are of a batch
        (loss,) = await backend.nll(done.prompt.id, tokens, [one.token_ids])
        given = [length for step in done.trace for length in step.given or [0] * len(step.lengths)]
        drawn = sum(len(c.token_ids) - g for c, g in zip(done.candidates[:budget], given, strict=False))
        shown = {"text": one.text, "nll": loss, "diversity": diversity(one.text), "held-out": other.value}
        return shown | {"reward": one.reward, "tokens": sum(len(c.token_ids) for c in seen), "drawn": drawn}

    async def one(line: Input) -> dict[str, Any]:
        async with turn:
            done = await align_input(run, line, backend.tokenizer, None, backend)
            if not isinstance(done, Done):
                raise RuntimeError(f"prompt {line.id}: {done.reason}")
            sizes = [budget for budget in BUDGETS if budget <= done.samples_spent]
            base = {"reward": done.base.reward, "nll": done.base_nll, "text": done.base.text}
            return {"id": line.id, "base": base} | {str(budget): await best(done, budget) for budget in sizes}

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(line)) for line in prompts.read(run.prompts)]
    write(job.file, {"method": job.values["method"], "prompts": [task.result() for task in tasks]})
    backend.close()
    return str(job.file)


class Remembering(LocalBackend):
    """Scores a text of a prompt once."""

    def __init__(self, run: Run, base_dir: Path, device: str) -> None:
        super().__init__(run, base_dir, device)
        self.known: dict[tuple[str, str, str], Score] = {}

    async def score(self, reward: str, prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        new = [text for text in dict.fromkeys(responses) if (reward, prompt.id, text) not in self.known]
        scores = await super().score(reward, prompt, new) if new else []
        self.known |= {(reward, prompt.id, text): found for text, found in zip(new, scores, strict=True)}
        return [self.known[reward, prompt.id, text] for text in responses]


def rows(
    case: str, arm: str, jobs: Sequence[Job], results: dict[tuple[str, str], list[Job]]
) -> Iterable[dict[str, Any]]:
    """One row for each budget: means with intervals over prompts (a prompt's value is its mean over seeds), and paired
    differences from tuned best-of-n with 512 samples."""
    jobs, peers = ([job for job in of if job.file.exists()] for of in (jobs, results[case, "best-of-n top-p"]))
    if not jobs or not peers:
        return
    peer = means(peers, max(BUDGETS))
    for budget in BUDGETS:
        own = means(jobs, budget)
        row: dict[str, Any] = {"case": case, "arm": arm, "seeds": len(jobs), "samples": budget}
        row["method"] = jobs[0].values["method"]
        for name, values in own.items():
            row[name] = interval(values)
            row[f"{name}, less best-of-512"] = interval([a - b for a, b in zip(values, peer[name], strict=True)])
        yield row


def means(jobs: Sequence[Job], budget: int) -> dict[str, list[float]]:
    """A value for each prompt, by measure."""
    seeds = [read(job.file)["prompts"] for job in jobs]
    names = ("reward", "nll", "diversity", "held-out", "tokens", "drawn")
    return {n: [sum(p[str(budget)][n] for p in same) / len(same) for same in zip(*seeds, strict=True)] for n in names}


def _mean(found: dict[str, Any], size: dict[str, int], name: str) -> float:
    budget = str(size["num_samples"] * size["num_iterations"])
    return sum(prompt[budget][name] for prompt in found["prompts"]) / len(found["prompts"])


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    main(sys.argv[1:])
