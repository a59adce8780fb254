"""`aisp status OUTPUT`: how far a running or dead run is, from its files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aisp_dist.output import verify
from aisp_dist.output.filesystem import Place
from jobs import cli, settings

OUTPUT = "output of a run: a directory, or s3://bucket/path with access from AWS's environment variables"


def main(args: Sequence[str]) -> int:
    parse = settings.parser("status", cli.VERBS["status"], config=False)
    parse.add_argument("output", help=OUTPUT)
    parse.add_argument("--json", action="store_true", help="as JSON")
    options = parse.parse_args(args)
    now = verify.status(Place.at(options.output))
    if options.json:
        print(json.dumps(now, indent=2))
        return 0
    last = now["metrics"]
    print(f"{now['done']} done, {now['failed']} failed in {now['parts']} parts; {now['staged']} more staged")
    for owner in now["owners"]:
        lives = {True: "lives", False: "is dead: the same command resumes", None: "is on another machine"}
        shard = "" if owner["shard"] == [0, 1] else "shard {} of {} ".format(*owner["shard"])
        print(f"{shard}owned by process {owner['process']} on {owner['host']}, which {lives[owner['alive']]}")
    if not now["owners"]:
        print(f"not running; {_standing(options.output, now)}")
    if last:
        ago = time.time() - last["time"]
        total = "?" if last["total"] is None else last["total"]
        of = f" of shards {', '.join(map(str, last['shards']))}" if "shards" in last else ""
        print(f"{ago:.0f} s ago: {last['done'] + last['failed']}/{total} prompts{of}, {last['in_flight']} in flight")
    return 0


def _standing(output: str, now: Mapping[str, Any]) -> str:
    """Whether an output without an owner is whole."""
    if now["metrics"] is None:  # `aisp rescore` keeps no record of its progress
        return f"`aisp verify {output}` says whether every input has its row; if not, the same command resumes"
    whole = now["metrics"]["total"] == now["done"] + now["failed"]
    return "every input has its row" if whole else "the same command resumes"


if __name__ == "__main__":
    cli.run("status")
