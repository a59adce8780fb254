"""`aisp verify OUTPUT`: every input accounted for exactly once, in order, in files that agree with each other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from aisp_dist.config import ConfigError, load
from aisp_dist.data import prompts
from aisp_dist.output import fingerprint, manifest, verify
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
    verdict = verify.verify(output, None if options.without_inputs else inputs(manifest.read_run(output)))
    for violation in verdict.violations:
        print(f"violation: {violation}")
    found = f"{verdict.done} done, {verdict.failed} failed, {verdict.staged} staged, {verdict.parts} parts"
    against = "" if options.without_inputs else "every input is there exactly once"
    print(
        f"{output}: {found}: " + (f"{len(verdict.violations)} violations" if verdict.violations else against or "whole")
    )
    return 1 if verdict.violations else 0


def inputs(run: dict[str, Any] | None) -> Iterator[Input] | None:
    """The inputs of a run again, from where it read them. Raises ConfigError where they are gone."""
    if run is None:
        return None  # verify says that there is no run
    here = os.getcwd()
    try:
        os.chdir(run["directory"])  # relative sources are relative to where the run was started
        located = fingerprint.locate_prompts(load.check(run["config"]).prompts)
    except OSError:
        raise ConfigError(
            f"the directory {run['directory']!r}, where the run was started, is gone, and with it relative prompt "
            "files; --without-inputs checks the tables alone"
        ) from None
    finally:
        os.chdir(here)
    return prompts.read(located)


if __name__ == "__main__":
    cli.run("verify")
