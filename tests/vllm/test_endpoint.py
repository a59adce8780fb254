"""`generator.endpoint` with vLLM's own server: the local engine's greedy tokens and likelihoods, and a whole run."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import yaml
from engines import SHAPE, STEPS
from test_runs import REWARD, ended, rows, start

from aisp_dist import endpoint
from aisp_dist.config import Generator
from aisp_dist.engine import decode, model
from aisp_dist.records import BASE_ITERATION, Round, Sampling, TopP

PROMPT = tuple(range(20, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose generation_config would make the server draw otherwise than it is asked to."""
    folder = tmp_path_factory.mktemp("served")
    tiny.save("llama", folder / "model", **SHAPE)
    own = '{"eos_token_id": 2, "do_sample": true, "top_k": 1, "repetition_penalty": 1.5, "temperature": 0.7}'
    (folder / "model" / "generation_config.json").write_text(own)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(1 << 26)]
    env = os.environ | {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with (folder / "server.txt").open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.txt").read_text()[-3000:]
            try:
                if httpx.get(f"{address}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"{address}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def settings(folder: Path, url: str, **more: Any) -> Generator:
    there = {"url": url, "model": "tiny", "max_parallel": 8}
    return Generator(**{"model": str(folder / "model"), "max_new_tokens": STEPS, "endpoint": there} | more)


def test_tokens_and_likelihoods_are_the_local_engines(folder: Path, url: str) -> None:
    """Greedy, from the beginning and from given tokens, with and without a stop string, whatever the server's defaults
    are; draws are distinct, and their likelihoods the base model's."""
    lm = model.load(Generator(model=str(folder / "model"), dtype="float32", engine="local"), "cpu")

    def local(*stop: str) -> decode.Engine:
        return decode.Engine(lm, 8, STEPS, stop)

    def round_of(sampling: Sampling, samples: int, **more: Any) -> Round:
        return Round(0, "p", PROMPT, BASE_ITERATION if samples == 1 else 0, 0, samples, sampling, **more)

    plain = round_of(Sampling(), 1)
    ((whole,),) = ([*done.trajectories] for done in local().run([plain]))
    stop = whole.text[3:5]
    drawn = round_of(Sampling(decode=TopP(0.95, 1.0), likelihood=True), 8)

    async def ask(configured: Generator, *rounds: Round) -> list[Any]:
        service = await endpoint.connect(configured, 100)
        try:
            return [[*(await service.rollout(one)).trajectories] for one in rounds]
        finally:
            service.close()

    given = round_of(Sampling(), 1, starts=(whole.token_ids[:4],))
    first, second, answers = asyncio.run(ask(settings(folder, url), plain, given, drawn))
    assert first == second == [whole]
    assert asyncio.run(ask(settings(folder, url, stop=(stop,)), plain)) == [
        [*done.trajectories] for done in local(stop).run([plain])
    ]
    assert len({t.token_ids for t in answers}) == 8, "top_k 1 of the model's generation_config has no effect"
    own = local()
    assert [t.nll for t in answers] == pytest.approx([own.nll(PROMPT, t.token_ids) for t in answers], abs=1e-4)


@pytest.mark.ray
def test_a_whole_run(folder: Path, url: str) -> None:
    (folder / "rewards.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("How do I train a puppy?\nIs coffee good?\nWhat is a bicycle for?\n")
    config = {
        "output": str(folder / "out"),
        "prompts": {"source": str(folder / "prompts.txt"), "max_tokens": 100},
        "generator": {
            "model": str(folder / "model"),
            "max_new_tokens": STEPS,
            "endpoint": {"url": url, "model": "tiny"},
        },
        "rewards": {"words": {"kind": "function", "function": "rewards.py:words"}},
        "method": {"kind": "population", "num_samples": 4, "num_iterations": 3, "sampling": {"top_p": 0.95}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    told = ended(folder, start(folder))
    assert f"engine: endpoint (tiny at {url}); every input exactly once" in told
    assert "decoded by a server" in told and "not promised" in told
    table = rows(folder)
    assert sorted(table) == [0, 1, 2] and all(row["reward"] >= 1 for row in table.values())
