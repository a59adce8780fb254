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
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease, LeaseLost, Owner, read_owners

TTL = 0.4


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    return Place.at(tmp_path) if request.param == "local" else request.getfixturevalue("server").place()


def put(place: Place, *owners: Owner) -> None:
    place.write(".staging/lease.json", json.dumps([asdict(owner) for owner in owners]).encode())


def foreign(place: Place, **changes) -> Owner:
    """The lease of a process on a machine that this one cannot see; its number here is that of a live process."""
    lease = Lease.take(place, TTL)
    (owner,) = read_owners(place)
    owner = replace(owner, token=f"not-{lease.token}", **({"host": "elsewhere"} | changes))
    put(place, owner)
    return owner


def child(root: Path) -> subprocess.Popen:
    script = textwrap.dedent("""
        import sys, time
        from aisp_dist.output.lease import Lease
        from aisp_dist.output.filesystem import Place
        with Lease.take(Place.at(sys.argv[1])).beating():
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
            Lease.take(Place.at(tmp_path))
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now, as where nobody reaps
        said = []
        lease = Lease.take(Place.at(tmp_path), say=said.append)
        assert lease.held() and said == []


def test_a_recycled_process_id_is_not_the_owner(place):
    Lease.take(place)
    put(place, replace(read_owners(place)[0], started=1.0))
    assert Lease.take(place).held()


@pytest.mark.parametrize("change", [{}, {"host": socket.gethostname(), "machine": "another boot or container"}])
def test_an_owner_out_of_sight_loses_it_when_it_stands_still(place, change):
    owner = foreign(place, **change)
    said = []
    assert Lease.take(place, say=said.append).held()
    assert len(said) == 1 and owner.host in said[0] and "waiting 0.4 s" in said[0]


def test_an_owner_out_of_sight_keeps_it_while_it_beats(place):
    owner = foreign(place)

    def beat(line):
        put(place, replace(owner, beat=1))

    with pytest.raises(ConfigError, match=r"live run .* on elsewhere"):
        Lease.take(place, say=beat)
    assert read_owners(place)[0].token == owner.token


def test_one_that_is_given_back_meanwhile_is_taken(place):
    foreign(place, ttl=3600.0)
    assert Lease.take(place, say=lambda line: place.remove(".staging/lease.json")).held()


def test_who_lost_it_can_tell_and_cannot_renew_or_release_it(place):
    orphan = Lease.take(place)
    put(place, replace(read_owners(place)[0], started=1.0))
    owner = Lease.take(place)
    orphan = pickle.loads(pickle.dumps(orphan))  # as an actor has it
    assert owner.held() and not orphan.held()
    with pytest.raises(LeaseLost, match="owns this output now"):
        orphan.renew()
    orphan.release()
    assert owner.held()
    owner.release()
    assert not owner.held() and read_owners(place) == []


def test_shards_of_one_number_are_owned_by_several_and_of_another_by_none_of_them(place):
    first, second = (Lease.take(place, shard=(i, 3)) for i in (0, 2))
    for taken in ((0, 3), (2, 3), (1, 2), (0, 1)):
        with pytest.raises(ConfigError, match="is owned by a live run"):
            Lease.take(place, shard=taken)
    first.renew()
    assert first.held() and second.held()
    assert [(owner.shard, owner.beat) for owner in read_owners(place)] == [((2, 3), 0), ((0, 3), 1)][::-1]
    put(place, *(replace(owner, started=1.0) if owner.token == first.token else owner for owner in read_owners(place)))
    again = Lease.take(place, shard=(0, 3))  # of the dead one alone
    assert again.held() and second.held() and not first.held()
    first.release()
    second.release()
    assert [owner.token for owner in read_owners(place)] == [again.token]


def test_who_owns_it_alone_tidies_up_after_killed_writers(tmp_path):
    place = Place.at(tmp_path)
    other = Lease.take(place, shard=(0, 2))
    (tmp_path / ".staging/0123.tmp").write_bytes(b"half a fi")
    mine = Lease.take(place, shard=(1, 2))
    assert "0123.tmp" in place.names(".staging"), "it may be the other's, who lives"
    mine.release()
    other.release()
    Lease.take(place)
    assert place.names(".staging") == ["lease.json", "lock"]


def test_beats_until_the_block_ends_then_gives_it_back(place, monkeypatch):
    lease, beaten = Lease.take(place, ttl=0.04), threading.Event()
    renew = Lease.renew

    def seen(self):
        renew(self)
        if read_owners(place)[0].beat >= 3:
            beaten.set()

    monkeypatch.setattr(Lease, "renew", seen)
    with lease.beating():
        assert beaten.wait(30)
    assert read_owners(place) == []


def _race(place, wins):
    try:
        Lease.take(place)
        wins.put(os.getpid())
        threading.Event().wait()  # lives on: the others must see it
    except ConfigError:
        wins.put(None)


def test_of_many_that_take_it_at_once_one_gets_it(tmp_path):
    place = Place.at(tmp_path)
    context = multiprocessing.get_context("fork")
    wins = context.Queue()
    racers = [context.Process(target=_race, args=(place, wins)) for _ in range(6)]
    for racer in racers:
        racer.start()
    winners = [pid for _ in racers if (pid := wins.get(timeout=60)) is not None]
    for racer in racers:
        racer.kill()
        racer.join()
    assert len(winners) == 1
    assert Lease.take(place).held()
