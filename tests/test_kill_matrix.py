"""The short form of the kill matrix: every process, and the steps of a commit; the rest is the long form's."""

from __future__ import annotations

import random
import re
import signal

import pytest
from kill_job import TIMEOUTS, Job
from kill_matrix import KILL, STOP, TERM, Spec, a_cluster, machine_case, quiet_tables, run_case

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),
]  # of a machine that does other things too; alone each takes about a minute


@pytest.fixture(scope="module")
def matrix():
    with a_cluster() as cluster:
        yield cluster, *quiet_tables(cluster)


def undisturbed(matrix, name: str, specs: list[Spec]) -> None:
    """The tables are those of the quiet job, and every fault hit."""
    cluster, quiet = matrix[:2]
    case = run_case(cluster, name, specs, quiet, random.Random(0))
    if case.outcome != "equal" or len(case.faults) != len(specs):
        pytest.fail(f"{len(case.faults)} of {len(specs)} faults, {case.faults}\n{case.outcome}")


def test_actors(matrix):
    undisturbed(matrix, "actors", [Spec(role, how) for how in (KILL, STOP) for role in ("scorer", "generator")])


def test_steps_of_a_commit(matrix):
    """Killed before the changes of files that a commit is made of; of a file that is written, with half of it there."""
    commit = {"rename candidates/part-N.parquet": TERM, "rename failed/part-N.parquet": KILL}
    commit |= {"rename data/part-N.parquet": STOP, "remove .staging/part-N/seg-N-*": KILL, "open .staging/*.tmp": KILL}
    assert commit.keys() <= set(matrix[2]), matrix[2]
    steps = sorted(commit, key=lambda step: commit[step] == TERM)  # terminated, a coordinator may finish first
    specs = [Spec("coordinator", commit[step], re.escape(step), torn=step.startswith("open")) for step in steps]
    undisturbed(matrix, "commit", specs)


def test_drivers(matrix):
    """Two at once, then each way in which a command ends."""
    specs = [Spec("driver", how) for how in (signal.SIGINT, TERM, KILL, STOP)]
    undisturbed(matrix, "drivers", [Spec("second driver", KILL), *specs])


def test_nodes(matrix):
    undisturbed(matrix, "nodes", [Spec("raylet", KILL)])


def test_processes_of_ray_itself_on_one_machine(matrix, tmp_path_factory):
    """With Ray's default settings: an agent takes the raylet along. The command is never silent for long, and the run
    ends as it would have."""
    names = ["runtime_env_agent", "gcs_server"]
    case = machine_case(tmp_path_factory.mktemp("machine") / "home", matrix[1], names)
    if case.outcome != "equal" or [fault.process for fault in case.faults] != names:
        pytest.fail(f"{case.faults}\n{case.outcome}")


def test_the_last_machine(matrix):
    """A cluster that was joined has none left: the command ends, and resumes on another cluster. The last test of this
    one."""
    cluster, quiet = matrix[:2]
    job = Job(cluster, "last")
    try:
        job.pace(0.3)
        job.start()
        job.goes_on()
        cluster.end()
        job.end(1)
        assert job.count("aisp: the Ray cluster is lost: it has shown no living machine") == 1
        assert job.silence < TIMEOUTS["stall"] + 60
        with a_cluster() as other:
            job.cluster = other
            job.pace(0.0)
            job.start()
            job.end()
            job.check(quiet)
    finally:
        job.close()
