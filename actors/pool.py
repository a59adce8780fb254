"""Calls to replicas that may die, hang or be slow. Owns the difference between a fault and an answer:

- a fault of the infrastructure (a dead, frozen or stalled process) replaces the process and repeats the call wherever
  there is room. A call that saw more than `retries` faults is tried alone: if processes die of it again and again, and
  answer others, it becomes RowError; else the run ends with Fault, and what is committed stays;
- an error that the callee raised itself is repeated once in a fresh process; if it comes again it is about this prompt,
  and becomes RowError. So does a reward's timeout (`timeout_is_content`).

Plain asyncio; knows Ray only through the replicas it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from actors.fleet import Call, Fault, Fleet, Replica, Slot, say
from aisp_dist.align import RowError

log = logging.getLogger("aisp")


class _Away(Exception):
    """The one slot that will do did not come back in time."""


class _Waiter(NamedTuple):
    turn: asyncio.Future[Slot]
    home: str
    only: Slot | None


class Pool:
    """Replicas of one kind.

    limit: calls a replica is given at a time; more wait here, outside the timeout. timeout: seconds for an answer;
    stall, patience: see Fleet.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        limit: int,
        timeout: float,
        retries: int,
        is_fault: Callable[[BaseException], bool],
        timeout_is_content: bool = False,
        stall: float = 60.0,
        patience: float = 1800.0,
    ) -> None:
        self.fleet = Fleet(
            replicas, retries=retries, stall=stall, patience=patience, up=self._hand_out, broken=self._give_up
        )
        self.limit, self.timeout, self.retries = limit, timeout, retries
        self.is_fault, self.timeout_is_content = is_fault, timeout_is_content
        self.waiting: deque[_Waiter] = deque()
        self.home: dict[str, Slot] = {}  # where a prompt's prefix and control are warm; a preference, not a rule
        self.isolation = asyncio.Lock()
        self.answers = 0
        self.canary: tuple[Any, ...] | None = None  # the last call that was answered
        self.repeats = 0
        self._numbers = itertools.count()

    async def call(self, home: str, method: str, *args: Any) -> Any:
        """The method's answer from some replica, preferably the one that served `home` before.

        Raises RowError where a fresh process reproduces the error, Fault after too many infrastructure faults.
        """
        faults = errors = 0
        fresh: Slot | None = None  # the one slot that may judge, once restarted
        while faults <= self.retries:
            slot = await self._take_fresh(home, fresh) if fresh else await self._take(home)
            epoch = slot.epoch
            try:
                return await self._answer(slot, home, method, *args)
            except Exception as error:
                content, reason = self._judge(slot, epoch, error)
                blameless = slot.epoch != epoch and slot.sacrificed
                faults, errors = faults + (not content and not blameless), errors + content
                if errors > 1:
                    if isinstance(error, TimeoutError):  # the process still hangs on it
                        self.fleet.restart(slot, epoch, reason, sacrificed=True)
                    raise RowError(f"{method} on {slot.replica.name}, again in a fresh process: {reason}") from None
                log.info("%s of %s is repeated: %s on %s", method, home, reason, slot.replica.name)
                self.repeats += 1
                self.fleet.event("retry", slot.replica.name)
                self.fleet.restart(slot, epoch, reason, sacrificed=content)
                fresh = slot if content else None
        async with self.isolation:
            return await self._alone(slot, home, method, *args)

    async def _alone(self, slot: Slot, home: str, method: str, *args: Any) -> Any:
        """The last tries, each alone in a fresh process. It is the call that kills it where that process then answers
        what another did; if not, it is the infrastructure."""
        try:
            for _ in range(self.retries + 1):
                slot = await self._take_fresh(home, slot, alone=True)
                epoch = slot.epoch
                try:
                    return await self._answer(slot, home, method, *args)
                except Exception as error:
                    _, reason = self._judge(slot, epoch, error)
                    self.fleet.restart(slot, epoch, reason)
                slot = await self._take_fresh(home, slot, alone=True)
                what = (
                    f"{method} of {home} on {slot.replica.name} failed more than runtime.retries = {self.retries} times"
                )
                if not await self._serves(slot):
                    raise Fault(f"{what}, and nothing else succeeds there; the last: {reason}")
            raise RowError(f"{what}, alone in a fresh process that answers other calls: {reason}")
        finally:
            slot.alone = False
            self._hand_out(slot)

    async def _serves(self, slot: Slot) -> bool:
        """Whether the process answers what was answered last; False where nothing was."""
        if self.canary is None:
            slot.reserved -= 1
            return False
        epoch = slot.epoch
        try:
            await self._answer(slot, *self.canary)
        except Exception as error:
            self.fleet.restart(slot, epoch, say(error))
            return False
        return True

    def forget(self, home: str) -> None:
        if (slot := self.home.pop(home, None)) is not None:
            slot.homes -= 1

    async def _answer(self, slot: Slot, home: str, method: str, *args: Any) -> Any:
        number = next(self._numbers)
        slot.reserved -= 1
        try:
            async with asyncio.timeout(self.timeout) as deadline:
                slot.calls[number] = Call(home, method, asyncio.get_running_loop().time(), deadline)
                answer = await slot.replica.call(method, *args)
            self.answers += 1
            self.canary = (home, method, *args)
            slot.barren = 0
            return answer
        finally:
            slot.calls.pop(number, None)
            self._hand_out(slot)

    def _judge(self, slot: Slot, epoch: int, error: Exception) -> tuple[bool, str]:
        """Whether the error is about the call's content, and what to say of it."""
        if isinstance(error, TimeoutError) and slot.epoch != epoch:
            return False, "its process was replaced"
        if isinstance(error, TimeoutError):
            return self.timeout_is_content, f"no answer within {self.timeout:g} s"
        return not self.is_fault(error), say(error)

    async def _take(self, home: str, only: Slot | None = None) -> Slot:
        """A slot with room, first come first served. Raises _Away where `only` that one will do and it stays away."""
        if self.fleet.broken:
            raise self.fleet.broken
        slot = only or self._choose(home)
        if slot is not None and self._open(slot, only):
            return self._give(slot, home)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), home, only)
        self.waiting.append(waiter)
        try:
            await asyncio.wait({waiter.turn}, timeout=self.fleet.patience if only else None)
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.exception():
                waiter.turn.result().reserved -= 1
                self._hand_out(waiter.turn.result())
            raise
        finally:
            if waiter in self.waiting:
                self.waiting.remove(waiter)
        if not waiter.turn.done():
            raise _Away
        return waiter.turn.result()

    async def _take_fresh(self, home: str, slot: Slot, alone: bool = False) -> Slot:
        """That slot, restarted before; or another, restarted now, where that one does not come back."""
        while True:
            slot.alone = alone
            try:
                return await self._take(home, slot)
            except _Away:
                slot.alone = False
                others = [s for s in self.fleet.slots if s.up and s is not slot]
                if not others:
                    raise Fault(f"{slot.replica.name} did not come back within {self.fleet.patience:g} s") from None
                self.fleet.restart(others[0], others[0].epoch, f"{slot.replica.name} stays away", sacrificed=True)
                slot = others[0]
            except BaseException:
                slot.alone = False
                raise

    def _choose(self, home: str) -> Slot | None:
        """Where the prompt is warm, else where the fewest are at home."""
        warm = self.home.get(home)
        if warm is not None and self._open(warm, None):
            return warm
        return min(
            (s for s in self.fleet.slots if self._open(s, None)), key=lambda s: (s.homes, s.in_flight), default=None
        )

    def _open(self, slot: Slot, only: Slot | None) -> bool:
        if not slot.up:
            return False
        if slot.alone:
            return only is slot and not slot.in_flight
        return slot.in_flight < self.limit

    def _give(self, slot: Slot, home: str) -> Slot:
        if self.home.get(home) is not slot:
            self.forget(home)
            self.home[home] = slot
            slot.homes += 1
        slot.reserved += 1
        return slot

    def _hand_out(self, slot: Slot) -> None:
        """Room has come up: to those who wait, in their order."""
        for waiter in list(self.waiting) if self.waiting and slot.up else ():
            if not self._open(slot, slot):
                return
            if waiter.only in (None, slot) and self._open(slot, waiter.only):
                self.waiting.remove(waiter)
                if not waiter.turn.done():
                    waiter.turn.set_result(self._give(slot, waiter.home))

    def _give_up(self, error: BaseException) -> None:
        while self.waiting:
            waiter = self.waiting.popleft()
            if not waiter.turn.done():
                waiter.turn.set_exception(error)
