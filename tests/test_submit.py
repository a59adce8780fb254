"""`aisp submit`: what is refused on this machine, and what comes back from a cluster with token authentication."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray_head
import yaml
from pydantic import SecretStr

from aisp_dist.config.runtime import StorageOptions
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease
from aisp_dist.rewards.client import is_loopback
from jobs import cli, submit

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
WAIT = 200  # seconds; for a machine that is busy
SECRET = "planted-" + secrets.token_hex(12)
CONFIG = {
    "output": "/data/aisp-test-submit",
    "prompts": {"source": "some prompts/p.jsonl"},
    "generator": {"model": "demo", "max_new_tokens": 8, "batch_rows": 8},
    "rewards": {"words": {"kind": "function", "function": "mine/rewards.py:words"}},
    "method": {"kind": "aisp", "num_samples": 2, "num_iterations": 2, "lambda": {"ess": 0.1}},
}
REWARD = """
import aisp_dist
def words(prompts, completions, **columns):
    assert "py_modules" in aisp_dist.__file__, aisp_dist.__file__  # ours as they were sent, not what the cluster has
    return [float(len(set(c[-1]["content"].split()))) for c in completions]
"""
FOLLOW = """
import asyncio, json, sys
from jobs import cli, submit
address, entrypoint, env = sys.argv[1:]
job = {"submission_id": json.loads(env)["ID"], "entrypoint": entrypoint, "runtime_env": {"env_vars": json.loads(env)}}
submit.main = lambda args: asyncio.run(submit.submit(submit.connect(address), job, "NO_WAIT" in env))
cli.run("submit", [])
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "my project"
    for name in ("some prompts", "mine"):
        (folder / name).mkdir(parents=True)
    (folder / "some prompts" / "p.jsonl").write_text(
        '{"prompt": "What is tea?"}\n{"prompt": "What is a bicycle for?"}\n'
    )
    (folder / "mine" / "rewards.py").write_text(REWARD)
    (folder / "my run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head with token authentication and secrets in its environment; what a user's shell needs to reach it."""
    token = tmp_path_factory.mktemp("submit") / "token"
    token.write_text(secrets.token_hex(16))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    keys = {"HF_TOKEN": f"{SECRET}-hub", "AWS_SECRET_ACCESS_KEY": f"{SECRET}-store"}
    with ray_head.started(PATH=path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), **keys) as env:
        yield env | {"PYTHONPATH": str(ROOT)}


def shell(command: list[str], env: dict[str, str], code: int | None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=400)
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def job(env: dict[str, str], entrypoint: str, address: str | None = None, **variables: str) -> subprocess.Popen[str]:
    """Any command as a job that `aisp submit` follows, without the upload and the start of a real run."""
    variables = {"ID": f"test-{secrets.token_hex(4)}"} | submit.ENVIRONMENT | variables
    command = [
        sys.executable,
        "-c",
        FOLLOW,
        address or env["RAY_API_SERVER_ADDRESS"],
        entrypoint,
        json.dumps(variables),
    ]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(run: subprocess.Popen[str], line: str) -> None:
    while (said := run.stdout.readline()) and line not in said:
        pass
    assert said, run.stderr.read()


def test_a_run_from_any_directory_and_what_the_cluster_remembers_of_it(cluster, project, tmp_path):
    output = tmp_path / "out"
    command = ["-m", "jobs.submit", "my run.yaml", "--output", str(output), "--prompts.limit=2"]
    done = shell(command, cluster, 0)  # the address comes from the environment
    assert "first prompt" in done.stdout and "2 rows done, 0 failed" in done.stdout
    rows = pq.read_table(output / "data").to_pylist()
    assert [row["prompt"][0]["content"] for row in rows] == ["What is tea?", "What is a bicycle for?"]

    lease = Lease.take(Place.at(output))  # as if the run were still at work
    refused = shell(command, cluster, 2)
    assert "is owned by a live run" in refused.stdout and "Traceback" not in refused.stderr
    lease.release()

    question = (
        "import sys; from ray.job_submission import JobSubmissionClient as C\n"
        "for job in C(sys.argv[1]).list_jobs():\n"
        "    if job.submission_id: print(job.json())"
    )
    text = shell(["-c", question, cluster["RAY_API_SERVER_ADDRESS"]], cluster, 0).stdout
    found = [json.loads(line) for line in text.splitlines() if "jobs.align" in line]
    assert {tuple(shlex.split(job["entrypoint"])) for job in found} == {
        ("python", "-m", "jobs.align", "my run.yaml", "--output", str(output), "--prompts.limit=2")
    }
    assert all(job["metadata"] == {"job_name": "aisp out", "output": str(output)} for job in found)
    assert all(job["runtime_env"]["env_vars"] == submit.ENVIRONMENT for job in found)
    token = Path(cluster["RAY_AUTH_TOKEN_PATH"]).read_text()
    for secret in (SECRET, token):
        assert secret not in text + done.stdout + done.stderr
        assert holders(secret, output, Path(cluster[ray_head.MARK])) == set()


def holders(secret: str, *folders: Path) -> set[str]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 10
    return {file.name for file in files if secret.encode() in file.read_bytes()}


def test_the_exit_code_is_the_drivers(cluster):
    failed, killed = job(cluster, "echo héllo; exit 3"), job(cluster, "kill -9 $$")
    assert (failed.wait(WAIT), killed.wait(WAIT)) == (3, 137)
    assert "héllo" in failed.stdout.read().splitlines()


def test_no_wait_prints_the_id_and_an_id_is_taken_once(cluster):
    proxied = cluster | {"http_proxy": "http://127.0.0.1:9"}  # which no request to this machine takes
    left = job(
        proxied if is_loopback(cluster["RAY_API_SERVER_ADDRESS"]) else cluster, "true", NO_WAIT="1", ID="test-left"
    )
    assert left.wait(WAIT) == 0 and left.stdout.read() == "test-left\n"
    taken = job(cluster, "true", ID="test-left")
    assert taken.wait(WAIT) == 1 and "the cluster did not take the job" in taken.stderr.read()


def test_a_signal_stops_the_job_and_waits_for_its_flush(cluster):
    """Longer than the 3 s that Ray gives by default."""
    run = job(cluster, "trap 'sleep 5; echo flushed; exit' TERM; echo began; while :; do sleep 0.1; done")
    until(run, "began")
    run.send_signal(signal.SIGTERM)
    assert run.wait(WAIT) == 143
    assert "flushed" in run.stdout.read() and "the same command resumes" in run.stderr.read()


def test_a_second_signal_leaves_at_once_and_a_job_that_others_stopped_is_no_success(cluster):
    other = job(cluster, "echo began; sleep 600", ID="test-other")
    until(other, "began")
    run = job(cluster, "trap '' TERM; echo began; while :; do sleep 0.1; done")
    until(run, "began")
    run.send_signal(signal.SIGINT)
    assert "a second signal leaves at once" in "".join(run.stderr.readline() for _ in range(2))
    run.send_signal(signal.SIGINT)
    assert run.wait(WAIT) == 130
    said = run.stderr.read()
    assert "may still run. To stop it: ray job stop --address http://" in said
    stop = [str(Path(sys.executable).with_name("ray")), *shlex.split(said.split("To stop it: ray ")[1])]
    subprocess.run([*stop[:-1], "test-other"], env=cluster, capture_output=True, timeout=100, check=True)
    assert other.wait(WAIT) == 1 and "test-other was stopped" in other.stderr.read()


class Link:
    """A TCP relay that can be cut, as a network can."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.pairs, self.up = target, [], True
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            if not self.up:
                near.close()
                continue
            far = socket.create_connection(self.target)
            self.pairs += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def cut(self) -> None:
        self.up = False
        for end in self.pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_lost_connection_loses_and_repeats_no_line(cluster):
    host, port = cluster["RAY_API_SERVER_ADDRESS"].removeprefix("http://").split(":")
    link = Link((host, int(port)))
    run = job(cluster, "for i in $(seq 80); do echo line $i; sleep 0.1; done", link.address)
    lines = []
    while "line 20" not in lines:
        lines.append(run.stdout.readline().strip())
    link.cut()
    time.sleep(3)
    link.up = True
    assert run.wait(WAIT) == 0
    lines += run.stdout.read().splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {i}" for i in range(1, 81)]
    assert "lost the connection" in run.stderr.read()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RAY_AUTH_TOKEN": "x" * 32}, "Invalid authentication token"),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "/no/such/file"),
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
    ],
)
def test_a_wrong_token_is_one_line(cluster, changes, said):
    run = job(cluster | changes, "true")
    assert run.wait(WAIT) == 2
    complaint = run.stderr.read()
    assert said in complaint and complaint.count("\n") == 1 and "RAY_AUTH_TOKEN_PATH" in complaint


def refused(capsys, *args: str, last: str = "http://127.0.0.1:1") -> str:
    with pytest.raises(SystemExit) as left:
        cli.run("submit", ["my run.yaml", "--address", last, *args])
    said = capsys.readouterr()
    assert left.value.code == 2 and said.out == "" and "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method.sigma2", "-1"], "method.sigma2"),
        (["--output", "out"], "'out' is relative, and a Ray job runs in a temporary copy"),
        (["--config", "../more.yaml"], "more.yaml' is outside"),
        (["--runtime.storage_options", '{"key": "AKIA-SECRET"}'], "--runtime.storage_options"),
        (['--runtime={"storage_options": {"key": "AKIA-SECRET"}}'], "--runtime"),
        (["--runtime", '{"storage_options": {"key": "AKIA-SECRET"}}'], "--runtime"),
        ([], "cannot connect to http://127.0.0.1:1"),
    ],
)
def test_refused_here(project, capsys, args, said):
    (project.parent / "more.yaml").write_text("seed: 1")
    complaint = refused(capsys, *args)
    assert said in complaint and "AKIA-SECRET" not in complaint


SECRET_KEYS = {"access_key": "AKIA-SECRET", "secret_key": "SECRET"}


@pytest.mark.parametrize("where", ["my run.yaml", "more.yaml"])
@pytest.mark.parametrize("of_a_case", [False, True])
def test_a_secret_in_a_file_that_would_be_sent(project, capsys, where, of_a_case):
    values = {"runtime": {"storage_options": {"region": "eu-west-1", **SECRET_KEYS}}}
    values = {"compare": {"cases": {"one": values}}} if of_a_case else values
    (project / where).write_text(yaml.safe_dump(values | (CONFIG if where == "my run.yaml" else {})))
    complaint = refused(capsys, *(["--config", where] if where == "more.yaml" else []))
    key = "compare.cases.one.runtime" if of_a_case else "runtime"
    assert f"{where}: {key}.storage_options.access_key is a secret" in complaint and "take it out" in complaint
    assert "SECRET" not in complaint


def test_storage_options_that_are_no_secret_may_be_sent(project, capsys):
    values = {"endpoint_override": "store:9000", "region": "eu-west-1", "access_key": None}
    (project / "my run.yaml").write_text(yaml.safe_dump(CONFIG | {"runtime": {"storage_options": values}}))
    assert "cannot connect" in refused(capsys)


def test_every_secret_of_the_configuration_is_known():
    secret = StorageOptions(access_key="a", secret_key="b", session_token="c")
    assert {key for key, value in secret if isinstance(value, SecretStr)} == set(submit.SECRETS)


@pytest.mark.parametrize("name", ["actors/__init__.py", "jobs.py"])
def test_a_name_that_would_hide_our_packages(project, capsys, name):
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("")
    assert "in place of ours" in refused(capsys)


def test_files_are_left_to_the_job(project, capsys):
    args = ["--generator.model", "/cluster/llama", "--prompts.source", "/cluster/prompts.jsonl"]
    assert "cannot connect" in refused(capsys, *args)


def test_no_address(project, capsys, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as left:
        cli.run("submit", ["my run.yaml"])
    assert left.value.code == 2 and "--address: missing" in capsys.readouterr().err
