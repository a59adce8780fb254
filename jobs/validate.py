"""`aisp validate CONFIG`: what can be checked without loading a model: keys, values, files, columns, functions."""

from __future__ import annotations

from collections.abc import Sequence

from aisp_dist.analysis import arms
from jobs import cli, prepare, settings


def main(args: Sequence[str]) -> int:
    _, run, base_dir = settings.read(settings.parser("validate", cli.VERBS["validate"]), args)
    prepare.check(run, base_dir)
    for case in settings.cases(run).values():
        arms.arms(case)
        prepare.check(case, base_dir)
    method = run.method
    print(
        f"valid: {method.kind} with {method.num_samples} x {method.num_iterations} samples a prompt, from "
        f"{run.prompts.source} to {run.output}, rewards {', '.join(run.rewards)}"
    )
    return 0


if __name__ == "__main__":
    cli.run("validate")
