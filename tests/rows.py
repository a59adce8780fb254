"""Made-up inputs and results for the tests of the store: a pure function of the ordinal, so that a row computed twice
is the same row. Awkward on purpose: quarantined rewards, rows that fail, unicode, nulls, floats with all digits."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np

from aisp_dist.output.filesystem import Place
from aisp_dist.output.writer import Store
from aisp_dist.records import BadInput, Candidate, Done, Failed, Input, Iteration, Prompt, Result

COLUMNS = {"answer": "string", "grade": "int64", "extra": "json", "kept_as_json": "misfits"}
RECORD = {"fingerprint": "f" * 8, "run_id": "f" * 4, "rows_per_file": 4, "components": {}, "config": {"output": "o"}}
NUM_SAMPLES, NUM_ITERATIONS = 3, 2


def prompt(ordinal: int, kind: str = "chat", version: str = "") -> Input:
    text = f"Question {ordinal}{version}: é 世界 \n?"
    digest = f"digest-{ordinal}{version}"
    if ordinal % 7 == 5:
        return BadInput(f"file.jsonl:{ordinal}", ordinal, "line is not JSON", text[:9], (), digest)
    columns = (("answer", None if ordinal % 2 else f"a{ordinal}"), ("grade", ordinal), ("extra", {"k": [ordinal]}))
    content = (("system", "Be brief."), ("user", text)) if kind == "chat" else text
    return Prompt(f"id-{ordinal}", ordinal, content, columns, digest)


def prompts(count: int, kind: str = "chat") -> list[Input]:
    return [prompt(ordinal, kind) for ordinal in range(count)]


def result(line: Input, fails: bool | None = None) -> Result:
    """The result of an input; every eleventh prompt fails unless told otherwise."""
    if isinstance(line, BadInput):
        return Failed(line, line.reason)
    if line.source_index % 11 == 3 if fails is None else fails:
        return Failed(line, "no candidate has a finite reward")
    rng = random.Random(line.source_index)
    candidates = [
        Candidate(
            iteration=k,
            sample=i,
            text=f"answer {k}.{i} of {line.source_index}",
            token_ids=tuple(rng.randrange(50_000) for _ in range(4)),
            finish_reason="stop" if i else "length",
            reward=None if (line.source_index + k + i) % 5 == 1 else rng.gauss(0, 1),
            rewards=(("main", rng.gauss(0, 1)), ("words", None)),
            reason="reward main is NaN" if (line.source_index + k + i) % 5 == 1 else None,
        )
        for k in range(NUM_ITERATIONS)
        for i in range(NUM_SAMPLES)
    ]
    curve, trace = [], []
    for k in range(NUM_ITERATIONS):
        seen = [c.reward for c in candidates if c.iteration <= k and c.reward is not None]
        curve.append(max(seen))
        weights = tuple(float(np.float32(w)) for w in (0.1, 0.7, 0.2))
        trace.append(Iteration(weights, (4, 4, 4), 1.9, 0.1 * k, sum(seen) / len(seen), max(seen)))
    best = max((c for c in candidates if c.reward is not None), key=lambda c: c.reward)
    base = Candidate(-1, 0, "base", (1, 2), "stop", None if line.source_index % 4 == 2 else 0.25, (("main", 0.25),))
    return Done(
        prompt=line,
        prompt_tokens=9,
        best=best,
        base=base,
        nll=1 / 3,
        base_nll=0.5,
        samples_spent=len(candidates),
        quarantined=sum(c.reward is None for c in candidates),
        curve=tuple(curve),
        candidates=tuple(candidates),
        trace=tuple(trace),
    )


def at(root: Path | Place) -> Place:
    return root if isinstance(root, Place) else Place.at(root)


def store(root: Path | Place, rows_per_file: int = 4, **changes: Any) -> Store:
    settings = dict(
        kind="chat",
        columns=COLUMNS,
        fingerprint="f" * 8,
        run_id="f" * 4,
        model="demo",
        candidates=(1, 1),
        trace=True,
        still_owner=lambda: True,
    )
    return Store(at(root), rows_per_file, **(settings | changes))


def write(root: Path | Place, inputs: list[Input], rows_per_file: int = 4, **changes: Any) -> Path | Place:
    """A whole run, undisturbed."""
    rows = store(root, rows_per_file, **changes)
    for line in rows.plan(inputs):
        rows.add(result(line))
    rows.finish()
    return root


def tables(root: Path | Place) -> dict[str, bytes]:
    """All that a run has committed, by relative path."""
    place = at(root)
    names = [f"{table}/{name}" for table in ("data", "failed", "candidates") for name in place.names(table)]
    return {name: place.read(name) for name in names}


def run(root, inputs, answer=result, retry=False, order=None, flush_every=3, durable=None, **settings):
    """A run as a coordinator does it; `durable` collects the ordinals that a completed flush has taken over. Returns
    the ordinals that it computed."""
    rows = store(root, **settings)
    computed, pending = [], []

    def flush():
        rows.flush()
        if durable is not None:
            durable.update(pending)

    plan = rows.plan(inputs, retry)
    while chunk := list(itertools.islice(plan, 5)):
        for line in order(chunk) if order else chunk:
            rows.add(answer(line))
            computed.append(line.source_index)
            pending.append(line.source_index)
            if len(pending) % flush_every == 0:
                flush()
    rows.finish()
    return computed


def changed(ordinal, count=10):
    return [prompt(n, version=" changed" if n == ordinal else "") for n in range(count)]
