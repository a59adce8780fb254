"""Whole runs with vLLM, as a user starts them: the command line on a Ray cluster, and `relabel` in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from engines import SHAPE
from test_rewards import judge

from aisp_dist.align import tokens_of
from aisp_dist.config import load
from aisp_dist.data import prompts
from aisp_dist.engine import model
from aisp_dist.engine.decode import Engine
from aisp_dist.output import fingerprint
from aisp_dist.records import Round, Weights

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parent.parent.parent
REWARD = """
import time
def words(prompts, completions, **columns):
    time.sleep(0.2)
    return [float(len(set(c[-1]["content"]))) for c in completions]
"""
QUESTIONS = ["How do I train a puppy?", "Is coffee good?", "What is a bicycle for?", "How do I learn Spanish?"] * 6
OWN = {"max_num_seqs": 8, "enforce_eager": True, "kv_cache_memory_bytes": 1 << 26}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tiny.save("llama", tmp_path / "model", **SHAPE)
    judge(tmp_path / "judge")
    (tmp_path / "rewards.py").write_text(REWARD)
    lines = [json.dumps({"prompt": q, "n": i}) + "\n" for i, q in enumerate(QUESTIONS)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes: Any) -> None:
    config = {
        "output": str(folder / "out"),
        "prompts": {"source": str(folder / "prompts.jsonl"), "keep": ["n"], "max_tokens": 100},
        "generator": {
            "model": str(folder / "model"),
            "engine": "vllm",
            "dtype": "float32",
            "max_new_tokens": 12,
            "vllm": OWN,
        },
        "rewards": {
            "words": {"kind": "function", "function": "rewards.py:words"},
            "judge": {"kind": "model", "model": str(folder / "judge"), "engine": "vllm", "dtype": "float32"},
        },
        "method": {"kind": "aisp", "num_samples": 4, "num_iterations": 3, "lambda": {"ess": 0.3}, "sigma2": 0.3},
        "save": {"rows_per_file": 4, "flush_seconds": 0.2, "candidates": "all"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config | changes))


def start(folder: Path) -> subprocess.Popen[bytes]:
    """The command, whose output goes to log.txt."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.align", "run.yaml"]
    with (folder / "log.txt").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)


def ended(folder: Path, command: subprocess.Popen[bytes], code: int = 0) -> str:
    """What it printed."""
    command.wait(timeout=500)
    told = (folder / "log.txt").read_text()
    assert command.returncode == code, told[-3000:]
    return told


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    files = sorted((folder / "out" / "data").glob("part-*.parquet"))
    return {row["source_index"]: row for file in files for row in pq.read_table(file).to_pylist()}


def descendants() -> dict[int, tuple[psutil.Process, str]]:
    """Process and title of all that the tests have started, by process id. By parents alone: psutil's `children` and
    `parent` leave out a process that seems older than its parent, as one does where the clock was set in between."""
    seen: dict[int, tuple[psutil.Process, int, str]] = {}
    for process in psutil.process_iter():
        try:
            seen[process.pid] = process, process.ppid(), " ".join(process.cmdline())
        except psutil.Error:
            continue
    ours = {os.getpid()}
    while more := {pid for pid, (_, parent, _) in seen.items() if parent in ours} - ours:
        ours |= more
    return {pid: (seen[pid][0], seen[pid][2]) for pid in ours - {os.getpid()}}


def processes(name: str) -> list[psutil.Process]:
    """Those of the tests' own runs with this in their title."""
    return [process for process, title in descendants().values() if name in title]


def cores(role: str) -> list[psutil.Process]:
    """Engines of actors of a class."""
    found = descendants()
    engines = [process for process, title in found.values() if "EngineCore" in title]
    return [core for core in engines if f"ray::{role}" in found.get(core.ppid(), (core, ""))[1]]


def more_rows(folder: Path, command: subprocess.Popen[bytes], before: set[int]) -> psutil.Process:
    """The generator's engine, once it has made new rows. before: engines that are gone."""
    done, deadline = len(rows(folder)), time.monotonic() + 400
    while not (new := [p for p in cores("Generator") if p.pid not in before]) or len(rows(folder)) == done:
        seen = "\n".join(f"{pid} {title[:80]}" for pid, (_, title) in descendants().items())
        told = f"{seen}\n{(folder / 'log.txt').read_text()[-3000:]}"
        assert command.poll() is None and time.monotonic() < deadline, told
        time.sleep(0.05)
    before.add(new[0].pid)
    return new[0]


def check_controls(folder: Path) -> None:
    """Every round of every search is the one that its seed and the trace before it give, as the local engine decodes
    it."""
    run, base_dir = load.read(folder / "run.yaml")
    run = fingerprint.locate(run, base_dir)
    lm = model.load(run.generator.model_copy(update={"engine": "local", "vllm": {}}), "cpu")
    engine = Engine(lm, 32, run.generator.max_new_tokens)
    inputs = {line.source_index: line for line in prompts.read(run.prompts)}
    (sampling, _), samples = run.method.draws(), run.method.num_samples
    asked, found = [], []
    for file in sorted((folder / "out" / "candidates").glob("part-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            prompt = inputs[row["source_index"]]
            tokens = tokens_of(run, prompt, lm.tokenizer, lm.context_length)
            trace = [Weights(tuple(one["weights"]), tuple(one["lengths"])) for one in row["trace"]]
            drawn = [tuple(one["token_ids"]) for one in row["candidates"]]
            for k in range(len(trace)):
                asked.append(Round(run.seed, prompt.id, tokens, k, 0, samples, sampling, tuple(trace[:k])))
                found.append(drawn[k * samples : (k + 1) * samples])
    assert len(asked) == 3 * len(QUESTIONS)
    assert [[t.token_ids for t in rollout.trajectories] for rollout in engine.run(asked)] == found


def test_a_run_survives_the_death_of_driver_engine_and_actor(project: Path) -> None:
    """No row is lost or doubled, no process of vLLM is left behind, and every search goes on with the control of its
    trace. The engine is the generator's; the reward has one too."""
    dead: set[int] = set()
    command = start(project)
    more_rows(project, command, dead)
    deadline = time.monotonic() + 10
    while len(orphans := processes("EngineCore")) < 2 and time.monotonic() < deadline:  # one was once missing
        time.sleep(0.05)
    command.kill()
    command.wait()
    assert not psutil.wait_procs(orphans, timeout=60)[1] and len(orphans) == 2
    assert 0 < len(rows(project)) < len(QUESTIONS), "in the middle"
    command = start(project)
    more_rows(project, command, dead).kill()
    psutil.Process(more_rows(project, command, dead).ppid()).kill()
    out = ended(project, command)
    assert set(rows(project)) == set(range(len(QUESTIONS))), out[-3000:]
    (line,) = [line for line in out.splitlines() if "engine: vllm 0." in line]
    assert "computed again may differ" in line
    record = json.loads((project / "out" / "run.json").read_text())
    assert record["engine"]["name"] == record["config"]["generator"]["engine"] == "vllm"
    assert record["same_rows"].startswith("not promised: every input exactly once")
    assert out.count("generator-0: a fresh process is up") == out.count("a fresh process is up") == 2
    assert "nothing to do" in ended(project, start(project))
    check_controls(project)
    write(project, generator={"model": str(project / "model"), "engine": "local"})
    assert "made with vllm" in ended(project, start(project), 2)
    assert not processes("EngineCore") and not processes("VLLM::")
