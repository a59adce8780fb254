"""Guard rails against reward hacking: each bound with a table that breaks it and one that does not, in the summary, in
a running search and at its end."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import finished
import numpy as np
import pytest
import test_coordinator as running
import yaml
from rows import RECORD, at, prompt, result, store
from test_coordinator import FakeGenerator, FakeScorer, coordinator, fill, run_of

from aisp_dist.analysis import guard, summary
from aisp_dist.analysis.metrics import repetition
from aisp_dist.config import Guard
from aisp_dist.data import prompts
from aisp_dist.output import manifest
from aisp_dist.output.filesystem import Place
from aisp_dist.output.verify import verify
from jobs import cli

LOOP = "so it goes on and on " * 4
PLAIN = "every word of this answer is there once"


def tally(rows) -> guard.Tally:
    found = guard.Tally(("other",))
    for row in rows:
        found.add(*row)
    return found


def row(gain=1.0, longer=0, text=PLAIN, finish="stop", other=0.5):
    return finish, (repetition(text), repetition(PLAIN)), gain, longer, {"other": other}


GOOD = [row(gain, longer) for gain, longer in ((1.0, 2), (2.0, -1), (3.0, 1), (1.5, -2))]
BROKEN = {  # the bound, and rows that break it
    "max_truncated": (0.2, [*GOOD, row(finish="length"), row(finish="length")]),
    "max_repetition": (0.1, [*GOOD, row(text=LOOP)]),
    "max_length_correlation": (0.9, [row(float(n), 3 * n) for n in range(5)]),
    "held_out_gain": (0.2, [*GOOD, row(other=-3.5)]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_bound_is_seen_broken_and_seen_kept(name):
    bound, rows = BROKEN[name]
    settings = Guard(**{name: bound})
    (said,) = guard.broken(settings, tally(rows).measures())
    assert f"guard.{name} " in said and f"{bound:g}" in said
    assert guard.broken(settings, tally(GOOD).measures()) == []
    assert guard.broken(Guard(), tally(rows).measures()) == [], "a null bound watches nothing"


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_is_stopped_where_it_is_settled_or_whole(name):
    bound, rows = BROKEN[name]
    stop, warn = (Guard(**{name: bound, "action": action}) for action in ("stop", "warn"))
    guard.check(stop, tally(rows))  # too few to tell
    guard.check(stop, tally([]), whole=True)
    guard.check(stop, tally(GOOD * 100), whole=True)
    guard.check(warn, tally(rows * 100), whole=True)
    with pytest.raises(guard.GuardStop, match=rf"guard\.{name} .*the same command resumes"):
        guard.check(stop, tally(rows), whole=True)
    with pytest.raises(guard.GuardStop, match="after 200 prompts"):
        guard.check(stop, tally((rows * 200)[:200]))


def test_the_measures_are_what_numpy_says_wherever_the_rewards_are():
    rng = np.random.default_rng(0)
    gains, longer = rng.normal(size=50), rng.integers(-9, 9, 50)
    for shift in (0.0, 1e6):
        found = tally(
            [row(math.nan if i == 7 else g + shift, int(n)) for i, (g, n) in enumerate(zip(gains, longer, strict=True))]
        )
        there = np.arange(50) != 7
        assert found.measures().length_correlation == pytest.approx(
            np.corrcoef(gains[there], longer[there])[0, 1], rel=1e-6
        )
        assert found.measures().gain == pytest.approx(gains[there].mean() + shift)
    nulls = tally([row(other=math.nan), row(other=1.5), row(other=math.nan)]).measures()
    assert nulls.held_out == {"other": 1.5} and nulls.length_correlation is None


def test_a_done_result_is_counted_as_its_row(tmp_path):
    results = [result(prompt(n), fails=False) for n in (0, 1, 2, 4, 6, 8)]
    live = guard.Tally(("words",))
    for done in results:
        live.add_done(done)
    rewards = {
        n: {"kind": "function", "function": "a.py:b", "use": u} for n, u in (("main", "select"), ("words", "report"))
    }
    config = {"output": "o", "method": {"kind": "best_of_n"}, "generator": {"model": "m"}, "rewards": rewards}
    manifest.write_run(at(tmp_path), RECORD | {"config": config})
    rows = store(tmp_path)
    for line in rows.plan([prompt(n) for n in range(9)]):
        rows.add(result(line, fails=line.source_index not in (0, 1, 2, 4, 6, 8)))
    rows.finish()
    assert summary.tally(summary.read(at(tmp_path))).measures() == live.measures()


def test_a_running_search_is_ended_keeps_its_rows_and_goes_on_with_another_bound(tmp_path):
    run = run_of(tmp_path, lines=260, guard={"max_length_correlation": -0.999, "action": "stop"})
    with pytest.raises(guard.GuardStop, match="after 200 prompts"):
        asyncio.run(fill(run, coordinator(run, [Long("g")], [FakeScorer("s")])))
    kept = sum(len(part) for name, part in running.rows(run).items() if name.startswith("data"))
    assert 150 < kept < 260
    eased = run.model_copy(update={"guard": Guard(max_length_correlation=0.999, action="stop")})
    again = Long("g")
    asyncio.run(fill(eased, coordinator(eased, [again], [FakeScorer("s")])))
    assert len({r.prompt_id for r in again.rounds}) < 80, "what was finished is not searched again"
    assert verify(running.run_path(run), prompts.read(run.prompts)).violations == ()


class Long(FakeGenerator):
    """Answers of many lengths."""

    async def call(self, method, *args):
        drawn = await super().call(method, *args)
        if method == "nll":
            return drawn
        each = (replace(t, token_ids=t.token_ids * (1 + t.token_ids[0] % 5)) for t in drawn.trajectories)
        return replace(drawn, trajectories=tuple(each))


def test_the_end_of_a_whole_run_says_it_and_the_same_command_says_it_again(tmp_path, capsys):
    finished.output(finished.project(tmp_path), "out")
    config = json.loads((tmp_path / "out/run.json").read_text())["config"]

    def align(**bounds) -> tuple[int, str, str]:
        file = tmp_path / "c.yaml"
        file.write_text(yaml.safe_dump(config | {"guard": bounds}))
        with pytest.raises(SystemExit) as ended:
            cli.run("align", [str(file)])
        return ended.value.code, *capsys.readouterr()

    code, out, _ = align()
    assert code == 0 and "warning:" not in out and "selected answers: " in out and "held out: words" in out
    code, out, _ = align(held_out_gain=99.0)
    assert code == 0 and any(line.startswith("warning: the held-out reward words") for line in out.splitlines())
    code, out, err = align(held_out_gain=99.0, action="stop")
    assert code == 1 and "after 6 prompts: the held-out reward words" in err and "rows done" in out
    assert align(held_out_gain=-99.0, action="stop")[0] == 0
    assert manifest.read_run(Place.at(tmp_path / "out"))["config"]["guard"]["action"] == "warn", "nothing was run"
