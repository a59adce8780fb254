"""`aisp align CONFIG --plan` on a real Ray cluster with pretended GPUs: the shipped configurations have their place on
common machines, and nothing is loaded or written."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from jobs import align

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(p for p in (ROOT / "configs").glob("**/*.yaml") if p.parent.name != "deploy")
STORE = {"object_store_memory": 80 * 2**20}
# What a configuration names and the project does not ship.
FILES = {"mini": ["--prompts.source", "posts.jsonl", "--generator.model", "demo"], "quickstart": []}
FILES["tables"] = FILES["mini"][:2]
FILES["quick"] = ["--prompts.source", str(ROOT / "configs/smollm2/prompts.jsonl"), "--generator.model", "demo"]


@pytest.fixture(scope="module")
def head():
    """A cluster whose head has no resources, so that a machine beside it is all that a plan sees."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    there = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | STORE)
    yield there
    there.shutdown()


@pytest.mark.parametrize("gpus", [0, 1, 2, 8])
def test_shipped_configurations_have_a_plan_on_common_machines(head, gpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("posts.jsonl").write_text('{"history": "Why?"}\n')
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    node = head.add_node(num_cpus=16, num_gpus=gpus, **STORE)
    try:
        for path in CONFIGS:
            assert align.main([str(path), "--output", str(tmp_path / "out"), "--plan", *FILES[path.stem]]) == 0
            lines = capsys.readouterr().out.splitlines()
            actors = [re.match(r"(\S+): (\d+) actors? with \S+ CPU, (\S+) GPU each", line) for line in lines]
            found = {match[1]: int(match[2]) * float(match[3]) for match in actors if match}
            assert "generator" in found and sum(found.values()) <= gpus + 1e-6
            models = [r for r in yaml.safe_load(path.read_text())["rewards"].values() if r["kind"] == "model"]
            assert len([share for share in found.values() if share]) == (1 + len(models)) * bool(gpus)
            idle = any("stay idle" in line for line in lines)
            assert idle == (gpus > 1 + len(models))
    finally:
        head.remove_node(node)
    assert len(CONFIGS) == 4 and os.listdir() == ["posts.jsonl"] and not ray.is_initialized()
