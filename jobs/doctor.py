"""`aisp doctor CONFIG`: checks, on this machine and with the models of a run, that decoding is exact, that rows do not
depend on the schedule, and that reward models pass their self-test. Exit code 1 if a check FAILED."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence

from aisp_dist import quiet
from aisp_dist.config import ConfigError
from jobs import cli, engines, prepare, settings
from jobs.progress import say

_STEPS = 72  # more than the 64 after which a row's keys and values continue in another block


def main(args: Sequence[str]) -> int:
    parse = settings.parser("doctor", cli.VERBS["doctor"])
    parse.add_argument(
        "--steps", type=int, default=_STEPS, help=f"decode at most this many tokens of a response ({_STEPS})"
    )
    parse.add_argument("--json", action="store_true", help="print one JSON document instead of lines")
    options, run, base_dir = settings.read(parse, args)
    if options.steps < 1:
        raise ConfigError(f"--steps is {options.steps}; it must be at least 1")
    run, choice = engines.resolve(run, None)
    located = prepare.check(run, base_dir)
    say(choice.line())

    from aisp_dist.analysis.doctor import examine

    quiet.libraries()
    out, checks = sys.stdout, []
    with contextlib.redirect_stdout(sys.stderr):  # code that comes with a model may print
        for check in examine.examine(located, base_dir, options.steps, say):
            checks.append(check)
            if not options.json:
                print(check.line(), file=out, flush=True)
    failed = [check.name for check in checks if check.verdict == "FAILED"]
    if options.json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    elif failed:
        print(f"{len(failed)} of {len(checks)} checks FAILED: {', '.join(failed)}")
    else:
        notes = [check.name for check in checks if check.verdict == "note"]
        print(f"all {len(checks)} checks passed" + f", with a note on {', '.join(notes)}" * bool(notes))
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run("doctor")
