"""Who owns an output: one run at a time, and an orphan cannot keep it. A run may own it in shards (i, n): then it is
shared by the owners of other shards of the same n.

.staging/lease.json lists the owners, each with its process and a counter that it raises; it is replaced by
Place.update, so that of two changes at one moment the second sees the first. A new run takes the lease of a process
that is provably dead (same machine, same boot) at once, and that of one it cannot see when the counter has stood still
for the owner's time to live. An owner whose lease was taken finds no entry with its token and stops before it writes
(`held`). Clocks are not compared between machines.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from aisp_dist.config import ConfigError
from aisp_dist.output.filesystem import Place

_FILE = ".staging/lease.json"


class LeaseLost(RuntimeError):
    """Another run has taken the output."""


@dataclass(frozen=True)
class Owner:
    """An entry of lease.json. machine: boot id and process namespace, equal where process ids mean the same; started:
    the process's start time in seconds since the epoch; ttl: seconds without a beat after which the lease may be taken;
    shard: (i, n), what it owns, (0, 1) for everything."""

    token: str
    host: str
    machine: str
    pid: int
    started: float
    ttl: float
    beat: int = 0
    shard: tuple[int, int] = (0, 1)

    def excludes(self, shard: tuple[int, int]) -> bool:
        """Whether nobody else may own this shard of the output meanwhile."""
        return self.shard[1] != shard[1] or self.shard[0] == shard[0]

    def alive(self) -> bool | None:
        """Whether the owner's process lives; None where this machine cannot know, or it is stopped."""
        if (self.host, self.machine) != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            same: bool = abs(process.create_time() - self.started) < 2  # the system's notion of its boot time drifts
            if same and process.status() == psutil.STATUS_STOPPED:
                return None  # it may never run again: the counter decides
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Lease:
    """A taken lease; pickles, so that an actor can ask `held` for the run that started it."""

    place: Place
    token: str
    ttl: float

    @classmethod
    def take(
        cls,
        place: Place,
        ttl: float = 20.0,
        say: Callable[[str], None] = lambda line: None,
        shard: tuple[int, int] = (0, 1),
    ) -> Lease:
        """Own a shard of the output. Waits at most the present owner's ttl, saying why through `say`; who then owns it
        alone tidies up after writers that were killed.

        Raises ConfigError where a live run owns the shard, or another number of shards.
        """
        host, machine = _machine()
        started = psutil.Process().create_time()
        mine = Owner(secrets.token_hex(8), host, machine, os.getpid(), started, ttl, shard=shard)
        seen: dict[str, Owner] = {}
        deadline = 0.0
        rivals: list[Owner] = []

        def claim(owners: list[Owner]) -> list[Owner]:
            others = [owner for owner in owners if owner.token != mine.token]
            stale = [owner for owner in others if seen.get(owner.token) == owner and time.monotonic() >= deadline]
            rivals[:] = [o for o in others if o.excludes(shard) and o.alive() is not False and o not in stale]
            if rivals:
                return owners
            left = [owner for owner in others if not owner.excludes(shard)]
            if not left:
                place.collect()
            return [*left, mine]

        while True:
            _update(place, claim)
            if not rivals:
                return cls(place, mine.token, ttl)
            for rival in rivals:
                if rival.alive() or (seen and seen.get(rival.token) != rival):
                    raise ConfigError(f"output: {place} is owned by a live run ({rival}); wait for it, or stop it")
            if not seen:
                seen = {rival.token: rival for rival in rivals}
                wait = max(rival.ttl for rival in rivals)
                deadline = time.monotonic() + wait
                say(f"{place} was owned by {rivals[0]}; waiting {wait:g} s to see whether that run lives")
            time.sleep(min(1.0, min(rival.ttl for rival in rivals) / 10))

    def renew(self) -> None:
        """Show that the owner lives. Raises LeaseLost where another run has taken the lease."""

        def beat(owners: list[Owner]) -> list[Owner]:
            if all(owner.token != self.token for owner in owners):
                now = ", ".join(map(str, owners)) or "nobody"
                raise LeaseLost(f"{self.place}: {now} owns this output now; this run stops")
            return [replace(o, beat=o.beat + 1) if o.token == self.token else o for o in owners]

        _update(self.place, beat)

    def held(self) -> bool:
        return any(owner.token == self.token for owner in read_owners(self.place))

    def release(self) -> None:
        """Give the output back; nothing where it is another's already."""
        _update(self.place, lambda owners: [owner for owner in owners if owner.token != self.token])

    @contextmanager
    def beating(self) -> Iterator[Lease]:
        """Renew from a thread, four times per ttl, and release at the end."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.ttl / 4):
                try:
                    self.renew()
                except LeaseLost:
                    return  # whoever writes next finds out by `held`
                except OSError:
                    continue  # a file system that is away for a moment; the next beat may reach it

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
            with suppress(OSError):  # what the run ended with matters more; the next run waits for the ttl
                self.release()


def read_owners(place: Place) -> list[Owner]:
    """The owners as lease.json has them; none where there are none, or where the file is not one of ours."""
    return _parse(place.read(_FILE))


def _parse(data: bytes | None) -> list[Owner]:
    try:
        return [Owner(**entry | {"shard": tuple(entry["shard"])}) for entry in json.loads(data or b"[]")]
    except (ValueError, TypeError, KeyError):
        return []


def _update(place: Place, change: Callable[[list[Owner]], list[Owner]]) -> None:
    place.update(_FILE, lambda data: json.dumps([asdict(owner) for owner in change(_parse(data))]).encode())


def _machine() -> tuple[str, str]:
    """Host name, and what tells boots and process namespaces (containers) of one host name apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot, namespace = f"{psutil.boot_time():.0f}", ""
    return socket.gethostname(), f"{boot} {namespace}"
