"""What a human and a program see of a run."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest

from actors.counts import Counts
from aisp_dist.config import Run
from aisp_dist.output.filesystem import Place
from jobs import progress


@pytest.fixture
def run(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\nc\nd\n")
    return Run.model_validate({
        "output": str(tmp_path), "prompts": {"source": str(tmp_path / "p.txt")}, "generator": {"model": "demo"},
        "rewards": {"r": {"kind": "function", "function": "a.py:b"}},
        "method": {"kind": "best_of_n", "num_samples": 16, "num_iterations": 8},
    })  # fmt: skip


def test_plain_lines_and_metrics(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PLAIN", 0.0)
    with progress.Progress(Place.at(tmp_path), run) as shown:
        while shown.total is None:
            time.sleep(0.001)
        shown(Counts(done=1))  # resumed: one was done before this command
        now = Counts(done=2, failed=1, fresh=2, samples=64, tokens=900, gain=1.0, gains=2, restarts=1)
        shown(now)
        left = shown.seconds_left(now) * 64 / shown.seconds
        assert left == pytest.approx(3 * shown.samples_each - 64, rel=0.5), "samples of three prompts, 64 of them drawn"
    last = capsys.readouterr().err.splitlines()[-1]
    for part in ("3/4 prompts", "left", "samples/s", "tokens/s", "reward +0.5 over base", "1 failed", "1 restart"):
        assert part in last
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entries[-1]["done"] == 2 and entries[-1]["total"] == 4
    assert {(entry["command"], *entry["shard"]) for entry in entries} == {(shown.command, 0, 1)}


def test_a_bar_on_a_terminal(run, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_TERMINAL", 0.0)
    with progress.Progress(Place.at(tmp_path), run, title="aisp: ") as shown:
        shown(Counts())
        shown(Counts(done=3, samples=7))
    assert "aisp: 3/" in terminal.getvalue()
