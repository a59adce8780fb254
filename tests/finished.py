"""Small finished outputs, searched for real in this process: a tiny model, a function reward, no Ray."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny

from aisp_dist.align import align_input
from aisp_dist.config import load
from aisp_dist.data import prompts
from aisp_dist.local import LocalBackend
from aisp_dist.output import manifest
from aisp_dist.output.lease import Lease
from jobs import prepare, settings

REWARDS = """
def texts(completions):
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]
def vowels(completions, **_):
    return [sum(letter in "aeiou" for letter in text) - len(text) / 9 for text in texts(completions)]
def words(completions, **_):
    return [float(len(text.split())) for text in texts(completions)]
"""
AISP = {"kind": "aisp", "num_samples": 4, "num_iterations": 3, "sigma2": 0.3, "lambda": {"ess": 0.1}}
BEST_OF_N = {"kind": "best_of_n", "num_samples": 4, "num_iterations": 3, "sampling": {"gaussian": 0.3}}


def project(folder: Path, count: int = 6) -> Path:
    """A folder with a model, prompts and rewards."""
    folder.mkdir(exist_ok=True)
    tiny.save("llama", folder / "model")
    lines = [{"name": f"p{i}", "prompt": f"Say {'so ' * (i % 3)}{i}", "note": {"n": i}} for i in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def output(folder: Path, name: str, method: dict[str, Any] = AISP, seed: int = 0, **changes: Any) -> Path:
    """A finished output of a project. changes: sections of the configuration."""
    values = {
        "output": str(folder / name),
        "seed": seed,
        "prompts": {"source": str(folder / "prompts.jsonl"), "id_column": "name", "keep": ["note"]},
        "generator": {"model": str(folder / "model"), "max_new_tokens": 12, "batch_rows": 32},
        "rewards": {
            "main": {"kind": "function", "function": "rewards.py:vowels"},
            "words": {"kind": "function", "function": "rewards.py:words", "use": "report"},
        },
        "method": method,
        "save": {"candidates": "all", "rows_per_file": 4},
    }
    prepared = prepare.prepare(load.check(settings.merge(values, changes)), folder)
    manifest.write_run(prepared.output, prepared.record())
    run, lease = prepared.located, Lease.take(prepared.output)
    store = replace(prepared.table(), lease=lease).store()
    backend = LocalBackend(run, folder, "cpu")
    for line in store.plan(prompts.read(run.prompts)):
        store.add(asyncio.run(align_input(run, line, backend.tokenizer, backend.context_length, backend)))
    backend.close()
    store.finish()
    lease.release()
    return folder / name
