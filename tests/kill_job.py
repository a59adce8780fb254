"""One output of a kill matrix, the commands that fill it, and what happened to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

import yaml
from kill_cluster import Cluster, Disagreement, unless_gone, until

PROMPTS, ROWS = 40, 5  # input lines of the quiet job; rows of a part
THINGS = ("puppies", "cups of coffee", "bicycles", "words of Spanish", "loaves of bread", "miles on foot", "gardens")
TIMEOUTS: dict[str, float] = {"startup": 300, "round": 60, "reward": 10, "stall": 8}

REWARD = '''
import time
from pathlib import Path

def words(prompts, completions, **columns):
    """As slow as the file beside it says: a kill is to find the job in the middle, at little cost."""
    time.sleep(float((Path(__file__).parent / "pace").read_text()))
    return [float(len(set(c[-1]["content"].split()))) for c in completions]
'''


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
        self.silence, self.closed = 0.0, False
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
        if not self.commands:
            threading.Thread(target=self._listen, daemon=True).start()
        with (self.folder / f"log-{len(self.commands)}").open("wb") as log:
            command = [sys.executable, "-m", "jobs.align", "run.yaml"]
            self.commands.append(
                subprocess.Popen(
                    command, cwd=self.folder, env=self.cluster.env | {"AISP_ROLE": "driver"}, stdout=log, stderr=log
                )
            )
        return self.commands[-1]

    def _listen(self) -> None:
        """Measure how long a command says nothing."""
        size, at = 0, time.monotonic()
        while not self.closed:
            now = sum(path.stat().st_size for path in self.folder.glob("log-*"))
            if now != size:
                size, at = now, time.monotonic()
            self.silence = max(self.silence, time.monotonic() - at)
            time.sleep(0.2)

    def end(self, code: int = 0, command: subprocess.Popen[bytes] | None = None) -> None:
        """Wait for a command, the last one by default, to end with this code."""
        command = command or self.commands[-1]
        until("the command ends", lambda: command.poll() is not None)
        found = command.returncode
        self.case.codes.append(found)
        if found != code:
            raise Disagreement(f"exit code {found} in place of {code}")

    def count(self, words: str) -> int:
        """How often the commands have said so."""
        return sum(path.read_text().count(words) for path in self.folder.glob("log-*"))

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
            command, cwd=self.folder, env=self.cluster.env, capture_output=True, text=True, timeout=240
        )
        if done.returncode or "every input is there exactly once" not in done.stdout:
            raise Disagreement(f"verify: {done.stdout}{done.stderr}")
        if staged := [str(path) for path in self.output.glob(".staging/part-*")]:
            raise Disagreement(f"left in staging: {staged}")

    def close(self) -> None:
        self.closed = True
        for command in self.commands:
            if command.poll() is None:
                command.kill()
                command.wait()
