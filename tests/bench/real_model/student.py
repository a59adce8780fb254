"""What students learn from the answers that were found, measured where no answer was searched.

    AISP_TEST_DATA=... python -m tests.bench.real_model.student --model DIRECTORY --out outputs/real_model \\
        --arms best-of-n --arms population

After the tuning of `python -m tests.bench.real_model` with the same --out, whose settings it takes:

    the arms answer the student prompts -> LoRA-SFT by TRL, for each training seed -> greedy answers to the test prompts

A student of each arm's answers stands beside one of the model's own greedy answers and one of samples that were picked
at random from best-of-n's. Whatever is finished is not done again. Needs the extra `distill`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aisp_dist.config import Generator, load
from aisp_dist.data import prompts
from aisp_dist.engine import pretrained
from tests.bench.distill import measure
from tests.bench.real_model import __main__ as protocol
from tests.bench.real_model import rewards, table, tasks

TASK, OWN = "ifeval", "its greedy answers"
HOW = {"lr": 5e-4, "epochs": 3.0, "rank": 16}


def main(args: Sequence[str]) -> None:
    options = _parser().parse_args(args)
    jobs = _jobs(options)
    tests = tasks.split(TASK, tasks.lines(TASK, options.data))["student-test"][: options.tests]
    _estimate(options, jobs, len(tests))
    if options.estimate:
        return
    options.model = _dequantised(options)
    backend = protocol.work(options, jobs, None)
    if backend is not None:
        backend.close()
    found = {"not trained": [_measured(options, "not trained", None, tests)]}
    for kind, rows in _lessons(options.out, jobs).items():
        found[kind] = []
        for seed in range(options.training_seeds):
            name = f"{kind}-seed{seed}"
            folder = options.out / "students" / name
            if not (folder / "adapter_model.safetensors").exists():
                _train(options.model, rows, folder, seed)
            found[kind].append(_measured(options, name, str(folder), tests))
    rows = measure.table(found, OWN, "strict")
    protocol.write(options.out / "students.json", {"tests": len(tests), "lessons": len(jobs[0].rows), "rows": rows})
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())
        print(f"| {' | '.join(cells)} |")


def _parser() -> argparse.ArgumentParser:
    made = protocol.parser()
    made.prog += ".student"
    made.add_argument("--training-seeds", type=int, default=3, help="students of each kind")
    made.add_argument("--tests", type=int, default=100, help="test prompts, at most 100")
    made.set_defaults(prompts=128, samples=32, no_controls=True, seeds=1)
    return made


def _jobs(options: argparse.Namespace) -> list[protocol.Job]:
    asked = tasks.split(TASK, tasks.lines(TASK, options.data))["student"][: options.prompts]
    tuned = protocol.chosen(options.out, protocol.trials(options, TASK, []))
    return protocol.jobs(options, "student", TASK, asked, tuned)


def _estimate(options: argparse.Namespace, jobs: list[protocol.Job], tests: int) -> None:
    samples = sum(len(job.left(options.out)) for job in jobs) * options.samples
    print(f"relabelling: at most {protocol.spending(options, samples)}")
    students = (2 + len(jobs)) * options.training_seeds
    read = int(students * HOW["epochs"] * len(jobs[0].rows) * options.tokens)
    print(f"{students} students: {read:,} tokens of answers to train on, forward and backward, and their prompts")
    print(f"test: at most {protocol.spending(options, (1 + students) * tests)}", flush=True)


def _dequantised(options: argparse.Namespace) -> str:
    """The base model as a directory where it is a GGUF file, which each student would wait for again."""
    if not options.model.endswith(".gguf"):
        return str(options.model)
    folder = options.out / "base"
    if not folder.exists():
        settings, half = Generator(model=options.model, dtype=options.dtype), options.out / "base.part"
        pretrained.weights(settings, torch.device("cpu")).save_pretrained(half)
        pretrained.tokenizer(settings).save_pretrained(half)
        half.rename(folder)
    return str(folder)


def _lessons(out: Path, jobs: Iterable[protocol.Job]) -> dict[str, list[dict[str, Any]]]:
    """Prompt and answer, by kind of student; on the prompts that all arms have answered."""
    found = {job.place: {r["id"]: r for r in table.read(job.file(out)) if "failed" not in r} for job in jobs}
    shared = set.intersection(*(set(of) for of in found.values()))
    asked = {row["id"]: row["prompt"] for job in jobs for row in job.rows if row["id"] in shared}
    own = found[tasks.BEST]
    said = {
        OWN: {one: own[one]["base"] for one in asked},
        "samples at random": {one: own[one]["some"] for one in asked},
    }
    said |= {arm: {one: of[one]["best"][-1] for one in asked} for arm, of in found.items()}
    return {
        kind: [
            {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": answers[one]["text"]}],
            }
            for one, text in asked.items()
        ]
        for kind, answers in said.items()
    }


def _train(model: str, rows: list[dict[str, Any]], folder: Path, seed: int) -> None:
    from datasets import Dataset

    from tests.bench.distill import students  # loads TRL

    students.sft(model, Dataset.from_list(rows), folder, seed=seed, **HOW)


def _measured(
    options: argparse.Namespace, name: str, adapter: str | None, tests: Sequence[tasks.Line]
) -> measure.Columns:
    """The measures of a student's greedy answers, which are kept beside it."""
    place = options.out / "students" / f"{name}.jsonl"
    if not place.exists():
        source = options.out / "prompts" / "student-test.jsonl"
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("".join(json.dumps(row) + "\n" for row in tests), encoding="utf-8")
        values = tasks.run_values(TASK, source, options.model, options.tokens, options.dtype)
        run = load.check(values | {"method": {"kind": "best_of_n"}})  # of which nothing is used: answers are greedy
        student = Generator(model=options.model, adapter=adapter, dtype=options.dtype)
        texts = [text for *_, text in measure.answers(run, student, list(prompts.read(run.prompts)))]
        lines = [json.dumps({"id": row["id"], "text": text}) for row, text in zip(tests, texts, strict=True)]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = {line["id"]: line["text"] for line in map(json.loads, place.read_text(encoding="utf-8").splitlines())}
    shares = np.array([rewards.share(texts[row["id"]], json.loads(row["checks"])) for row in tests])
    copied = np.array([rewards.copied(texts[row["id"]], row["prompt"]) for row in tests])
    words = np.array([float(len(texts[row["id"]].split())) for row in tests])
    return {"strict": (shares == 1).astype(float), "followed": shares, "copied": copied, "words": words}


if __name__ == "__main__":
    main(sys.argv[1:])
