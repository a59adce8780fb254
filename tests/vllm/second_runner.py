"""vLLM's second model runner on a CPU: Triton's interpreter runs its kernels. `second_runner.py DIRECTORY` decodes the
rounds of test_exact.py with the model in that directory and prints what came of each, as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1", VLLM_WORKER_MULTIPROCESSING_METHOD="fork")

import triton.backends

# vLLM asks for a backend "cpu", which triton-cpu would register. Processes that are forked inherit it.
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

from engines import settings  # noqa: E402
from test_exact import rounds  # noqa: E402


async def main(directory: Path) -> None:
    from aisp_dist.vllm.start import start

    service = await start(settings(directory), 100)
    runners = [await service.install()]
    found = await asyncio.gather(*(service.rollout(round) for round in rounds().values()))
    told = {
        name: [(t.token_ids, t.control_cost, t.nll) for t in rollout.trajectories]
        for name, rollout in zip(rounds(), found, strict=True)
    }
    print("found", json.dumps({"runners": runners, "rounds": told}), flush=True)
    service.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
