"""The base model behind an actor: rounds come at any time and share the engine's rows."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from aisp_dist import quiet
from aisp_dist.config import Run
from aisp_dist.placement import Group
from aisp_dist.records import Calibration, Rollout, Round, Sampling
from aisp_dist.vllm.choice import Check


class Answers(Protocol):
    """An engine behind this process: the local engine's Service, vLLM's, or a server's."""

    @property
    def work(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    async def rollout(self, round: Round) -> Rollout: ...
    async def nll(self, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]) -> list[float]: ...
    async def calibrate(self, request: Calibration) -> Sampling: ...
    def figures(self) -> dict[str, float]: ...


class Generator:
    """One replica of the base model. An error of one request goes back to its caller. An error of a decoding step
    concerns every row, so the process ends and the callers repeat their rounds elsewhere.

    group: threads, and the share of its device's memory that this process may use."""

    def __init__(self, run: Run, base_dir: Path, name: str, group: Group) -> None:
        self.run, self.base_dir, self.name, self.group = run, base_dir, name, group
        self.service: Answers
        self.checked: Check | None = None

    def __repr__(self) -> str:
        return self.name

    async def load(self) -> int | None:
        """Load the model; answers its context length in tokens. Raises ConfigError for one that cannot be used."""
        import torch

        from aisp_dist.engine import decode, model
        from aisp_dist.engine.service import Service
        from aisp_dist.rewards import stepwise

        settings = self.run.generator
        torch.set_num_threads(self.group.threads)
        quiet.libraries()
        if settings.engine == "vllm":
            return await self._load_vllm()
        if settings.engine == "endpoint":
            return await self._connect()
        if torch.cuda.is_available() and self.group.num_gpus:
            torch.cuda.set_per_process_memory_fraction(self.group.memory)
        lm = await asyncio.to_thread(model.load, settings)
        guide = await asyncio.to_thread(stepwise.load, self.run, self.base_dir, lm.device)
        sizes = settings.batch_rows, settings.max_new_tokens
        limit = self.run.runtime.timeouts.round
        engine = decode.Engine(lm, *sizes, settings.stop, guide=guide, memory_share=self.group.memory)
        self.service = Service(engine, limit, _exit)
        what = f"{settings.model}, {lm.dtype}, {len(engine.rows)} rows, {self.group.threads} threads"
        print(f"{self.name}: {what}, context {lm.context_length or 'unlimited'}", file=sys.stderr)
        return lm.context_length

    async def _load_vllm(self) -> int:
        """vLLM's engine runs in processes of its own, which end with this one; this one ends when they have died."""
        from aisp_dist.vllm.invariance import check
        from aisp_dist.vllm.start import start

        settings, timeouts = self.run.generator, self.run.runtime.timeouts
        how = {"share": self.group.memory, "threads": self.group.threads, "limit": timeouts.round, "broken": _exit}
        self.service = service = await start(settings, self.run.prompts.max_tokens, **how)  # type: ignore[arg-type]
        served = service.served
        what = f"{settings.model}, vLLM, {served.rows} rows, context {served.context_length}"
        print(f"{self.name}: {what}", file=sys.stderr)
        self.checked = await check(service)
        if self.checked:
            print(f"{self.name}: {self.checked}", file=sys.stderr)
        return served.context_length

    async def _connect(self) -> int:
        from aisp_dist import endpoint

        settings = self.run.generator
        limit = self.run.runtime.timeouts.round
        self.service = service = await endpoint.connect(settings, self.run.prompts.max_tokens, limit)
        where = f"{service.endpoint.model} at {service.endpoint.url}"
        print(f"{self.name}: {where}, {service.served.rows} requests at a time", file=sys.stderr)
        return service.served.context_length

    def invariance(self) -> Check | None:
        """Of vLLM's batches, as this process found at its start; None where that was not asked for."""
        return self.checked

    async def rollout(self, round: Round) -> Rollout:
        """See Service."""
        return await self.service.rollout(round)

    async def nll(self, prompt_tokens: tuple[int, ...], responses: Sequence[tuple[int, ...]]) -> list[float]:
        return await self.service.nll(prompt_tokens, responses)

    async def calibrate(self, request: Calibration) -> Sampling:
        return await self.service.calibrate(request)

    async def health(self) -> dict[str, float]:
        """See fleet.Replica."""
        return {"progress": self.service.work, "busy": float(self.service.busy)} | self.service.figures()


def _exit(error: BaseException) -> None:
    traceback.print_exception(error)
    os._exit(1)
