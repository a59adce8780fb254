"""`aisp validate CONFIG`: what can be checked without loading a model: keys, values, files, columns, functions, and the
first input lines, read as `aisp align` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from aisp_dist.analysis import arms
from aisp_dist.config import ConfigError, Prompts, as_published
from aisp_dist.data import prompts
from aisp_dist.output import schema
from aisp_dist.records import BadInput
from jobs import cli, prepare, settings

_LINES = 1000  # input lines that are read
_SHOWN = 5  # of the bad ones


def main(args: Sequence[str]) -> int:
    _, run, base_dir = settings.read(settings.parser("validate", cli.VERBS["validate"]), args)
    told = _bad_lines(prepare.check(run, base_dir).prompts)
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


def _bad_lines(settings: Prompts) -> list[str]:
    """What to say of the first input lines that will become failed rows. Raises ConfigError where all of them will."""
    read = [(where, schema.writable(line)) for where, line in islice(prompts.located(settings), _LINES)]
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


if __name__ == "__main__":
    cli.run("validate")
