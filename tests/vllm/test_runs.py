"""Whole runs with vLLM, as a user starts them: the command line on a Ray cluster, and `relabel` in one process."""

from __future__ import annotations

import json
import os
import signal
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

pytestmark = pytest.mark.ray

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


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.align", "run.yaml", *args]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    files = sorted((folder / "out" / "data").glob("part-*.parquet"))
    return {row["source_index"]: row for file in files for row in pq.read_table(file).to_pylist()}


def processes(name: str) -> list[psutil.Process]:
    """Those of the tests' own runs with this in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_run_survives_the_death_of_the_engine_and_of_the_actor(project: Path) -> None:
    """And of nothing more than these: no row is lost or doubled, and no process of vLLM is left behind."""
    command = start(project)
    before: set[int] = set()
    for of_actor in (False, True):
        done, deadline = len(rows(project)), time.monotonic() + 200
        while not (cores := [p for p in processes("EngineCore") if p.pid not in before]) or len(rows(project)) == done:
            assert command.poll() is None and time.monotonic() < deadline, command.communicate()[0][-3000:]
            time.sleep(0.05)
        before.add(cores[0].pid)
        (cores[0].parent() if of_actor else cores[0]).send_signal(signal.SIGKILL)
    out, _ = command.communicate(timeout=250)
    assert command.returncode == 0, out[-3000:]
    assert set(rows(project)) == set(range(len(QUESTIONS))), out[-3000:]
    (line,) = [line for line in out.splitlines() if "engine: vllm 0." in line]
    assert "computed again may differ" in line
    record = json.loads((project / "out" / "run.json").read_text())
    assert record["engine"]["name"] == record["config"]["generator"]["engine"] == "vllm"
    assert record["same_rows"].startswith("not promised: every input exactly once")
    assert out.count("a fresh process is up") == 2
    again = start(project)
    told, _ = again.communicate(timeout=100)
    assert again.returncode == 0 and "nothing to do" in told
    write(project, generator={"model": str(project / "model"), "engine": "local"})
    other = start(project)
    told, _ = other.communicate(timeout=100)
    assert other.returncode == 2 and "made with vllm" in told
    assert not processes("EngineCore") and not processes("VLLM::")
