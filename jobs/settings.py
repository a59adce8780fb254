"""From files and flags to a Run: YAML, then later --config files, then dotted flags. Imports no torch and no Ray.

Sections merge key by key. Unions (the method, a reward, lambda, noise, decode, sampling, candidates) are replaced
whole, never merged; only a scalar flag such as --method.num_iterations reaches into the method or reward that is there.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, create_model
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from aisp_dist.config import (
    ConfigError,
    FunctionReward,
    ModelReward,
    Reward,
    RewardReplicas,
    Run,
    Runtime,
    Section,
)
from aisp_dist.rewards import templates

_KINDS = ("method", "rewards.*", "compare.arms.*")  # discriminated by `kind`
_UNIONS = ("method.sigma2", "method.lambda", "method.noise", "method.decode", "method.sampling", "save.candidates")
_TAGS = "'aisp', 'batched_aisp', 'best_of_n', 'args' or 're_control'", "'model', 'function' or 'http'"


def parser(verb: str, about: str, config: bool = True) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(f"aisp {verb}", description=about, allow_abbrev=False, add_help=not config)
    if config:
        parse.add_argument("config", nargs="?", help="YAML file of the run")
        parse.add_argument("--config", dest="more", action="append", default=[], help="further file; later ones win")
        parse.add_argument("-h", "--help", action="store_true", help="this text and every configuration key")
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
    values: dict[str, Any] = {"method": {"kind": "aisp"}}
    for file in files:
        values = merge(values, load_yaml(file))
    values = merge(values, _flags(values, flags), flags=True)
    return options, check(values), files[0].resolve().parent


def cases(run: Run) -> dict[str, Run]:
    """The runs of compare.cases by name, or the run itself under the empty name. Raises ConfigError naming the case."""
    whole = run.model_dump(mode="json", by_alias=True, exclude={"runtime": {"storage_options"}, "compare": {"cases"}})
    found = {}
    for name, case in run.compare.cases.items():
        inner = ["compare.cases"] if "cases" in (case.get("compare") or {}) else []
        if taken := [str(key) for key in case if key in ("output", "seed")] + inner:
            raise ConfigError(f"compare.cases.{name}: {taken[0]} is that of the whole; take it out of the case")
        try:
            made = check(merge(whole, case))
        except ConfigError as error:
            raise ConfigError(f"compare.cases.{name}: {error}") from None
        access = made.runtime.model_copy(update={"storage_options": run.runtime.storage_options})
        found[name] = made.model_copy(update={"runtime": access})
    return found or {"": run}


def anchored(run: Run, base_dir: Path) -> Run:
    """The run with the paths that are relative to its file made absolute, so that its file may be anywhere."""
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


def load_yaml(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(file)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise ConfigError(f"{file} is empty; `aisp schema` lists the keys")
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds {type(values).__name__}; a configuration is a mapping of keys to values")
    return values


def merge(old: Mapping[str, Any], new: Mapping[str, Any], flags: bool = False, at: str = "") -> dict[str, Any]:
    """`new` over `old`, neither changed; unions as the module's docstring says."""
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
        if at == "rewards" and value is None:  # as a case leaves one out
            out.pop(key, None)
            continue
        out[key] = merge(was or {}, value, flags, here) if both and not whole else value
    return out


def _flags(values: Mapping[str, Any], args: Sequence[str]) -> dict[str, Any]:
    """The dotted flags as nested values; the names of the rewards come from the files."""
    rewards = values.get("rewards")
    names = [str(name) for name in rewards] if isinstance(rewards, dict) else []
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
        source: Any = CliSettingsSource(
            settings,  # type: ignore[arg-type]
            cli_prog_name="aisp",
            cli_parse_args=list(args),
            cli_exit_on_error=False,
        )
        given: dict[str, Any] = source()
    except SettingsError as error:
        raise ConfigError(f"{str(error).removeprefix('error parsing CLI: ')}; every key is listed by --help") from None
    return given


def check(values: Mapping[str, Any]) -> Run:
    """A Run, or a ConfigError with one line for each fault: key, value, rule."""
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
                message = "missing; it has no default"
            elif fault["type"].startswith("union_tag"):
                expected = fault.get("ctx", {}).get("expected_tags", _TAGS[key.startswith("rewards.")])
                message = (
                    f"kind is {found.get('kind') if isinstance(found, Mapping) else found!r}; it must be {expected}"
                )
            elif fault["type"] != "value_error" and not isinstance(found, Mapping):
                message += f" (it is {found!r})"
            faults.setdefault(key, []).append(message)
        raise ConfigError("; ".join(f"{key}: {', or '.join(dict.fromkeys(m))}" for key, m in faults.items())) from None


def _locate(loc: Sequence[str | int], values: Any, absent: bool) -> tuple[str, Any]:
    """The user's dotted key for pydantic's location, which names union members too, and the value found there.
    `absent`: the last part is a key that the user did not give or should not have given."""
    keys: list[str] = []
    for i, part in enumerate(loc):
        known = values if isinstance(values, Mapping) else range(len(values)) if isinstance(values, list) else ()
        if part in known:
            values = values[part]
        elif not (absent and i == len(loc) - 1):
            continue
        keys.append(str(part))
    return ".".join(keys) or "configuration", values


def _known_keys() -> list[str]:
    def walk(schema: Any) -> list[str]:
        found = list(schema.get("properties", {})) if isinstance(schema, dict) else []
        children = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        return found + [key for child in children for key in walk(child)]

    return sorted(set(walk(Run.model_json_schema())))
