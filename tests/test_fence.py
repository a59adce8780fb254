"""A write that hangs while its output changes hands: what the later owner has committed stays, byte for byte."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from dataclasses import asdict, replace

import pytest
from rows import at, prompts, result, run, store, tables

from aisp_dist.output import schema, staging
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease, LeaseLost, read_owners

HUNG = [".staging/part-000000/seg", "candidates/part", "failed/part", "data/part"]


@pytest.fixture(params=["local", "s3"])
def hanging(request, tmp_path, monkeypatch):
    """A place, what waits until a write to a name there hangs, and what lets it go on: in fsync, as on a network file
    system that is away, or between the client and the store."""
    hung, free, wanted = threading.Event(), threading.Event(), []

    def hang(name):
        if wanted and wanted[0] in name:
            wanted.clear()
            hung.set()
            assert free.wait(30)

    if request.param == "local":
        place, writing, replaced = at(tmp_path), threading.local(), Place.write

        def write(self, name, *args):
            writing.name = name
            replaced(self, name, *args)

        monkeypatch.setattr(Place, "write", write)
        monkeypatch.setattr(os, "fsync", lambda handle: hang(getattr(writing, "name", "")))
    else:
        server = request.getfixturevalue("server")
        place = server.place()
        monkeypatch.setattr(server, "before_change", hang)
    yield place, wanted, hung, free
    free.set()


def other(line):
    """Another answer to the same input, as a model that is not deterministic gives it."""
    return result(line) if line.source_index % 11 == 3 or line.source_index % 7 == 5 else another(line)


def another(line):
    done = result(line, fails=False)
    noise = random.Random(line.source_index + 1000).random()
    return replace(done, best=replace(done.best, text=f"another answer {noise}"), nll=noise)


def flushing(orphan):
    """A thread that flushes, and the error that this ends with."""
    ended: list[BaseException] = []

    def flush():
        try:
            orphan.flush()
        except (LeaseLost, OSError) as error:
            ended.append(error)

    thread = threading.Thread(target=flush)
    thread.start()
    return thread, ended


@pytest.mark.parametrize("name", HUNG)
def test_what_hangs_is_not_written_once_another_run_owns_the_output(hanging, name):
    """The other run has a larger limit, so that its part of the same name holds more rows, and other answers. A third
    one fills another shard."""
    place, wanted, hung, free = hanging
    Lease.take(place, shard=(1, 2))
    lease = Lease.take(place, ttl=0.3, shard=(0, 2))
    seen = [replace(owner, host="elsewhere") if owner.token == lease.token else owner for owner in read_owners(place)]
    place.write(".staging/lease.json", json.dumps([asdict(owner) for owner in seen]).encode())
    orphan = store(place, 10, still_owner=lease.held, shard=(0, 2))
    for line in orphan.plan(prompts(6)):
        orphan.add(result(line))
    wanted.append(name)
    thread, ended = flushing(orphan)
    assert hung.wait(30)
    owner = Lease.take(place, shard=(0, 2))
    run(place, prompts(9), other, rows_per_file=10, still_owner=owner.held, shard=(0, 2))
    want = tables(place)
    free.set()
    thread.join()
    assert ended or (place.remote and "seg" in name), "the orphan finds out"
    assert tables(place) == want
    run(place, prompts(9), result, rows_per_file=10, still_owner=owner.held)
    assert tables(place) == want and not place.names(".staging/part-000000")


@pytest.mark.parametrize("hanging", ["s3"], indirect=True)
def test_failed_rows_that_land_beside_a_commit_without_any_are_removed(hanging):
    """The later owner has tried failed rows again. On S3 nothing can prevent it: before that run and after it there is
    no object, so no version tells the times apart."""
    place, wanted, hung, free = hanging
    lines = prompts(5)
    owned = [True]
    orphan = store(place, 10, still_owner=lambda: owned[0])
    for line in orphan.plan(lines):
        orphan.add(result(line))
    wanted.append("failed/part")
    thread, ended = flushing(orphan)
    assert hung.wait(30)
    owned[0] = False
    run(place, lines, another, retry=True, rows_per_file=10)
    want = tables(place)
    free.set()
    thread.join()
    assert ended and tables(place).keys() - want.keys() == {"failed/part-000000.parquet"}
    assert run(place, lines, rows_per_file=10) == []
    assert tables(place) == want


def test_a_segment_that_lands_after_the_commit_changes_no_committed_row(tmp_path):
    """On S3 nothing can prevent it. Its done rows bring no candidates either."""
    place = at(tmp_path)
    run(place, prompts(4), other)
    want = tables(place)
    late = store(place)
    rows = [late._finished(result(line)) for line in prompts(4) if line.source_index != 3]
    staging.write(place, 0, "late", "f" * 8, schema.schemas("chat", late._columns), rows)
    assert run(place, prompts(4)) == []
    assert tables(place) == want and place.names(".staging") == ["lock"]


def test_an_orphan_tidies_up_only_what_it_has_committed(tmp_path, monkeypatch):
    """Another owner stages rows of an extended input while the orphan is between its commit and its tidying up."""
    place, discard = at(tmp_path), staging.discard
    orphan = store(place, 10)
    for line in orphan.plan(prompts(4)):
        orphan.add(result(line))

    def meanwhile(*args):
        monkeypatch.setattr(staging, "discard", discard)
        owner = store(place, 10)
        for line in owner.plan(prompts(6)):
            if line.source_index < 5:
                owner.add(result(line))
        owner.flush()
        discard(*args)

    monkeypatch.setattr(staging, "discard", meanwhile)
    orphan.flush()
    assert run(place, prompts(6), rows_per_file=10) == [5], "what the other has staged is still there"


def test_a_full_disk_is_left_as_it_was(tmp_path, monkeypatch):
    place = at(tmp_path)
    place.write("config.yaml", b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(3):
        with pytest.raises(OSError, match="no space"):
            place.write("config.yaml", b"new")
    assert place.read("config.yaml") == b"old" and not place.names(".staging")
