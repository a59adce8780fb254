"""Disturbs real jobs on a Ray cluster of its own and compares what they leave with the output of a quiet one.

    python tests/kill_matrix.py --minutes 30 --seed 0

Every case is one output, filled by `python -m jobs.align` while SIGKILL, SIGTERM and SIGSTOP reach generator, scorer,
coordinator, driver and raylet: at random, or at a chosen change of a file. For the second, a `sitecustomize.py` of the
harness is on the path of every process of the cluster; its audit hook (`HOOK`) sees each rename, removal, directory and
file opened for writing under the output, and sends the process a signal at the one that the file `plan` names. In the
end the tables must be those of the quiet job, byte for byte, and `aisp verify` must agree.

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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parent.parent
PROMPTS, ROWS = 40, 5  # input lines of the quiet job; rows of a part
KILL, TERM, STOP = signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP
ACTORS = ("generator", "scorer", "coordinator")

HOOK = '''
import json, os, re, sys, time

HOME, ROLE = os.environ.get("AISP_KILLS"), os.environ.get("AISP_ROLE", "actor")
CHANGES = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "open": 0}  # event: which argument is the path
seen, armed, busy = 0, None, False


def step(event, args):
    """What the change is: the event and the path below the output, without what differs between runs."""
    if event not in CHANGES or not isinstance(args[CHANGES[event]], (str, os.PathLike)):
        return None
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return None
    path = os.fspath(args[CHANGES[event]])
    if "/out/" not in path:
        return None
    path = re.sub(r"[0-9a-f]{8,}", "*", path.split("/out/", 1)[1])
    return f"{event.removeprefix('os.')} {re.sub('[0-9]+', 'N', path)}"


def hook(event, args):
    global seen, armed, busy
    if busy or event not in CHANGES:
        return
    busy = True
    try:
        found = step(event, args)
        if found is None:
            return
        with open(f"{HOME}/steps/{ROLE}-{os.getpid()}", "a") as file:
            file.write(f"{time.time()} {found}\\n")
        try:
            text = open(f"{HOME}/plan").read()
        except FileNotFoundError:
            return
        if text != armed:
            armed, seen = text, 0
        plan = json.loads(text)
        if (plan["process"] == "driver") != (ROLE == "driver"):
            return
        if not re.fullmatch(plan["step"], found) or plan["output"] not in os.path.abspath(args[CHANGES[event]]):
            return
        seen += 1
        if seen < plan["occurrence"]:
            return
        try:
            os.rename(f"{HOME}/plan", f"{HOME}/firing")
        except FileNotFoundError:  # another process was there first
            return
        if plan["torn"] and event == "open" and not os.path.exists(args[0]):
            with open(args[0], "wb") as file:
                file.write(b"PAR1 and then no more")
        with open(f"{HOME}/fired.tmp", "w") as file:
            json.dump(plan | {"step": found, "pid": os.getpid(), "time": time.time()}, file)
        os.rename(f"{HOME}/fired.tmp", f"{HOME}/fired")
        os.kill(os.getpid(), plan["signal"])
    finally:
        busy = False


if HOME:
    open(f"{HOME}/pids/{os.getpid()}", "w").close()
    sys.addaudithook(hook)
'''

REWARD = '''
import time
from pathlib import Path

def words(prompts, completions, **columns):
    """As slow as the file beside it says: a kill is to find the job in the middle, at little cost."""
    time.sleep(float((Path(__file__).parent / "pace").read_text()))
    return [float(len(set(c[-1]["content"].split()))) for c in completions]
'''


class Disagreement(AssertionError):
    """A case did not end as it must."""


def until(what: str, ask: Callable[[], Any], seconds: float = 240.0) -> Any:
    """The first true answer of `ask`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
        time.sleep(0.05)
    raise Disagreement(f"not within {seconds:g} s: {what}")


class Cluster:
    """A head without CPUs and a node with them, so that every actor that takes CPUs is on a node that can be killed."""

    def __init__(self, home: Path) -> None:
        self.home, self.temp = home, home / "ray"
        self.victims: set[int] = set()
        for name in ("pids", "steps", "site", "jobs"):
            (home / name).mkdir(parents=True)
        (home / "site" / "sitecustomize.py").write_text(HOOK)
        checks = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 3}
        self.env = os.environ | {f"RAY_health_check_{name}": str(value) for name, value in checks.items()}
        self.env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "AISP_KILLS": str(home)}
        self.env |= {"RAY_worker_niceness": "0"}  # not starved by whatever else the machine does
        self.env |= {"PYTHONPATH": f"{home / 'site'}:{ROOT}", "HF_HUB_OFFLINE": "1"}

    def start(self) -> None:
        self._ray(
            "--head",
            "--port=0",
            "--num-cpus=0",
            "--include-dashboard=false",
            "--dashboard-port=0",
            f"--temp-dir={self.temp}",
        )
        self.env["RAY_ADDRESS"] = self.address = (self.temp / "ray_current_cluster").read_text().strip()
        self.add_node()

    def add_node(self) -> None:
        self._ray(f"--address={self.address}", "--num-cpus=4")

    def _ray(self, *args: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", *args, "--object-store-memory=100000000"]
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def raylets(self) -> list[psutil.Process]:
        return [p for p in self._native() if Path(cmdline(p)[0]).name == "raylet"]

    def actors(self, role: str) -> list[psutil.Process]:
        """Processes of this cluster that are actors of a role, by the title that `ps` shows, oldest first."""
        found = [p for p in self._python() if cmdline(p)[0].lower().startswith(f"ray::{role}")]
        return sorted(found, key=psutil.Process.create_time)

    def living(self, role: str) -> list[psutil.Process]:
        """Actors of a role that were not hit."""
        return [p for p in self.actors(role) if p.pid not in self.victims]

    def steps(self, pid: int | None = None, who: str = "*") -> list[tuple[float, str]]:
        """When what was changed under an output, by one process or by all drivers or actors."""
        lines = [line for f in (self.home / "steps").glob(f"{who}-{pid or '*'}") for line in f.read_text().splitlines()]
        return [(float(when), step) for when, step in (line.split(" ", 1) for line in lines)]

    def close(self) -> None:
        for process in (*self._native(), *self._python()):
            if process.pid != os.getpid():
                unless_gone(process.kill)

    def _native(self) -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if any(str(self.temp) in word for word in cmdline(p))]

    def _python(self) -> Iterator[psutil.Process]:
        for path in (self.home / "pids").iterdir():
            process = unless_gone(lambda pid=int(path.name): psutil.Process(pid))
            if process is not None and -120 < process.create_time() - path.stat().st_mtime < 2 and cmdline(process)[0]:
                yield process  # not another that was given its number


def unless_gone(ask: Callable[[], Any]) -> Any:
    """The answer; None where the process or file that is asked has just gone."""
    try:
        return ask()
    except (psutil.Error, FileNotFoundError):
        return None


def cmdline(process: psutil.Process) -> list[str]:
    return unless_gone(process.cmdline) or [""]


@dataclass
class Fault:
    """noticed: seconds until a replacement was there (of a driver: until it had ended); recovered: until more rows
    were written. None: not looked at."""

    process: str
    signal: str
    moment: str
    noticed: float | None = None
    recovered: float | None = None
    left_behind: bool = False  # the process, stopped, was still there when its replacement had come


@dataclass
class Case:
    name: str
    faults: list[Fault] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)  # exit codes of the commands, in order
    outcome: str = ""
    seconds: float = 0.0


class Job:
    """One output and the commands that fill it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.case = cluster, Case(name)
        self.folder = cluster.home / "jobs" / name
        self.folder.mkdir()
        self.output = self.folder / "out"
        self.commands: list[subprocess.Popen[bytes]] = []
        lines = [{"prompt": f"What is good about {i} {THINGS[i % len(THINGS)]}?", "n": i} for i in range(PROMPTS)]
        for line in lines[2::ROWS]:  # a failed row for every part
            line["prompt"] *= 20
        (self.folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (self.folder / "rewards.py").write_text(REWARD)
        self.pace(0.0)
        config = {
            "output": "out",
            "prompts": {"source": "prompts.jsonl", "keep": ["n"], "max_tokens": 64},
            "generator": {"model": "demo", "max_new_tokens": 24, "batch_rows": 16},
            "rewards": {"words": {"kind": "function", "function": "rewards.py:words"}},
            "method": {"kind": "aisp", "num_samples": 4, "num_iterations": 2, "lambda": {"ess": 0.1}},
            "save": {"rows_per_file": ROWS, "flush_seconds": 0.2, "candidates": "all"},
            "runtime": {"retries": 50, "timeouts": TIMEOUTS},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(config))

    def pace(self, seconds: float) -> None:
        """Seconds that each scoring takes from now on."""
        (self.folder / "pace.new").write_text(str(seconds))
        os.replace(self.folder / "pace.new", self.folder / "pace")

    def start(self) -> subprocess.Popen[bytes]:
        with (self.folder / f"log-{len(self.commands)}").open("wb") as log:
            command = [sys.executable, "-m", "jobs.align", "run.yaml"]
            self.commands.append(
                subprocess.Popen(
                    command, cwd=self.folder, env=self.cluster.env | {"AISP_ROLE": "driver"}, stdout=log, stderr=log
                )
            )
        return self.commands[-1]

    def end(self, code: int = 0, command: subprocess.Popen[bytes] | None = None) -> None:
        """Wait for a command, the last one by default, to end with this code."""
        command = command or self.commands[-1]
        until("the command ends", lambda: command.poll() is not None)
        found = command.returncode
        self.case.codes.append(found)
        if found != code:
            raise Disagreement(f"exit code {found} in place of {code}")

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("log-*")))

    def written(self) -> int:
        """When rows were last written, in ns."""
        paths = (*self.output.glob(".staging/part-*/seg-*"), *self.output.glob("data/part-*"))
        return max((unless_gone(lambda path=path: path.stat().st_mtime_ns) or 0 for path in paths), default=0)

    def goes_on(self) -> None:
        """Wait until more rows are written, or the command is done."""
        before = self.written()

        def ask() -> bool:
            code = self.commands[-1].poll()
            if code and self.written() == before:
                raise Disagreement(f"the command ended with {code}")
            return code == 0 or self.written() != before

        until("more rows", ask)

    def tables(self) -> dict[str, bytes]:
        return {str(f.relative_to(self.output)): f.read_bytes() for f in sorted(self.output.glob("*/part-*.parquet"))}

    def check(self, quiet: dict[str, bytes]) -> None:
        """Raise Disagreement unless the output is that of the quiet job, and `aisp verify` agrees."""
        found = self.tables()
        if found != quiet:
            names = sorted(name for name in found.keys() | quiet.keys() if found.get(name) != quiet.get(name))
            raise Disagreement(f"other tables: {', '.join(names)}")
        command = [sys.executable, "-m", "jobs.verify", "out"]
        done = subprocess.run(
            command, cwd=self.folder, env=self.cluster.env, capture_output=True, text=True, timeout=120
        )
        if done.returncode or "every input is there exactly once" not in done.stdout:
            raise Disagreement(f"verify: {done.stdout}{done.stderr}")
        if staged := [str(path) for path in self.output.glob(".staging/part-*")]:
            raise Disagreement(f"left in staging: {staged}")

    def close(self) -> None:
        for command in self.commands:
            if command.poll() is None:
                command.kill()
                command.wait()


THINGS = ("puppies", "cups of coffee", "bicycles", "words of Spanish", "loaves of bread", "miles on foot", "gardens")
TIMEOUTS: dict[str, float] = {"startup": 300, "round": 60, "reward": 10, "stall": 8}


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
    """The command goes away, and the same command again goes on; of a stopped one it takes the output over."""
    old = job.commands[-1]
    if spec.signal != STOP:
        job.end(EXIT[spec.signal])
        fault.noticed = time.time() - began
        if spec.signal != KILL and "the same command goes on" not in job.logs():
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
                specs = draw(rng, *steps)
                cases.append(run_case(cluster, f"case-{len(cases)}", specs, quiet, rng))
                print(f"{cases[-1].seconds:g} s: {specs}: {cases[-1].outcome}", file=sys.stderr, flush=True)
                if cases[-1].outcome != "equal":
                    break
    report = {"seed": options.seed, "minutes": options.minutes, **summary(cases)}
    print(json.dumps(report | {"outcomes": [asdict(case) for case in cases]}, indent=2))
    return 0 if report["cases"] == report["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
