"""Calls to replicas that may die, hang, be slow or raise. Owns the difference between a fault and an answer.

A fault (a process that is dead, frozen or stalled) replaces the process and repeats the call wherever there is room.
After more than `retries` faults the call is tried alone, in a fresh process each time. Where it goes on failing while
another prompt is answered there in between, it becomes RowError; else the run ends with Fault.

An error that the callee raises is an answer. It is confirmed by one more try, on another replica if there is one, and
becomes RowError if the process that raised it still answers what it answered before. A process that does not is broken:
it is replaced, and the call is tried alone in the fresh one.

A server behind the callee that does not answer (Unavailable) is neither: the call is repeated after a pause, and the
process stays. After `outage` seconds the call is tried alone. Without an answer twice, with another prompt answered
after each, it becomes RowError; where the other prompt is not answered either, the run ends with Fault.

A call over its time limit is tried alone in a fresh process. Over the limit twice, with another prompt answered there
in between by the same kind of call, it becomes RowError.

Plain asyncio; knows Ray only through the replicas it is given.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from actors.fleet import Call, Fault, Fleet, Replica, Slot, cause
from actors.tries import Away, Down, Lost, NoAnswer, Over, Raised
from aisp_dist.align import RowError, reason
from aisp_dist.records import Late
from aisp_dist.rewards.client import Unavailable

log = logging.getLogger("aisp")

Home = tuple[str, int]  # a prompt and the part of its samples that a replica has
_PAUSE = 1.0  # seconds before a server that is down is asked again: the first time; twice as long each time


@dataclass
class _Wait:
    """For a server that is down. until: the loop's time after which it is not asked again."""

    pauses: int = 0
    until: float = 0.0


class _Waiter(NamedTuple):
    turn: asyncio.Future[Slot]
    home: Home
    only: Slot | None


class Pool:
    """Replicas of one kind.

    max_calls: that a replica is given at a time; further calls wait here. timeout: seconds that a replica may take
    for a call; None where it keeps its own limit and raises Late. outage: seconds that a server behind a replica may be
    down (default: timeout). key: the time limit's in the configuration, for messages. stall, patience: see Fleet.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        max_calls: int,
        timeout: float | None,
        retries: int,
        is_fault: Callable[[BaseException], bool],
        outage: float | None = None,
        key: str = "the time limit",
        stall: float = 60.0,
        patience: float = 1800.0,
    ) -> None:
        self.fleet = Fleet(
            replicas, retries=retries, stall=stall, patience=patience, up=self._hand_out, broken=self._give_up
        )
        self.max_calls, self.timeout, self.retries = max_calls, timeout, retries
        self.outage = (timeout or 0.0) if outage is None else outage
        self.is_fault, self.key = is_fault, key
        self.waiting: deque[_Waiter] = deque()
        self.home: dict[Home, Slot] = {}  # where a prompt's prefix and control are warm; a preference, not a rule
        self.isolation = asyncio.Lock()  # one call at a time has a replica for itself
        self.answers = 0
        self.repeats = 0
        self._answered: dict[str, dict[str, tuple[Any, ...]]] = {}  # by method, of the last two prompts: arguments
        self._numbers = itertools.count()

    async def call(self, home: str, method: str, *args: Any, part: int = 0) -> Any:
        """The method's answer from some replica, preferably the one that served this part of `home` before.

        Raises RowError where the call itself is to blame, Fault after too many faults.
        """
        faults, raised, slot, wait, down = 0, None, None, _Wait(), False
        while faults <= self.retries:
            sound: bool | None = True
            try:
                async with self._slot(home, part, avoid=slot if raised else None) as slot:
                    try:
                        return await self._try(slot, home, method, *args)
                    except Raised:
                        sound = await self._sound(slot, home, method)
                        raise
            except Lost as error:
                faults += error.counts
                self._repeats(slot, home, method, error)
            except Down as error:
                if down := not await self._wait(wait, slot, home, method, error):
                    break
            except Over as error:
                self._repeats(slot, home, method, error)
                break
            except Raised as error:
                if raised and sound:
                    raise RowError(str(error)) from None
                self._repeats(slot, home, method, error)
                if raised or sound is False:
                    break
                raised = error
        assert slot is not None
        if down:  # no fresh process could load
            with suppress(NoAnswer):
                async with self._alone(home, slot, fresh=False) as slot:
                    return await self._try_up(wait, slot, home, method, *args)
        return await self._last_tries(slot, home, method, *args)

    async def once(self, home: str, method: str, *args: Any) -> Any:
        """As `call`, but an error that the callee raises is not confirmed. None where there is no answer."""
        async with self._slot(home) as slot:
            try:
                return await self._try(slot, home, method, *args)
            except Raised as error:
                raise RowError(str(error)) from None
            except NoAnswer:
                return None

    async def _last_tries(self, slot: Slot, home: str, method: str, *args: Any) -> Any:
        """Tries alone in a fresh process, between which the process must answer another prompt."""
        failures: Counter[type[NoAnswer]] = Counter()
        between = False  # another prompt was answered there
        while True:
            if self._witness(home, method) is None:
                async with self._slot(home):  # behind those who wait: one of them may be the witness
                    pass
            async with self._alone(home, slot) as slot:
                try:
                    return await self._try_up(_Wait(), slot, home, method, *args)
                except Raised as error:
                    await self._sound(slot, home, method)  # the next call must not find what this one left behind
                    raise RowError(str(error)) from None
                except NoAnswer as error:
                    failures[type(error)] += 1
                    failure = error
            alone = "alone in a fresh process that answers other prompts"
            if failures[Over] == 2 and between:
                raise RowError(f"{self.key}: {failure}, twice, {alone}; raise the limit if it needs longer")
            if failures[Lost] > max(self.retries, 1) and between:
                raise RowError(f"{method} ends its process every time, {alone}: {failure}")
            sound: bool | None = False
            if failures.total() <= max(self.retries, 1):
                self._repeats(slot, home, method, failure)
                async with self._alone(home, slot, fresh=False) as slot:
                    sound = await self._sound(slot, home, method)
            if sound is False:
                raise Fault(
                    f"{method} of {home} on {slot.replica.name} failed more than runtime.retries = {self.retries} "
                    f"times, and nothing else succeeds there; the last failure: {failure}"
                )
            between |= bool(sound)

    async def _try_up(self, wait: _Wait, slot: Slot, home: str, method: str, *args: Any) -> Any:
        """As `_try`, alone, but a server that is down is asked again, by the same process. Raises Fault where it has
        been down for too long, RowError where it is down for this call and no other."""
        refused = 0
        while True:
            try:
                return await self._try(slot, home, method, *args)
            except Down as error:
                down = error
            if (sound := await self._sound(slot, home, method)) is False:
                raise Lost("its process was replaced", counts=False)
            refused += sound is True
            if refused == 2:
                raise RowError(f"{down.why}, twice, alone, while another prompt is answered")
            if not await self._wait(wait, slot, home, method, down) and not sound:
                raise Fault(f"{down}; it was asked again for {self.outage:g} s ({self.key})")

    async def _wait(self, wait: _Wait, slot: Slot | None, home: str, method: str, error: Down) -> bool:
        """Until a server that is down may be asked again. False where it has been down for too long."""
        now, limit = asyncio.get_running_loop().time(), self.outage
        if not wait.pauses:
            wait.until = now + limit
        elif now > wait.until:
            return False
        log.warning("%s; asking again", error)
        self._repeats(slot, home, method, error)
        await asyncio.sleep(min(_PAUSE * 2**wait.pauses, limit / 4))
        wait.pauses += 1
        return True

    def _witness(self, home: str, method: str) -> tuple[Any, ...] | None:
        """A call of another prompt that was answered: its home, method and arguments."""
        known = self._answered.get(method, {})
        return next(((other, method, *known[other]) for other in reversed(known) if other != home), None)

    async def _sound(self, slot: Slot, home: str, method: str) -> bool | None:
        """Whether the process in a slot that this task holds still answers what another prompt was answered; if it does
        not, it is replaced. None where no other prompt was answered yet."""
        if (witness := self._witness(home, method)) is None:
            return None
        epoch = slot.epoch
        try:
            await self._try(slot, *witness)
        except Down:
            return None
        except NoAnswer as error:
            self.fleet.restart(slot, epoch, f"it fails on what was answered before: {error}", sacrificed=True)
            return False
        return True

    def forget(self, home: str) -> None:
        for part in range(len(self.fleet.slots)):
            self._leave((home, part))

    def _leave(self, home: Home) -> None:
        if (slot := self.home.pop(home, None)) is not None:
            slot.homes -= 1

    async def _try(self, slot: Slot, home: str, method: str, *args: Any) -> Any:
        """One call in a slot that this task holds. Raises NoAnswer; of a process that is gone or hangs when it has
        been replaced."""
        epoch, number, slot.used = slot.epoch, next(self._numbers), True
        try:
            async with asyncio.timeout(self.timeout) as deadline:
                slot.calls[number] = Call(home, method, asyncio.get_running_loop().time(), deadline)
                answer = await slot.replica.call(method, *args)
        except Exception as error:
            del slot.calls[number]
            if slot.epoch != epoch:  # whatever it says, the process was replaced meanwhile
                raise Lost("its process was replaced", counts=not slot.sacrificed) from None
            if deadline.expired():
                late = f"no answer within {self.timeout:g} s"
                self.fleet.restart(slot, epoch, late, sacrificed=True)
                raise Over(late) from None
            if isinstance(why := cause(error), Late):
                raise Over(str(why)) from None
            if isinstance(why, Unavailable):
                raise Down(why) from None
            if not self.is_fault(error):
                raise Raised(reason(why)) from None
            self.fleet.restart(slot, epoch, reason(why))
            raise Lost(reason(why)) from None
        finally:
            slot.calls.pop(number, None)
        self.answers += 1
        slot.barren = 0
        known = self._answered.setdefault(method, {})
        if home not in known:  # a prompt's first call is its smallest
            known[home] = args
            if len(known) > 2:
                del known[next(iter(known))]
        return answer

    def _repeats(self, slot: Slot | None, home: str, method: str, error: NoAnswer) -> None:
        assert slot is not None
        log.info("%s of %s is repeated: %s on %s", method, home, error, slot.replica.name)
        self.repeats += 1
        self.fleet.event("retry", slot.replica.name)

    @asynccontextmanager
    async def _slot(self, home: str, part: int = 0, avoid: Slot | None = None) -> AsyncIterator[Slot]:
        """A replica with room, first come first served; not `avoid` if another has room now."""
        slot = await self._take((home, part), avoid=avoid)
        try:
            yield slot
        finally:
            self._release(slot)

    @asynccontextmanager
    async def _alone(self, home: str, slot: Slot, fresh: bool = True) -> AsyncIterator[Slot]:
        """That replica when its other calls are done, and nobody else in it; or another replica, where that one does
        not come back. fresh: in a process that nothing was asked of."""
        async with self.isolation:
            try:
                slot.alone = True
                while True:
                    try:
                        await self._take((home, 0), slot)
                    except Away:
                        others = [s for s in self.fleet.slots if s.up and s is not slot]
                        if not others:
                            what = f"{slot.replica.name} did not come back within {self.fleet.patience:g} s"
                            raise Fault(what) from None
                        slot.alone, slot = False, others[0]
                        slot.alone = True
                        continue
                    if not (fresh and slot.used):
                        break
                    self.fleet.restart(slot, slot.epoch, "a fresh process is wanted", sacrificed=True)
                    self._release(slot)
                try:
                    yield slot
                finally:
                    slot.alone = False
                    self._release(slot)
            finally:
                slot.alone = False
                self._hand_out(slot)

    async def _take(self, home: Home, only: Slot | None = None, avoid: Slot | None = None) -> Slot:
        """Hold a place in a slot. Raises Away where `only` that one will do and it stays away."""
        while True:
            if self.fleet.broken:
                raise self.fleet.broken
            slot = only or self._choose(home, avoid)
            if slot is not None and self._open(slot, only):
                return self._give(slot, home)
            waiter = _Waiter(asyncio.get_running_loop().create_future(), home, only)
            self.waiting.append(waiter)
            try:
                await asyncio.wait({waiter.turn}, timeout=self.fleet.patience if only else None)
            except asyncio.CancelledError:
                if waiter.turn.done() and not waiter.turn.exception():
                    self._release(waiter.turn.result())
                raise
            finally:
                if waiter in self.waiting:
                    self.waiting.remove(waiter)
            if not waiter.turn.done():
                raise Away
            slot = waiter.turn.result()
            if slot.up:
                return slot
            self._release(slot)  # its process was replaced in the moment between

    def _choose(self, home: Home, avoid: Slot | None) -> Slot | None:
        """Where the prompt is warm, else where the fewest prompts are at home."""
        warm = self.home.get(home)
        if warm is not None and warm is not avoid and self._open(warm, None):
            return warm
        there = [slot for slot in self.fleet.slots if self._open(slot, None)]
        return min(there, key=lambda slot: (slot is avoid, slot.homes, slot.held), default=None)

    def _open(self, slot: Slot, only: Slot | None) -> bool:
        if not slot.up:
            return False
        if slot.alone:
            return only is slot and not slot.held
        return slot.held < self.max_calls

    def _give(self, slot: Slot, home: Home) -> Slot:
        if self.home.get(home) is not slot:
            self._leave(home)
            self.home[home] = slot
            slot.homes += 1
        slot.held += 1
        return slot

    def _release(self, slot: Slot) -> None:
        slot.held -= 1
        self._hand_out(slot)

    def _hand_out(self, slot: Slot) -> None:
        """There is room: for those who wait, in their order."""
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
