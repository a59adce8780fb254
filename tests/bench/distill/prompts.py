"""Training prompts of the demo's domain, as JSON lines: `python -m tests.bench.distill.prompts FILE`.

The demo's base model has seen good and bad answers to these questions. The demo's own prompts (`source: demo`) ask for
other facts of the same topics, so students are measured on questions that no teacher relabelled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from tests.demo_recipe import domain


def main(file: str, count: int = 400, seed: int = 0) -> None:
    rng = Random(f"{seed}/distill")
    pairs = domain.combinations("first", "second")
    asked = dict.fromkeys(domain.question(rng, *pair).text for pair in rng.choices(pairs, k=2 * count))
    lines = [json.dumps({"id": f"train-{i:04d}", "prompt": text}) for i, text in enumerate(list(asked)[:count])]
    assert len(lines) == count, f"only {len(lines)} different questions"
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:2])
