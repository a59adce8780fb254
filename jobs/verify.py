"""`aisp verify OUTPUT`: every input accounted for exactly once, in order, in files that agree with each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data import prompts
from aisp_dist.data.sources import exists, is_local
from aisp_dist.output import manifest, verify
from aisp_dist.output.filesystem import Place
from aisp_dist.records import Input
from jobs import cli, settings
from jobs.status import OUTPUT


def main(args: Sequence[str]) -> int:
    parse = settings.parser("verify", cli.VERBS["verify"], config=False)
    parse.add_argument("output", help=OUTPUT)
    parse.add_argument("--without-inputs", action="store_true", help="check the tables only, not against the prompts")
    options = parse.parse_args(args)
    output = Place.at(options.output)
    verdict = verify.verify(output, None if options.without_inputs else inputs(output))
    for violation in verdict.violations:
        print(f"violation: {violation}")
    found = f"{verdict.done} done, {verdict.failed} failed, {verdict.staged} staged, {verdict.parts} parts"
    against = "" if options.without_inputs else "every input is there exactly once"
    print(
        f"{output}: {found}: " + (f"{len(verdict.violations)} violations" if verdict.violations else against or "whole")
    )
    return 1 if verdict.violations else 0


def inputs(output: Place) -> Iterator[Input] | None:
    """The inputs of an output's run, read again; None where there is no run. A relative source is looked up beside a
    copy of the whole project first, then in the directory that the run was started in. Raises ConfigError where it is
    gone."""
    run = manifest.read_run(output)
    if run is None:
        return None  # verify says that there is no run
    settings = Prompts.model_validate(run["config"]["prompts"])
    source = Path(settings.source).expanduser()
    if settings.source == "demo" or source.is_absolute():
        return prompts.read(settings)
    homes = [home for home in (_home(output, run["config"]["output"]), Path(run["directory"])) if home is not None]
    for home in homes:
        if exists(str(home / source)):
            return prompts.read(settings.model_copy(update={"source": str(home / source)}))
    if is_local(settings.source):
        raise ConfigError(
            f"prompts.source: {settings.source!r} is gone from {' and from '.join(map(str, homes))}, where the run "
            "read it; --without-inputs checks only the tables"
        )
    return prompts.read(settings)


def _home(output: Place, name: str) -> Path | None:
    """The directory from which `name`, the output's relative path when the run was started, leads to the output."""
    place, parts = Path(output.uri), Path(os.path.normpath(name)).parts
    if output.remote or "://" in name or Path(name).is_absolute() or place.parts[-len(parts) :] != parts:
        return None
    return place.parents[len(parts) - 1]


if __name__ == "__main__":
    cli.run("verify")
