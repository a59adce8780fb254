"""Laws of the store: whatever kills, order of answers, limits and retries, the committed files are byte for byte those
of an undisturbed run; nothing finished is computed twice; nothing foreign is mixed in."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import killing
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killing import killed_after
from rows import at, changed, prompt, prompts, result, run, store, tables, write

from aisp_dist.config import ConfigError
from aisp_dist.output import parts, schema, staging
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import LeaseLost
from aisp_dist.output.writer import Unfinished


def answered(line):
    """As `result`, but what failed once now succeeds: the second attempt of --retry-failed."""
    return result(line, fails=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """fsync matters when the power fails, not when a process dies, and is most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@dataclass(frozen=True)
class Home:
    """Where outputs are put, and how a process dies there: `killed_after(n)`, before its change number n."""

    base: Place
    killed_after: Callable[[float], AbstractContextManager[list[bool]]]
    count: int  # of prompts, as many as there is time for
    step: int  # between the changes to die at

    def __truediv__(self, name) -> Place:
        return self.base / str(name)


@pytest.fixture(params=["local", "s3"])
def home(request, tmp_path):
    if request.param == "local":
        return Home(at(tmp_path), killing.killed_after, 7, 1)
    server = request.getfixturevalue("server")
    return Home(server.place(), server.killed_after, 4, 3)


def test_a_kill_before_any_change_of_any_file_loses_and_doubles_nothing(home):
    want = tables(write(home / "want", prompts(home.count)))
    for changes in itertools.count():
        root, kept = home / changes, set()
        with home.killed_after(changes) as died:
            run(root, prompts(home.count), durable=kept)
        assert_parts_are_whole(root)
        again = run(root, prompts(home.count))
        assert tables(root) == want, changes
        assert not kept & set(again), f"{changes}: finished rows were computed again"
        root.collect()
        assert root.names(".staging") in ([], ["lock"])
        if not died:
            break
    assert changes > 6 and again == []


def assert_parts_are_whole(root):
    """A reader who finds data/part-k finds beside it all that belongs to it."""
    found = {name: pq.ParquetFile(pa.BufferReader(data)) for name, data in tables(root).items()}
    for part in root.names("data"):
        names = [f"{table}/{part}" for table in ("data", "failed", "candidates")]
        start, end = (int(found[names[0]].metadata.metadata[b"aisp." + name]) for name in (b"start", b"end"))
        done, failed, kept = (found[n].read()["source_index"].to_pylist() if n in found else [] for n in names)
        assert sorted(done + failed) == list(range(start, end)) and kept == done


def test_a_kill_while_a_part_is_extended_and_its_failed_rows_are_retried(home):
    want = tables(answer_all(home / "want", 7))
    before = tables(write(home / "before", prompts(6)))
    for changes in itertools.count(step=home.step):
        root, kept = home / changes, set()
        for name, data in before.items():
            root.write(name, data)
        with home.killed_after(changes) as died:
            run(root, prompts(7), answered, retry=True, durable=kept)
        good = {n for n in range(6) if n not in (3, 5)}
        assert not good & set(run(root, prompts(7), answered)), f"{changes}: a done row was computed again"
        last = run(root, prompts(7), answered, retry=True)
        assert tables(root) == want, changes
        assert not kept & set(last) - {5}, f"{changes}: a retried row that succeeded was computed again"
        if not died:
            break
    assert changes > 10


@pytest.mark.parametrize("seed", range(6))
def test_random_orders_kills_limits_and_retries_end_in_the_same_bytes(tmp_path, seed, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(parts, "ROW_GROUP", {1: 900, 3: 2000, 5: 3000}[seed])  # few rows
    rng = random.Random(seed)
    total, rows_per_file = rng.randrange(9, 30), [1, 3, 4, 50][seed % 4]
    want = tables(answer_all(tmp_path / "want", total, rows_per_file))
    root, limit, deaths = tmp_path / "out", rng.randrange(total), 0

    def shuffled(chunk):
        return rng.sample(chunk, len(chunk))

    for _ in range(15):
        with killed_after(rng.randrange(40)) as died:
            run(
                root,
                prompts(limit),
                rng.choice([result, answered]),
                retry=rng.random() < 0.5,
                order=shuffled,
                flush_every=rng.randrange(1, 7),
                rows_per_file=rows_per_file,
            )
        deaths += bool(died)
        limit = min(total, max(0, limit + rng.randrange(-2, 4)))
    run(root, prompts(total), answered, retry=True, order=shuffled, rows_per_file=rows_per_file)
    assert deaths > 1
    assert tables(root) == want


def answer_all(root, count, rows_per_file=4):
    run(root, prompts(count), answered, rows_per_file=rows_per_file)
    return root


def test_a_real_process_killed_by_the_system_at_random_moments(tmp_path):
    want = tables(write(tmp_path / "want", prompts(20)))
    root, rng, kills = tmp_path / "out", random.Random(0), 0
    script = "from rows import *; import sys\n" + textwrap.dedent("""
        rows = store(Path(sys.argv[1]))
        for line in rows.plan(prompts(20)):
            rows.add(result(line))
            rows.flush()
            print("one more", flush=True)
        rows.finish()
    """)
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    while True:
        with subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, env=env) as child:
            for _ in range(rng.randrange(3, 9)):
                child.stdout.readline()
            time.sleep(rng.uniform(0, 0.02))  # somewhere inside the next flush
            if child.poll() is None:
                child.kill()
                kills += 1
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert kills >= 2
    assert tables(root) == want


def test_rows_are_the_same_whatever_thread_and_order_answers_come_in(tmp_path):
    want = tables(write(tmp_path / "want", prompts(40)))
    rows = store(tmp_path / "out")
    lines = list(rows.plan(prompts(40)))
    random.Random(1).shuffle(lines)
    over = threading.Event()

    def flushing():
        while not over.is_set():
            rows.flush()

    threads = [
        threading.Thread(target=lambda part=part: [rows.add(result(line)) for line in part])
        for part in (lines[::3], lines[1::3], lines[2::3])
    ]
    flusher = threading.Thread(target=flushing)
    for thread in (flusher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    flusher.join()
    rows.finish()
    assert tables(tmp_path / "out") == want


def test_the_stores_of_all_shards_together_write_what_one_store_does(home):
    """Two at a time, each of every second part; then three, of an extended input with another division."""
    want = tables(write(home / "want", prompts(home.count + 2), rows_per_file=2))
    root = home / "out"
    for count, shards in ((home.count, 2), (home.count + 2, 3)):
        threads = [
            threading.Thread(target=run, args=(root, prompts(count)), kwargs={"rows_per_file": 2, "shard": (i, shards)})
            for i in range(shards)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tables(root) == want
    assert root.read("README.md") == (home / "want").read("README.md")


def test_a_shard_opens_counts_and_checks_its_own_parts_alone(tmp_path):
    write(tmp_path, prompts(9), rows_per_file=2)
    (tmp_path / "data/part-000001.parquet").write_bytes(b"damaged")
    rows = store(tmp_path, 2, shard=(0, 2))
    assert list(rows.plan(changed(2, 10))) == [prompt(9)]  # line 2 is of part 1
    assert rows.counts() == (6, 4, 1, 5)
    with pytest.raises(ValueError, match="never planned"):
        rows.add(result(prompt(2)))
    rows.add(result(prompt(9)))
    rows.finish()
    with pytest.raises(ConfigError, match="damaged"):
        list(store(tmp_path, 2, shard=(1, 2)).plan(prompts(10)))
    idle = store(tmp_path / "none", 2, shard=(3, 4))
    assert list(idle.plan(prompts(5))) == list(idle.plan([])) == []
    idle.finish()
    assert idle.counts() == (0, 0, 0, 0) and tables(tmp_path / "none") == {}


def test_a_second_answer_to_the_same_prompt_changes_nothing(tmp_path):
    want = tables(write(tmp_path / "want", prompts(6)))
    rows = store(tmp_path / "out")
    for line in rows.plan(prompts(6)):
        assert rows.add(result(line))
        assert not rows.add(result(line))
        rows.flush()
        assert not rows.add(result(line, fails=True))
    rows.finish()
    assert tables(tmp_path / "out") == want


def test_counts_agree_with_what_is_there_at_every_moment_and_after_a_resume(tmp_path):
    rows = store(tmp_path)
    bad = {3, 5}
    for n, line in enumerate(rows.plan(prompts(10)), 1):
        rows.add(result(line))
        counts = rows.counts()
        assert (counts.done, counts.failed) == (n - len(bad & set(range(n))), len(bad & set(range(n))))
        rows.flush()
        assert rows.counts() == counts._replace(committed=n // 4 * 4 if n < 10 else 10)
    rows.finish()
    again = store(tmp_path)
    assert list(again.plan(prompts(10))) == []
    assert again.counts() == rows.counts() == (10, 8, 2, 10)


def test_resume_reads_no_rows_of_complete_parts(tmp_path, monkeypatch):
    write(tmp_path, prompts(9))
    for path in tmp_path.glob("*/part-00000[01].parquet"):
        data = path.read_bytes()
        footer = int.from_bytes(data[-8:-4], "little") + 8
        path.write_bytes(bytes(len(data) - footer) + data[-footer:])  # rows gone, metadata whole
    rows = store(tmp_path)
    assert [line.source_index for line in rows.plan(prompts(11))] == [9, 10]


def test_an_empty_input_is_an_empty_table(tmp_path):
    rows = store(tmp_path)
    assert list(rows.plan([])) == []
    rows.finish()
    table = pq.read_table(tmp_path / "data")
    assert list(tables(tmp_path)) == ["data/part-000000.parquet"]
    assert table.num_rows == 0 and "completion" in table.column_names
    write(tmp_path, prompts(10))
    assert tables(tmp_path) == tables(write(tmp_path.parent / "want", prompts(10)))


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-7], lambda data: b"", lambda data: data[:900] + b"x" + data[901:], lambda data: b"x" + data],
    ids=["torn", "empty", "changed", "foreign"],
)
def test_a_damaged_segment_is_computed_again(tmp_path, damage, caplog):
    root = tmp_path / "out"
    rows = store(root, rows_per_file=50)
    for line in rows.plan(prompts(6)):
        rows.add(result(line))
        if line.source_index == 3:
            rows.flush()  # the last there is: the process dies here
    (name,) = staging.names(at(root), 0)
    segment = root / staging.folder(0) / name
    segment.write_bytes(damage(segment.read_bytes()))
    assert run(root, prompts(6), rows_per_file=50) == list(range(6))
    assert "checksum" in caplog.text
    assert tables(root) == tables(write(tmp_path / "want", prompts(6), rows_per_file=50))


def test_a_segment_that_decays_during_the_run_leaves_its_rows_to_the_next_run(tmp_path):
    root = tmp_path / "out"
    rows = store(root)
    for line in rows.plan(prompts(4)):
        rows.add(result(line))
        if line.source_index == 1:
            rows.flush()
            (root / staging.folder(0) / staging.names(at(root), 0)[0]).write_bytes(b"")
    with pytest.raises(Unfinished, match="2 inputs have no row, first line 0"):
        rows.finish()
    assert rows.counts()[1:] == (1, 1, 0)  # line 3 is the failed one
    assert run(root, prompts(4)) == [0, 1]
    assert tables(root) == tables(write(tmp_path / "want", prompts(4)))


def test_a_smaller_limit_keeps_what_a_larger_one_finished(tmp_path):
    root = tmp_path / "out"
    rows = store(root, rows_per_file=50)
    for line in rows.plan(prompts(10)):
        if line.source_index != 4:
            rows.add(result(line))
    rows.flush()
    assert run(root, prompts(6), rows_per_file=50) == [4]
    assert pq.read_metadata(root / "data/part-000000.parquet").metadata[b"aisp.end"] == b"6"
    assert run(root, prompts(5), rows_per_file=50) == []
    assert run(root, prompts(10), rows_per_file=50) == []
    assert tables(root) == tables(write(tmp_path / "want", prompts(10), rows_per_file=50))
    assert run(root, prompts(3), rows_per_file=50) == []


@pytest.mark.parametrize("answers", range(6))
def test_an_orphan_neither_stages_nor_commits_nor_tidies_up_once_the_lease_is_lost(home, answers):
    """The lease goes to another run after the orphan's first, second, ... question; the other then ends the work. The
    orphan asks before it begins, before it stages, before each of the three tables, and before it tidies up."""
    root, asked = home / "out", itertools.count()
    orphan = store(root, still_owner=lambda: next(asked) < answers)
    for line in orphan.plan(prompts(4)):
        orphan.add(result(line))
    with pytest.raises(LeaseLost, match="another run has taken"):
        orphan.flush()
    assert len(staging.names(at(root), 0)) == (answers > 1)
    written = [table for table in ("candidates", "failed", "data") if root.names(table)]
    assert written == ["candidates", "failed", "data"][: max(0, answers - 2)]
    assert run(root, prompts(4)) == ([] if answers > 1 else [0, 1, 2, 3])
    with pytest.raises(LeaseLost):
        orphan.flush()
    assert tables(root) == tables(write(home / "want", prompts(4)))


def test_two_owners_that_stage_at_one_moment_do_not_overwrite_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "names", lambda place, part: [])  # both look before either has written
    rows = [staging.Finished(n, "", failed={"id": str(n), "source_index": n}) for n in (0, 1)]
    for owner, row in zip("ab", rows, strict=True):
        staging.write(at(tmp_path), 0, owner, "f", schema.schemas("chat", {}), [row])
    monkeypatch.undo()
    assert [list(segment.digests) for segment in staging.read(at(tmp_path), 0)] == [[0], [1]]


def test_save_settings_may_change_between_resumes(tmp_path):
    kept = ("all", "none", (1, 1), (1, 0))
    for number, candidates in enumerate(kept):
        run(tmp_path, prompts(4 * number + 4), candidates=candidates, trace=candidates != "none")
    rows = {row["source_index"]: row for row in pq.read_table(tmp_path / "candidates").to_pylist()}
    assert len(rows[0]["candidates"]) == 6 and len(rows[0]["trace"]) == 2
    assert not any(n in rows for n in range(4, 8))
    assert len(rows[8]["candidates"]) == 2 and len(rows[13]["candidates"]) == 1


def test_looking_at_an_output_imports_neither_torch_nor_ray():
    script = "import sys\nfrom aisp_dist.output import verify, writer\nprint({'torch', 'ray'} & set(sys.modules))"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    assert subprocess.check_output([sys.executable, "-c", script], env=env) == b"set()\n"
