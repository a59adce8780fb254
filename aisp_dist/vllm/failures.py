"""Why an engine of vLLM cannot start. It starts in processes of its own, of whose errors the caller learns no more than
"see root cause above": here they are read back, so that a refusal names the cause."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aisp_dist.config import ConfigError

_RECORD = "\x1e"  # in front of each record of the log
# What ends a traceback, the first of a chain: the name of an error and its message.
_RAISED = re.compile(r"^(?:\w+\.)*(\w+(?:Error|Exception))(?:: (.*?))?(?=\n\n|\n?\Z)", re.MULTILINE | re.DOTALL)
_VALUE = re.compile(r"\[type=\w+, input_value=(?!ArgsKwargs)(.*?), input_type=\w+\]")  # as pydantic gives it
_NOISE = re.compile(r"\[type=\w+, .*?\]|For further information visit \S+|\d+ validation errors? for \w+|Value error, ")


@contextmanager
def refused(what: str, fix: str) -> Iterator[dict[str, Any]]:
    """Raises what an engine's start raises as ConfigError. what: the key and its value; fix: what to change. Yields
    further arguments for the engine. One that was killed from outside gives no cause: its error is a fault of the
    machine, and is raised as it is."""
    with TemporaryDirectory(prefix="aisp-vllm-") as folder:
        told = Path(folder, "errors")
        try:
            yield {"logging_config": _logging(Path(folder, "logging.json"), told)}
        except ConfigError:
            raise
        except Exception as error:
            if (cause := _cause(told)) is None:
                if isinstance(error, RuntimeError):
                    raise
                cause = one_line(error)
            raise ConfigError(f"{what}: vLLM cannot start ({cause}); {fix}") from error


def one_line(error: BaseException | str) -> str:
    """A message of vLLM's, which may have many lines and pydantic's links, in one."""
    words = " ".join(_NOISE.sub("", _VALUE.sub(r"(it is \1)", str(error))).split()) or type(error).__name__
    return textwrap.shorten(words.rstrip("."), 500, placeholder=" ...")


def _logging(file: Path, told: Path) -> Any:
    """vLLM's logging, and beside it a file with the errors of all its processes. The user's own stays as it is."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    found = LoggingConfig()
    if found.configure_logging and not found.pylogging_config_file:
        settings: dict[str, Any] = copy.deepcopy(DEFAULT_LOGGING_CONFIG)
        settings["formatters"]["aisp"] = {"format": f"{_RECORD}%(message)s"}
        file_of_errors = {"class": "logging.FileHandler", "filename": str(told), "level": "ERROR", "formatter": "aisp"}
        settings["handlers"]["aisp"] = file_of_errors
        settings["loggers"]["vllm"]["handlers"] = ["vllm", "aisp"]
        file.write_text(json.dumps(settings))
        found.pylogging_config_file = str(file)
    return found


def _cause(told: Path) -> str | None:
    """What the first error that any process logged was raised for."""
    if not told.exists():
        return None
    records = told.read_text(errors="replace").split(_RECORD)
    return next((one_line(found[2] or found[1]) for record in records if (found := _RAISED.search(record))), None)
