"""Clusters whose processes can be found and killed, and the hook that kills one at a change of a file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent

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


class Disagreement(AssertionError):
    """A case did not end as it must."""


def until(what: str, ask: Callable[[], Any], seconds: float = 480.0) -> Any:
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

    def end(self) -> None:
        """End every machine at one moment."""
        for raylet in self.raylets():
            unless_gone(raylet.kill)

    def add_node(self) -> None:
        self._ray(f"--address={self.address}", "--num-cpus=4")

    def _ray(self, *args: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", *args, "--object-store-memory=100000000"]
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
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


class OneMachine(Cluster):
    """The clusters that commands start for themselves, one after the other, with Ray's default settings."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.env = {n: v for n, v in self.env.items() if n != "RAY_ADDRESS" and not n.startswith("RAY_health_check")}

    def start(self) -> None:
        pass

    def server(self, command: int, name: str) -> psutil.Process | None:
        """A process of Ray itself under a command. The agents are known by the title that they give themselves."""
        words = {"runtime_env_agent": "ray::RuntimeEnvAgent", "dashboard_agent": "ray::DashboardAgent"}
        words |= {"dashboard": "/dashboard/dashboard.py", "raylet": "/raylet/raylet", "gcs_server": "/gcs_server"}
        below = unless_gone(lambda: psutil.Process(command).children(recursive=True)) or []
        return next((p for p in below if any(words[name] in word for word in cmdline(p)[:3])), None)


def unless_gone(ask: Callable[[], Any]) -> Any:
    """The answer; None where the process or file that is asked has just gone."""
    try:
        return ask()
    except (psutil.Error, FileNotFoundError):
        return None


def cmdline(process: psutil.Process) -> list[str]:
    return unless_gone(process.cmdline) or [""]
