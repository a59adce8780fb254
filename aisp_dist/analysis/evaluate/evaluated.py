"""What evaluation asks of outputs beyond reading them: that several are one run with different seeds, that the base
model's files are still those of the run, and the search of a sampled row as a round of the engine. No torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aisp_dist.analysis import outputs
from aisp_dist.analysis.outputs import Columns, Output, Row
from aisp_dist.config import ConfigError, Generator
from aisp_dist.engine import checkpoints
from aisp_dist.output import manifest
from aisp_dist.records import Round, TopP, Weights

_TRACE = [f"trace.list.element.{name}" for name in ("weights", "lengths", "sigma2", "top_p", "given")]
_CANDIDATE = [f"candidates.list.element.{name}" for name in ("iteration", "sample", "token_ids")]


def check(runs: Sequence[Output]) -> None:
    """Raise ConfigError unless the outputs are of one run with different seeds."""
    first = dict(runs[0].record["components"], seed=None)
    for other in runs[1:]:
        if keys := manifest.differing_keys(first, dict(other.record["components"], seed=None)):
            raise ConfigError(
                f"{other} is not {runs[0]} with another seed: they differ in {', '.join(keys)} (another method "
                "goes into --against)"
            )
    seeds = Counter(output.run.seed for output in runs)
    if repeated := [str(seed) for seed, times in seeds.items() if times > 1]:
        raise ConfigError(f"seed {', '.join(repeated)}: two of the outputs have it; give each seed once")


def rows(columns: Columns, ids: Sequence[str]) -> list[Row]:
    """Whole rows of data/ in the order of ids, with `trace` (empty if not kept) and `tokens`, the ids of the selected
    answer's tokens (None if not kept)."""
    searches = {row["source_index"]: row for row in outputs.rows(columns, ids, [*_CANDIDATE, *_TRACE], "candidates")}
    found = []
    for row in outputs.rows(columns, ids):
        kept = searches.get(row["source_index"], {"candidates": [], "trace": []})
        best = row["best_iteration"], row["best_sample"]
        tokens = (c["token_ids"] for c in kept["candidates"] if (c["iteration"], c["sample"]) == best)
        found.append(row | {"trace": kept["trace"], "tokens": next(tokens, None)})
    return found


def last_round(output: Output, row: Row, prompt_tokens: tuple[int, ...]) -> Round:
    """The search of a row after its last iteration; without trace where the output keeps none."""
    trace = tuple(Weights(*(tuple(step[n]) for n in ("weights", "lengths"))) for step in row["trace"])
    trace = trace if any(entry.weights for entry in trace) else ()
    sampling, _ = output.run.method.draws()
    if row["trace"]:  # a flip rate was turned into numbers for each prompt
        step = row["trace"][0]
        sampling = replace(sampling, sigma2=step["sigma2"])
        if sampling.decode is None and step["top_p"] is not None:
            sampling = replace(sampling, decode=TopP(step["top_p"], 1.0))
    return Round(output.run.seed, row["id"], prompt_tokens, len(trace), 0, 1, sampling, trace)


def generator(output: Output) -> Generator:
    """The base model's section with paths that can be opened. Raises ConfigError unless the files there are those that
    the run read."""
    settings, digests = output.run.generator, output.record["components"]["digests"]
    known = ("generator", settings.model) in checkpoints.EMBEDDED
    near = Path(output.record["directory"], settings.model)  # relative to where the run was started
    name = str(near) if not known and near.exists() else settings.model
    place = checkpoints.locate("generator.model", name, "generator")
    now = {"generator.model": checkpoints.digest("generator.model", place, settings.revision)}
    adapter = settings.adapter and str(Path(output.record["directory"], Path(settings.adapter).expanduser()))
    adapter = checkpoints.locate_adapter(settings.model_copy(update={"adapter": adapter}))
    if adapter:
        now["generator.adapter"] = checkpoints.adapter_digest(adapter)
    template = settings.chat_template and Path(output.record["base_dir"], settings.chat_template)
    if template:
        found = template.read_bytes() if template.is_file() else b""
        now["generator.chat_template"] = hashlib.blake2b(found, digest_size=16).hexdigest()
    if changed := [f"{key} (now {now[key]}, then {digests.get(key)})" for key in now if now[key] != digests.get(key)]:
        raise ConfigError(
            f"{output} was made with other files than are there now: {', '.join(changed)}; put those back, or give "
            "--no-model"
        )
    return settings.model_copy(update={"model": place, "adapter": adapter, "chat_template": template and str(template)})
