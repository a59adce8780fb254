"""Who owns an output directory: one run at a time, and an orphan cannot keep it.

.staging/lease.json names the owner's process and carries a counter that the owner raises; it is read and replaced under
a lock on .staging/lease.lock. A new run takes the lease of a process that is provably dead (same machine, same boot) at
once, and that of one it cannot see when the counter has stood still for the owner's time to live. An owner whose lease
was taken finds another token there and stops before it writes (`held`). Clocks are not compared between machines.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from aisp_dist import durable
from aisp_dist.config import ConfigError


class LeaseLost(RuntimeError):
    """Another run has taken the output."""


@dataclass(frozen=True)
class Owner:
    """lease.json. machine: boot id and process namespace, equal where process ids mean the same; started: the process's
    start time in seconds since the epoch; ttl: seconds without a beat after which the lease may be taken."""

    token: str
    host: str
    machine: str
    pid: int
    started: float
    ttl: float
    beat: int = 0

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

    root: Path
    token: str
    ttl: float

    @classmethod
    def take(cls, root: Path, ttl: float = 20.0, say: Callable[[str], None] = lambda line: None) -> Lease:
        """Own the output at `root`. Waits at most the present owner's ttl, saying why through `say`.

        Raises ConfigError where a live run owns it.
        """
        durable.make_dir(root / ".staging")
        host, machine = _machine()
        started = psutil.Process().create_time()
        mine = Owner(secrets.token_hex(8), host, machine, os.getpid(), started, ttl)
        seen: Owner | None = None
        deadline = 0.0
        while True:
            with _locked(root):
                owner = read_owner(root)
                alive = None if owner is None else owner.alive()
                stale = owner is not None and owner == seen and time.monotonic() >= deadline
                if owner is None or alive is False or stale:
                    _write(root, mine)
                    return cls(root, mine.token, ttl)
            if alive or (seen is not None and owner != seen):
                raise ConfigError(f"output: {root} is owned by a live run ({owner}); wait for it, or stop it")
            if seen is None:
                seen, deadline = owner, time.monotonic() + owner.ttl
                say(f"{root} was owned by {owner}; waiting {owner.ttl:g} s to see whether that run lives")
            time.sleep(min(1.0, owner.ttl / 10))

    def renew(self) -> None:
        """Show that the owner lives. Raises LeaseLost where another run has taken the lease."""
        with _locked(self.root):
            owner = read_owner(self.root)
            if owner is None or owner.token != self.token:
                raise LeaseLost(f"{self.root}: {owner or 'nobody'} owns this output now; this run stops")
            _write(self.root, Owner(**(asdict(owner) | {"beat": owner.beat + 1})))

    def held(self) -> bool:
        owner = read_owner(self.root)
        return owner is not None and owner.token == self.token

    def release(self) -> None:
        """Give the output back; nothing where it is another's already."""
        with _locked(self.root):
            if self.held():
                _path(self.root).unlink()

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
            self.release()


def read_owner(root: Path) -> Owner | None:
    """The owner as lease.json has it; None where there is none, or where the file is not one of ours."""
    try:
        return Owner(**json.loads(_path(root).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write(root: Path, owner: Owner) -> None:
    durable.write(_path(root), json.dumps(asdict(owner)).encode())


def _path(root: Path) -> Path:
    return root / ".staging" / "lease.json"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Held for one read and one write; the lock file stays, since a lock on a removed file protects nothing."""
    handle = os.open(root / ".staging" / "lease.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _machine() -> tuple[str, str]:
    """Host name, and what tells boots and process namespaces (containers) of one host name apart."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot, namespace = f"{psutil.boot_time():.0f}", ""
    return socket.gethostname(), f"{boot} {namespace}"
