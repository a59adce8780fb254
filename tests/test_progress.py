"""What a human and a program see of a run."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest

from aisp_dist.config import Run
from aisp_dist.place import Place
from jobs import progress

NOW = {"done": 0, "failed": 0, "committed": 0, "in_flight": 2, "samples": 0, "tokens": 0, "quarantined": 0,
       "reward_gain": None, "repeats": 0, "restarts": 0}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    return Run.model_validate({
        "output": str(tmp_path), "prompts": {"source": str(tmp_path / "p.txt")}, "generator": {"model": "demo"},
        "rewards": {"r": {"kind": "function", "function": "a.py:b"}},
    })  # fmt: skip


def test_plain_lines_and_metrics(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PLAIN", 0.0)
    with progress.Progress(Place.at(tmp_path), run) as shown:
        while shown.total.value is None:
            time.sleep(0.001)
        shown(NOW | {"done": 1})  # resumed: one was done before this command
        shown(NOW | {"done": 2, "failed": 1, "samples": 64, "tokens": 900, "reward_gain": 0.5, "restarts": 1})
    assert shown.finished == 2
    last = capsys.readouterr().err.splitlines()[-1]
    for part in ("3/4 prompts", "s left", "samples/s", "tokens/s", "reward +0.5 over base", "1 failed", "1 restarts"):
        assert part in last
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries[-1]["done"] == 2 and entries[-1]["total"] == 4


def test_a_bar_on_a_terminal(run, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_TERMINAL", 0.0)
    with progress.Progress(Place.at(tmp_path), run, title="aisp: ") as shown:
        shown(NOW)
        shown(NOW | {"done": 3, "samples": 7})
    assert "aisp: 3/" in terminal.getvalue()
