"""`aisp status OUTPUT`: how far a running or dead run is, from its files alone."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from aisp_dist import verify
from jobs import cli, settings


def main(args: Sequence[str]) -> int:
    parse = settings.parser("status", cli.VERBS["status"], config=False)
    parse.add_argument("output", type=Path, help="output directory of a run")
    parse.add_argument("--json", action="store_true", help="as JSON")
    options = parse.parse_args(args)
    now = verify.status(options.output)
    if options.json:
        print(json.dumps(now, indent=2))
        return 0
    print(f"{now['done']} done, {now['failed']} failed in {now['parts']} parts; {now['staged']} more staged")
    owner = now["owner"]
    if owner is None:
        print("no run owns it")
    else:
        lives = {True: "lives", False: "is dead: the same command resumes", None: "is on another machine"}[
            owner["alive"]
        ]
        print(f"owned by process {owner['process']} on {owner['host']}, which {lives}")
    if last := now["metrics"]:
        ago = time.time() - last["time"]
        total = "?" if last["total"] is None else last["total"]
        print(f"{ago:.0f} s ago: {last['done'] + last['failed']}/{total} prompts, {last['in_flight']} in flight")
    return 0


if __name__ == "__main__":
    cli.run("status")
