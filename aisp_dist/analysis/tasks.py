"""Tasks of lm-evaluation-harness (EleutherAI) as prompts of a run: which tasks can be asked, how their requests become
input lines grouped by generation setting, how answers become lm-eval's results. Needs the extra `tasks`; knows no Ray.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from aisp_dist.config import ConfigError

_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's aliases of one setting
_KEPT = ("results", "groups", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class Group:
    """Requests of one generation setting. lines: {id, prompt} and the gold column, if any; at: each line's place among
    all requests. An id is task/document/repeat, so a document's noise does not depend on the other requests."""

    stop: tuple[str, ...]
    max_new_tokens: int
    chat: bool
    lines: tuple[dict[str, Any], ...]
    at: tuple[int, ...]

    @property
    def jsonl(self) -> bytes:
        return "".join(json.dumps(line) + "\n" for line in self.lines).encode()

    @property
    def name(self) -> str:
        """A hash of all requests and settings: the same requests have the same name."""
        settings = json.dumps([self.stop, self.max_new_tokens, self.chat]).encode()
        return hashlib.blake2b(settings + self.jsonl, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Asking:
    """How requests become lines. max_new_tokens: for tasks without max_gen_toks and, with `capped`, the upper limit for
    all. gold_column: the column in which function rewards get the task's target; None: not at all. say: is told which
    settings of a task are not used."""

    max_new_tokens: int
    capped: bool = False
    chat: bool = False
    gold_column: str | None = None
    say: Callable[[str], None] = print
    said: set[str] = field(default_factory=set)

    def groups(self, requests: Sequence[Any], tasks: Mapping[str, Any]) -> list[Group]:
        """Every request of lm-eval (`Instance`) in exactly one group. Raises ConfigError for a task that asks for no
        tokens."""
        found: dict[tuple[tuple[str, ...], int], list[tuple[int, dict[str, Any]]]] = {}
        repeats: dict[str, int] = {}
        for at, request in enumerate(requests):
            context, wanted = request.args[:2]
            settings = normalize_gen_kwargs(wanted, self.max_new_tokens)
            tokens = min(settings["max_gen_toks"], self.max_new_tokens) if self.capped else settings["max_gen_toks"]
            if tokens < 1:
                raise ConfigError(f"--tasks: {request.task_name} asks for {tokens} tokens; max_gen_toks is at least 1")
            self._tell(request.task_name, wanted, tokens)
            own = f"{request.task_name}/{request.doc_id}"
            repeats[own] = repeats.get(own, 0) + 1
            line = {"id": f"{own}/{repeats[own] - 1}", "prompt": json.loads(context) if self.chat else context}
            if self.gold_column:
                line[self.gold_column] = tasks[request.task_name].doc_to_target(request.doc)
            found.setdefault((tuple(filter(None, settings["until"])), tokens), []).append((at, line))
        return [
            Group(stop, tokens, self.chat, tuple(line for _, line in members), tuple(at for at, _ in members))
            for (stop, tokens), members in found.items()
        ]

    def _tell(self, task: str, wanted: Mapping[str, Any], tokens: int) -> None:
        if task in self.said:
            return
        self.said.add(task)
        if other := ", ".join(f"{k}={v}" for k, v in wanted.items() if k not in (*_TOKENS, "until")):
            self.say(f"{task} asks for {other}: not used, since an arm draws as its method does (base: greedily)")
        named = next((wanted[key] for key in _TOKENS if wanted.get(key) is not None), None)
        if named is None:
            self.say(f"{task} names no max_gen_toks: generator.max_new_tokens, {tokens}, is used")
        elif named != tokens:
            self.say(f"{task} asks for max_gen_toks={named}, capped at generator.max_new_tokens, {tokens}")


class Answering(LM):  # type: ignore[misc]
    """lm-eval's model. `answer` gives one text for each line of a group, in order."""

    def __init__(self, asking: Asking, tasks: Mapping[str, Any], answer: Callable[[Group], Sequence[str]]) -> None:
        super().__init__()
        self.asking, self.tasks, self.answer = asking, tasks, answer

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        for group in self.asking.groups(requests, self.tasks):
            found |= dict(zip(group.at, self.answer(group), strict=True))
        return [found[at] for at in range(len(requests))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as JSON: the run's own generator renders them."""
        if not add_generation_prompt:
            raise ConfigError("--apply-chat-template: a task begins the answer itself (gen_prefix); leave the flag out")
        return json.dumps(chat_history)

    @property
    def tokenizer_name(self) -> str:
        return "messages"

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        raise ConfigError("--tasks: a search has no likelihood of a given text")

    loglikelihood_rolling = loglikelihood


def load(names: Sequence[str], include_path: str | None, unsafe_code: bool) -> list[Any]:
    """Tasks and groups as lm-eval's objects. What their YAML shows to be impossible is refused before a dataset is
    opened. Raises ConfigError."""
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, n=3))
            raise ConfigError(f"--tasks: {name!r} is no task of lm-eval; " + (f"close are {close}" if close else _OWN))
    leaves = {task: config for name in names for task, config in _leaves(manager.task_index, name)}
    _refuse({task: str(c.get("output_type", "generate_until")) for task, c in leaves.items() if "class" not in c})
    if seeing := [task for task, config in leaves.items() if config.keys() & {"doc_to_image", "doc_to_audio"}]:
        raise ConfigError(f"--tasks: {', '.join(seeing)} shows images or plays sound; prompts are text only")
    if unsafe := [task for task, config in leaves.items() if config.get("unsafe_code") and not unsafe_code]:
        raise ConfigError(
            f"--tasks: {', '.join(unsafe)} is scored by running what the model wrote, on this machine and as this "
            "user; in a sandbox, allow that with --unsafe-code"
        )
    built: list[Any] = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # anything that the task's code or its dataset's host raises
            paths = {
                str(config["dataset_path"])
                for _, config in _leaves(manager.task_index, name)
                if "dataset_path" in config
            }
            what = next(iter(f"{error}".strip().splitlines()), "")
            raise ConfigError(
                f"--tasks: {name} cannot be loaded from {', '.join(sorted(paths)) or 'its class'} "
                f"({type(error).__name__}: {what}); is the dataset reachable, or in the cache?"
            ) from error
        built += [loaded["groups"][name]] if name in loaded.get("groups", {}) else loaded["tasks"].values()
    _refuse({name: task.OUTPUT_TYPE for name, task in by_name(built).items()})
    return built


_OWN = "--include-path names a directory with your own"


def _refuse(types: Mapping[str, str]) -> None:
    if other := {task: type_ for task, type_ in types.items() if type_ != "generate_until"}:
        told = ", ".join(f"{task} ({type_})" for task, type_ in list(other.items())[:4])
        told += f" and {len(other) - 4} more" if len(other) > 4 else ""
        raise ConfigError(
            f"--tasks: {told}: a search selects among generated answers and has no likelihood of a given one; only "
            "generate_until tasks can be asked"
        )


def _leaves(index: Mapping[str, Any], spec: str | Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The tasks below a name, or below a member of a group, with their YAML settings."""
    changes = {} if isinstance(spec, str) else spec
    name = spec if isinstance(spec, str) else spec.get("group", spec.get("task"))
    entry = index.get(name) if isinstance(name, str) else None
    config = {**((entry and entry.cfg) or {}), **changes}
    if entry is not None and entry.kind.name == "TAG":
        members: Sequence[Any] = sorted(entry.tags)
    elif isinstance(config.get("task"), list):
        members = config["task"]
    else:
        yield str(name), config
        return
    for member in members:
        yield from _leaves(index, member)


def by_name(built: Sequence[Any]) -> dict[str, Any]:
    """The single tasks that `load` returned, by name."""
    tasks = [task for item in built for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]
    return {task.task_name: task for task in tasks}


def evaluate(built: Sequence[Any], lm: Answering, **options: Any) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """lm-eval's results of one arm, without machine and date, and its samples by task."""
    found = evaluator.simple_evaluate(lm, tasks=list(built), apply_chat_template=lm.asking.chat, **options)
    return {key: found[key] for key in _KEPT if key in found}, found.get("samples", {})


def metrics(results: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """(task, metric, value, stderr or None) of one arm's results."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if isinstance(value, int | float) and filter_ and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filter_}")
                stderr = float(error) if isinstance(error, int | float) else None
                rows.append((task, metric if filter_ == "none" else f"{metric}, {filter_}", float(value), stderr))
    return rows
