"""Ray's tokens: a machine without a home, and a cluster that wants another token, or one at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray_head

from jobs import tokens

ROOT = Path(__file__).parent.parent
JOIN = """
from jobs import cli, connection
from aisp_dist.config import Run
run = Run.model_validate({"output": "o", "generator": {"model": "demo"}, "rewards": {"r": {"kind": "model", "model": "demo"}},
                          "method": {"kind": "best_of_n", "num_samples": 1, "num_iterations": 1}})
try:
    connection.Connection(run, print).close()
except cli.Exit as error:
    print("refused:", error)
"""  # noqa: E501


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_a_home_that_can_be_written_is_rays_own_business(environment):
    said: list[str] = []
    tokens.for_own_cluster(said.append)
    assert said == [] and "RAY_AUTH_TOKEN" not in os.environ


def test_without_a_home_the_run_has_a_token_of_its_own(environment):
    said: list[str] = []
    environment.setenv("HOME", "/proc/nohome")
    environment.setenv("RAY_AUTH_TOKEN", "")  # so that what is set below is taken back
    environment.delenv("RAY_AUTH_TOKEN")
    tokens.for_own_cluster(said.append)
    assert "HOME (/proc/nohome)" in said[0] and "RAY_AUTH_TOKEN_PATH" in said[0]
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_TOKEN"] not in said[0]
    tokens.for_own_cluster(said.append)
    assert len(said) == 1


@pytest.mark.parametrize("name", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_what_the_user_has_set_stays(environment, name):
    environment.setenv("HOME", "/proc/nohome")
    environment.setenv(name, "token")
    tokens.for_own_cluster(pytest.fail)


def joined(folder: Path, env: dict[str, str]) -> str:
    command = [sys.executable, "-c", JOIN]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400).stdout


@pytest.mark.ray
def test_a_cluster_that_wants_a_token_says_so_in_one_message(tmp_path):
    (tmp_path / "token").write_text("a" * 64)
    (tmp_path / "left").write_text("b" * 64)
    with ray_head.started(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token")) as env:
        plain = {k: v for k, v in env.items() if not k.startswith("RAY_AUTH")} | {"PYTHONPATH": str(ROOT)}
        plain["HOME"] = str(tmp_path)
        left = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "left")}
        good = left | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        said = [joined(tmp_path, plain | more) for more in ({}, left, good)]
    for refusal, words in zip(said, ("(it is not set)", "(it is token)"), strict=False):
        assert "answers, but does not let this program in" in refusal and words in refusal, refusal
        assert "set RAY_AUTH_MODE=token" in refusal and "RAY_AUTH_TOKEN_PATH" in refusal
    assert "now read from RAY_AUTH_TOKEN_PATH" in said[1] and "joined the Ray cluster" in said[2]
