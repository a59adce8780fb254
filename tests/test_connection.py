"""The cluster of a command: when it is lost, and the namespace of its actors."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import psutil
import pytest

from jobs import connection
from jobs.connection import ClusterLost, Connection

RUN = SimpleNamespace(runtime=SimpleNamespace(timeouts=SimpleNamespace(stall=3600.0)))


@pytest.fixture
def link(monkeypatch):
    """A connection to nothing."""
    monkeypatch.setattr(connection, "_connect", lambda run, say: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(connection._RECONNECT, "60")
    made = Connection(RUN, print)
    yield made
    made.over.set()


def test_a_cluster_of_ours_is_lost_with_a_server_of_it(link):
    with subprocess.Popen(["sleep", "600"]) as server:
        link.servers = {"raylet": psutil.Process(server.pid)}
        link.check()
        server.kill()
        while psutil.Process(server.pid).status() != psutil.STATUS_ZOMBIE:  # nobody has asked for its exit code
            pass
        with pytest.raises(ClusterLost, match="lost: its raylet ended; the same command resumes") as lost:
            link.check()
        assert lost.value.code == 1


def test_a_cluster_is_lost_when_it_has_shown_no_machine_for_long(link):
    link.check()
    link.stall = 0.0
    with pytest.raises(ClusterLost, match="no living machine for runtime.timeouts.stall"):
        link.check()


def test_two_commands_with_one_process_id_have_namespaces_of_their_own(monkeypatch, tmp_path):
    """As two containers have."""
    asked = []
    monkeypatch.setattr(
        connection, "_init", lambda **options: asked.append(options) or SimpleNamespace(dashboard_url="")
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    runtime = SimpleNamespace(generators=SimpleNamespace(replicas=1, num_cpus=1))
    for _ in range(2):
        connection._connect(SimpleNamespace(output="out", rewards={}, runtime=runtime), print)
    assert asked[0]["namespace"] != asked[1]["namespace"]
