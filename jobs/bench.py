"""`aisp bench WHAT`: how fast, as one JSON document on stdout. coordinator and simulate are of the actors, the others
of aisp_dist, without Ray."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from aisp_dist.bench import command
from aisp_dist.bench.command import positive, several
from jobs import cli, settings

ABOUT = {
    "coordinator": "what a round costs the coordinator, with generators and scorers that answer at once",
    "simulate": "utilisation of a large cluster: the real coordinator on a virtual clock",
}


def main(args: Sequence[str]) -> int:
    parse = settings.parser("bench", cli.VERBS["bench"], config=False)
    known = command.ABOUT | ABOUT
    about = "; ".join(f"{what}: {text}" for what, text in known.items())
    parse.add_argument("what", choices=known, help=f"{about}. `aisp bench WHAT --help` lists its flags")
    what = parse.parse_args(args[:1]).what
    if what not in ABOUT:
        return command.run(what, args[1:])
    options = parser(what).parse_args(args[1:])
    load = os.getloadavg()[0]
    with contextlib.redirect_stdout(sys.stderr):
        module = importlib.import_module("tests.bench.rounds" if what == "coordinator" else "tests.bench.simulation")
        result: dict[str, Any] = module.measure(options)
    print(json.dumps({"bench": what, "load_average_before": load, **result}, indent=2))
    return 0 if result["agrees"] else 1


def parser(what: str) -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(f"aisp bench {what}", description=ABOUT[what], allow_abbrev=False)

    def add(flag: str, kind: Callable[[str], Any], default: Any, about: str) -> None:
        parse.add_argument(flag, type=kind, default=default, metavar="X", help=f"{about} ({default})")

    if what == "coordinator":
        add("--rounds", positive, 2000, "rounds in all")
        add("--replicas", positive, 2, "generators, and scorers")
    else:
        add("--gpus", several(positive), [16], "of generators and scorers together")
        add("--ratio", several(_ratio), [0.5], "generators : scorers, as 1:1")
        add("--shards", several(positive), [1], "coordinators")
        add("--prompts", positive, 400, "with the most GPUs; with fewer in proportion")
        add("--coordinator", _share, 0.005, "CPU seconds of the coordinator in a round, as `bench coordinator` says")
        add("--batch-rows", positive, 256, "rows of a generator")
        add("--spread", _share, 0.5, "responses are uniform between (1 - spread) x new tokens and new tokens")
        add("--deaths", _share, 0.0, "of a replica in an hour")
        add("--stalls", _share, 0.1, "share of the deaths that only hang")
        add("--queue", positive, 1, "requests that a scorer is given at a time")
        add("--startup", _share, 120.0, "seconds that a replica takes to start")
        add("--retries", positive, 3, "runtime.retries")
        add("--bundle", positive, 8, "rows that are simulated as one")
        add("--bandwidth", float, 4.3e12, "bytes/s of a GPU, an H200's")
        add("--flops", float, 7.9e14, "FLOP/s of a GPU, an H200's in bf16")
        add("--seed", int, 0, "of lengths and faults")
    add("--samples", positive, 32, "trajectories of a round")
    add("--iterations", positive, 32, "rounds of a prompt")
    add("--prompt-tokens", positive, 500, "tokens of a prompt")
    add("--new-tokens", positive, 128, "tokens of a response, at most")
    return parse


def _share(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return float(text)


def _ratio(text: str) -> float:
    """The generators' share of the GPUs."""
    generators, _, scorers = text.partition(":")
    return positive(generators) / (positive(generators) + positive(scorers))


if __name__ == "__main__":
    cli.run("bench")
