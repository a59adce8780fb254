"""One run owns an output: a live one keeps it, a dead or silent one loses it, and whoever lost it can tell."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from aisp_dist.config import ConfigError
from aisp_dist.lease import Lease, LeaseLost, Owner, read_owners
from aisp_dist.place import Place

TTL = 0.4


def put(root: Path, owner: Owner) -> None:
    durable.write(root / ".staging/lease.json", json.dumps(asdict(owner)).encode())


def foreign(root: Path, **changes) -> Owner:
    """The lease of a process on a machine that this one cannot see; its number here is that of a live process."""
    lease = Lease.take(root, TTL)
    owner = replace(read_owner(root), token=f"not-{lease.token}", **({"host": "elsewhere"} | changes))
    put(root, owner)
    return owner


def child(root: Path) -> subprocess.Popen:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from aisp_dist.lease import Lease
        with Lease.take(Path(sys.argv[1])).beating():
            print("taken", flush=True)
            time.sleep(60)
    """)
    path = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, env=os.environ | path)
    assert process.stdout.readline() == b"taken\n"
    return process


def test_a_live_process_keeps_it_and_a_killed_one_loses_it_at_once(tmp_path):
    with child(tmp_path) as process:
        with pytest.raises(ConfigError, match=rf"a live run \(process {process.pid} on .*; wait for it, or stop"):
            Lease.take(tmp_path)
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now, as where nobody reaps
        said = []
        lease = Lease.take(tmp_path, say=said.append)
        assert lease.held() and said == []


def test_a_recycled_process_id_is_not_the_owner(tmp_path):
    Lease.take(tmp_path)
    put(tmp_path, replace(read_owner(tmp_path), started=1.0))
    assert Lease.take(tmp_path).held()


@pytest.mark.parametrize("change", [{}, {"host": socket.gethostname(), "machine": "another boot or container"}])
def test_an_owner_out_of_sight_loses_it_when_it_stands_still(tmp_path, change):
    owner = foreign(tmp_path, **change)
    said = []
    assert Lease.take(tmp_path, say=said.append).held()
    assert len(said) == 1 and owner.host in said[0] and "waiting 0.4 s" in said[0]


def test_an_owner_out_of_sight_keeps_it_while_it_beats(tmp_path):
    owner = foreign(tmp_path)

    def beat(line):
        put(tmp_path, replace(owner, beat=1))

    with pytest.raises(ConfigError, match=r"live run .* on elsewhere"):
        Lease.take(tmp_path, say=beat)
    assert read_owner(tmp_path).token == owner.token


def test_one_that_is_given_back_meanwhile_is_taken(tmp_path):
    foreign(tmp_path, ttl=3600.0)
    assert Lease.take(tmp_path, say=lambda line: (tmp_path / ".staging/lease.json").unlink()).held()


def test_who_lost_it_can_tell_and_cannot_renew_or_release_it(tmp_path):
    orphan = Lease.take(tmp_path)
    put(tmp_path, replace(read_owner(tmp_path), started=1.0))
    owner = Lease.take(tmp_path)
    orphan = pickle.loads(pickle.dumps(orphan))  # as an actor has it
    assert owner.held() and not orphan.held()
    with pytest.raises(LeaseLost, match="owns this output now"):
        orphan.renew()
    orphan.release()
    assert owner.held()
    owner.release()
    assert not owner.held() and read_owner(tmp_path) is None


def test_beats_until_the_block_ends_then_gives_it_back(tmp_path, monkeypatch):
    lease, beaten = Lease.take(tmp_path, ttl=0.04), threading.Event()
    renew = Lease.renew

    def seen(self):
        renew(self)
        if read_owner(tmp_path).beat >= 3:
            beaten.set()

    monkeypatch.setattr(Lease, "renew", seen)
    with lease.beating():
        assert beaten.wait(30)
    assert read_owner(tmp_path) is None


def _race(root, wins):
    try:
        Lease.take(root)
        wins.put(os.getpid())
        threading.Event().wait()  # lives on: the others must see it
    except ConfigError:
        wins.put(None)


def test_of_many_that_take_it_at_once_one_gets_it(tmp_path):
    context = multiprocessing.get_context("fork")
    wins = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, wins)) for _ in range(6)]
    for racer in racers:
        racer.start()
    winners = [pid for _ in racers if (pid := wins.get(timeout=60)) is not None]
    for racer in racers:
        racer.kill()
        racer.join()
    assert len(winners) == 1
    assert Lease.take(tmp_path).held()
