"""`aisp submit CONFIG --address URL`: align as a job on a Ray cluster.

    keys and values checked here -> upload of this directory and our packages -> python -m jobs.align CONFIG flags
    -> its log on stdout, through lost connections -> its exit code

The job checks files, columns and models, since the cluster may have others than this machine. SIGINT and SIGTERM stop
the job and wait for it; a second signal leaves at once. The command, the metadata and the runtime environment of a job
show in Ray's dashboard: they hold no secret and no environment variable of this machine.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from aisp_dist.config import ConfigError
from aisp_dist.config.load import read_yaml
from aisp_dist.rewards.client import is_loopback
from jobs import cli, settings
from jobs.cli import Exit
from jobs.progress import say

OURS = Path(__file__).parent.parent
PACKAGES = ("aisp_dist", "actors", "jobs")
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "90"}  # from SIGTERM to SIGKILL: more than the last flush may take
SECRETS = ("access_key", "secret_key", "session_token")
_ACCESS = "give the cluster its own access: AWS's variables in its environment, or secrets of its pods"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_QUIET = 60.0  # seconds without a line of the log before connecting again: the connection may be dead
_ANSWER = 30.0  # seconds that the cluster may take to answer a request
_LOST = 300.0  # seconds without any answer before giving up


def main(args: Sequence[str]) -> int:
    if any("storage_options" in arg for arg in args):
        raise ConfigError(f"--runtime.storage_options: the command of a job shows in the dashboard; {_ACCESS}")
    parse = settings.parser("submit", cli.VERBS["submit"])
    parse.add_argument("--address", help=f"the cluster's dashboard, http://HEAD:8265 (or {' or '.join(_ADDRESSES)})")
    parse.add_argument("--no-wait", action="store_true", help="print the submission id and leave")
    parse.add_argument("--retry-failed", action="store_true", help="as in `aisp align`")
    parse.add_argument("--dry-run", action="store_true", help="as in `aisp align`")
    options, run, _ = settings.read(parse, args)
    root, files = Path.cwd(), [Path(os.path.abspath(name)) for name in (options.config, *options.more) if name]
    for file in files:
        if not file.is_relative_to(root):
            raise ConfigError(f"{str(file)!r} is outside {str(root)!r}, the directory that is sent; move it inside")
        if secret := next(iter(_secrets(read_yaml(file))), None):
            raise ConfigError(f"{file.name}: {secret} is a secret, and the file is sent; take it out, and {_ACCESS}")
    if "://" not in run.output and not Path(run.output).is_absolute():
        raise ConfigError(
            f"output: {run.output!r} is relative, and a Ray job runs in a temporary copy that is deleted; "
            "give an absolute path, as in --output /data/run1"
        )
    hiding = [name for name in PACKAGES if (root / name).exists() or (root / f"{name}.py").exists()]
    if hiding and root != OURS:
        raise ConfigError(f"{str(root)!r} holds {hiding[0]!r}, which the job would import in place of ours; rename it")
    _, flags = parse.parse_known_args(args)
    flags += ["--retry-failed"] * options.retry_failed + ["--dry-run"] * options.dry_run
    config, *more = [str(file.relative_to(root)) for file in files]
    environment = {"working_dir": str(root), "excludes": [".git", ".venv"], "env_vars": ENVIRONMENT}
    if root != OURS:
        environment["py_modules"] = [str(OURS / name) for name in PACKAGES]
    job = {
        "submission_id": f"aisp-{secrets.token_hex(6)}",
        "entrypoint": shlex.join(["python", "-m", "jobs.align", config, *(f"--config={m}" for m in more), *flags]),
        "runtime_env": environment,
        "metadata": {"job_name": f"aisp {Path(run.output).name}", "output": run.output},
    }
    return asyncio.run(submit(connect(options.address), job, options.no_wait))


def _secrets(values: Any, at: str = "") -> list[str]:
    """The dotted keys of secrets in storage options, at any depth: cases have storage options too."""
    found = []
    for key, value in values.items() if isinstance(values, Mapping) else ():
        here = f"{at}.{key}".lstrip(".")
        if at.endswith("storage_options") and key in SECRETS and value is not None:
            found.append(here)
        found += _secrets(value, here)
    return found


def connect(address: str | None) -> Any:
    """A JobSubmissionClient. Raises ConfigError if the cluster does not answer or does not let us in."""
    known = [os.environ.pop(name, None) for name in _ADDRESSES]  # Ray would prefer them to the argument
    address = address or next(filter(None, known), None)
    if not address:
        raise ConfigError(f"--address: missing; as in --address http://HEAD:8265, or set {' or '.join(_ADDRESSES)}")
    from ray.job_submission import JobSubmissionClient

    if is_loopback(address):  # such as a forwarded port: no proxy of the environment reaches it
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost,127.0.0.1,::1")))
    logging.disable(logging.INFO)  # what Ray logs of uploads and connections
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        raise ConfigError(
            f"--address: cannot connect to {address} ({' '.join(str(error).split())}). Give the URL of the dashboard; "
            "for a cluster with tokens set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        ) from None


async def submit(client: Any, job: dict[str, Any], no_wait: bool = False) -> int:
    """Submit a job, follow it to its end and return the driver's exit code. Raises Exit with a message."""
    id_, loop = job["submission_id"], asyncio.get_running_loop()
    stops: dict[int, asyncio.Task[None]] = {}

    def on_signal(number: int) -> None:
        if stops:
            stop = f"ray job stop --address {client.get_address()} {id_}"
            _leave(128 + number, f"left; {id_} may still run. To stop it: {stop}")
        say(f"{signal.Signals(number).name}: stopping {id_}; a second signal leaves at once")
        stops[number] = loop.create_task(_stop(client, id_))

    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, on_signal, each)
    try:
        await asyncio.to_thread(client.submit_job, **job)
    except Exception as error:
        raise Exit(1, f"the cluster did not take the job: {error}") from None
    say(f"submitted {id_} to {client.get_address()}: {job['entrypoint']}")
    if no_wait and not stops:
        print(id_)
        return 0
    details = await _follow(client, id_)
    if details.status == "STOPPED":
        code = 128 + next(iter(stops)) if stops else 1
        raise Exit(code, f"{id_} was stopped; the same command resumes from what is written")
    if details.driver_exit_code is None:
        raise Exit(1, f"{id_} failed: {details.message}")
    code = int(details.driver_exit_code)
    return code if code >= 0 else 128 - code  # -9: killed by signal 9


async def _follow(client: Any, id_: str) -> Any:
    """Print the job's log as it grows, through lost connections; returns the job's details at its end."""
    loop, printed, lost = asyncio.get_running_loop(), 0, 0.0
    while True:
        read = 0
        with suppress(Exception):  # the request below says what is wrong
            async with asyncio.timeout(_QUIET) as quiet:
                async for text in client.tail_job_logs(id_):  # every connection starts at the first line
                    quiet.reschedule(loop.time() + _QUIET)
                    print(text[max(0, printed - read) :], end="", flush=True)
                    read += len(text)
                    printed = max(printed, read)
        try:
            details = await _ask(client.get_job_info, id_)
            if details.status.is_terminal():
                print((await _ask(client.get_job_logs, id_))[printed:], end="", flush=True)
                return details
            lost = 0.0
        except Exception as error:
            if not lost:
                lost = loop.time()
                say(f"lost the connection ({type(error).__name__}: {error}); trying for {_LOST:g} s")
            if loop.time() - lost > _LOST:
                _leave(1, f"no answer about {id_} for {_LOST:g} s; it may still run")
        await asyncio.sleep(1)


async def _stop(client: Any, id_: str) -> None:
    while True:
        with suppress(Exception):  # not submitted yet, or the connection is lost
            await _ask(client.stop_job, id_)
            return
        await asyncio.sleep(1)


async def _ask(question: Any, id_: str) -> Any:
    return await asyncio.wait_for(asyncio.to_thread(question, id_), _ANSWER)


def _leave(code: int, message: str) -> NoReturn:
    say(f"aisp: {message}")
    sys.stdout.flush()
    os._exit(code)  # a thread may hang in a request, and the interpreter would wait for it


if __name__ == "__main__":
    cli.run("submit")
