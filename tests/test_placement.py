"""The plan from configuration and machines to actors: laws over random clusters, then examples."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from aisp_dist import placement
from aisp_dist.config import ConfigError, Run

ROOT = Path(__file__).parent.parent
MAIN = {"kind": "model", "model": "demo"}
WORDS = {"kind": "function", "function": "a.py:b", "use": "report"}


def run(models=None, **runtime) -> Run:
    models = {"main": MAIN, "words": WORDS} if models is None else models
    values = {"output": "x", "generator": {"model": "demo"}, "method": {"kind": "best_of_n"}}
    return Run.model_validate(values | {"rewards": models, "runtime": runtime})


def machine(cpus: float, gpus: float = 0, kind: str | None = None) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus} | ({f"accelerator_type:{kind}": 1.0} if kind else {})


def shares(plan) -> dict[str, float]:
    return {group.role: group.num_gpus for group in plan.groups}


def counts(plan) -> dict[str, int]:
    return {group.role: group.replicas for group in plan.groups}


def brute(items: list[float], gpus: int) -> bool:
    """Whether fractions fit on GPUs, by trying everything."""
    if not items:
        return True
    first, *rest = items

    def place(free: tuple[float, ...], left: list[float]) -> bool:
        if not left:
            return True
        return any(
            f >= left[0] - 1e-6 and place((*free[:i], f - left[0], *free[i + 1 :]), left[1:])
            for i, f in enumerate(free)
        )

    return place((1.0,) * gpus, [first, *rest])


def test_fractions_are_placed_exactly_where_some_placement_exists():
    draw = random.Random(0)
    seen = set()
    for _ in range(300):
        gpus = draw.randint(1, 3)
        each = {name: draw.choice([0.2, 0.3, 0.4, 0.5, 0.6, 0.7]) for name in ("generator", "a", "b")}
        many = {name: draw.randint(1, 3) for name in each}
        wanted = run(
            {"a": MAIN, "b": MAIN},
            generators={"replicas": many["generator"], "num_gpus": each["generator"]},
            rewards={name: {"replicas": many[name], "num_gpus": each[name]} for name in ("a", "b")},
        )
        fits = brute([each[name] for name in each for _ in range(many[name])], gpus)
        seen.add(fits)
        try:
            plan = placement.plan(wanted, [machine(64, gpus)])
        except ConfigError:
            assert not fits
            continue
        assert fits
        on: dict[tuple[int, int], float] = {}
        for gpu in plan.shared:
            on[gpu.machine, gpu.index] = sum(share for _, share in gpu.seats)
        assert all(total <= 1 + 1e-6 for total in on.values())
        assert sum(len(gpu.seats) for gpu in plan.shared) == sum(many.values()), "every actor has its one GPU"
    assert seen == {True, False}


def test_the_plan_never_exceeds_the_cpus():
    for cpus in range(1, 9):
        for replicas in range(1, 9):
            try:
                plan = placement.plan(run(generators={"replicas": replicas}), [machine(cpus)])
            except ConfigError:
                assert replicas + 1 > cpus
            else:
                assert sum(g.replicas * g.num_cpus for g in plan.groups) <= cpus


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("rewards", [1, 2, 3])
def test_auto_shares_what_there_is(gpus, rewards):
    plan = placement.plan(run({f"r{i}": MAIN for i in range(rewards)} | {"words": WORDS}), [machine(16, gpus)])
    given = shares(plan)
    assert given.pop("words") == 0
    assert sum(given.values()) <= gpus + 1e-6 and all((share > 0) == (gpus > 0) for share in given.values())
    if gpus > rewards:
        assert set(given.values()) == {1.0}
    elif gpus:
        assert given["generator"] == max(given.values())
        assert plan.idle == 0 and sum(given.values()) > gpus - 0.05 * len(given), "nearly all of every GPU is given"


def test_shares_follow_the_sizes_of_the_models():
    two = run({"main": MAIN})
    alike = shares(placement.plan(two, [machine(8, 1)], sizes={"generator": 10, "main": 10}))
    assert alike["generator"] == pytest.approx(0.66, abs=0.02) and alike["main"] == pytest.approx(0.33, abs=0.02)
    small = shares(placement.plan(two, [machine(8, 1)], sizes={"generator": 60, "main": 12}))
    assert small["main"] == pytest.approx(0.09, abs=0.01) and small["generator"] + small["main"] <= 1
    unknown = shares(placement.plan(two, [machine(8, 1)], sizes={"generator": 10}))
    assert unknown == alike, "a model of unknown size counts as the largest"


def test_memory_shares_add_up_to_what_a_machine_has():
    gpu = placement.plan(run({"main": MAIN}), [machine(8, 1)])
    assert sum(g.memory for g in gpu.groups) <= 1
    cpu = placement.plan(run(generators={"replicas": 3}), [machine(8)])
    assert {g.memory for g in cpu.groups if g.role != "words"} == {1 / 4}


def test_replicas_fill_the_cluster_in_the_measured_ratio():
    wanted = run(generators={"replicas": "auto"}, rewards={"main": {"replicas": "auto"}})
    eight = [machine(32, 8)]
    assert counts(placement.plan(wanted, eight, busy={"generator": 3.0, "main": 1.0})) == {
        "generator": 6, "main": 2, "words": 1,
    }  # fmt: skip
    assert counts(placement.plan(wanted, eight, busy={"generator": 1.0, "main": 1.0}))["main"] == 4
    plan = placement.plan(wanted, eight)
    assert counts(plan) == {"generator": 7, "main": 1, "words": 1} and "without a measured ratio" in plan.notes[0]
    assert plan.idle == 0
    many = placement.plan(wanted, [machine(32, 8)] * 16, busy={"generator": 3.0, "main": 1.0})
    assert counts(many)["generator"] + counts(many)["main"] == 128
    cpus = placement.plan(run(generators={"replicas": "auto"}), [machine(4)])
    assert counts(cpus)["generator"] == 3, "half a CPU for each reward, the rest for generators"


def test_idle_gpus_are_named():
    plan = placement.plan(run(), [machine(16, 8)])
    assert plan.idle == 6 and "6 of 8 GPUs stay idle" in "\n".join(plan.lines())
    assert placement.plan(run(), [machine(16, 2)]).idle == 0


def test_the_lines_show_who_shares_a_gpu_before_anything_loads():
    lines = list(placement.plan(run({"main": MAIN}), [machine(8, 1)], sizes={"generator": 7, "main": 6}).lines())
    assert lines[0] == "generator: 1 actor with 1 CPU, 0.7 GPU each"
    assert lines[2] == "machine 0, GPU 0: generator-0 70%, main-0 30%"


def test_an_autoscaling_cluster_waits_for_gpus_and_never_falls_to_cpus():
    plan = placement.plan(run(autoscaling=True, generators={"accelerator": "H100"}), [machine(4)])
    assert shares(plan) == {"generator": 1, "main": 1, "words": 0} and "machines may still join" in plan.notes[0]
    assert shares(placement.plan(run(), [machine(4)]))["generator"] == 0


@pytest.mark.parametrize(
    ("generators", "main", "machines", "message"),
    [
        (
            {"replicas": 4, "num_gpus": 1},
            {},
            [machine(64, 2)],
            r"need 5 GPU \(generator 4 x 1, main 1 x 1\) and the cluster has 2",
        ),
        ({"accelerator": "H100"}, {}, [machine(8, 2, "L4")], r"'H100' is on no machine of the cluster \(there: L4\)"),
        ({"num_gpus": 0.6, "replicas": 3}, {"num_gpus": 0}, [machine(16, 2)], "fit no machine-by-machine placement"),
        ({"num_gpus": 1, "replicas": 4}, {}, [machine(1, 8), machine(64)], "fit no machine-by-machine placement"),
        (
            {"replicas": 2, "accelerator": "H100"},
            {"num_gpus": 0},
            [machine(32, 1, "H100"), machine(32, 8, "T4")],
            r"generator 2 x 1 CPU \+ 1 GPU on H100",
        ),
        ({"num_gpus": 0.5}, {}, [machine(8)], r"need 0.5 GPU \(generator 1 x 0.5\) and the cluster has 0"),
    ],
)
def test_a_shortfall_says_what_is_short_and_which_key_to_change(generators, main, machines, message):
    with pytest.raises(ConfigError, match=message):
        placement.plan(run(generators=generators, rewards={"main": main}), machines)


def test_an_actor_must_fit_on_one_machine():
    wanted = run(generators={"num_cpus": 12})
    with pytest.raises(ConfigError, match="fit no machine-by-machine placement"):
        placement.plan(wanted, [machine(8)] * 3)
    assert placement.plan(wanted, [*[machine(8)] * 3, machine(16)])


def test_each_coordinator_has_a_replica_of_each_kind_and_others_may_come_later():
    with pytest.raises(ConfigError, match=r"runtime.shards: 2 coordinators, and main has 1 replicas"):
        placement.plan(run(generators={"replicas": 2}), [machine(8)], 2)
    late = placement.plan(run(generators={"replicas": 8, "at_least": 2}), [machine(4)])
    assert (late.groups[0].replicas, late.groups[0].needed) == (8, 2)
    with pytest.raises(ConfigError, match="generator 2 x 1"):
        placement.plan(run(generators={"replicas": 8, "at_least": 2}), [machine(1)])


EIGHT = [machine(64, 8)]
SIZES = {"one-24gb": (6.4e9, 1.2e9), "eight-80gb": (16.1e9, 15.0e9), "seventy-b": (141.1e9, 15.0e9)}  # bytes in bf16
CLUSTERS = {"one-24gb": ([machine(8, 1)], 24e9), "eight-80gb": (EIGHT, 80e9), "seventy-b": (EIGHT, 80e9)}
TOKEN = {"one-24gb": 28 * 8 * 128 * 4, "eight-80gb": 32 * 8 * 128 * 4, "seventy-b": 80 * 8 * 128 * 4}  # bytes


@pytest.mark.parametrize("name", SIZES)
def test_the_configurations_of_the_docs_fit_their_gpus(name):
    """Each is planned on its machines, and its share of each GPU holds the weights and the tokens of its rows."""
    text = (ROOT / "docs/cluster.md").read_text()
    (block,) = [b.split("```")[0] for b in text.split("```yaml\n")[1:] if b.startswith(f"# {name}\n")]
    wanted = Run.model_validate(yaml.safe_load(block))
    machines, memory = CLUSTERS[name]
    sizes = dict(zip(("generator", "helpful"), map(int, SIZES[name]), strict=True))
    made = placement.plan(wanted, machines, sizes=sizes)
    assert made.idle == 0
    generator, helpful = made.groups
    split = wanted.generator.gpus
    assert generator.num_gpus == (split if split > 1 else generator.memory)
    free = 0.92 * generator.memory * memory - sizes["generator"] / split
    longest = wanted.prompts.max_tokens + wanted.generator.max_new_tokens
    assert free > 2e9 and free / (TOKEN[name] / split) > longest  # vLLM starts with one longest sequence
    prompts = 2 * wanted.generator.rows / wanted.method.num_samples
    each = wanted.prompts.max_tokens + wanted.method.num_samples * wanted.generator.max_new_tokens  # a shared prompt
    assert free / (TOKEN[name] / split) > each * prompts / 2  # the rows at work, at their longest
    assert helpful.memory * memory > 1.25 * sizes["helpful"]


def test_a_split_model_takes_whole_gpus_of_one_machine():
    wanted = run().model_copy(update={"generator": run().generator.model_copy(update={"tensor_parallel": 2})})
    made = placement.plan(wanted, [machine(4, 1), machine(4, 4)])
    assert shares(made)["generator"] == 2.0 and made.groups[0].memory == 1.0
    assert made.idle == 2
    assert "2 GPU each" in next(made.lines())
    with pytest.raises(ConfigError, match="fit no machine-by-machine placement"):
        placement.plan(wanted, [machine(4, 1)] * 3)
    with pytest.raises(ConfigError, match="need 3 GPU .generator 1 x 2, main 1 x 1. and the cluster has 2"):
        placement.plan(
            wanted.model_copy(update={"runtime": run(rewards={"main": {"num_gpus": 1}}).runtime}), [machine(4, 2)]
        )
    assert shares(placement.plan(wanted, [machine(4, 0)]))["generator"] == 0
