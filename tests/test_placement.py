"""The plan from configuration and resources to actors."""

from __future__ import annotations

import pytest

from actors import placement
from aisp_dist.config import ConfigError, Run


def run(**runtime) -> Run:
    return Run.model_validate(
        {
            "output": "x",
            "generator": {"model": "demo"},
            "rewards": {
                "main": {"kind": "model", "model": "demo"},
                "words": {"kind": "function", "function": "a.py:b", "use": "report"},
            },
            "runtime": runtime,
        }
    )


def test_auto_gpus_follow_the_cluster_and_functions_take_none():
    none = placement.plan(run(), {"CPU": 2})
    assert [(g.role, g.num_gpus) for g in none] == [("generator", 0), ("main", 0), ("words", 0)]
    some = placement.plan(run(), {"CPU": 8, "GPU": 2})
    assert [(g.role, g.num_gpus) for g in some] == [("generator", 1), ("main", 1), ("words", 0)]


def test_the_plan_never_exceeds_the_cluster():
    for cpus in range(1, 9):
        for replicas in range(1, 9):
            try:
                groups = placement.plan(run(generators={"replicas": replicas}), {"CPU": cpus})
            except ConfigError:
                assert replicas + 1 > cpus
            else:
                assert sum(g.replicas * g.num_cpus for g in groups) <= cpus


def test_a_shortfall_says_what_is_short_and_which_key_to_change():
    with pytest.raises(
        ConfigError, match=r"need 5 GPU \(generator 4 x 1, main 1 x 1\) and the cluster has 2; lower rep"
    ):
        placement.plan(run(generators={"replicas": 4}), {"CPU": 64, "GPU": 2})
    with pytest.raises(ConfigError, match=r"'H100' is on no machine of the cluster \(there: L4\)"):
        placement.plan(run(generators={"accelerator": "H100"}), {"CPU": 8, "GPU": 2, "accelerator_type:L4": 1})
    with pytest.raises(ConfigError, match=r"num_gpus is 1.5; above 1 it must be whole"):
        placement.plan(run(generators={"num_gpus": 1.5}), {"CPU": 8, "GPU": 4})


def test_two_to_a_card():
    groups = placement.plan(
        run(generators={"num_gpus": 0.5}, rewards={"main": {"num_gpus": 0.5}}), {"CPU": 8, "GPU": 1}
    )
    assert sum(g.num_gpus for g in groups) == 1


def test_an_actor_must_fit_on_one_machine():
    wanted = run(generators={"num_gpus": 8, "num_cpus": 1}, rewards={"main": {"num_gpus": 1}})
    small = [{"CPU": 8.0, "GPU": 4.0}] * 3
    with pytest.raises(ConfigError, match="generator: one actor takes 1 CPU and 8 GPU, and no machine"):
        placement.plan(wanted, {"CPU": 24, "GPU": 12}, machines=small)
    assert placement.plan(wanted, {"CPU": 32, "GPU": 20}, machines=[*small, {"CPU": 8.0, "GPU": 8.0}])


def test_each_coordinator_has_a_replica_of_each_kind_and_others_may_come_later():
    with pytest.raises(ConfigError, match=r"runtime.shards: 2 coordinators, and main has 1 replicas"):
        placement.plan(run(generators={"replicas": 2}), {"CPU": 8}, 2)
    late = placement.plan(run(generators={"replicas": 8, "at_least": 2}), {"CPU": 4})
    assert (late[0].replicas, late[0].needed) == (8, 2)
    with pytest.raises(ConfigError, match="generator 2 x 1"):
        placement.plan(run(generators={"replicas": 8, "at_least": 2}), {"CPU": 1})
