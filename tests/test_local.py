"""Rows in one process: the table's rows, in input order, whatever the input and however the caller reads them."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import finished
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import aisp_dist
from aisp_dist import local
from aisp_dist.config import ConfigError
from aisp_dist.engine.service import Closed
from aisp_dist.output import schema

QUESTIONS = [f"What is {i}?" for i in range(30)]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = finished.project(tmp_path_factory.mktemp("local"))
    reward = "def picky(prompts, completions, **_):\n    if '3' in str(prompts[0]):\n        raise KeyError('three')\n"
    (folder / "rewards.py").write_text(f"{finished.REWARDS}\n{reward}    return vowels(completions)\n")
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


def test_a_reward_that_raises_fails_its_row_and_no_other(project):
    rows = list(aisp_dist.relabel(mapping(project, "picky"), QUESTIONS[:5]))
    assert [row["reason"] is None for row in rows] == [True, True, True, False, True]
    assert rows[3]["completion"] is None and rows[3]["reason"].startswith(
        "main: rewards.py:picky raised KeyError in line "
    )


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


def test_a_failure_of_the_engine_is_no_row(project, monkeypatch):
    monkeypatch.setattr("aisp_dist.engine.step.Batch.step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(Closed, match="ZeroDivisionError"):
        next(aisp_dist.relabel(mapping(project), QUESTIONS))


@pytest.mark.parametrize(
    ("prompts", "change", "said"),
    [
        ("one text", {}, "give a list of prompts"),
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
