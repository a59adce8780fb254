"""`aisp submit CONFIG --address URL`: `ray job submit` done right. The current directory and our packages travel to the
cluster; the log comes back, and with it the job's exit code.

    checks here -> upload -> python -m jobs.align CONFIG flags -> log to stdout, through lost connections -> exit code
                   ^ SIGINT, SIGTERM: stop the job and wait until it is stopped; a second one leaves at once

Nothing of this machine's environment is sent, and no secret: entrypoint and metadata show in the dashboard.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import inspect
import logging
import os
import re
import secrets
import shlex
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from aisp_dist.config import ConfigError, Generator, HttpReward, ModelReward, Prompts, Run
from aisp_dist.data.sources import is_local
from aisp_dist.output import fingerprint
from aisp_dist.rewards import templates
from jobs import cli, prepare, settings
from jobs.cli import Exit
from jobs.progress import say

OURS = Path(__file__).parent.parent
PACKAGES = ("aisp_dist", "actors", "jobs")
_EXCLUDED = [".git", ".venv", "venv", "__pycache__"]  # from our packages too; newer Rays do so for working_dir alone
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "90"}  # from SIGTERM to SIGKILL: more than the last flush may take
_QUIET = 60.0  # seconds without a line of the log after which the connection is made anew: it may be dead
_ANSWER = 30.0  # seconds that the cluster may take to answer
_LOST = 300.0  # seconds without any answer after which we give up
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def main(args: Sequence[str]) -> int:
    own, parse = (
        argparse.ArgumentParser(add_help=False, allow_abbrev=False),
        settings.parser("submit", cli.VERBS["submit"]),
    )
    for each in (own, parse):
        each.add_argument("--address", help=f"the cluster's dashboard, http://HEAD:8265 (or {' or '.join(_ADDRESSES)})")
        each.add_argument("--no-wait", action="store_true", help="print the submission id and leave")
    ours, args = own.parse_known_args(args)
    parse.add_argument("--retry-failed", action="store_true", help="as in `aisp align`")
    parse.add_argument("--dry-run", action="store_true", help="as in `aisp align`")
    if secret := next((arg.partition("=")[0] for arg in args if "storage_options" in arg), None):
        raise ConfigError(
            f"{secret}: the flags of a job show in the dashboard, and storage options hold secrets; give credentials "
            "to the cluster itself, through the environment or the secrets of its pods"
        )
    options, run, base_dir = settings.read(parse, args)
    if "://" not in run.output and not Path(run.output).is_absolute():
        raise ConfigError(
            f"output: {run.output!r} is relative, and a Ray job runs in a temporary copy that is deleted; "
            "give an absolute path, as in --output /data/run1"
        )
    root = Path.cwd()
    here, elsewhere = _here(run)
    located = prepare.check(here.model_copy(update={"output": tempfile.gettempdir()}), base_dir)
    for what in elsewhere:
        say(f"{what} is not on this machine: only the job can check it")
    sizes = uploads(root)
    configs = {name: root / Path(name).expanduser() for name in (options.config, *options.more) if name}
    _travels(root, sizes, [*(("the configuration", path) for path in configs.values()), *_needs(run, base_dir)])
    relative = {name: os.path.relpath(path, root) for name, path in configs.items()}
    args = [relative.get(arg, arg) for arg in args]
    run_id = None if elsewhere else _run_id(run, located, base_dir)
    job: dict[str, Any] = {
        "submission_id": f"aisp-{run_id or 'run'}-{secrets.token_hex(4)}",
        "entrypoint": shlex.join(["python", "-m", "jobs.align", *args]),
        "runtime_env": {
            "working_dir": str(root),
            "excludes": _EXCLUDED,
            "env_vars": ENVIRONMENT,
        },
        "metadata": {"job_name": f"aisp {Path(run.output).name}", "output": run.output}
        | ({"run_id": run_id} if run_id else {}),
    }
    if root != OURS:
        job["runtime_env"]["py_modules"] = [str(OURS / name) for name in PACKAGES]
    client = connect(ours.address)
    say(f"sending {len(sizes)} files, {sum(sizes.values()) / 1e3:.0f} kB, of {root}")
    return asyncio.run(_submit(client, job, ours.no_wait))


def _here(run: Run) -> tuple[Run, list[str]]:
    """The run as far as it can be checked here, and what cannot: an absolute path that this machine has not is the
    cluster's. The embedded demo stands for it."""

    def elsewhere(name: str | None) -> bool:
        return bool(name) and Path(name or "").is_absolute() and not glob.glob(name or "")

    base, absent = run.generator, []
    if elsewhere(base.model):
        absent.append(f"generator.model {base.model!r}")
        base = Generator(model="demo", chat_template=base.chat_template)
    if elsewhere(base.chat_template):
        absent.append(f"generator.chat_template {base.chat_template!r}")
        base = base.model_copy(update={"chat_template": None})
    rewards = dict(run.rewards)
    for name, reward in run.rewards.items():
        if isinstance(reward, HttpReward):
            continue
        place = reward.model if isinstance(reward, ModelReward) else reward.function.rpartition(":")[0]
        if elsewhere(place):
            absent.append(f"rewards.{name} {place!r}")
            rewards[name] = ModelReward(model="demo")
        elif isinstance(reward, ModelReward) and elsewhere(reward.chat_template):
            absent.append(f"rewards.{name}.chat_template {reward.chat_template!r}")
            rewards[name] = reward.model_copy(update={"chat_template": None})
    prompts = run.prompts
    if elsewhere(prompts.source):
        absent.append(f"prompts.source {prompts.source!r}")
        prompts = Prompts()
    return run.model_copy(update={"generator": base, "rewards": rewards, "prompts": prompts}), absent


def _needs(run: Run, base_dir: Path) -> Iterator[tuple[str, Path]]:
    """Key and file of everything that the configuration names by a relative path."""

    def relative(name: str) -> bool:
        return not Path(name).expanduser().is_absolute()

    def model(key: str, name: str) -> Iterator[tuple[str, Path]]:
        if relative(name) and Path(name).is_dir():
            yield from ((key, file) for file in (Path(name, "config.json"), *Path(name).glob("*.safetensors")))

    yield from model("generator.model", run.generator.model)
    if run.generator.chat_template and relative(run.generator.chat_template):
        yield "generator.chat_template", base_dir / run.generator.chat_template
    for name, reward in run.rewards.items():
        if isinstance(reward, ModelReward):
            yield from model(f"rewards.{name}.model", reward.model)
            if (template := reward.chat_template) and template not in templates.BUILT_IN and relative(template):
                yield f"rewards.{name}.chat_template", base_dir / template
        elif isinstance(reward, HttpReward):
            continue
        elif (place := reward.function.rpartition(":")[0]).endswith(".py") and relative(place):
            yield f"rewards.{name}.function", base_dir / place
    source = run.prompts.source
    if source != "demo" and is_local(source) and relative(source):
        found = [Path(name) for name in ([source] if Path(source).exists() else glob.glob(source, recursive=True))]
        files = (file for path in found for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
        yield from (("prompts.source", file) for file in files)


def _travels(root: Path, sizes: dict[Path, int], needed: Iterable[tuple[str, Path]]) -> None:
    """Raise ConfigError where a needed file stays behind, all is too large, or a folder would hide our packages."""
    from ray._private.runtime_env import packaging

    for key, file in needed:
        path = Path(os.path.normpath(root / file))
        if not path.is_relative_to(root):
            raise ConfigError(
                f"{key}: {str(path)!r} is outside {str(root)!r}, the directory that is sent to the cluster; move it "
                "inside, submit from a directory that holds it, or give an absolute path or URI that the cluster has"
            )
        if path not in sizes:
            raise ConfigError(
                f"{key}: {str(path.relative_to(root))!r} would stay behind: .gitignore or .rayignore excludes it, or "
                f"it is in one of {', '.join(_EXCLUDED)}; move it, or set RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1"
            )
    if (total := sum(sizes.values())) >= packaging.GCS_STORAGE_MAX_SIZE:
        largest = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(
            f"{str(root)!r} holds {total / 1e6:.0f} MB, and Ray takes less than "
            f"{packaging.GCS_STORAGE_MAX_SIZE / 1e6:.0f} MB; the largest file is {str(largest.relative_to(root))!r}: "
            "list what the run does not need in .rayignore"
        )
    hiding = {path.relative_to(root).parts[0].removesuffix(".py") for path in sizes} & set(PACKAGES)
    if hiding and root != OURS:
        raise ConfigError(
            f"{str(root)!r} holds {min(hiding)!r}, which the job would import in place of ours; rename it, "
            "list it in .rayignore, or submit from another directory"
        )


def uploads(root: Path) -> dict[Path, int]:
    """Path and size in bytes of every file that Ray would send of this directory."""
    from ray._private.runtime_env import packaging  # private, but only Ray knows what it leaves out

    sizes: dict[Path, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path] = path.stat().st_size

    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    newer = "include_gitignore" in inspect.signature(packaging._dir_travel).parameters
    more = {"include_gitignore": gitignore} if newer else {}
    packaging._dir_travel(
        root, [packaging._get_excludes(root, _EXCLUDED)], note, **more, logger=logging.getLogger("none")
    )
    return sizes


def _run_id(run: Run, located: Run, base_dir: Path) -> str | None:
    """The job's run id, where it can be known here: not for a hub model whose commit the job will choose."""
    models: list[Generator | ModelReward] = [located.generator]
    models += [r for r in located.rewards.values() if isinstance(r, ModelReward)]
    if any(model.revision is None and not Path(model.model).is_dir() for model in models):
        return None
    try:
        return fingerprint.fingerprint(fingerprint.components(run, located, base_dir))[:12]
    except ConfigError:
        return None


def connect(address: str | None) -> Any:
    """A JobSubmissionClient. Raises ConfigError within seconds where nobody answers, or where the token is wrong."""
    known = [os.environ.pop(name, None) for name in _ADDRESSES]  # Ray would let them win over the argument
    address = address or next(filter(None, known), None)
    if not address:
        raise ConfigError(
            f"--address: which cluster? As in --address http://HEAD:8265, or set {' or '.join(_ADDRESSES)}"
        )
    place = urlsplit(address if "://" in address else f"//{address}")
    port = re.search(r":(\d{1,5})$", place.netloc)
    if place.hostname and (port or place.scheme.startswith("http")):
        try:
            number = int(port[1]) if port else 443 if place.scheme == "https" else 80
            socket.create_connection((place.hostname, number), timeout=10).close()
        except OSError as error:
            raise ConfigError(f"--address: nobody answers at {address} ({error}); is the cluster up?") from None

    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.WARNING)  # Ray's chatter about uploads and websockets
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ConfigError(
            f"--address: {address} wants a token ({str(error).splitlines()[0].partition('. ')[0]}); set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN to the cluster's"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"--address: no Ray dashboard at {address} ({type(error).__name__}: {str(error).splitlines()[0]}); give "
            "its URL, as in http://HEAD:8265"
        ) from None


async def _submit(client: Any, job: dict[str, Any], no_wait: bool) -> int:
    id_ = job["submission_id"]
    how = f"ray job stop --address {client.get_address()} {id_}"
    signals: asyncio.Queue[int] = asyncio.Queue()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, signals.put_nowait, each)
    submitted = asyncio.create_task(asyncio.to_thread(client.submit_job, **job))
    if number := await _signal_before(submitted, signals):
        _leave(128 + number, f"{id_} may have been submitted; to stop it: {how}")
    try:
        submitted.result()
    except Exception as error:
        raise Exit(1, f"the cluster did not take the job: {error}") from None
    say(f"submitted {id_} to {client.get_address()}: {job['entrypoint']}")
    if no_wait:
        print(id_)
        return 0
    log = asyncio.create_task(_follow(client, id_))
    number = await _signal_before(log, signals)
    if number:
        say(f"{signal.Signals(number).name}: stopping {id_}; once more leaves at once")
        stop = asyncio.create_task(_stop(client, id_))
        if await _signal_before(log, signals):
            _leave(128 + number, f"left; {id_} may still run. To stop it: {how}")
        stop.cancel()
    return _code(id_, log.result(), number)


async def _signal_before(task: asyncio.Task[Any], signals: asyncio.Queue[int]) -> int:
    """The signal that came before the task was done, or 0."""
    waiting = asyncio.create_task(signals.get())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        return 0
    return waiting.result()


def _leave(code: int, message: str) -> NoReturn:
    say(f"aisp: {message}")
    sys.stdout.flush()
    os._exit(code)  # a thread may hang in a request, and would be waited for


async def _stop(client: Any, id_: str) -> None:
    while True:
        with suppress(Exception):  # the connection: the next try may reach it, and _follow says if none does
            await _ask(client.stop_job, id_)
            return
        await asyncio.sleep(1)


async def _follow(client: Any, id_: str) -> Any:
    """Print the job's log as it grows, through lost connections; the job's last details. Raises Exit where it is
    unknown, or where nobody has answered for long."""
    loop, printed, lost = asyncio.get_running_loop(), 0, 0.0
    while True:
        read = 0
        with suppress(Exception):  # what is the matter shows below
            async with aclosing(client.tail_job_logs(id_)) as tail, asyncio.timeout(_QUIET) as quiet:
                async for text in tail:  # from the log's first line on, every time
                    quiet.reschedule(loop.time() + _QUIET)
                    print(text[max(0, printed - read) :], end="", flush=True)
                    read += len(text)
                    printed = max(printed, read)
        try:
            details = await _ask(client.get_job_info, id_)
            lost = 0.0
            if details.status.is_terminal():
                rest = (await _ask(client.get_job_logs, id_))[printed:]
                print(rest, end="", flush=True)
                return details
        except Exception as error:
            if "does not exist" in str(error):
                raise Exit(1, f"the cluster knows no {id_} any more: its head was started anew? submit again") from None
            if not lost:
                lost = loop.time()
                say(f"lost the connection ({type(error).__name__}); trying for {_LOST:g} s")
            if loop.time() - lost > _LOST:
                _leave(1, f"nobody has answered for {_LOST:g} s; {id_} may still run")
        await asyncio.sleep(1)


async def _ask(question: Any, id_: str) -> Any:
    return await asyncio.wait_for(asyncio.to_thread(question, id_), _ANSWER)


def _code(id_: str, details: Any, number: int) -> int:
    """The driver's exit code. A stopped job has none and is never a success."""
    status, code = str(details.status.value), details.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        raise Exit(128 + number if number else 1, f"{id_} was stopped; the same command goes on from what is written")
    if code is None:
        raise Exit(1, f"{id_} failed: {details.message}")
    return int(code) if code > 0 else 128 - int(code)


if __name__ == "__main__":
    cli.run("submit")
