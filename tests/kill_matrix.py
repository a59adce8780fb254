"""Disturbs real jobs on a Ray cluster of its own and compares what they leave with the output of a quiet one.

    python tests/kill_matrix.py --minutes 30 --seed 0

Every case is one output, filled by `python -m jobs.align` while SIGKILL, SIGTERM and SIGSTOP reach generator, scorer,
coordinator, driver and raylet: at random, or at a chosen change of a file. For the second, a `sitecustomize.py` of the
harness is on the path of every process of the cluster; its audit hook (`HOOK`) sees each rename, removal, directory and
file opened for writing under the output, and sends the process a signal at the one that the file `plan` names. In some
cases the command starts Ray itself, and Ray's own processes are killed: agents, dashboard, GCS and raylet. In the end
the tables must be those of the quiet job, byte for byte, and `aisp verify` must agree.

Prints a JSON report: faults by process and signal, seconds to notice and to recover, restarts of the command, outcomes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from kill_cluster import Cluster, Disagreement, OneMachine, unless_gone, until
from kill_job import PROMPTS, ROWS, TIMEOUTS, Case, Fault, Job

KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
ACTORS = ("generator", "scorer", "coordinator")
SERVERS = ("runtime_env_agent", "dashboard_agent", "dashboard", "gcs_server", "raylet")  # of Ray, on one machine


@dataclass(frozen=True)
class Spec:
    """A fault to come: `step` is a pattern of HOOK's steps, at which the process that reaches it is hit, with `torn` a
    file that is to be written being half there. Without it the process is hit some time after rows were written, or
    `loading`: it is killed then, and its replacement is hit as soon as it is there."""

    process: str
    signal: signal.Signals
    step: str = ""
    occurrence: int = 1
    torn: bool = False
    loading: bool = False


EXIT = {signal.SIGINT: 130, TERM: 143, KILL: -KILL}
SILENCE = 120.0  # seconds in which a command says something, while Ray and models start too
SLOW, HELD = 0.3, 3.0  # seconds a scoring takes while faults are to come, and while little is to be done


def disturb(job: Job, specs: list[Spec], rng: random.Random) -> None:
    """Fill the output of a job while all of this happens, and end with exit code 0. Raises Disagreement."""
    job.pace(SLOW)
    if specs[0].step:
        _arm(job, specs[0])
    job.start()
    for number, spec in enumerate(specs):
        if job.commands[-1].poll() == 0:
            break
        job.pace(SLOW * (not spec.step))
        if spec.step:
            _at_step(job, spec, armed=number == 0)
            continue
        if number or spec.process != "second driver":  # else two commands at once
            if number == 0:
                job.goes_on()
            time.sleep(rng.uniform(0, 0.3))
        others = {"driver": _driver, "raylet": _raylet, "second driver": _second}
        others.get(spec.process, _actor)(job, spec)
    job.pace(0.0)
    job.end()
    until("no actor is left", lambda: not any(job.cluster.living(role) for role in ACTORS))


def _note(job: Job, process: str, spec: Spec, moment: str = "random") -> Fault:
    job.case.faults.append(Fault(process, spec.signal.name, moment))
    return job.case.faults[-1]


def _replaced(job: Job, fault: Fault, role: str, victims: set[int], began: float) -> None:
    """Wait for another process in the place of these, and for rows from it."""
    job.cluster.victims |= victims

    def replacement() -> bool:
        if code := job.commands[-1].poll():
            raise Disagreement(f"the command ended with {code} on {fault}")
        return code == 0 or bool(job.cluster.living(role))

    until(f"another {role} after {fault}", replacement)
    fault.noticed = time.time() - began
    job.goes_on()
    fault.recovered = time.time() - began
    fault.left_behind = any(psutil.pid_exists(pid) for pid in victims)


def _find(job: Job, role: str) -> psutil.Process | None:
    """The newest actor of a role; None where the job is done."""
    until(f"a {role}", lambda: job.cluster.living(role) or job.commands[-1].poll() is not None)
    return next(reversed(job.cluster.living(role)), None)


def _actor(job: Job, spec: Spec) -> None:
    victim = _find(job, spec.process)
    if victim and spec.loading:
        victim.kill()
        job.cluster.victims.add(victim.pid)
        victim = _find(job, spec.process)
    if victim is None:
        return
    fault, began = _note(job, spec.process, spec, "loading" if spec.loading else "random"), time.time()
    unless_gone(lambda: victim.send_signal(spec.signal))
    _replaced(job, fault, spec.process, {victim.pid}, began)


def _arm(job: Job, spec: Spec) -> None:
    home = job.cluster.home
    (home / "fired").unlink(missing_ok=True)
    plan = asdict(spec) | {"output": str(job.output), "signal": int(spec.signal), "time": time.time()}
    (home / "plan.new").write_text(json.dumps(plan))
    os.replace(home / "plan.new", home / "plan")


def _at_step(job: Job, spec: Spec, armed: bool) -> None:
    if not armed:
        _arm(job, spec)
    home = job.cluster.home
    until(f"{spec.step}", lambda: (home / "fired").exists() or job.commands[-1].poll() == 0)
    (home / "plan").unlink(missing_ok=True)
    if not (home / "fired").exists():
        return  # the job was done before
    fired = json.loads((home / "fired").read_text())
    driver = fired["pid"] == job.commands[-1].pid
    fault = _note(job, "driver" if driver else "coordinator", spec, "torn " * spec.torn + fired["step"])
    if driver:
        _driver_hit(job, spec, fault, fired["time"])
    else:
        _replaced(job, fault, "coordinator", {fired["pid"]}, fired["time"])


def _driver(job: Job, spec: Spec) -> None:
    fault, began = _note(job, "driver", spec), time.time()
    job.commands[-1].send_signal(spec.signal)
    _driver_hit(job, spec, fault, began)


def _driver_hit(job: Job, spec: Spec, fault: Fault, began: float) -> None:
    """The command ends, and the same command again resumes. From a stopped command it takes the output over."""
    old = job.commands[-1]
    if spec.signal != STOP:
        job.end(EXIT[spec.signal])
        fault.noticed = time.time() - began
        if spec.signal != KILL and "the same command resumes" not in job.logs():
            raise Disagreement(f"{spec.signal.name}: the command does not say how it resumes")
        job.start()
        job.goes_on()
        fault.recovered = time.time() - began
        return
    coordinators = {p.pid for p in job.cluster.living("coordinator")}
    job.pace(HELD)  # else the stopped command's coordinator, which runs on, is done before the output is taken from it
    new = job.start()
    until("the second command owns the output", lambda: _owns(job, new.pid) or new.poll() is not None)
    fault.noticed = time.time() - began
    job.pace(SLOW)
    job.goes_on()
    fault.recovered = time.time() - began
    woken = time.time()
    old.send_signal(signal.SIGCONT)
    if until("the woken command ends", lambda: old.poll() is not None) and old.returncode == 0:
        raise Disagreement("a command that lost its output ended with exit code 0")
    job.case.codes.append(old.returncode)
    for pid in (old.pid, *coordinators):
        if wrote := [step for when, step in job.cluster.steps(pid) if when > woken and "part-" in step]:
            raise Disagreement(f"process {pid} wrote after its output was taken: {wrote}")
    job.cluster.victims |= coordinators


def _owns(job: Job, pid: int) -> bool:
    lease = job.output / ".staging" / "lease.json"
    return unless_gone(lambda: str(pid) in re.findall(r'"pid": ?([0-9]+)', lease.read_text()))


def _second(job: Job, spec: Spec) -> None:
    """The same command beside the first: refused."""
    fault, began, first = _note(job, "second driver", spec), time.time(), job.commands[-1]
    second = job.start()
    until("one of two commands ends", lambda: first.poll() is not None or second.poll() is not None)
    job.commands = [second, first] if second.poll() is not None else [first, second]  # the winner last
    job.end(2, job.commands[0])
    fault.noticed = time.time() - began


def _raylet(job: Job, spec: Spec) -> None:
    """Lose the node that the generator is on; another has just joined."""
    cluster = job.cluster
    job.pace(HELD)
    cluster.add_node()
    generator = _find(job, "generator")
    if generator is None:
        return
    raylet = next(p for p in cluster.raylets() if p.pid == generator.ppid())
    lost = {p.pid for p in raylet.children()}
    fault, began = _note(job, "raylet", spec), time.time()
    raylet.send_signal(spec.signal)
    job.pace(SLOW)
    try:
        _replaced(job, fault, "generator", lost, began)
    finally:
        unless_gone(raylet.kill)
        for pid in lost:
            unless_gone(lambda pid=pid: psutil.Process(pid).kill())


def lose_server(job: Job, name: str) -> None:
    """Kill a process of Ray on the machine of a command that started Ray itself: Ray is started again, but for the
    dashboard, and more rows come."""
    machine, command = job.cluster, job.commands[-1]
    assert isinstance(machine, OneMachine)
    job.pace(HELD)
    victim = until(f"a {name}", lambda: machine.server(command.pid, name) or command.poll() is not None)
    if command.poll() is not None:
        return
    gone = set() if name == "dashboard" else {p.pid for role in ACTORS for p in machine.living(role)}
    fault, began, before = Fault(name, "SIGKILL", "one machine"), time.time(), job.count("starting Ray again")
    job.case.faults.append(fault)
    unless_gone(victim.kill)
    if gone:
        until("Ray is started again", lambda: job.count("starting Ray again") > before, TIMEOUTS["stall"] + 30)
        fault.noticed = time.time() - began
    machine.victims |= gone
    job.pace(SLOW)
    job.goes_on()
    fault.recovered = time.time() - began


def machine_case(home: Path, quiet: dict[str, bytes], names: Sequence[str]) -> Case:
    """One output, filled by a command that starts Ray itself and loses these of its processes."""
    job, began = Job(OneMachine(home), "machine"), time.monotonic()
    try:
        job.pace(SLOW)
        job.start()
        for name in names:
            job.goes_on()
            lose_server(job, name)
        job.pace(0.0)
        job.end()
        job.check(quiet)
        if job.silence > SILENCE:
            raise Disagreement(f"the command said nothing for {job.silence:.0f} s")
        job.case.outcome = "equal"
    except Disagreement as error:
        job.case.outcome = f"{error}\n{job.logs()}"
    finally:
        job.close()
        job.cluster.close()
    job.case.seconds = round(time.monotonic() - began, 1)
    return job.case


def draw(rng: random.Random, steps: list[str], starting: list[str]) -> list[Spec]:
    """A random case: one to five faults, most at random moments, some at steps of a coordinator, and perhaps one before
    them at a step of the driver."""

    def one(kind: str) -> Spec:
        how = rng.choices((KILL, TERM, STOP), (5, 2, 2))[0]
        if kind == "step":
            torn = rng.random() < 0.5
            how = rng.choices((KILL, STOP), (5, 1))[0]
            return Spec("coordinator", how, re.escape(rng.choice(steps)), rng.randint(1, 3), torn)
        if kind == "driver" and how == TERM:
            how = rng.choice((TERM, signal.SIGINT))
        if kind in ACTORS and rng.random() < 0.2:
            return Spec(kind, how, loading=True)
        return Spec(kind, KILL if kind == "second driver" else how)

    kinds = ("generator", "scorer", "coordinator", "driver", "step", "raylet", "second driver")
    faults = [one(kind) for kind in rng.choices(kinds, (3, 3, 3, 3, 6, 1, 1), k=rng.randint(1, 5))]
    first = [Spec("driver", KILL, re.escape(rng.choice(starting)), torn=rng.random() < 0.5)]
    return first * (rng.random() < 0.25) + faults


def run_case(cluster: Cluster, name: str, specs: list[Spec], quiet: dict[str, bytes], rng: random.Random) -> Case:
    """One output, disturbed and compared; the case says what came out."""
    job, began = Job(cluster, name), time.monotonic()
    try:
        disturb(job, specs, rng)
        job.check(quiet)
        job.case.outcome = "equal"
    except Disagreement as error:
        job.case.outcome = f"{error}\n{job.logs()}"
    finally:
        job.close()
    job.case.seconds = round(time.monotonic() - began, 1)
    return job.case


def quiet_tables(cluster: Cluster) -> tuple[dict[str, bytes], list[str], list[str]]:
    """The tables of an undisturbed job; the steps of its coordinator for every part; and those of its driver."""
    job = Job(cluster, "quiet")
    job.start()
    job.end()
    job.check(job.tables())
    steps = [Counter(step for _, step in cluster.steps(who=who)) for who in ("actor", "driver")]
    return job.tables(), sorted(s for s, count in steps[0].items() if count >= PROMPTS // ROWS), sorted(steps[1])


@contextmanager
def a_cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="aisp-"))  # short: Ray puts sockets below it
    cluster = Cluster(home)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(home, ignore_errors=True)


def summary(cases: list[Case]) -> dict[str, Any]:
    """Faults by process and signal, with the median and the longest time in seconds to notice and to recover."""
    faults: dict[str, list[Fault]] = {}
    for fault in (fault for case in cases for fault in case.faults):
        faults.setdefault(f"{fault.process} {fault.signal}", []).append(fault)

    def seconds(values: list[float | None]) -> dict[str, float]:
        known = [value for value in values if value is not None]
        return {"median": round(statistics.median(known), 1), "longest": round(max(known), 1)} if known else {}

    return {
        "cases": len(cases),
        "equal": sum(case.outcome == "equal" for case in cases),
        "commands": sum(len(case.codes) for case in cases),
        "faults": {
            name: {
                "count": len(found),
                "noticed": seconds([fault.noticed for fault in found]),
                "recovered": seconds([fault.recovered for fault in found]),
                "left_behind": sum(fault.left_behind for fault in found),
            }
            for name, found in sorted(faults.items())
        },
        "moments": dict(Counter(fault.moment for case in cases for fault in case.faults).most_common()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    deadline, rng = time.monotonic() + 60 * options.minutes, random.Random(options.seed)
    cases: list[Case] = []
    quiet: dict[str, bytes] = {}
    while time.monotonic() < deadline:
        with a_cluster() as cluster:  # a fresh one after a case that failed
            found, *steps = quiet_tables(cluster)
            quiet = quiet or found
            while time.monotonic() < deadline:
                if rng.random() < 0.1:
                    what: Sequence[Any] = rng.sample(SERVERS, 2)
                    cases.append(machine_case(cluster.home / f"machine-{len(cases)}", quiet, what))
                else:
                    what = draw(rng, *steps)
                    cases.append(run_case(cluster, f"case-{len(cases)}", what, quiet, rng))
                print(f"{cases[-1].seconds:g} s: {what}: {cases[-1].outcome}", file=sys.stderr, flush=True)
                if cases[-1].outcome != "equal":
                    break
    report = {"seed": options.seed, "minutes": options.minutes, **summary(cases)}
    print(json.dumps(report | {"outcomes": [asdict(case) for case in cases]}, indent=2))
    return 0 if report["cases"] == report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
