"""vLLM's second model runner, the default on GPUs, against the local engine, all rounds in one batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import slow_path
import tiny
from engines import SHAPE, STEPS
from test_exact import rounds

from aisp_dist.engine import model
from aisp_dist.engine.decode import Engine

HERE = Path(__file__).parent


def test_the_second_runner_decodes_as_the_local_engine(llama: Path) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent.parent)])
    command = [sys.executable, str(HERE / "second_runner.py"), str(llama)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("found ")]
    found = json.loads(line.removeprefix("found "))
    assert found["runners"] == ["V2Hook"]
    engine = Engine(model.adapt(tiny.causal("llama", **SHAPE), tiny.tokenizer()), 32, STEPS)
    for (name, round), right in zip(rounds().items(), engine.run(rounds().values()), strict=True):
        told = found["rounds"][name]
        assert [tokens for tokens, _, _ in told] == slow_path.tokens(right), (name, round)
        assert [cost for _, cost, _ in told] == pytest.approx([t.control_cost for t in right.trajectories], rel=1e-6)
        assert [nll for _, _, nll in told] == pytest.approx([t.nll for t in right.trajectories], abs=1e-4)
