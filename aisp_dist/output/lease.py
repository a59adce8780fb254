"""Who owns an output: one run at a time, and no orphan can keep it. A run may own one shard (i, n), beside the owners
of other shards of the same n.

.staging/lease.json lists the owners, each with its process and a counter that it keeps raising. Place.update replaces
the file, so that of two changes at the same moment the second sees the first. A new run takes the lease of a process
that is provably dead (same machine, same boot) at once. It takes the lease of a process that it cannot see when the
counter has not moved for the owner's time to live. An owner whose lease was taken finds no entry with its token and
stops before it writes (`held`). Clocks of different machines are not compared.
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
    """An entry of lease.json.

    machine: boot id and process namespace; where they are equal, process ids mean the same. started: start of the
    process, seconds since the epoch. ttl: seconds without a beat after which the lease may be taken. shard: (i, n);
    (0, 1) is the whole output.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: float
    ttl: float
    beat: int = 0
    shard: tuple[int, int] = (0, 1)

    def excludes(self, shard: tuple[int, int]) -> bool:
        """Whether nobody else may own this shard at the same time."""
        return self.shard[1] != shard[1] or self.shard[0] == shard[0]

    def alive(self) -> bool | None:
        """Whether the owner's process is alive; None where this machine cannot know, or the process is stopped."""
        if (self.host, self.machine) != _machine():
            return None
        try:
            process = psutil.Process(self.pid)
            same: bool = abs(process.create_time() - self.started) < 2  # the system's boot time drifts
            if same and process.status() == psutil.STATUS_STOPPED:
                return None  # it may never continue: the counter decides
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Lease:
    """A taken lease. Pickles, so that an actor can ask `held` for the run that started it."""

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
        """Take a shard of the output. Waits for at most the present owner's ttl, and says so through `say`. A sole
        owner removes the temporary files of killed writers.

        Raises ConfigError where a live run owns the shard, or owns the output in another number of shards.
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
        """Raise the counter. Raises LeaseLost where another run has taken the lease."""

        def beat(owners: list[Owner]) -> list[Owner]:
            if all(owner.token != self.token for owner in owners):
                now = ", ".join(map(str, owners)) or "nobody"
                raise LeaseLost(f"{self.place}: {now} owns this output now; this run stops")
            return [replace(o, beat=o.beat + 1) if o.token == self.token else o for o in owners]

        _update(self.place, beat)

    def held(self) -> bool:
        return any(owner.token == self.token for owner in read_owners(self.place))

    def release(self) -> None:
        """Give the output back; does nothing where another run has taken it."""
        _update(self.place, lambda owners: [owner for owner in owners if owner.token != self.token])

    @contextmanager
    def beating(self) -> Iterator[Lease]:
        """Renew the lease from a thread, four times per ttl; release it at the end."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.ttl / 4):
                try:
                    self.renew()
                except LeaseLost:
                    return  # the next write finds out through `held`
                except OSError:
                    continue  # the file system is away for a moment; the next beat may reach it

        thread = threading.Thread(target=beat, name="lease", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()
            with suppress(OSError):  # the run's own error matters more; the next run waits for the ttl
                self.release()


def read_owners(place: Place) -> list[Owner]:
    """The owners in lease.json; none where there is no such file or it is not ours."""
    return _parse(place.read(_FILE))


def _parse(data: bytes | None) -> list[Owner]:
    try:
        return [Owner(**entry | {"shard": tuple(entry["shard"])}) for entry in json.loads(data or b"[]")]
    except (ValueError, TypeError, KeyError):
        return []


def _update(place: Place, change: Callable[[list[Owner]], list[Owner]]) -> None:
    place.update(_FILE, lambda data: json.dumps([asdict(owner) for owner in change(_parse(data))]).encode())


def _machine() -> tuple[str, str]:
    """Host name, and a text that differs between boots and process namespaces (containers) of that host."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot, namespace = f"{psutil.boot_time():.0f}", ""
    return socket.gethostname(), f"{boot} {namespace}"
