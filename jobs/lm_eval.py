"""`aisp lm-eval CONFIG --tasks gsm8k`: tasks of lm-evaluation-harness, answered by every arm at the same number of
samples. The answers of an arm to the requests with one generation setting are an ordinary output under lm-eval/, in a
folder named by a hash of the requests: an interrupted command resumes, and a repeated one draws nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aisp_dist.analysis import arms, compare, outputs
from aisp_dist.analysis.outputs import Columns, Row
from aisp_dist.config import BestOfN, ConfigError, FunctionReward, Method, Prompts, Run
from aisp_dist.output import schema
from aisp_dist.output.filesystem import Place
from jobs import cli, prepare, settings
from jobs.compare import Filling, folder
from jobs.progress import say

if TYPE_CHECKING:
    from aisp_dist.analysis.tasks import Group


def main(args: Sequence[str]) -> int:
    options, run, base_dir = settings.read(_parser(), args)
    names = list(dict.fromkeys(filter(None, (options.tasks or "").split(","))))
    if not names:
        raise ConfigError("--tasks: give names of lm-eval's tasks, as in --tasks gsm8k,ifeval")
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    wanted = _wanted(run, options.arms)
    if options.gold_column and not any(isinstance(r, FunctionReward) for r in run.rewards.values()):
        raise ConfigError("--gold-column: only function rewards read it, and none of the rewards is one; leave it out")
    if "://" in run.output:
        raise ConfigError(f"output: {run.output} is not a local directory, which the prompts are read from; give one")
    schema.check_kept([options.gold_column] if options.gold_column else [])
    prepare.check(run.model_copy(update={"prompts": Prompts()}), base_dir)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-eval needs lm-evaluation-harness: pip install 'aisp-dist[tasks]'")
    if options.unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # the metric code_eval needs this beside --unsafe-code

    from aisp_dist.analysis import tasks

    built = tasks.load(names, options.include_path, options.unsafe_code)
    chat, cap = options.apply_chat_template, options.cap_new_tokens
    asking = tasks.Asking(run.generator.max_new_tokens, cap, chat, options.gold_column, say)
    if run.prompts.system and not chat:
        say("prompts.system is left out: only chats have it, which --apply-chat-template makes")
    answers = Answers(run, base_dir, options, wanted)
    found: dict[str, Any] = {}
    place = answers.output
    for arm in wanted:
        lm = tasks.Answering(asking, tasks.by_name(built), partial(answers, arm))
        results, samples = tasks.evaluate(
            built,
            lm,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            log_samples=options.log_samples,
            confirm_run_unsafe_code=options.unsafe_code,
        )
        found[arm] = results
        for task, lines in samples.items():
            text = "".join(f"{_json(line)}\n" for line in lines)
            place.write(f"samples/{folder(arm)}/{task}.jsonl", text.encode())
    spent = answers.spent()
    found = {arm: {"spent": spent[arm]} | results for arm, results in found.items()}
    oracle = {"oracle": f"rewards were given the gold answer as {options.gold_column}"} if options.gold_column else {}
    config = run.model_dump(mode="json", by_alias=True)
    place.write("results.json", _json(oracle | {"arms": found, "config": config}, indent=2).encode())
    print(_table(found, options.gold_column))
    return 0


def _parser() -> argparse.ArgumentParser:
    parse = settings.parser("lm-eval", cli.VERBS["lm-eval"])
    parse.add_argument("--tasks", help="names of generate_until tasks, groups or tags, separated by commas")
    parse.add_argument("--include-path", metavar="DIR", help="directory with task definitions of your own")
    parse.add_argument("--limit", type=int, help="documents of every task, from the first on (default: all)")
    parse.add_argument(
        "--num-fewshot", type=int, help="solved examples before every question (default: the task's own)"
    )
    parse.add_argument("--apply-chat-template", action="store_true", help="ask as a chat, with the examples as turns")
    parse.add_argument(
        "--arms",
        help="base (greedy), best-of-n (of top-p samples), and other arms of `aisp compare` by the names of their "
        "folders, separated by commas (default: base, best-of-n and the configured method)",
    )
    parse.add_argument(
        "--cap-new-tokens",
        action="store_true",
        help="generator.max_new_tokens limits every task (default: only tasks without max_gen_toks)",
    )
    parse.add_argument(
        "--gold-column",
        metavar="NAME",
        help="pass the gold answer to function rewards as this column: the result is an oracle's, an upper bound",
    )
    parse.add_argument("--log-samples", action="store_true", help="write every document, answer and score, by arm")
    parse.add_argument("--unsafe-code", action="store_true", help="allow tasks that run what the model wrote")
    return parse


def _wanted(run: Run, names: str | None) -> dict[str, Method | None]:
    """The arms asked for; base has no method of its own. Raises ConfigError for an unknown arm."""
    methods = arms.arms(run)
    found = {arms.BASE: None} | methods
    short = {folder(arm): arm for arm in found} | ({"best-of-n": arms.TOP_P} if arms.TOP_P in found else {})
    usual = [arms.BASE, *(name for name in ("best-of-n", folder(arms.main_arm(run, methods))) if name in short)]
    wanted: dict[str, Method | None] = {}
    for name in usual if names is None else filter(None, names.split(",")):
        if name not in short:
            raise ConfigError(f"--arms: {name!r} is not among {', '.join(short)}")
        wanted[short[name]] = found[short[name]]
    if not wanted:
        raise ConfigError(f"--arms: name at least one of {', '.join(short)}")
    return wanted


def _asked(run: Run, lines: Prompts, options: argparse.Namespace, stop: tuple[str, ...], max_new_tokens: int) -> Run:
    """The run over the task's prompts, rendered as the configuration says. The gold answer is the only column that
    rewards can see, and only with --gold-column."""
    chat = {"format": "chat", "system": run.prompts.system, "template_kwargs": run.prompts.template_kwargs}
    prompts = {
        "max_tokens": run.prompts.max_tokens,
        "overlong": run.prompts.overlong,
        "keep": (options.gold_column,) if options.gold_column else (),
        **(chat if options.apply_chat_template else {"format": "raw"}),
    }
    generator = run.generator.model_copy(update={"stop": stop, "max_new_tokens": max_new_tokens})
    return run.model_copy(update={"prompts": lines.model_copy(update=prompts), "generator": generator})


class Answers:
    """The arms' answers. A group is drawn for all arms on one session when the first arm asks for it. Base takes the
    greedy answers in another arm's output; where base is the only arm, one sample a prompt is drawn for them."""

    def __init__(
        self, run: Run, base_dir: Path, options: argparse.Namespace, wanted: Mapping[str, Method | None]
    ) -> None:
        self.run, self.base_dir, self.options = run, base_dir, options
        drawn = {arm: method for arm, method in wanted.items() if method is not None}
        self.drawn: dict[str, Method] = drawn or {arms.BASE: BestOfN(num_samples=1, num_iterations=1)}
        self.greedy = next(iter(self.drawn))
        self.output = Place.at(run.output, run.runtime.storage_options) / "lm-eval"
        self.columns: dict[str, dict[str, Columns]] = {}  # by group and arm
        self.texts: dict[tuple[str, str], dict[str, Row]] = {}  # by group and arm, rows by id

    def __call__(self, arm: str, group: Group) -> list[str]:
        """One text for each line of the group. Raises Exit for a prompt without an answer."""
        if group.name not in self.columns:
            self.columns[group.name] = self._draw(group)
        of, column = (self.greedy, "base_completion") if arm == arms.BASE else (arm, "completion")
        if (group.name, of) not in self.texts:
            columns = self.columns[group.name][of]
            rows = outputs.rows(columns, columns.rows.index, ["id", "completion", "base_completion"])
            self.texts[group.name, of] = {row["id"]: row for row in rows}
        rows_by_id = self.texts[group.name, of]
        return [outputs.answer(rows_by_id[line["id"]][column]) for line in group.lines]

    def spent(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """By arm and task, as in the comparison of the arms: samples drawn, tokens of the answer, its reward (None
        where no answer has one)."""
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        joined = {arm: outputs.joined([group[arm] for group in self.columns.values()]) for arm in self.drawn}
        tasks = next(iter(joined.values())).rows.index.str.partition("/").get_level_values(0)
        for task in tasks.unique():
            of_task = {arm: [replace(c, rows=c.rows[tasks == task])] for arm, c in joined.items()}
            for arm in compare.compare(of_task, self.greedy).arms:
                means = {"samples": arm.samples, "tokens": arm.num_tokens, "reward": arm.reward and arm.reward.mean}
                found.setdefault(arm.name, {}).setdefault(task, means)  # the greedy answers come before an arm `base`
        return found

    def _draw(self, group: Group) -> dict[str, Columns]:
        place = self.output / group.name
        if place.read("prompts.jsonl") != group.jsonl:
            place.write("prompts.jsonl", group.jsonl)
        lines = Prompts(source=f"{place.uri}/prompts.jsonl", id_column="id")
        run = _asked(self.run, lines, self.options, group.stop, group.max_new_tokens)
        prepared = {}
        for arm, method in self.drawn.items():
            own = {"method": method, "output": str(place / folder(arm))}
            prepared[arm] = prepare.prepare(run.model_copy(update=own), self.base_dir)
        with Filling() as filling:
            for arm, plan in prepared.items():
                filling.fill(arm, plan)
        return {arm: _read(arm, plan.output) for arm, plan in prepared.items()}


def _read(arm: str, place: Place) -> Columns:
    """Raises Exit for a prompt without an answer."""
    failed = [row for batch in outputs.batches(place, "failed", ["id", "reason"]) for row in batch.to_pylist()]
    if failed:
        raise cli.Exit(
            3,
            f"{arm}: {len(failed)} prompts have no answer, so there is no score; {failed[0]['id']}: "
            f"{failed[0]['reason']} ({place}/failed)",
        )
    return outputs.read(outputs.open_output(place))


def _json(value: Any, **options: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, **options)


def _table(found: Mapping[str, Any], gold_column: str | None) -> str:
    from aisp_dist.analysis.tasks import metrics

    rows = [["task", "metric", "arm", "value", "stderr", "samples", "tokens", "reward"]]
    scores = {arm: {row[:2]: row[2:] for row in metrics(result)} for arm, result in found.items()}
    for task, metric in dict.fromkeys(key for arm in scores.values() for key in arm):
        for arm, result in found.items():
            value, stderr = scores[arm][task, metric]
            name = f"{arm} (oracle)" if gold_column and arm != arms.BASE else arm
            of = result["spent"].get(task)  # a group of tasks has none of its own
            spent = [f"{of['samples']:g}", f"{of['tokens']:.1f}"] if of else ["", ""]
            spent.append("" if of is None or of["reward"] is None else f"{of['reward']:.3f}")
            rows.append([task, metric, name, f"{value:.4f}", "" if stderr is None else f"{stderr:.4f}", *spent])
    end = ["samples, tokens and reward: means over the task's prompts"]
    if gold_column:
        end.append(f"oracle: the rewards saw the gold answers as {gold_column!r}; an upper bound, not a result")
    return "\n".join([*compare.aligned(rows), *end])


if __name__ == "__main__":
    cli.run("lm-eval")
