"""A user's Python function as a reward, with TRL's signature f(prompts, completions, **columns). Owns its import, its
call and the digest of its source; imports no torch, though the function may."""

from __future__ import annotations

import ast
import asyncio
import copy
import hashlib
import importlib
import importlib.util
import inspect
import logging
import math
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from importlib.metadata import entry_points
from numbers import Real
from operator import attrgetter
from pathlib import Path
from typing import Any

from aisp_dist.config import ConfigError, FunctionReward
from aisp_dist.records import Prompt, Score

_log = logging.getLogger("aisp")
_GROUP = "aisp_dist.rewards"
# What GRPOTrainer of TRL 1.16 passes beside prompts, completions and columns, and why it is not there to pass here.
_TRAINING = {
    "completion_ids": "the base model's tokens, and rewards are given text alone",
    "trainer_state": "and there is no trainer",
    "environments": "and there are no environments",
}
_DYNAMIC = {"*", "__getattr__", "globals", "exec", "setattr"}  # by these a module has names that parsing cannot see
_LOGS: dict[str, Callable[[str, Any], None]] = {
    "log_extra": lambda column, values: _log.debug("reward column %s: %s", column, values),
    "log_metric": lambda name, value: _log.debug("reward metric %s: %s", name, value),
}


class RewardError(RuntimeError):
    """A reward gave no usable answer for a prompt. The message is one line and names the reward, the function and what
    it raised or returned."""


def load(
    name: str, settings: FunctionReward, base_dir: Path | None = None, columns: Sequence[str] = ()
) -> Callable[[Prompt, Sequence[str]], list[Score]]:
    """The function behind its name. Chats arrive as lists of {"role", "content"} and completions as one assistant
    message each, other prompts and completions as str; kept columns are repeated for every completion. An argument the
    function does not name is not passed, unless it has **kwargs. Async functions are run to their end, in one event
    loop. log_extra and log_metric write to the log at level DEBUG; completion_ids, trainer_state and environments are
    for trainers: a function that cannot do without them is refused.

    A name without colon is that of an entry point of the group `aisp_dist.rewards`, which a package declares by
    `[project.entry-points."aisp_dist.rewards"]` and `NAME = "module:function"`.

    None means not applicable; NaN and infinities are quarantined. Raises ConfigError where there is no such function or
    it needs an argument that is not among prompts, completions and `columns`; the returned function raises RewardError
    where it raises, or answers anything but one number or None for each. A KeyboardInterrupt stays one in the main
    thread, where it may be the user's; its message is that of the RewardError.
    """
    key = f"rewards.{name}.function"
    function = _import(key, settings.function, base_dir)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{key}: {settings.function!r} does not tell its arguments ({error}); wrap it in a def"
        ) from None
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if taken := sorted({"prompts", "completions", *_TRAINING, *_LOGS} & set(columns)):
        raise ConfigError(
            f"{key}: prompts.keep has {', '.join(taken)}, which have another meaning in TRL's signature; rename them"
        )
    for argument in sorted(required & _TRAINING.keys()):
        raise ConfigError(f"{key}: {settings.function} needs {argument}, {_TRAINING[argument]}; give it a default")
    if missing := sorted(required - {"prompts", "completions", *_LOGS, *columns}):
        raise ConfigError(
            f"{key}: {settings.function} needs {', '.join(missing)}, but there are prompts, completions and "
            f"prompts.keep ({', '.join(columns) or 'none'}); keep that column or give a default"
        )

    shown = f"{name}: {settings.function.rpartition('/')[2]}"  # rows hold no path
    loop = asyncio.Runner()  # one for all calls: clients that the function keeps belong to their loop

    def score(prompt: Prompt, responses: Sequence[str]) -> list[Score]:
        arguments: dict[str, Any] = {**_LOGS, **_arguments(prompt, responses)}
        try:
            values = function(**{k: v for k, v in arguments.items() if open_ended or k in accepted})
            if inspect.isawaitable(values):
                values = loop.run(_result(values))
        except BaseException as error:  # an exit too: the function ends nothing but its own call
            said = f"{shown} raised {type(error).__name__}{_where(error, function)}: {error}"
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt(said) from error  # a user's Ctrl-C is raised in this thread alone
            raise RewardError(said) from error
        return _scores(shown, values, len(responses))

    return score


def check(key: str, settings: FunctionReward, base_dir: Path | None = None) -> None:
    """Raise ConfigError, which begins with `key`, where the source file is missing or binds no such name. The file is
    parsed, not run; where it binds names as it runs, there is nothing to say."""
    try:
        place, _, attribute = _resolve(settings.function).rpartition(":")
        file = _source(settings.function, place, base_dir)
        tree = ast.parse(file.read_bytes() if file.suffix == ".py" else b"from compiled import *")
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ConfigError(f"{key}: {file.name}{line}: {error.args[0]}; correct the file") from None
    names = dict(_bound(tree))
    if names.keys().isdisjoint({attribute.partition(".")[0], *_DYNAMIC}):
        functions = ", ".join(sorted(name for name, is_function in names.items() if is_function)) or "none"
        raise ConfigError(
            f"{key}: {settings.function!r}: {file.name} has no function {attribute!r} (it has {functions}); name one "
            "that is there"
        )


def _bound(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The names that a module binds or looks up at its top level, and whether each is a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, not isinstance(node, ast.ClassDef)
            continue
        if isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0], False
        elif isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in _DYNAMIC):
            yield node.id, False
        yield from _bound(node)


def _where(error: BaseException, function: Callable[..., Any]) -> str:
    """` in line 7 of my_rewards.py`: the last line of the user's own that led to an error; files of the same folder are
    the user's too. Empty where none is known."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(code.co_filename).parent
    own = [frame for frame in frames if Path(frame.filename).parent == home and frame.lineno]
    return f" in line {own[-1].lineno} of {Path(own[-1].filename).name}" if own else ""


def digest(settings: FunctionReward, base_dir: Path | None = None) -> str:
    """128 bits over the source file that defines the function and its name; what that file imports is not covered. The
    module is found, not run. Raises ConfigError."""
    place, _, attribute = _resolve(settings.function).rpartition(":")
    data = _source(settings.function, place, base_dir).read_bytes()
    return hashlib.blake2b(attribute.encode() + b"\0" + data, digest_size=16).hexdigest()


def _resolve(function: str) -> str:
    """module:function of an entry point; other names as they are."""
    if ":" in function:
        return function
    if function.endswith(".py"):
        raise ConfigError(f"{function!r} names a file but no function in it; give {function}:NAME")
    known = entry_points(group=_GROUP)
    found = sorted({entry.value for entry in known.select(name=function)})
    if len(found) != 1:
        names = ", ".join(sorted(known.names)) or "none"
        what = f"is declared by several packages ({', '.join(found)})" if found else f"is no entry point ({names})"
        raise ConfigError(
            f"{function!r} {what} of the group {_GROUP}; name file.py:function, module:function or one "
            "that is installed"
        )
    return found[0].partition(" ")[0]  # without [extras]


def _source(function: str, place: str, base_dir: Path | None) -> Path:
    if place.endswith(".py"):
        file = (base_dir or Path()) / place
        if not file.is_file():
            raise ConfigError(f"{function!r}: no file {str(file)!r}; the path is relative to the config file")
        return file
    try:
        spec = importlib.util.find_spec(place) if place else None
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{function!r}: no module {place!r} ({error}); install it or name file.py:function") from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        beside = f"{place.replace('.', '/')}.py"
        fix = beside if ((base_dir or Path()) / beside).is_file() else "file.py"
        raise ConfigError(f"{function!r}: no module {place!r} with a file; name {fix}:function or an installed module")
    return Path(spec.origin)


def _import(key: str, function: str, base_dir: Path | None) -> Callable[..., Any]:
    place, _, attribute = _resolve(function).rpartition(":")
    file = _source(function, place, base_dir)
    try:
        if place.endswith(".py"):
            # A name of its own, so that two files called rewards.py are two modules; its neighbours can be imported.
            folder = str(file.resolve().parent)
            if folder not in sys.path:
                sys.path.append(folder)
            module_name = f"{file.stem}_{hashlib.blake2b(str(file.resolve()).encode(), digest_size=8).hexdigest()}"
            spec = importlib.util.spec_from_file_location(module_name, file)
            assert spec and spec.loader
            module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{key}: importing {place!r} raised {type(error).__name__}: {error}; correct the module"
        ) from error
    try:
        found = attrgetter(attribute)(module)
    except AttributeError:
        found = None
    if not callable(found):
        what = "nothing called" if found is None else "no function but a value under"
        raise ConfigError(f"{key}: {place!r} has {what} {attribute!r}; name a function that is there")
    return found  # type: ignore[no-any-return]


def _arguments(prompt: Prompt, responses: Sequence[str]) -> dict[str, list[Any]]:
    """Every completion gets values of its own: a function may change what it is handed."""
    completions: list[Any]
    if isinstance(prompt.content, str):
        prompts: list[Any] = [prompt.content for _ in responses]
        completions = list(responses)
    else:
        prompts = [[{"role": role, "content": text} for role, text in prompt.content] for _ in responses]
        completions = [[{"role": "assistant", "content": response}] for response in responses]
    columns = {name: [copy.deepcopy(value) for _ in responses] for name, value in prompt.columns}
    return {"prompts": prompts, "completions": completions, **columns}


async def _result(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _scores(what: str, values: Any, count: int) -> list[Score]:
    """What a function returned for `count` completions, as scores. Raises RewardError."""
    rule = f"for {count} completions; return a list with one number or None for each"
    if (shape := getattr(values, "shape", None)) is not None and tuple(shape) not in ((count,), (count, 1)):
        raise RewardError(f"{what} returned an array of shape {tuple(shape)} {rule}")
    try:
        found = list(values)
    except TypeError:
        raise RewardError(f"{what} returned {values!r}, of type {type(values).__name__}, {rule}") from None
    if len(found) != count:
        raise RewardError(f"{what} returned {len(found)} values {rule}")
    return [_score(what, value, rule) for value in found]


def _score(what: str, value: Any, rule: str) -> Score:
    if (shape := getattr(value, "shape", None)) is not None:  # an array or tensor of one number
        if math.prod(shape) != 1:
            raise RewardError(f"{what} returned arrays of shape {tuple(shape)} {rule}")
        value = value.item()
    if value is None:
        return Score(None)
    if not isinstance(value, Real):
        raise RewardError(f"{what} returned a list with {value!r}, of type {type(value).__name__}, {rule}")
    try:
        number = float(value)
    except OverflowError:
        raise RewardError(f"{what} returned an integer too large for a float") from None
    return Score(number) if math.isfinite(number) else Score(None, f"the reward is {number}; return a finite number")
