"""A reward model's scorer beside transformers' own forward pass over the whole padded batch.

    python -m tests.bench.score

`first` scores responses to a prompt that the scorer has not met; `next` scores further responses to a known prompt, as
in the later iterations of a search.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from aisp_dist.bench import paired
from aisp_dist.config import ModelReward
from aisp_dist.records import Prompt
from aisp_dist.rewards import model
from jobs.bench import positive
from tests.bench import checkpoints, command

AGREE = 1e-3  # largest difference of a reward in fp32


def main(args: Sequence[str] | None = None) -> int:
    return command.run(parser(), measure, args)


def parser() -> argparse.ArgumentParser:
    parse = command.parser("score", __doc__)
    command.model_flags(parse, "llama:512/8/16k", prompt_tokens=512, samples=32)
    parse.add_argument("--batch-rows", type=positive, metavar="N", help="rows of a batch; room for all samples")
    return parse


def measure(options: Namespace) -> dict[str, Any]:
    device, machine = paired.place(options.device, options.threads)
    longest = options.prompt_tokens + options.new_tokens + 64
    with tempfile.TemporaryDirectory() as folder:
        where = checkpoints.save(Path(folder), options.shape, longest, getattr(torch, options.dtype), classifier=True)
        rows = options.batch_rows or options.samples
        settings = ModelReward(model=where, dtype=options.dtype, max_tokens=longest, batch_rows=rows)
        ours = model.load("bench", settings, str(device))
        twin = AutoModelForSequenceClassification.from_pretrained(where, dtype=options.dtype).to(device).eval()
    tokenizer = checkpoints.tokenizer(options.shape)
    twin.config.pad_token_id = tokenizer.pad_token_id

    def texts(seed: int, count: int, length: int) -> list[str]:
        ids = torch.randint(len(tokenizer), (count, length), generator=torch.Generator().manual_seed(seed))
        return [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]

    def work(repetition: int, known: bool) -> tuple[Prompt, list[str]]:
        seed = 4 * repetition + 2 * known
        (prompt,) = texts(seed, 1, options.prompt_tokens)
        return Prompt(prompt, 0, prompt), texts(seed + 1, options.samples, options.new_tokens)

    def score(repetition: int, known: bool) -> Callable[[], Any]:
        prompt, responses = work(repetition, known)
        if known:
            ours(prompt, texts(-1 - repetition, options.samples, options.new_tokens))
        return lambda: [score.value for score in ours(prompt, responses)]

    def full(repetition: int, known: bool = False) -> Callable[[], list[float]]:
        return partial(forward, twin, tokenizer, *work(repetition, known))

    score(options.repeat, known=True)  # warms up
    contenders: dict[str, paired.Prepare] = {"first": partial(score, known=False), "full": full}
    runs = paired.alternate(contenders | {"next": partial(score, known=True)}, options.repeat, device)
    expected = {
        "first": [run.answer for run in runs["full"]],
        "next": [full(repetition, known=True)() for repetition in range(options.repeat)],
    }
    result: dict[str, Any] = {"full": {"seconds": paired.spread([run.seconds for run in runs["full"]])}}
    for part, rewards in expected.items():
        found = [run.answer for run in runs[part]]
        result[part] = {
            "seconds": paired.spread([run.seconds for run in runs[part]]),
            **paired.ratios(runs["full"], runs[part]),
            "max_difference": max(
                abs(a - b) for x, y in zip(found, rewards, strict=True) for a, b in zip(x, y, strict=True)
            ),
        }
    result["reward_range"] = max(map(max, expected["first"])) - min(map(min, expected["first"]))
    agrees = options.dtype != "float32" or all(result[part]["max_difference"] <= AGREE for part in expected)
    sizes = {n: getattr(options, n) for n in ("dtype", "prompt_tokens", "new_tokens", "samples")}
    return {**machine, "model": options.shape, **sizes, "agrees": agrees, **result}


@torch.inference_mode()
def forward(twin: Any, tokenizer: Any, prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """Scores of all responses in one batch, padded on the right."""
    chats = [[{"role": "user", "content": prompt.content}, {"role": "assistant", "content": r}] for r in responses]
    batch = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    logits: list[float] = twin(**batch.to(twin.device)).logits[:, 0].float().tolist()
    return logits


if __name__ == "__main__":
    sys.exit(main())
