"""`aisp align CONFIG`: relabel the prompts of a configuration. The same command resumes; a larger limit extends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from actors.table import Table, TooManyFailed
from aisp_dist.align import window
from aisp_dist.config import ConfigError, Run
from aisp_dist.data import prompts
from aisp_dist.output import manifest
from jobs import cli, cost, prepare, session, settings
from jobs.connection import Connection
from jobs.progress import Progress, say


def main(args: Sequence[str]) -> int:
    parse = settings.parser("align", cli.VERBS["align"])
    parse.add_argument("--retry-failed", action="store_true", help="compute the rows of failed/ again")
    parse.add_argument(
        "--dry-run",
        action="store_true",
        help="load the models, search a few prompts, say what the whole run will take; write nothing",
    )
    parse.add_argument(
        "--shard", metavar="I/N", help="only this one of N shards, from 0: one job of many on one output"
    )
    parse.add_argument(
        "--plan", action="store_true", help="say how many processes would run, on what; load and write nothing"
    )
    options, run, base_dir = settings.read(parse, args)
    shard = _shard(options.shard, run.runtime.shards) if options.shard else None
    if options.plan:
        return _plan(prepare.check(run, base_dir), 1 if shard else run.runtime.shards)
    prepared = prepare.prepare(run, base_dir, shard or (0, 1))
    table = replace(prepared.table(options.retry_failed), shard=shard or (0, 1))
    try:
        nothing_to_do = not options.dry_run and manifest.read_run(prepared.output) and table.whole()
    except TooManyFailed as error:
        raise cli.Exit(3, str(error)) from None
    if nothing_to_do:
        say("every input has its row already: nothing to do")
        manifest.write_card(prepared.output)  # a kill after the last commit may have kept it from being written
        return _end(prepared, 0.0, 0)
    with session.Session(prepared, say, shard) as cluster:
        say(cluster.first_prompt)
        if options.dry_run:
            print(_rehearsal(cluster, prepared, table))
            return 0
        with Progress(prepared.output, prepared.located, shard=table.shard) as progress:
            cluster.relabel(prepared, table, progress)
    return _end(prepared, progress.seconds, progress.samples)


def _plan(located: Run, coordinators: int) -> int:
    connection = Connection(located, say)
    try:
        print(*session.planned(located, coordinators).lines(), sep="\n")
    finally:
        connection.close()
    return 0


def _end(prepared: prepare.Prepared, seconds: float, samples: int) -> int:
    """Print the summary of a whole run. Raises Exit where a bound of its guard is broken and the guard stops runs."""
    from aisp_dist.analysis import guard, summary

    bounds, columns = prepared.run.guard, summary.read(prepared.output)
    print(summary.text(columns, seconds, samples, bounds))
    if prepared.choice.engine != "local" and (record := manifest.read_run(prepared.output)):
        print(f"rows that are computed again: {record['same_rows']}")
    try:
        guard.check(bounds, summary.tally(columns), whole=True)
    except guard.GuardStop as error:
        raise cli.Exit(1, str(error)) from None
    return 0


def _rehearsal(cluster: session.Session, prepared: prepare.Prepared, table: Table) -> str:
    """What the whole run will take, from a few prompts searched for real."""
    run = prepared.located
    inputs = prompts.count(run.prompts)
    few = window(run) * next(group.replicas for group in cluster.plan.groups if group.role == "generator")
    say(f"rehearsal: the first {min(few, inputs)} prompts, searched for real, then discarded")
    counts, seconds, size = cluster.rehearse(table, few)
    actors = int(counts.alive.get("generator", 1))
    each = counts.samples / max(counts.finished, 1)
    told = cost.text(run, inputs, counts, seconds, actors, size, counts.done, each)
    return f"{prepared.choice.line()}\n{told}\nnothing was written"


def _shard(text: str, coordinators: int) -> tuple[int, int]:
    """`2/8` as (2, 8). Raises ConfigError."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--shard is {text!r}; give it as I/N with 0 <= I < N, as in --shard 2/8")
    if coordinators > 1:
        raise ConfigError(
            f"--shard {text} with runtime.shards = {coordinators}: the first is one job of many, the second many "
            "coordinators in one job; give one of them"
        )
    return int(index), int(count)


if __name__ == "__main__":
    cli.run("align")
