"""From YAML or plain values to a Run, with errors that a user can act on. Imports no torch."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from aisp_dist.config.base import ConfigError
from aisp_dist.config.methods import Method
from aisp_dist.config.rewards import Reward
from aisp_dist.config.run import Run


def _kinds(union: Any) -> str:
    return ", ".join(repr(section.model_fields["kind"].default) for section in get_args(get_args(union)[0]))


_TAGS = _kinds(Method), _kinds(Reward)

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_TYPES = {  # by the beginning of pydantic's name of a fault
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_type": "a text",
    "list_": "a list",
    "tuple_": "a list",
    "dict_": "a mapping of keys to values",
    "model_": "a section of keys and values",
}


def read(config: str | os.PathLike[str] | Mapping[str, Any] | Run) -> tuple[Run, Path]:
    """The run of a YAML file, of a mapping or of a Run, and the directory that its relative paths start from: the
    file's, else the current one. `output` may be missing, since only commands write there.

    Raises ConfigError for a file that cannot be read, a bad value or an unknown key.
    """
    if not isinstance(config, str | os.PathLike | Mapping | Run):
        raise ConfigError(
            f"the configuration is {config!r}, of type {type(config).__name__}; give the path of a YAML file, a "
            "mapping with its keys, or a Run"
        )
    if isinstance(config, Run):
        return config, Path.cwd()
    if isinstance(config, Mapping):
        return check({"output": "output"} | dict(config)), Path.cwd()
    file = Path(config)
    return check({"output": "output"} | read_yaml(file)), file.resolve().parent


def read_yaml(file: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises ConfigError where it is unreadable, empty or no mapping."""
    try:
        values = yaml.safe_load(file.read_bytes())  # of UTF-16 it reads the byte order mark
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(file)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise ConfigError(f"{file} is empty; `aisp schema` lists the keys")
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds {type(values).__name__}; a configuration is a mapping of keys to values")
    return values


def check(values: Mapping[str, Any]) -> Run:
    """A Run, or a ConfigError with key, value and rule of everything that is wrong, in one line."""
    try:
        return Run.model_validate(values)
    except ValidationError as error:
        faults: dict[str, list[str]] = {}
        for fault in error.errors():
            key, found = _locate(fault["loc"], values, absent=fault["type"] in ("extra_forbidden", "missing"))
            message = fault["msg"].removeprefix("Value error, ")
            if fault["type"] == "extra_forbidden":
                own = str(fault["loc"][-1])  # a known key may be unknown where it stands
                close = [k for k in difflib.get_close_matches(own, _known_keys(), n=1) if k != own]
                message = "unknown key" + (f"; did you mean {close[0]!r}?" if close else "; see `aisp schema`")
            elif fault["type"] == "missing":
                message = "missing; it has no default" + _example(key)
            elif fault["type"].startswith("union_tag"):
                expected = fault.get("ctx", {}).get("expected_tags", _TAGS[key.startswith("rewards.")])
                message = (
                    f"kind is {found.get('kind') if isinstance(found, Mapping) else found!r}; it must be {expected}"
                )
            elif rule := _rule(fault["type"], fault.get("ctx", {})):
                shown = found if isinstance(found, str | int | float | bool | None) else type(found).__name__
                message = f"it is {shown!r}; it must be {rule}"
            elif fault["type"] != "value_error" and not isinstance(found, Mapping):
                message += f" (it is {found!r})"
            faults.setdefault(key, []).append(message)
        raise ConfigError("; ".join(f"{key}: {', or '.join(dict.fromkeys(m))}" for key, m in faults.items())) from None


def _rule(fault: str, context: Mapping[str, Any]) -> str | None:
    """What a value must be, by pydantic's name of the fault; None for a rule that says so itself."""
    for bound, words in _BOUNDS.items():
        if bound in context:
            return f"{words} {context[bound]}"
    if fault == "literal_error":
        return f"{context['expected']}"
    return next((rule for start, rule in _TYPES.items() if fault.startswith(start)), None)


def _locate(loc: Sequence[str | int], values: Any, absent: bool) -> tuple[str, Any]:
    """The user's dotted key for pydantic's location, which names union members too, and the value found there.
    `absent`: the last part is a key that the user did not give or should not have given."""
    keys: list[str] = []
    tag: Any = None  # the kind of the section that `values` is, which pydantic puts before the keys in it
    for i, part in enumerate(loc):
        if tag is not None and part == tag:
            tag = None
            continue
        known = values if isinstance(values, Mapping) else range(len(values)) if isinstance(values, list) else ()
        if part in known:
            values = values[part]
            tag = values.get("kind") if isinstance(values, Mapping) else None
        elif not (absent and i == len(loc) - 1):
            continue
        keys.append(str(part))
    return ".".join(keys) or "configuration", values


def _example(key: str) -> str:
    """A value to write for a missing key of a Run, where its section gives one."""
    field = Run.model_fields.get(key)
    if field is None or not field.examples:
        return ""
    return f"; give one, as {yaml.safe_dump(field.examples[0], default_flow_style=True, sort_keys=False).strip()}"


def _known_keys() -> list[str]:
    def walk(schema: Any) -> list[str]:
        found = list(schema.get("properties", {})) if isinstance(schema, dict) else []
        children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        return found + [key for child in children for key in walk(child)]

    return sorted(set(walk(Run.model_json_schema())))
