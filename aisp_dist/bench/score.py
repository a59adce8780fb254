"""A reward model's scorer beside transformers' own forward over the whole padded batch. `first`: a prompt that it has
not met; `next`: further responses to a known one, as in the later iterations of a search."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aisp_dist.bench import command, paired, shapes
from aisp_dist.config import ConfigError, ModelReward
from aisp_dist.records import Prompt
from aisp_dist.rewards import model

AGREE = 1e-3  # |dr| in fp32


def measure(options: Namespace) -> dict[str, Any]:
    device, machine = paired.place(options.device, options.threads)
    name, dtype = options.dtype or "float32", getattr(torch, options.dtype or "float32")
    if options.model and options.shape:
        raise ConfigError("--model excludes --shape; leave one out")
    with tempfile.TemporaryDirectory() as folder:
        shape, most = options.shape or "llama:512/8/16k", options.prompt_tokens + options.new_tokens + 64
        where = options.model or shapes.save(Path(folder), shapes.parse(shape), most, dtype, classifier=True)
        rows = options.batch_rows or options.samples
        ours = model.load("bench", ModelReward(model=where, dtype=name, max_tokens=most, batch_rows=rows), str(device))
        twin = AutoModelForSequenceClassification.from_pretrained(where, num_labels=1, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)

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
        return partial(_full, twin, tokenizer, *work(repetition, known))

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
    agrees = name != "float32" or all(result[part]["max_difference"] <= AGREE for part in expected)
    sizes = {n: getattr(options, n) for n in ("prompt_tokens", "new_tokens", "samples")}
    return {**machine, "model": options.model or shape, "dtype": name, **sizes, "agrees": agrees, **result}


@torch.inference_mode()
def _full(model: Any, tokenizer: Any, prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """Scores of all responses in one batch, padded on the right with a token that none of them holds: transformers
    reads a score at the last token that is not the padding."""
    chats = [[{"role": "user", "content": prompt.content}, {"role": "assistant", "content": r}] for r in responses]
    ids = tokenizer.apply_chat_template(chats, return_dict=False)
    pad = min(set(range(model.config.vocab_size)) - {token for row in ids for token in row})
    model.config.pad_token_id = pad
    width = max(map(len, ids))
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in ids], device=model.device)
    scores: list[float] = model(padded, attention_mask=(padded != pad).long()).logits[:, 0].float().tolist()
    return scores


if __name__ == "__main__":
    command.main("score")
