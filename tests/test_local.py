"""Rows in one process: the table's rows, in input order, whatever the input and however the caller reads them."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import finished
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from judge_server import serving
from ray.exceptions import RayTaskError

import aisp_dist
from actors import cluster
from aisp_dist import local, placement
from aisp_dist.config import ConfigError
from aisp_dist.config.load import check as load_run
from aisp_dist.engine import sizes
from aisp_dist.engine.service import Closed
from aisp_dist.output import schema
from aisp_dist.rewards.client import Unavailable
from aisp_dist.vllm.choice import Found
from aisp_dist.vllm.start import arguments, memory

QUESTIONS = [f"What is {i}?" for i in range(30)]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = finished.project(tmp_path_factory.mktemp("local"))
    rewards = finished.REWARDS
    for name, error in (("picky", KeyError), ("interrupts", KeyboardInterrupt)):
        rewards += f"\ndef {name}(prompts, completions, **_):\n    if '3' in str(prompts[0]):\n"
        rewards += f"        raise {error.__name__}('three')\n    return vowels(completions)\n"
    (folder / "rewards.py").write_text(rewards)
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder)))
    return folder


def config(folder: Path, function: str = "vowels", **changes):
    values = {
        "prompts": {"source": str(folder / "prompts.jsonl"), "id_column": "name", "keep": ["note"]},
        "generator": {"model": str(folder / "model"), "max_new_tokens": 12, "batch_rows": 32},
        "rewards": {
            "main": {"kind": "function", "function": f"rewards.py:{function}"},
            "words": {"kind": "function", "function": "rewards.py:words", "use": "report"},
        },
        "method": finished.AISP,
    }
    return values | changes


def mapping(folder: Path, function: str = "vowels", **changes):
    """As `config`, for a mapping: its paths start from the current directory."""
    values = config(folder, function, prompts={}, **changes)
    for reward in values["rewards"].values():
        reward["function"] = f"{folder}/{reward['function']}"
    return values


def test_the_rows_are_those_of_the_table_in_order(project):
    lines = (project / "prompts.jsonl").read_text().splitlines()
    bad = ["{broken", json.dumps({"name": "odd", "prompt": "", "note": None})]
    (project / "prompts.jsonl").write_text("\n".join([*lines[:2], *bad, *lines[2:]]))
    out = finished.output(project, "out")
    written = {name: pq.read_table(out / name).to_pylist() for name in ("data", "failed")}
    rows = list(aisp_dist.relabel(project / "run.yaml"))
    assert [row["source_index"] for row in rows] == list(range(8))
    done = [row for row in rows if row["reason"] is None]
    assert done == [row | {"reason": None} for row in written["data"]] and len(done) == 6
    for row, failed in zip((row for row in rows if row["reason"]), written["failed"], strict=True):
        assert row["completion"] is None and failed.items() <= row.items()
    names = [*schema.schemas("chat", {"note": "json", "kept_as_json": "misfits"}).data.names, "reason"]
    assert all(list(row) == names for row in rows)


def test_prompts_come_as_texts_as_messages_or_as_lines(project):
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS[:3]]
    run = mapping(project) | {"prompts": {"limit": 1, "skip": 1, "shuffle_seed": 7, "source": "nowhere.jsonl"}}
    rows = list(aisp_dist.relabel(run, QUESTIONS[:3]))
    assert [row["prompt"][0]["content"] for row in rows] == QUESTIONS[:3], "all of them, in order"
    assert rows == list(aisp_dist.relabel(run, chats))
    lines = [{"question": text, "key": f"k{i}", "n": i} for i, text in enumerate(QUESTIONS[:3])]
    columns = {"column": "question", "id_column": "key", "keep": ["n"]}
    kept = list(aisp_dist.relabel(mapping(project) | {"prompts": columns}, lines))
    assert [(row["id"], row["n"]) for row in kept] == [("k0", 0), ("k1", 1), ("k2", 2)]
    assert [row["base_completion"] for row in kept] == [row["base_completion"] for row in rows]


@pytest.mark.parametrize(("function", "error"), [("picky", "KeyError"), ("interrupts", "KeyboardInterrupt")])
def test_a_reward_that_raises_fails_its_row_and_no_other(project, function, error):
    rows = list(aisp_dist.relabel(mapping(project, function), QUESTIONS[:5]))
    assert [row["reason"] is None for row in rows] == [True, True, True, False, True]
    assert rows[3]["completion"] is None and rows[3]["reason"].startswith(
        f"main: rewards.py:{function} raised {error} in line "
    )


def test_a_prompt_that_a_server_never_scores_fails_its_row_and_no_other(project):
    with serving() as told:
        told.fault = lambda body: (403, {}) if "What is 3?" in body["messages"][0]["content"] else None
        graded = {"kind": "http", "url": told.url, "model": "m", "rubric": "{prompt} {response}", "retries": 0}
        rows = list(aisp_dist.relabel(mapping(project) | {"rewards": {"graded": graded}}, QUESTIONS[:5]))
        assert [row["reason"] is None for row in rows] == [True, True, True, False, True]
        assert rows[3]["reason"] == "graded: the server answers others, but not this prompt's: it answers 403 Forbidden"
        told.fault = lambda body: (403, {}) if told.seen[20:] else None
        told.seen.clear()
        with pytest.raises(Unavailable, match="answers 403"):
            list(aisp_dist.relabel(mapping(project) | {"rewards": {"graded": graded}}, QUESTIONS[:5]))


def test_prompts_that_are_no_sequence_are_read_at_once(project):
    of_list = list(aisp_dist.relabel(mapping(project), QUESTIONS[:3]))
    texts = iter(QUESTIONS[:3])
    rows = aisp_dist.relabel(mapping(project), texts)
    assert next(texts, None) is None and list(rows) == of_list
    assert list(aisp_dist.relabel(mapping(project), deque(QUESTIONS[:3]))) == of_list, "a sequence without slices"


def test_what_is_no_configuration_is_refused_by_name():
    with pytest.raises(ConfigError, match="the configuration is 3, of type int; give the path of a YAML file"):
        aisp_dist.relabel(3)


def test_no_more_prompts_are_read_than_a_window_ahead(project):
    read = []

    class Watched(list):
        def __iter__(self):
            for one in super().__iter__():
                read.append(one)
                yield one

    run = mapping(project) | {"method": finished.AISP | {"num_samples": 16}}
    for count, _ in enumerate(aisp_dist.relabel(run, Watched(QUESTIONS)), 1):
        assert len(set(read)) <= count + 4
    assert count == len(set(read)) == 30


def test_it_runs_beside_an_event_loop(project):
    async def notebook():
        return [row["reward"] for row in aisp_dist.relabel(mapping(project), QUESTIONS[:2])]

    assert len(asyncio.run(notebook())) == 2


def test_closed_early_it_leaves_no_thread_and_no_model(project, monkeypatch, tmp_path):
    backends = []

    class Seen(local.LocalBackend):
        def __init__(self, *args):
            super().__init__(*args)
            backends.append(weakref.ref(self))

    monkeypatch.setattr(local, "LocalBackend", Seen)
    monkeypatch.chdir(tmp_path)
    threads, before = set(threading.enumerate()), torch.get_num_threads()
    torch.set_num_threads(2)
    rows = aisp_dist.relabel(mapping(project), QUESTIONS)
    next(rows)
    assert torch.get_num_threads() == 1 and set(threading.enumerate()) > threads
    rows.close()
    gc.collect()
    assert set(threading.enumerate()) <= threads and backends[0]() is None
    assert torch.get_num_threads() == 2 and not list(tmp_path.iterdir()), "nothing is written"
    torch.set_num_threads(before)


def test_of_generators_that_overlap_the_last_restores_the_threads_of_torch(project):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    first, second = (aisp_dist.relabel(mapping(project), QUESTIONS) for _ in range(2))
    next(first), next(second)
    first.close()
    assert torch.get_num_threads() == 1
    second.close()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


DEMO = {
    "generator": {"model": "demo", "max_new_tokens": 12},
    "rewards": {"main": {"kind": "model", "model": "demo"}},
    "method": {"kind": "best_of_n", "num_samples": 4, "num_iterations": 1},
}


def test_calls_in_two_threads_load_their_models_in_turn():
    together = threading.Barrier(2)

    def rows(_: int) -> list[local.Row]:
        together.wait()
        return list(aisp_dist.relabel(DEMO, QUESTIONS[:1]))

    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(rows, range(2))
    assert one == other and one[0]["reason"] is None


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("rows = relabel(); next(rows); sys.exit(5)", 5),
        ("first, second = relabel(), relabel(); next(zip(first, second))", 0),
        ("Thread(target=read, daemon=True).start(); begun.wait(); sys.exit(6)", 6),
    ],
)
def test_a_script_that_leaves_rows_unread_ends_with_its_own_code(script, code):
    """Also where a thread is in the middle of reading them, which then ends with an error of its own."""
    lines = [
        "import sys, aisp_dist",
        "from threading import Event, Thread",
        f"relabel = lambda: aisp_dist.relabel({DEMO}, {QUESTIONS})",
        "begun = Event()",
        "def read():",
        "    for row in relabel(): begun.set()",
        script,
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert code == 6 or not done.stderr


def test_a_forked_child_does_not_disturb_what_its_parent_reads():
    script = (
        f"import os, sys, aisp_dist\nrows = aisp_dist.relabel({DEMO}, {QUESTIONS[:2]})\nnext(rows)\n"
        "if child := os.fork():\n    print(os.waitpid(child, 0)[1], next(rows)['reason'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "None"]), done.stderr


def test_a_failure_of_the_engine_is_no_row(project, monkeypatch):
    monkeypatch.setattr("aisp_dist.engine.step.Batch.step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(Closed, match="ZeroDivisionError"):
        next(aisp_dist.relabel(mapping(project), QUESTIONS))


def test_a_gpu_without_memory_is_no_row(project, monkeypatch):
    async def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("aisp_dist.engine.service.Service.nll", full)
    with pytest.raises(torch.OutOfMemoryError):
        next(aisp_dist.relabel(mapping(project), QUESTIONS))
    error = RayTaskError("nll", "", torch.OutOfMemoryError("CUDA out of memory"))
    assert cluster.is_fault(error) and not cluster.is_fault(RayTaskError("nll", "", ValueError("no")))


@pytest.mark.parametrize(
    ("prompts", "change", "said"),
    [
        ("one text", {}, "give a list of prompts"),
        (3, {}, "prompts is 3, of type int; give a list of prompts"),
        ([[{"role": "user", "content": "?"}]], {"prompts": {"format": "raw"}}, "messages need prompts.format: chat"),
        (None, {"generater": {}}, "did you mean 'generator'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(project, prompts, change, said):
    with pytest.raises(ConfigError, match=said):
        aisp_dist.relabel(mapping(project) | change, prompts)


def test_the_import_is_light():
    code = "import sys, aisp_dist; print(sorted({'torch', 'ray', 'pydantic', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


JUDGE = {"kind": "model", "model": "demo"}


@pytest.mark.parametrize("sizes_of", [{"generator": 64, "main": 12}, {}])
def test_models_of_one_process_share_the_memory_as_those_of_a_cluster_do(project, monkeypatch, sizes_of):
    """On one GPU: what both ask for is never more than there is."""
    asked, closed = {}, []
    monkeypatch.setattr(local, "here", lambda: Found(1, "0.32.0"))
    monkeypatch.setattr(sizes, "of_models", lambda run: dict(sizes_of))

    async def start(settings, prompt_tokens, *, share):
        asked["generator"] = arguments(settings, 100, share, 80 << 30, 64)["gpu_memory_utilization"]
        served = SimpleNamespace(tokenizer=None, context_length=100)
        return SimpleNamespace(served=served, close=lambda: closed.append("generator"))

    def load(name, *args, share):
        asked[name] = memory(share, 80 << 30)["gpu_memory_utilization"]
        raise ConfigError("the reward cannot be used")

    monkeypatch.setattr(local, "start", start)
    monkeypatch.setattr(local.rewards, "load", load)
    run = mapping(project, rewards={}) | {"rewards": {"main": JUDGE | {"engine": "vllm"}}}
    run["generator"] = {"model": "demo", "engine": "vllm"}
    with pytest.raises(ConfigError, match="the reward cannot be used"):
        next(aisp_dist.relabel(run, QUESTIONS))
    plan = placement.plan(load_run(run | {"output": "x"}), [{"CPU": 4, "GPU": 1}], sizes=sizes_of)
    assert asked == pytest.approx({group.role: 0.92 * group.num_gpus for group in plan.groups}, abs=1e-4)
    assert sum(asked.values()) <= 0.92 and asked["generator"] > asked["main"] > 0.04
    assert closed == ["generator"], "an error of a reward leaves no engine"


def test_a_model_alone_has_the_gpu_and_one_that_is_split_its_part_of_the_first(monkeypatch):
    monkeypatch.setattr(local, "here", lambda: Found(8, "0.32.0"))
    monkeypatch.setattr(sizes, "of_models", lambda run: {"generator": 140, "main": 16})
    values = {"output": "x", "generator": {"model": "m", "engine": "vllm", "tensor_parallel": 4}}
    values |= {"method": {"kind": "best_of_n"}, "rewards": {"main": JUDGE}}
    found = local.shares(load_run(values))
    assert found == {"generator": pytest.approx(70 / 86, abs=0.02), "main": pytest.approx(16 / 86, abs=0.02)}
    words = {"kind": "function", "function": "a.py:b"}
    assert local.shares(load_run(values | {"rewards": {"words": words}}))["generator"] == 1.0
    assert local.shares(load_run(values), "cpu") == {"generator": 0.5, "main": 0.5}
