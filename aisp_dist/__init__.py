"""Relabel prompts with a frozen language model that a reward model steers at test time. Knows nothing of Ray.

    import aisp_dist

    for row in aisp_dist.relabel("run.yaml"):
        print(row["prompt"], row["completion"], row["reward"])

    run = {"generator": {"model": "demo"}, "rewards": {"helpful": {"kind": "model", "model": "demo"}}}
    run["method"] = {"kind": "best_of_n", "num_samples": 8, "num_iterations": 1}
    rows = list(aisp_dist.relabel(run, prompts=["How do I save money?", "What is a bicycle for?"]))

A row is a dict with the columns of the output table and `reason`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aisp_dist.config import Run

__all__ = ["relabel"]


def relabel(
    config: str | PathLike[str] | Mapping[str, Any] | Run,
    prompts: Iterable[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Relabel prompts in this process; yields one row for every prompt, in input order.

    config: path of a YAML file, a mapping with its keys, or a Run. `output`, `save`, `guard` and `runtime` have no
    effect: nothing is written, and everything runs here, on the first GPU or else on one CPU thread.
    prompts: taken in place of `prompts.source`, all of them and in this order: texts, lists of messages (dicts with
    role and content), or dicts with the columns that `prompts.column`, `id_column` and `keep` name. An iterator is
    read to its end first.

    A row is a dict with the columns of data/, the same values as `aisp align` writes, and `reason`: None for a prompt
    that is done. A prompt that fails has its row too: `completion` and the other results are None, and `reason` says
    why. The models stay loaded, and at most a window of prompts (about twice what fills `generator.batch_rows`) in
    memory, until the generator ends or is closed; Python closes it before it exits.

    Raises ConfigError for a configuration, a model or a function that cannot be used, and whatever stops the engine
    or a reward's server: that is no prompt's fault, so it is no row.
    """
    from aisp_dist import local

    return local.relabel(config, prompts)
