"""`aisp validate CONFIG`: what can be checked without loading a model: keys, values, files, columns, functions, and the
first input lines, read as `aisp align` reads them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

from aisp_dist.analysis import arms
from aisp_dist.config import ConfigError, HttpReward, Prompts, Run, as_published
from aisp_dist.config.rewards import Server
from aisp_dist.data import prompts
from aisp_dist.output import schema
from aisp_dist.records import BadInput
from jobs import cli, prepare, settings

_LINES = 1000  # input lines that are read
_SHOWN = 5  # of the bad ones


def main(args: Sequence[str]) -> int:
    _, run, base_dir = settings.read(settings.parser("validate", cli.VERBS["validate"]), args)
    told = [*_inputs(prepare.check(run, base_dir).prompts), *_keys(run)]
    for case in settings.cases(run).values():
        arms.arms(case)
        prepare.check(case, base_dir)
    method = run.method
    print(
        f"valid: {method.name}{' as published' * as_published(method)} with {method.num_samples} x "
        f"{method.num_iterations} samples a prompt, from {run.prompts.source} to {run.output}, rewards "
        f"{', '.join(run.rewards)}"
    )
    print(*told, sep="\n", end="\n" if told else "")
    return 0


def _inputs(settings: Prompts) -> list[str]:
    """What to say of the first input lines: that there are none, or which will become failed rows. Raises ConfigError
    where all of them will."""
    read = [(where, schema.writable(line)) for where, line in islice(prompts.located(settings), _LINES)]
    if not read:
        return [f"but {settings.source} has no inputs, so the table will have no rows"]
    bad = [f"{where}: {line.reason}" for where, line in read if isinstance(line, BadInput)]
    if bad and len(bad) == len(read):
        raise ConfigError(
            f"prompts: none of the first {len(read)} inputs of {settings.source!r} can be used: "
            + "; ".join(bad[:_SHOWN])
        )
    if not bad:
        return []
    more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return [f"{len(bad)} of the first {len(read)} inputs will become failed rows:", *bad[:_SHOWN], *more]


def _keys(run: Run) -> list[str]:
    """Variables with API keys that are not set here; the run may start where they are."""
    servers: dict[str, Server] = {f"rewards.{n}": r for n, r in run.rewards.items() if isinstance(r, HttpReward)}
    if run.generator.endpoint is not None:
        servers["generator.endpoint"] = run.generator.endpoint
    named = {key: server.api_key_env for key, server in servers.items() if server.api_key_env}
    return [
        f"but {variable}, which {key}.api_key_env names, is not set here; export it where the run starts"
        for key, variable in named.items()
        if not os.environ.get(variable)
    ]


if __name__ == "__main__":
    cli.run("validate")
