"""From files and flags to a Run: YAML, then later --config files, then dotted flags. Imports no torch and no Ray.

Sections merge key by key. A choice between kinds or shapes (the method, a reward, `lambda`, `candidates`) is replaced
whole, never merged; only a flag such as --method.num_iterations reaches into the method or reward that is there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from aisp_dist.config import (
    ConfigError,
    FunctionReward,
    Method,
    ModelReward,
    Reward,
    RewardReplicas,
    Run,
    Runtime,
    Save,
    Section,
)
from aisp_dist.config.load import check, flow, read_yaml, unknown_flags
from aisp_dist.rewards import templates

_KINDS = ("method", "rewards.*", "compare.arms.*")  # discriminated by `kind`


def _shapes(at: str, section: type[BaseModel]) -> set[str]:
    """The keys of a section that take one of several shapes, as a number or {ess: 0.1}."""
    found = set()
    for name, field in section.model_fields.items():
        shapes = set(get_args(field.annotation)) - {type(None)}
        if len(shapes) > 1 and any(isinstance(shape, type) and issubclass(shape, Section) for shape in shapes):
            found.add(f"{at}.{field.alias or name}")
    return found


_WORDS = {
    r"dict\[.*\]|JSON": "mapping",
    r"(tuple|list)\[.*\]": "list",
    r"\b(str|SecretStr)\b": "text",
    r"\bint\b": "integer",
    r"\bfloat\b": "number",
    r"\bbool\b": "{true,false}",
}
_UNIONS = _shapes("save", Save).union(*(_shapes("method", method) for method in get_args(get_args(Method)[0])))


def parser(verb: str, about: str, config: bool = True) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(f"aisp {verb}", description=about, allow_abbrev=False, add_help=not config)
    if config:
        parse.add_argument("config", nargs="?", help="YAML file of the run")
        parse.add_argument(
            "--config",
            dest="more",
            action="append",
            default=[],
            help="another configuration file, merged over the ones before it",
        )
        parse.add_argument("-h", "--help", action="store_true", help="show this text and every configuration key")
    return parse


def read(parse: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, Run, Path]:
    """Options, configuration, and the directory that function paths are relative to.

    Raises ConfigError for an unreadable file, a bad value, or an unknown key or flag.
    """
    options, flags = parse.parse_known_args(args)
    files = [Path(f) for f in ([options.config] if options.config else []) + options.more]
    if options.help:
        print(parse.format_help())
        _flags({}, ["--help"])
    if not files:
        raise ConfigError(f"no configuration: give a YAML file, as in `{parse.prog} configs/quickstart.yaml`")
    values: dict[str, Any] = {}
    for file in files:
        values = merge(values, read_yaml(file))
    values = merge(values, _flags(values, flags), flags=True)
    return options, check(values), files[0].resolve().parent


def cases(run: Run) -> dict[str, Run]:
    """The runs of compare.cases by name, or the run itself under the empty name. Raises ConfigError naming the case."""
    whole = run.model_dump(mode="json", by_alias=True, exclude={"runtime": {"storage_options"}, "compare": {"cases"}})
    found = {}
    for name, case in run.compare.cases.items():
        inner = ["compare.cases"] if "cases" in (case.get("compare") or {}) else []
        if taken := [str(key) for key in case if key in ("output", "seed")] + inner:
            raise ConfigError(f"compare.cases.{name}: {taken[0]} is shared by all cases; take it out of the case")
        try:
            made = check(merge(whole, case))
        except ConfigError as error:
            raise ConfigError(f"compare.cases.{name}: {error}") from None
        access = made.runtime.model_copy(update={"storage_options": run.runtime.storage_options})
        found[name] = made.model_copy(update={"runtime": access})
    return found or {"": run}


def anchored(run: Run, base_dir: Path) -> Run:
    """The run with absolute paths in place of those relative to its file, so that the file may be anywhere."""
    rewards: dict[str, Reward] = {}
    for name, reward in run.rewards.items():
        if isinstance(reward, FunctionReward) and reward.function.rpartition(":")[0].endswith(".py"):
            reward = reward.model_copy(update={"function": str(base_dir / reward.function)})
        elif isinstance(reward, ModelReward):
            template = templates.locate(f"rewards.{name}.chat_template", reward.chat_template, base_dir)
            reward = reward.model_copy(update={"chat_template": template})
        rewards[name] = reward
    own = run.generator.chat_template
    generator = run.generator.model_copy(update={"chat_template": str(base_dir / own) if own else None})
    return run.model_copy(update={"rewards": rewards, "generator": generator})


def merge(old: Mapping[str, Any], new: Mapping[str, Any], flags: bool = False, at: str = "") -> dict[str, Any]:
    """`new` over `old`, as the module's docstring says; neither is changed."""
    out = dict(old)
    for key, value in new.items():
        here = f"{at}.{key}" if at else str(key)
        was = out.get(key)
        kind = f"{at}.*" if at in ("rewards", "compare.arms") else here
        whole = kind in _UNIONS or (
            kind in _KINDS
            and not (
                flags
                and isinstance(was, Mapping)
                and isinstance(value, Mapping)
                and value.get("kind", was.get("kind")) == was.get("kind")
            )
        )
        both = isinstance(value, Mapping) and isinstance(was, Mapping)
        if at == "rewards" and value is None:  # a case of compare.cases leaves a reward out in this way
            out.pop(key, None)
            continue
        out[key] = merge(was or {}, value, flags, here) if both and not whole else value
    return out


class _Flags(CliSettingsSource[Any]):
    """Flags whose help has a user's names of values, not Python's, and whose sections and lists may be written as in a
    file, as {top_p: 0.9}."""

    def _merge_parsed_list(self, parsed_list: list[str], field_name: str) -> str:
        return super()._merge_parsed_list([flow(value) for value in parsed_list], field_name)

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return super().decode_complex_value(field_name, field, flow(value) if isinstance(value, str) else value)

    def _metavar_format(self, obj: Any) -> str:
        text = super()._metavar_format(obj)
        for python, word in _WORDS.items():
            text = re.sub(python, word, text)
        return text

    def _help_format(self, *args: Any) -> str:
        text: str = super()._help_format(*args)
        return text.replace("default: None)", "default: null)").replace("default: ())", "default: [])")


def _flags(values: Mapping[str, Any], args: Sequence[str]) -> dict[str, Any]:
    """The dotted flags as nested values; the names of the rewards come from the files."""
    rewards = values.get("rewards")
    names = [str(name) for name in rewards] if isinstance(rewards, dict) else []
    for flag in args:
        new = re.match(r"--((?:runtime\.)?rewards)\.([^.=\s]+)", flag)
        if new and new[2] not in names:
            there = ", ".join(names) or "none"
            raise ConfigError(
                f"--{new[1]}.{new[2]}: there is no reward {new[2]!r} in the files (there: {there}); "
                f'add one by --rewards \'{{"{new[2]}": {{"kind": ...}}}}\', or in a file'
            )
    fields: dict[str, Any] = {}
    if names:
        of_reward = create_model("rewards", __base__=Section, **{n: (Reward, None) for n in names})  # type: ignore[call-overload]
        of_replicas = create_model("rewards", __base__=Section, **{n: (RewardReplicas, None) for n in names})  # type: ignore[call-overload]
        fields = {
            "rewards": (of_reward, None),
            "runtime": (create_model("runtime", __base__=Runtime, rewards=(of_replicas, None)), None),
        }
    settings = create_model("Flags", __base__=(Run, BaseSettings), **fields)
    settings.model_config = SettingsConfigDict(
        extra="forbid", cli_avoid_json=True, cli_hide_none_type=True, cli_parse_none_str="null", populate_by_name=True
    )
    try:
        source: Any = _Flags(
            settings,  # type: ignore[arg-type]
            cli_prog_name="aisp",
            cli_parse_args=list(args),
            cli_exit_on_error=False,
        )
        given: dict[str, Any] = source()
    except SettingsError as error:
        fault = str(error).removeprefix("error parsing CLI: ")
        fault = re.sub(r'error parsing value for field "(\w+)" .*', r"\1: it must be a section, as {key: value}", fault)
        what, unknown, flags = fault.partition("unrecognized arguments: ")
        raise ConfigError(unknown_flags(flags) if unknown else f"{what}; every key is listed by --help") from None
    return given
