"""The coordinator's laws on fake replicas: no model, no Ray, real store and real Parquet."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actors.coordinator import Coordinator, Stopped
from actors.fleet import Fault
from actors.pool import Pool
from actors.table import Table, TooManyFailed
from aisp_dist.align import window
from aisp_dist.config import ConfigError, Run
from aisp_dist.data import prompts
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease
from aisp_dist.output.verify import verify
from aisp_dist.records import Rollout, Score, Trajectory


class Dead(Exception):
    pass


class FakeGenerator:
    """Answers are a function of the round alone, as the engine's are. `faults`: chance that a call dies; `dies_after`:
    calls after which all die."""

    def __init__(self, name, faults=0.0, delay=0.0, seed=0, dies_after=1 << 30):
        self.name, self.faults, self.delay, self.random = name, faults, delay, random.Random(seed)
        self.rounds, self.left = [], dies_after

    async def health(self):
        return {"progress": len(self.rounds), "busy": 0.0, "busy_seconds": 0.5, "up_seconds": 1.0}

    async def call(self, method, *args):
        await asyncio.sleep(self.delay * self.random.random())
        self.left -= 1
        if self.random.random() < self.faults or self.left < 0:
            raise Dead("killed")
        if method == "nll":
            return [len(response) / 10 for response in args[1]]
        (request,) = args
        self.rounds.append(request)
        drawn = []
        for i in range(request.start, request.stop):
            word = zlib.crc32(repr((request.prompt_id, request.iteration, i, request.trace)).encode())
            drawn.append(
                Trajectory(i, (word % 97, 1), f"{request.prompt_id} {word % 1000}", "stop", word % 7 / 10, 0.5)
            )
        return Rollout(tuple(drawn), u_sq=float(len(request.trace)))

    async def restart(self, reason):
        await asyncio.sleep(0)


PROBE = ["Yes.", "No."]


class FakeScorer(FakeGenerator):
    strict = True  # it raises on a poisoned prompt, whatever the answer

    async def call(self, method, prompt, responses):
        await asyncio.sleep(self.delay * self.random.random())
        if self.random.random() < self.faults:
            raise Dead("killed")
        if "poison" in str(prompt.content) and (self.strict or responses != PROBE):
            raise ValueError("the reward cannot read this prompt")
        return [Score(0.0 if responses == PROBE else float(r.split()[-1])) for r in responses]


def run_of(tmp_path, lines=20, **changes) -> Run:
    source = tmp_path / "prompts.jsonl"
    if not source.exists():
        write_prompts(source, lines)
    return Run.model_validate(
        {
            "output": str(tmp_path / "out"),
            "prompts": {"source": str(source), "format": "raw"},
            "generator": {"model": "demo", "max_new_tokens": 16, "batch_rows": 32},
            "rewards": {"r": {"kind": "function", "function": "r.py:f"}},
            "method": {"kind": "aisp", "num_samples": 8, "num_iterations": 3, "lambda": {"ess": 0.1}},
            "save": {"rows_per_file": 7, "flush_seconds": 0.05},
            **changes,
        }
    )


def write_prompts(source, count, poison=()):
    rows = [{"prompt": f"question {i}" + (" poison" if i in poison else "")} for i in range(count)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))


def coordinator(run, generators, scorers, retries=50, reward_timeout=30.0):
    async def start():
        options = {"retries": retries, "is_fault": lambda e: isinstance(e, Dead)}
        return {
            "generator": Pool(generators, max_calls=8, timeout=30.0, **options),
            "r": Pool(scorers, max_calls=1, timeout=reward_timeout, **options),
        }, 256

    return Coordinator(run, start)


def record(run):
    manifest.write_run(
        run_path(run), {"config": {}, "fingerprint": "f" * 32, "run_id": "f" * 12, "components": {}, "rows_per_file": 7}
    )


def run_path(run):
    return Place.at(run.output)


async def fill(run, shard, retry_failed=False, stop_after=None):
    out = run_path(run)
    record(run)
    lease = Lease.take(out)
    try:
        await shard.load()
        table = Table(run, out, {}, "f" * 32, "demo", lease, retry_failed)
        task = asyncio.ensure_future(shard.relabel(table))
        if stop_after is not None:
            await asyncio.sleep(stop_after)
            await shard.stop()
        await task
    finally:
        lease.release()


def rows(run):
    files = sorted(Path(run.output).glob("*/part-*.parquet"))
    return {str(f.relative_to(run.output)): pq.read_table(f).to_pylist() for f in files}


def undisturbed(tmp_path, **changes):
    (tmp_path / "plain").mkdir()
    run = run_of(tmp_path / "plain", **changes)
    if (tmp_path / "prompts.jsonl").exists():
        (tmp_path / "plain" / "prompts.jsonl").write_text((tmp_path / "prompts.jsonl").read_text())
    asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    return rows(run)


def test_every_input_becomes_one_row_in_order_whatever_faults_and_replicas(tmp_path):
    plain = undisturbed(tmp_path)
    run = run_of(tmp_path)
    generators = [FakeGenerator(f"g{i}", faults=0.2, delay=0.01, seed=i) for i in range(3)]
    scorers = [FakeScorer(f"s{i}", faults=0.2, delay=0.01, seed=9 + i) for i in range(2)]
    shard = coordinator(run, generators, scorers)
    asyncio.run(fill(run, shard))
    assert rows(run) == plain
    assert verify(run_path(run), prompts.read(run.prompts)).violations == ()
    assert shard.backend.pools["generator"].fleet.restarts > 0, "the faults really happened"
    assert sum(len(part) for name, part in plain.items() if name.startswith("data")) == 20


@pytest.mark.parametrize("stop_after", [0.0, 0.03, 0.1, 0.25])
def test_stopped_and_started_again_gives_the_same_table(tmp_path, stop_after):
    plain = undisturbed(tmp_path)
    run = run_of(tmp_path)
    slow = lambda seed: coordinator(run, [FakeGenerator("g", delay=0.02, seed=seed)], [FakeScorer("s", delay=0.01)])  # noqa: E731
    with pytest.raises(Stopped):
        asyncio.run(fill(run, slow(1), stop_after=stop_after))
    again = slow(2)
    asyncio.run(fill(run, again))
    assert rows(run) == plain


def test_finished_prompts_are_not_computed_again(tmp_path):
    run = run_of(tmp_path)
    asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    before = rows(run)
    idle = FakeGenerator("g")
    asyncio.run(fill(run, coordinator(run, [idle], [FakeScorer("s")])))
    assert idle.rounds == [] and rows(run) == before


def test_a_larger_limit_extends(tmp_path):
    plain = undisturbed(tmp_path)
    small = run_of(tmp_path)
    small = small.model_copy(update={"prompts": small.prompts.model_copy(update={"limit": 10})})
    asyncio.run(fill(small, coordinator(small, [FakeGenerator("g")], [FakeScorer("s")])))
    assert sum(len(part) for name, part in rows(small).items() if name.startswith("data")) == 10
    run = run_of(tmp_path)
    more = FakeGenerator("g")
    asyncio.run(fill(run, coordinator(run, [more], [FakeScorer("s")])))
    assert rows(run) == plain
    assert len({r.prompt_id for r in more.rounds}) == 10


def test_a_reward_that_errs_fails_its_row_and_no_other_and_retry_failed_mends_it(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 20, poison={3, 11})
    run = run_of(tmp_path)
    asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    failed = [row for name, part in rows(run).items() if name.startswith("failed") for row in part]
    assert [row["source_index"] for row in failed] == [3, 11]
    assert all("cannot read this prompt" in row["reason"] for row in failed)
    again = FakeGenerator("g")
    FakeScorerMended = type("Mended", (FakeScorer,), {"call": lambda self, m, p, r: scores_of(r)})
    asyncio.run(fill(run, coordinator(run, [again], [FakeScorerMended("s")]), retry_failed=True))
    assert len({r.prompt_id for r in again.rounds}) == 2
    tables = rows(run)
    assert not any(name.startswith("failed") for name in tables)
    assert [row["source_index"] for name, part in tables.items() if name.startswith("data") for row in part] == list(
        range(20)
    )


async def scores_of(responses):
    return [Score(0.0 if responses == PROBE else float(r.split()[-1])) for r in responses]


def test_too_many_failed_rows_end_the_run_and_keep_what_is_done(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 400, poison=set(range(0, 400, 3)))
    run = run_of(tmp_path)
    with pytest.raises(TooManyFailed, match=r"runtime.max_failed allows 2.0%.*cannot read this prompt"):
        asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    kept = rows(run)
    with pytest.raises(TooManyFailed):
        asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    assert 100 < sum(len(part) for name, part in kept.items() if name.startswith("data")) < 200


def test_a_finished_table_of_failed_rows_ends_the_same_way_again(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 3, poison={0, 1, 2})
    run = run_of(tmp_path)
    scorer = FakeScorer("s")
    scorer.strict = False
    with pytest.raises(TooManyFailed, match="3 of 3 rows failed"):
        asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [scorer])))
    with pytest.raises(TooManyFailed, match="3 of 3 rows failed"):
        Table(run, run_path(run), {}, "f" * 32, "demo").whole()


def test_a_reward_that_fails_on_each_of_the_first_prompts_is_refused_at_load(tmp_path):
    for poison, refused in (((0, 1, 2), True), ((0, 1), False)):
        write_prompts(tmp_path / "prompts.jsonl", 20, poison)
        run, scorer = run_of(tmp_path), FakeScorer("s")
        shard = coordinator(run, [FakeGenerator("g")], [scorer])
        if refused:
            with pytest.raises(ConfigError, match=r"rewards.r: it fails on each of the first 3 prompts: ValueError"):
                asyncio.run(shard.load())
        else:
            asyncio.run(shard.load())
        assert shard.backend.totals().restarts == 0


def test_answers_as_long_as_the_context_are_refused_at_load(tmp_path):
    shard = coordinator(
        run_of(tmp_path, generator={"model": "demo", "max_new_tokens": 256}), [FakeGenerator("g")], [FakeScorer("s")]
    )
    with pytest.raises(ConfigError, match="max_new_tokens: 256 leaves no token for a prompt .* context of 256; lower"):
        asyncio.run(shard.load())


def test_a_coordinator_answers_while_it_reads_its_first_prompts(tmp_path, monkeypatch):
    """A shuffled source is read to its end first, which takes minutes where it is large; a coordinator that does not
    answer meanwhile is taken for dead."""
    reading, answered, read = threading.Event(), threading.Event(), prompts.read

    def slow(settings):
        reading.set()
        assert answered.wait(30)
        return read(settings)

    async def main():
        run = run_of(tmp_path)
        shard = coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])
        monkeypatch.setattr(prompts, "read", slow)
        loading = asyncio.ensure_future(shard.load())
        await asyncio.to_thread(reading.wait, 30)
        await shard.progress()
        answered.set()
        assert "first prompt" in await loading

    asyncio.run(main())


def test_a_dead_cluster_ends_in_a_fault_and_loses_nothing(tmp_path):
    plain = undisturbed(tmp_path)
    run = run_of(tmp_path)
    dying = FakeGenerator("g", dies_after=40)
    with pytest.raises(Fault, match="runtime.retries|again and again"):
        asyncio.run(fill(run, coordinator(run, [dying], [FakeScorer("s")], retries=1)))
    assert not any(name.startswith("failed") for name in rows(run)), "a fault is never a row"
    asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    assert rows(run) == plain


def test_an_empty_input_gives_an_empty_valid_table(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("")
    run = run_of(tmp_path)
    asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    assert rows(run) == {"data/part-000000.parquet": []}
    assert verify(run_path(run), prompts.read(run.prompts)).violations == ()


def test_bad_and_overlong_lines_become_failed_rows_in_place(tmp_path):
    lines = ['{"prompt": "fine"}', "{broken", '{"prompt": ""}', json.dumps({"prompt": "long " * 400}), '{"prompt": 7}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    run = run_of(tmp_path)
    asyncio.run(fill(run, coordinator(run, [FakeGenerator("g")], [FakeScorer("s")])))
    tables = rows(run)
    assert [row["source_index"] for row in tables["data/part-000000.parquet"]] == [0]
    reasons = [row["reason"] for row in tables["failed/part-000000.parquet"]]
    assert len(reasons) == 4 and "more than the 240 that fit" in reasons[2]


def test_no_more_prompts_are_in_flight_than_the_window_allows(tmp_path):
    run = run_of(tmp_path, lines=60)
    shard = coordinator(run, [FakeGenerator("g", delay=0.01)], [FakeScorer("s")])
    most = 0

    async def watch():
        nonlocal most
        filling = asyncio.ensure_future(fill(run, shard))
        while not filling.done():
            most = max(most, shard.sums["in_flight"])
            await asyncio.sleep(0.001)
        await filling

    asyncio.run(watch())
    assert 2 < most <= window(run) == 8
