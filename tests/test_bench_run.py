"""`aisp bench run`: contenders in processes of their own, vLLM's settings, and what is counted."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager

import psutil
import pytest

from aisp_dist.bench import script
from aisp_dist.bench.apart import Apart, Turn
from aisp_dist.config import ConfigError, Run
from jobs import bench_run, cli


@contextmanager
def counting():
    """Work that burns CPU time in a process below its own, and answers how often it was called."""
    calls = []

    def work(what):
        calls.append(what)
        if what == "burn":
            end = time.process_time() + 0.5
            while time.process_time() < end:
                pass
        if what == "refuse":
            raise ConfigError("key: a rule and its fix")
        return {"calls": len(calls), "pid": os.getpid(), "what": what}

    yield work


@contextmanager
def refusing():
    raise ConfigError("generator.model: not there")
    yield


@contextmanager
def dying():
    yield lambda: os._exit(7)


def test_a_contender_keeps_its_process_and_its_cpu_seconds_are_counted():
    with Apart(counting) as contender:
        first, second = contender("burn"), contender("rest")
        assert (first.answer["calls"], second.answer["calls"]) == (1, 2)
        assert first.answer["pid"] == second.answer["pid"] != os.getpid()
        assert first.cpu_seconds > 0.4 > second.cpu_seconds and first.seconds >= 0.5
    assert not psutil.pid_exists(first.answer["pid"])


def test_errors_of_a_contender_come_back_as_what_they_are():
    with pytest.raises(ConfigError, match="generator.model: not there"), Apart(refusing):
        pass
    with Apart(counting) as contender, pytest.raises(ConfigError, match="a rule and its fix"):
        contender("refuse")
    with Apart(counting) as contender, pytest.raises(RuntimeError, match="positional argument"):
        contender()
    with Apart(dying) as contender, pytest.raises(RuntimeError, match="ended with code 7"):
        contender()


def run_of(**method):
    rewards = {"words": {"kind": "function", "function": "rewards.py:words"}}
    run = {"output": "out", "generator": {"model": "demo"}, "rewards": rewards, "method": method}
    return Run.model_validate(run)


AISP = {"kind": "aisp", "num_samples": 4, "num_iterations": 2, "lambda": 0.3}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            {"kind": "best_of_n", "sampling": {"top_p": 0.8, "temperature": 0.6}},
            [{"temperature": 0.6, "top_p": 0.8}, {"temperature": 0.6}, {"temperature": 0.6, "top_k": 50}],
        ),
        (
            {"kind": "population"},
            [{"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 50}],
        ),
        ({"kind": "best_of_n", "sampling": {"gaussian": 0.5}}, [{"temperature": 0.0}]),
        (AISP, [{"temperature": 0.0}]),
    ],
)
def test_the_peer_draws_as_the_method_does(method, expected):
    assert list(script.variants(run_of(**method)).values()) == expected


def test_a_ratio_is_our_tokens_per_second_over_theirs_in_the_same_repetition():
    def turn(seconds, cpu_seconds, tokens, reward=1.0):
        return Turn(seconds, cpu_seconds, {"tokens": tokens, "prompts": 4, "reward": reward})

    mine, theirs = [turn(2.0, 4.0, 400), turn(4.0, 4.0, 400)], [turn(1.0, 2.0, 100, 2.0), turn(1.0, 1.0, 50, None)]
    found = bench_run._summary(theirs, mine, 3.0)
    assert found["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert found["cpu_ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert found["tokens_per_second"]["max"] == 100 and found["mean_reward"] == [2.0, None]
    assert "ratio" not in bench_run._summary(mine, mine, 3.0)


def test_values_of_the_flag_vllm():
    assert bench_run._engine(["max_num_seqs=256", "dtype=float32", "enforce_eager=true"]) == {
        "max_num_seqs": 256,
        "dtype": "float32",
        "enforce_eager": True,
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "vLLM is not installed"),
        (["--prompts", "0"], "--prompts is 0; it must be at least 1"),
        (["--vllm", "block_size"], "--vllm is 'block_size'; give KEY=VALUE"),
        (["--peers", "tgi"], "invalid choice: 'tgi'"),
        (["--generator.modle", "x"], "generator.modle"),
    ],
)
def test_bad_usage_ends_with_code_2_before_anything_is_loaded(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_run, "Apart", None)
    config = tmp_path / "run.yaml"
    rewards = "rewards: {main: {kind: model, model: demo}}"
    config.write_text(f"output: out\ngenerator: {{model: demo}}\n{rewards}\nmethod: {{kind: best_of_n}}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "run", str(config), *flags])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and says in shown.err and shown.out == ""
