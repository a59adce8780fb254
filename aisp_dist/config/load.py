"""From YAML or plain values to a Run, with errors that a user can act on. Imports no torch."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    fault = f"the key {key.value!r} stands twice in one section; keep one of them"
                    raise yaml.composer.ComposerError(None, None, fault, key.start_mark)
                seen.add(key.value)
        return node


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
        values = _Loader(file.read_bytes()).get_single_data()  # of UTF-16 it reads the byte order mark
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
        for fault in _nearest(error.errors(), values):
            key, found = _locate(fault["loc"], values, absent=fault["type"] in ("extra_forbidden", "missing"))
            message = fault["msg"].removeprefix("Value error, ")
            # A wrong value there may be a key, or a URL with one.
            secret = f"{key}.".startswith("runtime.storage_options.")
            if fault["type"] == "invalid_key" or fault["loc"][-1:] == ("[key]",):
                key, section = _locate(fault["loc"][: -1 if fault["type"] == "invalid_key" else -2], values, False)
                name = next(name for name in section if not isinstance(name, str))
                message = f"the name {name!r} is not a text; put it in quotes"
                if isinstance(name, bool):
                    message += ", since YAML reads yes, no, on and off as true and false"
            elif fault["type"] == "extra_forbidden":
                message = "unknown key; " + (_close(str(fault["loc"][-1])) or "see `aisp schema`")
            elif fault["type"] == "missing":
                message = "missing; it has no default" + _example(key)
            elif fault["type"].startswith("union_tag"):
                expected = fault.get("ctx", {}).get("expected_tags", _TAGS[key.startswith("rewards.")])
                kind = found.get("kind") if isinstance(found, Mapping) else found
                absent = isinstance(found, Mapping) and "kind" not in found
                message = f"kind is {'missing' if absent else repr(kind)}; it must be {expected}"
            elif rule := _rule(fault["type"], fault.get("ctx", {})):
                message = f"it must be {rule}" if secret else f"it is {_shown(found)}; it must be {rule}"
            elif fault["type"] != "value_error" and not isinstance(found, Mapping) and not secret:
                message += f" (it is {found!r})"
            faults.setdefault(key, []).append(message)
        raise ConfigError("; ".join(f"{key}: {_either(messages)}" for key, messages in faults.items())) from None


def _shown(value: Any) -> str:
    """A wrong value for a message; of a list or a section, which may hold anything, only that it is one."""
    if isinstance(value, Mapping):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(value) if isinstance(value, str | int | float | None) else f"{value} of type {type(value).__name__}"


def flow(text: str) -> str:
    """A section or list in YAML's flow form, as {top_p: 0.9}, as JSON. Any other text, and one that is JSON already,
    stays as it is."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    with suppress(ValueError):
        json.loads(text)
        return text
    try:
        values = _Loader(text).get_single_data()
        made = json.dumps(values)
    except (yaml.YAMLError, TypeError, ValueError):
        return text
    return made if json.loads(made) == values else text  # not with a name that is no text, or a date


def unknown_flags(flags: str) -> str:
    """What to say of flags that no command and no key has, as argparse names them."""
    first = flags.split()[0].split("=")[0]
    if not first.startswith("-"):
        return f"unexpected argument: {first}; give one configuration file, and others to merge over it by --config"
    return f"unknown flag: {flags}; " + (_close(first.rpartition(".")[2]) or "every key is listed by --help")


def _close(key: str) -> str:
    """The known key that somebody may have meant, in a question, or nothing. A known one may be unknown where it is."""
    close = [known for known in difflib.get_close_matches(key, _known_keys(), n=1) if known != key]
    return f"did you mean {close[0]!r}?" if close else ""


def _either(messages: Sequence[str]) -> str:
    """The faults of one value by the shapes that it may have; the value is shown once."""
    first, *others = dict.fromkeys(messages)
    head, mark, _ = first.partition("; it must be ")
    return ", or ".join([first, *(other.removeprefix(head + mark) for other in others)])


def _nearest(faults: Sequence[Any], values: Any) -> list[Any]:
    """The faults without those of shapes that were not meant. Where a key takes sections of several shapes, as
    {top_p: ...} or {gaussian: ...}, pydantic has faults for each of them; the shape with the fewest unknown keys was
    meant, and where several have as few, the unknown keys say enough."""
    shapes: dict[Any, list[Any]] = {}
    for fault in faults:
        if shape := _shape(fault, values):
            shapes.setdefault(shape, []).append(fault)

    def unknown(shape: Any) -> tuple[bool, int]:
        whole = any(fault["loc"] == shape for fault in shapes[shape])  # the shape is no section
        return whole, sum(fault["type"] == "extra_forbidden" for fault in shapes[shape])

    least = {shape[:-1]: min(unknown(s) for s in shapes if s[:-1] == shape[:-1]) for shape in shapes}
    meant = [shape for shape in shapes if unknown(shape) == least[shape[:-1]]]
    several = {shape for shape in meant if unknown(shape)[1] and sum(s[:-1] == shape[:-1] for s in meant) > 1}
    return [
        fault
        for fault in faults
        if not (shape := _shape(fault, values))
        or (shape in meant and not (shape in several and fault["type"] == "missing"))
    ]


def _shape(fault: Any, values: Any) -> Any:
    """The beginning of a fault's location up to the name of one of several shapes of a section that is there."""
    for i, _, there, found in _walk(fault["loc"], values):
        if not there and isinstance(found, Mapping) and not (fault["type"] == "missing" and i == len(fault["loc"]) - 1):
            return fault["loc"][: i + 1]
    return None


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
    for i, part, there, found in _walk(loc, values):
        values = found
        if there or (absent and i == len(loc) - 1):
            keys.append(str(part))
    return ".".join(keys) or "configuration", values


def _walk(loc: Sequence[str | int], values: Any) -> Iterator[tuple[int, str | int, bool, Any]]:
    """The parts of pydantic's location, with their places: whether the part is a key of the user's, and the value that
    the parts so far lead to. Kinds, which pydantic puts before the keys of a section, are left out."""
    tag: Any = None
    for i, part in enumerate(loc):
        if tag is not None and part == tag:
            tag = None
            continue
        known = values if isinstance(values, Mapping) else range(len(values)) if isinstance(values, list) else ()
        there = part in known
        if there:
            values = values[part]
            tag = values.get("kind") if isinstance(values, Mapping) else None
        yield i, part, there, values


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
