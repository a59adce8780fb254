"""The engine of an output, asked of the machines where generators would run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from aisp_dist import vllm
from aisp_dist.config import ConfigError, Run
from aisp_dist.vllm import choice
from aisp_dist.vllm.choice import Choice, Found, here

_PATIENCE = 120.0  # seconds for the machines to answer
_found: dict[str, Found] = {}  # by address: a command with many outputs asks once


def resolve(run: Run, before: Mapping[str, Any] | None) -> tuple[Run, Choice]:
    """The run with its engines. before: run.json of the output, if it exists. Raises ConfigError."""
    return choice.resolve(run, before["config"] if before else None, lambda: look(run))


def look(run: Run) -> Found:
    """What the machines with GPUs have; where none has any, all machines. Raises ConfigError where they differ."""
    if (address := os.environ.get("RAY_ADDRESS")) is None:
        return here()
    if address not in _found:
        _found[address] = _ask(run)
    return _found[address]


def _ask(run: Run) -> Found:
    import ray

    from jobs.connection import Connection

    connection = None if ray.is_initialized() else Connection(run, lambda message: None)  # one is enough
    try:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in ray.nodes() if node["Alive"]]
        workers = [node for node in nodes if node["Resources"].get("GPU")]
        ask = ray.remote(num_cpus=0, max_retries=0)(vllm.installed)
        asked = {
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(): node
            for node in workers or nodes
        }
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
        versions = {asked[ref]["NodeManagerHostname"]: ray.get(ref) for ref in done}
    finally:
        if connection is not None:
            connection.close()
    if len(set(versions.values())) > 1:
        told = ", ".join(f"{host} {version or 'none'}" for host, version in sorted(versions.items()))
        raise ConfigError(
            f"generator.engine: machines have different versions of vLLM ({told}); install one everywhere"
        )
    gpus = sum(int(node["Resources"].get("GPU", 0)) for node in workers)
    return Found(gpus, next(iter(versions.values()), None))
