"""A head node of our own, as `ray start --head` makes it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

MARK = "AISP_TEST_HEAD"


@contextmanager
def started(**env: str) -> Iterator[dict[str, str]]:
    """The environment of commands that join it: RAY_ADDRESS is the GCS, RAY_API_SERVER_ADDRESS the dashboard."""
    temp = Path(tempfile.mkdtemp(prefix="aisp", dir="/tmp"))  # short: Ray puts sockets below it
    with socket.create_server(("", 0)) as unused:
        free = unused.getsockname()[1]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", MARK: str(temp)} | env
    start = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--port=0",
        "--num-cpus=8",
        "--dashboard-port=0",
        f"--dashboard-agent-listen-port={free}",  # else of two heads on one machine only the first takes jobs
        "--include-dashboard=true",
        "--object-store-memory=200000000",
        f"--temp-dir={temp}",
    ]
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=240)
    try:
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        yield environment | {
            "RAY_ADDRESS": (temp / "ray_current_cluster").read_text().strip(),
            "RAY_API_SERVER_ADDRESS": said.split("RAY_API_SERVER_ADDRESS='")[1].split("'")[0],
        }
    finally:
        end(str(temp))
        shutil.rmtree(temp, ignore_errors=True)


def end(mark: str) -> None:
    """Kill every process that inherited this mark, and no other."""
    for process in psutil.process_iter():
        if _environment(process).get(MARK) == mark:
            process.kill()


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
