"""Actors that share GPUs on a real Ray cluster with pretended GPUs: each is where the plan says, whatever the order."""

from __future__ import annotations

import asyncio
import os
from collections import Counter

import pytest
import ray

from actors import cluster
from aisp_dist import placement
from aisp_dist.config import ConfigError, Run

pytestmark = pytest.mark.ray

MAIN = {"kind": "model", "model": "demo"}


class Probe:
    """An actor that answers which GPU it was given."""

    def load(self) -> list[int]:
        return ray.get_gpu_ids()


@pytest.fixture(scope="module", autouse=True)
def two_gpus():
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
    yield
    ray.shutdown()


def planned(share: float, other: float, replicas: int = 2):
    runtime = {
        "generators": {"replicas": replicas, "num_gpus": share, "num_cpus": 0.5},
        "rewards": {"main": {"replicas": replicas, "num_gpus": other}},
    }
    values = {"output": "x", "generator": {"model": "demo"}, "method": {"kind": "best_of_n"}}
    run = Run.model_validate(values | {"rewards": {"main": MAIN}, "runtime": runtime})
    return placement.plan(run, [node["Resources"] for node in ray.nodes() if node["Alive"]])


@pytest.mark.parametrize("order", [(0, 0, 1, 1), (1, 1, 0, 0), (1, 0, 1, 0)])
def test_every_actor_finds_its_share_in_any_order_of_starting(order):
    plan = planned(0.6, 0.4)  # two of .4 on one GPU would leave the second of .6 without a place
    bundles = cluster.reserve(plan, 60)
    groups, started = list(plan.groups), Counter()
    replicas = []
    for which in order:
        group = groups[which]
        seat = group.role, started[which]
        started[which] += 1
        replicas.append((seat, cluster.RayReplica(f"{seat}-{order}", Probe, (), group, 60, False, bundles[seat])))

    async def start():
        for _, replica in replicas:
            await replica.restart("")

    asyncio.run(start())
    found = {seat: replica.loaded[0] for seat, replica in replicas}
    for gpu in plan.shared:
        assert len({found[seat] for seat, _ in gpu.seats}) == 1, "those of one bundle share one GPU"
    assert len(set(found.values())) == 2
    for _, replica in replicas:
        ray.kill(replica.handle)
    ray.util.remove_placement_group(next(iter(bundles.values())).placement_group)


def test_gpus_that_others_hold_end_the_wait_with_the_key_to_change():
    held = cluster.reserve(planned(0.6, 0.4), 60)
    with pytest.raises(ConfigError, match=r"did not free 2 GPUs to share within runtime.timeouts.startup = 1 s"):
        cluster.reserve(planned(0.6, 0.4), 1)
    ray.util.remove_placement_group(next(iter(held.values())).placement_group)
