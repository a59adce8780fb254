"""`aisp rescore OUTPUT --config C --out DIR`: other rewards, weights or combine over the stored candidates.

One process without Ray, on purpose: nothing is decoded, texts come from files in order, and each prompt is one call of
each reward whose scores are not there yet. Rows are staged and committed as a run's, so the same command resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actors.table import Table
from aisp_dist import rewards
from aisp_dist.analysis import rescore, summary
from aisp_dist.analysis.evaluate.outputs import Output, open_output
from aisp_dist.config import ConfigError, ModelReward, Run, load
from aisp_dist.output import fingerprint, manifest, parts, schema
from aisp_dist.output.filesystem import Place
from aisp_dist.output.lease import Lease, LeaseLost
from aisp_dist.records import Failed, Input, Prompt, Result, Score
from aisp_dist.rewards import RewardError, RewardFn, client
from jobs import cli, settings, verify
from jobs.prepare import Prepared, check_output
from jobs.progress import say
from jobs.status import OUTPUT

_TAKEN = ("rewards", "combine", "guard")  # of the configuration given
_FREE = ("output", "save", "runtime", "compare", "tune")  # of which nothing is read: they change no row


def main(args: Sequence[str]) -> int:
    parse = settings.parser("rescore", cli.VERBS["rescore"], config=False)
    parse.add_argument("output", help=OUTPUT)
    parse.add_argument("--config", required=True, help="YAML file with `rewards` or `combine`, as of a run")
    parse.add_argument("--out", required=True, help="directory of the new output, or s3://bucket/path")
    options = parse.parse_args(args)
    parent = open_output(Place.at(options.output))
    _check_whole(parent)
    kept, drawn = _check_kept(parent)
    prepared = _prepare(parent, Path(options.config), options.out)
    known = rescore.unchanged(parent.record["components"], prepared.components)
    scorer = _Scorer(prepared)
    if any(isinstance(reward, ModelReward) for reward in prepared.run.rewards.values()):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    for name in prepared.run.rewards.keys() - known:
        scorer.load(name)  # what cannot be loaded is said before anything is written
    note = {"output": str(parent), "run_id": parent.record["run_id"], "candidates": kept, "samples": drawn}
    record = prepared.record() | {"directory": parent.record["directory"], "rescored": note}
    if (before := manifest.read_run(prepared.output)) is not None:
        manifest.check_resume(before, record)
    began = time.monotonic()
    with Lease.take(prepared.output, say=say).beating() as mine:
        manifest.write_run(prepared.output, record)
        try:
            _fill(parent, prepared, mine, lambda line, rows: _result(line, rows, prepared.run, known, scorer))
        except client.Unavailable as error:
            raise cli.Exit(1, f"{error}; once that is mended the same command goes on") from None
        except LeaseLost as error:
            raise cli.Exit(1, str(error)) from None
    say(f"{scorer.asked} answers scored anew, in {time.monotonic() - began:.1f} s")
    print(summary.text(prepared.output, 0.0, 0))
    return 0


def _check_whole(parent: Output) -> None:
    """Raise ConfigError unless every input has its row, computed from the input that is there now."""
    store = Table(parent.run, parent.place, *_of(parent)).store()
    missing = next(store.plan(_inputs(parent)), None)
    if missing is not None or not store.settled():
        raise ConfigError(f"output: {parent} is unfinished; the command that made it computes the missing rows")


def _of(output: Output) -> tuple[dict[str, schema.ColumnType], str, str]:
    return output.record["columns"], output.record["fingerprint"], output.run.generator.model


def _inputs(parent: Output) -> Iterator[Input]:
    lines = verify.inputs(dict(parent.record))
    assert lines is not None
    return lines


def _check_kept(parent: Output) -> tuple[int, int]:
    """Candidates that are kept and that were drawn. Raises ConfigError where a done row has none."""
    rows = kept = 0
    for name in parent.place.names("candidates"):
        file = parent.place.open(f"candidates/{name}")
        assert file is not None
        with file:
            lists = pq.ParquetFile(file).read(columns=["candidates.list.element.sample"])["candidates"]
        lengths = pc.list_value_length(lists)
        rows += pc.sum(pc.greater(lengths, 0)).as_py() or 0
        kept += pc.sum(lengths).as_py() or 0
    samples = parent.place.dataset("data").to_table(columns=["samples_spent"])["samples_spent"]
    if rows < len(samples):
        raise ConfigError(
            f"output: {len(samples) - rows} of {len(samples)} done rows of {parent} have no candidates to choose from; "
            "save.candidates: all keeps them, or {top: k} the best, in a run from the start"
        )
    return kept, pc.sum(samples).as_py() or 0


def _prepare(parent: Output, file: Path, out: str) -> Prepared:
    """The new output's configuration and fingerprint; the base model's files need not be there. Raises ConfigError."""
    given, old = load.read_yaml(file), dict(parent.record["config"])
    if not given.keys() & {"rewards", "combine"}:
        raise ConfigError(f"--config: {file} has neither rewards nor combine; give what is to change")
    same = {key: value for key, value in old.items() if key not in ("runtime", "compare", "tune")}
    values = settings.merge(same, {key: value for key, value in given.items() if key not in _FREE})
    run = load.check(values | {"rewards": given.get("rewards", old["rewards"]), "output": out})
    if other := sorted(set(_row_keys(parent.run, run))):
        raise ConfigError(
            f"--config: {file} is of another run than {parent}, in {', '.join(other)}; rescoring changes rewards and "
            "combine: set these back, or leave them out"
        )
    output, base_dir = check_output(run), file.resolve().parent
    if output == parent.place:
        raise ConfigError(f"--out: {out} is the output that is read; give another directory")
    before = manifest.read_run(output) or parent.record
    run = run.model_copy(update={"rewards": fingerprint.pin_rewards(run, before["config"])})
    located = {name: fingerprint.locate_reward(name, reward, base_dir) for name, reward in run.rewards.items()}
    was, now = parent.record["components"], run.row_settings()
    of_base = {key: value for key, value in was["digests"].items() if not key.startswith("rewards.")}
    components = was | {"rewards": now["rewards"], "combine": now["combine"], "parent": parent.record["fingerprint"]}
    components["digests"] = of_base | fingerprint.reward_digests(located, base_dir)
    if template := run.generator.chat_template:  # relative to the parent's configuration, not to this one
        template = str(Path(parent.record["base_dir"], template))
        run = run.model_copy(update={"generator": run.generator.model_copy(update={"chat_template": template})})
    here = run.model_copy(update={"rewards": located})
    return Prepared(run, here, base_dir, output, components, parent.record["columns"])


def _row_keys(old: Run, new: Run) -> list[str]:
    return [
        key
        for key in manifest.differing_keys(old.row_settings(), new.row_settings())
        if key.partition(".")[0] not in _TAKEN
    ]


class _Scorer:
    """Rewards by name, loaded when first asked. asked: texts scored so far."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.loaded, self.asked = prepared, dict[str, RewardFn](), 0

    def load(self, name: str) -> RewardFn:
        if name not in self.loaded:
            run = self.prepared.located
            reward, columns = run.rewards[name], run.prompts.keep
            self.loaded[name] = rewards.load(name, reward, self.prepared.base_dir, columns=columns)
        return self.loaded[name]

    def score(self, name: str, prompt: Prompt, texts: Sequence[str]) -> list[Score]:
        self.asked += len(texts)
        return self.load(name)(prompt, texts)


@dataclass(frozen=True)
class _Rows:
    """A row of each table of the parent, those that an input has."""

    data: dict[str, Any] | None
    failed: dict[str, Any] | None
    candidates: dict[str, Any] | None


def _result(line: Input, rows: _Rows, run: Run, known: frozenset[str], scorer: _Scorer) -> Result:
    if rows.data is None or rows.candidates is None or not isinstance(line, Prompt):
        assert rows.failed is not None  # _check_whole and _check_kept have seen them
        return Failed(line, rows.failed["reason"])
    try:
        return rescore.rescore(
            run, line, rows.data, rows.candidates, known, lambda name, texts: scorer.score(name, line, texts)
        )
    except RewardError as error:
        return Failed(line, str(error))


def _fill(parent: Output, prepared: Prepared, lease: Lease, result: Callable[[Input, _Rows], Result]) -> None:
    """Every input that has no row yet, a part of the parent in memory at a time."""
    run = prepared.located
    keep = run.save.model_copy(update={"candidates": "all"})  # all that the parent has
    store = replace(prepared.table(), run=run.model_copy(update={"save": keep}), lease=lease).store()
    schemas = schema.schemas("raw" if run.prompts.format == "raw" else "chat", prepared.columns)
    size, part, flushed = run.save.rows_per_file, -1, time.monotonic()
    for line in store.plan(_inputs(parent)):
        if line.source_index // size != part or time.monotonic() - flushed > run.save.flush_seconds:
            store.flush()
            flushed = time.monotonic()
            if line.source_index:
                say(f"{line.source_index} inputs are through")
        if line.source_index // size != part:
            part = line.source_index // size
            tables = parts.read_rows(parent.place, part, (part + 1) * size, schemas)
            places = [{n: i for i, n in enumerate(t["source_index"].to_pylist())} for t in tables]
        store.add(result(line, _Rows(*(_row(*pair, line.source_index) for pair in zip(tables, places, strict=True)))))
    store.finish()


def _row(table: pa.Table, places: dict[int, int], ordinal: int) -> dict[str, Any] | None:
    at = places.get(ordinal)
    return None if at is None else table.slice(at, 1).to_pylist()[0]


if __name__ == "__main__":
    cli.run("rescore")
