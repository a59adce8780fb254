"""`aisp rescore OUTPUT --config C --out DIR`: other rewards, their `weight` or `combine` over the stored candidates.

One process without Ray: nothing is decoded, texts come from files in order, and each prompt is one call of each reward
whose scores are not stored. Rows are staged and committed as those of a run, so the same command resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from actors.table import Table
from aisp_dist import engine, quiet, rewards, vllm
from aisp_dist.analysis import outputs, rescore, summary
from aisp_dist.analysis.outputs import Output, Row
from aisp_dist.config import ConfigError, Reward, Run
from aisp_dist.config.load import check, read_yaml
from aisp_dist.output import fingerprint, manifest, parts, schema
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease, LeaseLost
from aisp_dist.records import Failed, Input, Prompt, Result, Score
from aisp_dist.rewards import RewardError, RewardFn, client
from aisp_dist.vllm.choice import Choice, resolve_rewards, usable
from jobs import cli, settings, verify
from jobs.prepare import Prepared, check_output
from jobs.progress import say
from jobs.status import OUTPUT

_TAKEN = ("rewards", "combine", "guard")  # of the configuration given
_FREE = ("output", "save", "runtime", "compare", "tune")  # ignored there: they change no row


def main(args: Sequence[str]) -> int:
    parse = settings.parser("rescore", cli.VERBS["rescore"], config=False)
    parse.add_argument("output", help=OUTPUT)
    parse.add_argument("--config", required=True, help="YAML file with `rewards` or `combine`, as in a configuration")
    parse.add_argument("--out", required=True, help="directory of the new output, or s3://bucket/path")
    options = parse.parse_args(args)
    parent = outputs.open_output(Place.at(options.output))
    _check_whole(parent)
    kept, drawn = _check_kept(parent)
    prepared = _prepare(parent, Path(options.config), options.out)
    known = rescore.unchanged(parent.record["components"], prepared.components)
    scorer = _Scorer(prepared)
    for name in prepared.run.rewards.keys() - known:
        scorer.load(name)  # a reward that cannot be loaded ends the command before anything is written
    quiet.libraries()
    note = {"output": str(parent), "run_id": parent.record["run_id"], "candidates": kept, "samples": drawn}
    record = prepared.record() | {"directory": parent.record["directory"], "rescored": note}
    if (before := manifest.read_run(prepared.output)) is not None:
        manifest.check_resume(before, record)

    def result(line: Input, row: Row | None, failed: Row | None, candidates: Row | None) -> Result:
        if row is None or candidates is None or not isinstance(line, Prompt):
            assert failed is not None  # _check_whole and _check_kept have seen all others
            return Failed(line, failed["reason"])
        try:
            return rescore.rescore(
                prepared.run, line, row, candidates, known, lambda name, texts: scorer.score(name, line, texts)
            )
        except RewardError as error:
            return Failed(line, str(error))

    began = time.monotonic()
    with Lease.take(prepared.output, say=say).beating() as mine:
        manifest.write_run(prepared.output, record)
        try:
            _fill(parent, prepared, mine, result)
        except client.Unavailable as error:
            raise cli.Exit(1, f"{error}; once it answers, the same command resumes") from None
        except LeaseLost as error:
            raise cli.Exit(1, str(error)) from None
    say(f"{scorer.asked} answers scored, in {time.monotonic() - began:.1f} s")
    print(summary.text(summary.read(prepared.output)))
    return 0


def _check_whole(parent: Output) -> None:
    """Raise ConfigError unless every input has its row, computed from the input that is there now."""
    record = parent.record
    table = Table(parent.run, parent.place, record["columns"], record["fingerprint"], parent.model_name)
    store = table.store()
    missing = next(store.plan(_inputs(parent)), None)
    if missing is not None or not store.settled():
        raise ConfigError(f"output: {parent} is unfinished; the command that made it computes the missing rows")


def _inputs(parent: Output) -> Iterator[Input]:
    lines = verify.inputs(parent.place)
    assert lines is not None
    return lines


def _check_kept(parent: Output) -> tuple[int, int]:
    """Candidates that are kept and that were drawn. Raises ConfigError where a done row has none."""
    done = drawn = rows = kept = 0
    for batch in outputs.batches(parent.place, "data", ["samples_spent"], 1 << 16):
        done += batch.num_rows
        drawn += pc.sum(batch["samples_spent"]).as_py()
    for batch in outputs.batches(parent.place, "candidates", ["candidates.list.element.sample"], 1 << 16):
        lengths = pc.list_value_length(batch["candidates"])
        rows += pc.sum(pc.greater(lengths, 0)).as_py()
        kept += pc.sum(lengths).as_py()
    if rows < done:
        raise ConfigError(
            f"output: {done - rows} of {done} done rows of {parent} have no candidates to choose from; "
            "save.candidates: all keeps them, or {top: k} the best, in a run from the start"
        )
    return kept, drawn


def _prepare(parent: Output, file: Path, out: str) -> Prepared:
    """The new output's configuration and fingerprint; the base model's files need not be there. Raises ConfigError."""
    given, old = read_yaml(file), parent.run.model_dump(mode="json", by_alias=True)
    if not given.keys() & {"rewards", "combine"}:
        raise ConfigError(f"--config: {file} has neither rewards nor combine; give what is to change")
    same = {key: value for key, value in old.items() if key not in ("runtime", "compare", "tune")}
    values = settings.merge(same, {key: value for key, value in given.items() if key not in _FREE})
    run = check(values | {"rewards": given.get("rewards", old["rewards"]), "output": out})
    changed = manifest.differing_keys(parent.run.row_settings(), run.row_settings())
    if other := [key for key in changed if key.partition(".")[0] not in _TAKEN]:
        raise ConfigError(
            f"--config: {file} is of another run than {parent}, in {', '.join(other)}; rescoring changes rewards and "
            "combine: set these back, or leave them out"
        )
    output = check_output(run)
    # Where files of rewards start: beside the configuration that names them.
    base_dir = file.resolve().parent if "rewards" in given else Path(parent.record["base_dir"])
    if output == parent.place:
        raise ConfigError(f"--out: {out} is the output that is read; give another directory")
    before = manifest.read_run(output) or parent.record
    run = run.model_copy(update={"rewards": resolve_rewards(run, before["config"])})
    run = run.model_copy(update={"rewards": fingerprint.pin_rewards(run, before["config"])})
    located = {name: fingerprint.locate_reward(name, reward, base_dir) for name, reward in run.rewards.items()}
    components = _components(parent, run, located, base_dir)
    if template := run.generator.chat_template:  # relative to the parent's configuration, not to this one
        template = str(Path(parent.record["base_dir"], template))
        run = run.model_copy(update={"generator": run.generator.model_copy(update={"chat_template": template})})
    here = run.model_copy(update={"rewards": located})
    told = parent.record.get("engine") or {"name": "local", "version": None}
    choice = Choice(told["name"], "of the run that is rescored", told["version"])
    return Prepared(run, here, base_dir, output, components, parent.record["columns"], parent.model_name, choice)


def _components(parent: Output, run: Run, located: Mapping[str, Reward], base_dir: Path) -> dict[str, Any]:
    """What the new fingerprint is taken of: the parent's, but for the rewards. Raises ConfigError for a reward that
    vLLM is to score and cannot."""
    was, now, version = parent.record["components"], run.row_settings(), vllm.installed()
    of_base = {key: value for key, value in was["digests"].items() if not key.startswith("rewards.")}
    new = {name: fingerprint.reward_settings(reward, version) for name, reward in now["rewards"].items()}
    components: dict[str, Any] = was | {"rewards": new, "combine": now["combine"]}
    if not isinstance(was.get("engine"), str):  # vLLM's is recorded by its name
        components["engine"] = engine.VERSION
    components["parent"] = parent.record["fingerprint"]
    components["digests"] = of_base | fingerprint.reward_digests(located, base_dir)
    known = rescore.unchanged(was, components)
    for name in (name for name, reward in new.items() if "engine" in reward):
        if name in known:  # its scores are those of the version that computed them, which need not be here
            new[name]["engine"] = was["rewards"][name]["engine"]
        else:
            usable(f"rewards.{name}.engine", "transformers", version)
    return components


@dataclass
class _Scorer:
    """Rewards by name, loaded when first asked. asked: texts scored so far."""

    prepared: Prepared
    loaded: dict[str, RewardFn] = field(default_factory=dict)
    asked: int = 0

    def load(self, name: str) -> RewardFn:
        if name not in self.loaded:
            run = self.prepared.located
            reward, columns = run.rewards[name], run.prompts.keep
            self.loaded[name] = rewards.load(name, reward, self.prepared.base_dir, columns=columns)
        return self.loaded[name]

    def score(self, name: str, prompt: Prompt, texts: Sequence[str]) -> list[Score]:
        self.asked += len(texts)
        return self.load(name)(prompt, texts)


def _fill(parent: Output, prepared: Prepared, lease: Lease, result: Callable[..., Result]) -> None:
    """Every input that has no row yet, a part of the parent in memory at a time. result: of an input and its rows in
    data, failed and candidates, None where it has none."""
    run = prepared.located
    keep = run.save.model_copy(update={"candidates": "all"})  # all that the parent has
    store = replace(prepared.table(), run=run.model_copy(update={"save": keep}), lease=lease).store()
    schemas = schema.schemas("raw" if run.prompts.format == "raw" else "chat", prepared.columns)
    size, part, flushed = run.save.rows_per_file, -1, time.monotonic()
    tables: list[Mapping[int, Any]] = []
    for line in store.plan(_inputs(parent)):
        at = line.source_index
        if at // size != part or time.monotonic() - flushed > run.save.flush_seconds:
            store.flush()
            flushed = time.monotonic()
            if at:
                say(f"{at} inputs are done")
        if at // size != part:
            part = at // size
            found = parts.read_rows(parent.place, part, (part + 1) * size, schemas)
            tables = [{n: (t, i) for i, n in enumerate(t["source_index"].to_pylist())} for t in found]
        rows = [table.get(at) for table in tables]
        store.add(result(line, *(r and r[0].slice(r[1], 1).to_pylist()[0] for r in rows)))
    store.finish()


if __name__ == "__main__":
    cli.run("rescore")
