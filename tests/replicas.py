"""Fake replicas for the tests of pools and fleets."""

from __future__ import annotations

import asyncio

from actors.pool import Pool


class Dead(Exception):
    """Stands for a process that went away."""


class Fake:
    """A replica that follows a script: one entry a call; callables are awaited, exceptions raised, values answered."""

    def __init__(self, name, script=(), restart=None):
        self.name, self.script, self.restarts, self.calls, self.on_restart = name, list(script), [], [], restart

    async def call(self, method, *args):
        self.calls.append(args)
        await asyncio.sleep(0)
        step = self.script.pop(0) if self.script else "ok"
        if isinstance(step, BaseException):
            raise step
        return await step() if callable(step) else step

    async def restart(self, reason):
        self.restarts.append(reason)
        if self.on_restart:
            await self.on_restart()

    async def health(self):
        return {"progress": len(self.calls), "busy": 0.0, "busy_seconds": 1.0}


def pool(*replicas, **options):
    defaults = {"max_calls": 4, "timeout": 5.0, "retries": 2, "is_fault": lambda e: isinstance(e, Dead)}
    return Pool(replicas, **defaults | options)


async def forever(*args):
    await asyncio.sleep(3600)
