"""Laws of the store: whatever kills, order of answers, limits and retries, the committed files are byte for byte those of
an undisturbed run; nothing finished is computed twice; nothing foreign is mixed in."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from killing import killed_after
from rows import prompt, prompts, result, store, tables, write

from aisp_dist import segments
from aisp_dist.config import ConfigError
from aisp_dist.lease import LeaseLost
from aisp_dist.records import BadInput, Prompt
from aisp_dist.store import Unfinished


def answered(line):
    """As `result`, but what failed once now succeeds: the second attempt of --retry-failed."""
    return result(line, fails=False)


def run(root, inputs, answer=result, retry=False, order=None, flush_every=3, durable=None, **settings):
    """A run as a coordinator does it; `durable` collects the ordinals that a completed flush has taken over. Returns the
    ordinals that it computed."""
    rows = store(root, **settings)
    computed, pending = [], []

    def flush():
        rows.flush()
        if durable is not None:
            durable.update(pending)

    for chunk in iter(lambda plan=rows.plan(inputs, retry): list(itertools.islice(plan, 5)), []):
        for line in order(chunk) if order else chunk:
            rows.add(answer(line))
            computed.append(line.source_index)
            pending.append(line.source_index)
            if len(pending) % flush_every == 0:
                flush()
    rows.finish()
    return computed


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """fsync matters when the power fails, not when a process dies, and is most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_kill_before_any_change_of_any_file_loses_and_doubles_nothing(tmp_path):
    want = tables(write(tmp_path / "want", prompts(10)))
    for changes in itertools.count():
        root, kept = tmp_path / str(changes), set()
        with killed_after(changes) as died:
            run(root, prompts(10), durable=kept)
        again = run(root, prompts(10))
        assert tables(root) == want, changes
        assert not kept & set(again), f"{changes}: finished rows were computed again"
        assert not list((root / ".staging").iterdir())
        if not died:
            break
    assert changes > 40 and again == []


def test_a_kill_while_a_part_is_extended_and_its_failed_rows_are_retried(tmp_path):
    want = tables(answer_all(tmp_path / "want", 10))
    before = write(tmp_path / "before", prompts(6))
    for changes in itertools.count():
        root, kept = tmp_path / str(changes), set()
        shutil.copytree(before, root)
        with killed_after(changes) as died:
            run(root, prompts(10), answered, retry=True, durable=kept)
        good = {n for n in range(6) if n not in (3, 5)}
        assert not good & set(run(root, prompts(10), answered)), f"{changes}: a done row was computed again"
        last = run(root, prompts(10), answered, retry=True)
        assert tables(root) == want, changes
        assert not kept & set(last) - {5}, f"{changes}: a retried row that succeeded was computed again"
        if not died:
            break
    assert changes > 30


@pytest.mark.parametrize("seed", range(6))
def test_random_orders_kills_limits_and_retries_end_in_the_same_bytes(tmp_path, seed):
    rng = random.Random(seed)
    total, rows_per_file = rng.randrange(9, 30), [1, 3, 4, 50][seed % 4]
    want = tables(answer_all(tmp_path / "want", total, rows_per_file))
    root, limit, deaths = tmp_path / "out", rng.randrange(total), 0

    def shuffled(chunk):
        return rng.sample(chunk, len(chunk))

    for _ in range(25):
        with killed_after(rng.randrange(60)) as died:
            run(root, prompts(limit), rng.choice([result, answered]), retry=rng.random() < 0.5, order=shuffled,
                flush_every=rng.randrange(1, 7), rows_per_file=rows_per_file)
        deaths += bool(died)
        limit = min(total, max(0, limit + rng.randrange(-2, 4)))
    run(root, prompts(total), answered, retry=True, order=shuffled, rows_per_file=rows_per_file)
    assert deaths > 2
    assert tables(root) == want


def answer_all(root, count, rows_per_file=4):
    run(root, prompts(count), answered, rows_per_file=rows_per_file)
    return root


def test_a_real_process_killed_by_the_system_at_random_moments(tmp_path):
    want = tables(write(tmp_path / "want", prompts(40)))
    root, rng, kills = tmp_path / "out", random.Random(0), 0
    script = "from rows import *; import sys, time\n" + textwrap.dedent("""
        rows = store(Path(sys.argv[1]))
        print("started", flush=True)
        for line in rows.plan(prompts(40)):
            rows.add(result(line))
            time.sleep(.005)
            rows.flush()
        rows.finish()
    """)
    here = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    while True:
        child = subprocess.Popen([sys.executable, "-c", script, str(root)], stdout=subprocess.PIPE, env=env)
        child.stdout.readline()  # imports are done
        try:
            child.wait(rng.uniform(0.02, 0.3))
        except subprocess.TimeoutExpired:
            child.kill()
            kills += 1
        if child.wait() == 0:
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

    threads = [threading.Thread(target=lambda part=part: [rows.add(result(line)) for line in part])
               for part in (lines[::3], lines[1::3], lines[2::3])]
    flusher = threading.Thread(target=flushing)
    for thread in (flusher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    flusher.join()
    rows.finish()
    assert tables(tmp_path / "out") == want


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


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"", lambda data: data[:900] + b"x" + data[901:],
                                    lambda data: b"not ours\n" + data])
def test_a_damaged_segment_is_computed_again(tmp_path, damage, caplog):
    rows = store(tmp_path, rows_per_file=50)
    for line in rows.plan(prompts(6)):
        rows.add(result(line))
        if line.source_index == 3:
            with rows._lock:
                opened = rows._open[0]
            opened.missing.add(99)  # keeps the part from its commit: this process dies before the last answer
            rows.flush()
            opened.missing.discard(99)
    (segment,) = segments.paths(tmp_path, 0)
    segment.write_bytes(damage(segment.read_bytes()))
    assert run(tmp_path, prompts(6), rows_per_file=50) == list(range(6))
    assert "checksum" in caplog.text
    assert tables(tmp_path) == tables(write(tmp_path.parent / "want", prompts(6), rows_per_file=50))
