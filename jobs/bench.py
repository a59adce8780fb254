"""`aisp bench decode | score | pipeline`: how fast, beside peers in the same run. One JSON document on stdout."""

from __future__ import annotations

from collections.abc import Sequence

from aisp_dist.bench import command
from jobs import cli, settings


def main(args: Sequence[str]) -> int:
    parse = settings.parser("bench", cli.VERBS["bench"], config=False)
    about = "; ".join(f"{what}: {text}" for what, text in command.ABOUT.items())
    parse.add_argument("what", choices=command.ABOUT, help=f"{about}. `aisp bench WHAT --help` lists its flags")
    return command.run(parse.parse_args(args[:1]).what, args[1:])


if __name__ == "__main__":
    cli.run("bench")
