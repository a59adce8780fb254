"""The simulated cluster: its clock, its arithmetic, and the laws of a run by the real coordinator on it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import fields, replace

import pytest

from aisp_dist.records import Round, Sampling
from tests.bench import simulation
from tests.bench.roofline import Plan
from tests.bench.simulation import simulate
from tests.bench.virtual import VirtualLoop

SMALL = Plan(generators=2, scorers=2, prompts=12, samples=8, iterations=4, batch_rows=32, bundle=4)
FAULTY = replace(SMALL, prompts=60, iterations=8, deaths=300.0, startup=0.5, retries=50)  # a death in 12 s of a replica


def virtual(main):
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def test_time_passes_only_while_nothing_is_ready_and_threads_take_none():
    async def main():
        loop, seen = asyncio.get_running_loop(), []

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            seen.append((seconds, loop.time()))

        await asyncio.gather(*map(sleeper, (3e6, 5.0, 0.25)), asyncio.to_thread(sum, [1, 2]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(loop.create_future(), 100.0)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 1, 0)
        return seen, loop.time()

    seen, end = virtual(main())
    assert seen == [(s, pytest.approx(s)) for s in (0.25, 5.0, 3e6)] and end == pytest.approx(3e6 + 100)


def test_a_run_that_would_wait_forever_says_so():
    async def main():
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="waits forever"):
        virtual(main())


@pytest.mark.parametrize(
    ("tokens", "prompts", "tokens_per_second"),
    [(500, 4, 33.5e3), (500, 8, 46.4e3), (2000, 4, 32.0e3), (2000, 8, 43.5e3)],
)
def test_the_roofline_of_llama_3_8b_on_an_h200(tokens, prompts, tokens_per_second):
    plan = Plan(prompt_tokens=tokens, spread=0.0)
    assert 32 * prompts / plan.step(32 * prompts) == pytest.approx(tokens_per_second, rel=0.01)
    assert plan.read(32 * (tokens + 128)) == pytest.approx({500: 0.355, 2000: 1.203}[tokens], rel=0.01)


def test_lengths_are_keyed_and_uniform_in_their_bounds():
    def drawn(plan, count=1000, **changes):
        asked = {"seed": 0, "prompt_id": "p", "prompt_tokens": (), "iteration": 0, "start": 0, "stop": count}
        return plan.lengths(Round(**asked | changes, sampling=Sampling()))

    plan = Plan(new_tokens=100, spread=0.4)
    lengths = drawn(plan)
    assert 60 <= min(lengths) < 62 and 99 < max(lengths) <= 100 and sum(lengths) / 1000 == pytest.approx(80.5, abs=2)
    assert lengths == drawn(plan) and drawn(plan, 3) == lengths[:3]
    others = [drawn(plan, prompt_id="q"), drawn(plan, iteration=1), drawn(replace(plan, seed=1))]
    assert all(other != lengths for other in others)
    assert set(drawn(replace(plan, spread=0.0))) == {100}


def test_one_replica_of_each_takes_the_time_that_one_adds_up_by_hand():
    """One prompt: prefill, then the base answer beside the first round; each round is scored before the next; the score
    of the base answer and the likelihoods come last."""
    plan = Plan(generators=1, scorers=1, prompts=1, spread=0.0, bundle=1, iterations=3)
    decoding = plan.read(500) + 128 * (plan.step(33) + 2 * plan.step(32))
    scoring = plan.read(500) + 3 * plan.read(32 * 128) + plan.read(128)
    rest = plan.read(2 * 128)
    found = simulate(plan)
    assert found["makespan_seconds"] == pytest.approx(decoding + scoring + rest, rel=1e-6)
    assert found["utilisation"]["generators"] == pytest.approx((decoding + rest) / found["makespan_seconds"], rel=1e-6)
    assert found["utilisation"]["scorers"] == pytest.approx(scoring / found["makespan_seconds"], rel=1e-6)


def test_rows_beyond_the_batch_wait_for_a_row():
    """Two prompts of one round with rows for one: the rows of the second prompt follow those of the first."""
    plan = Plan(generators=1, scorers=1, prompts=2, spread=0.0, bundle=1, iterations=1, samples=32, batch_rows=33)
    one, two = simulate(replace(plan, prompts=1)), simulate(plan)
    both = simulate(replace(plan, batch_rows=66))
    assert two["makespan_seconds"] > one["makespan_seconds"] + 127 * plan.step(33)
    assert one["makespan_seconds"] < both["makespan_seconds"] < two["makespan_seconds"]


def test_the_same_seed_gives_the_same_figures_and_another_seed_others():
    first = json.dumps(simulate(FAULTY))
    assert json.dumps(simulate(FAULTY)) == first
    assert json.dumps(simulate(replace(FAULTY, seed=1))) != first


@pytest.mark.parametrize("stalls", [0.0, 0.3])
@pytest.mark.parametrize("shards", [1, 2])
def test_every_input_has_one_row_and_nobody_works_more_than_all_the_time(stalls, shards):
    found = simulate(replace(FAULTY, stalls=stalls, coordinator=0.001), shards)
    assert found["restarts"] > 3, "the faults really happened"
    assert (found["done"], found["failed"], found["violations"]) == (60, 0, 0)
    for shares in (found["utilisation"], found["steady_utilisation"] or {}):
        assert all(0 <= share <= 1 + 1e-9 for share in shares.values())


def test_work_is_the_same_whoever_does_it():
    """Without faults and apart from prefills, the busy seconds of scorers do not depend on their number."""
    plan = replace(SMALL, prompt_tokens=1)
    busy = [simulate(replace(plan, scorers=n))["gpu_seconds_per_round"]["scorers"] for n in (1, 2, 4)]
    assert busy == pytest.approx([busy[0]] * 3, rel=0.01)


def test_doubling_replicas_never_slows_and_doubles_the_pace_of_a_full_cluster():
    plan = replace(SMALL, prompts=64)
    ends = [simulate(replace(plan, generators=n, scorers=n))["makespan_seconds"] for n in (1, 2, 4, 8, 16)]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] / ends[1] == pytest.approx(2, rel=0.15)


def test_a_coordinator_carries_the_inverse_of_what_a_round_costs_it():
    plan = replace(SMALL, generators=8, scorers=8, prompts=64)
    for cost in (0.01, 0.1):
        found = simulate(replace(plan, coordinator=cost))
        assert found["rounds_per_second"] <= 1 / cost
        assert found["utilisation"]["coordinator"] == pytest.approx(found["rounds_per_second"] * cost)
    assert found["utilisation"]["coordinator"] > 0.95 and found["rounds_per_second"] > 9.5
    assert simulate(replace(plan, coordinator=0.1), shards=2)["rounds_per_second"] > 19


def measured(capsys, *args):
    code = simulation.main(args)
    return code, json.loads(capsys.readouterr().out)


def test_the_command_sweeps_and_reckons(capsys):
    sizes = ["--gpus", "4,8", "--ratio", "1:1,3:1", "--prompts", "16", "--iterations", "3", "--samples", "16"]
    code, found = measured(capsys, *sizes, "--coordinator", "0.01")
    assert code == 0
    assert [(c["gpus"], c["generators"], c["prompts"]) for c in found["configurations"]] == [
        (4, 2, 8),
        (4, 3, 8),
        (8, 4, 16),
        (8, 6, 16),
    ]
    assert found["best"]["gpus"] == 8 and found["shards_wanted"]["8"] >= 1
    assert sum(found["configurations"][0]["gpu_seconds_per_round"].values()) > 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--bundle", "5"], "not a multiple of --bundle 5"),
        (["--shards", "9"], "9 with 8 generators, 8 scorers and 400 prompts"),
        (["--gpus", "1"], "1 with 1 generators, 0 scorers"),
        (["--ratio", "1"], "'' must be a whole number"),
        (["--deaths", "-1"], "'-1' must be a number of at least 0"),
    ],
)
def test_bad_usage_ends_with_code_2_and_says_why(args, says, capsys):
    with pytest.raises(SystemExit) as ended:
        simulation.main(args)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and says in shown.err and shown.out == ""


def test_the_bench_stands_by_the_plans_defaults():
    given = vars(simulation.parser().parse_args([]))
    assert {f.name: given[f.name] for f in fields(Plan) if f.name in given and f.name != "coordinator"} == {
        f.name: f.default for f in fields(Plan) if f.name in given and f.name != "coordinator"
    }
