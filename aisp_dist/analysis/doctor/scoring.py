"""A reward against itself and, if it is a model, against transformers: whether a score is that of its text alone, read
whole, and says what a human would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from aisp_dist.analysis.doctor import Check, allowed, free, judge, own_model
from aisp_dist.config import ModelReward, Reward
from aisp_dist.data.chat import encode_chat
from aisp_dist.engine import checkpoints
from aisp_dist.records import Prompt
from aisp_dist.rewards import RewardError, RewardFn, model
from aisp_dist.rewards.client import Unavailable
from aisp_dist.rewards.self_test import PAIRS, Defect, bos_counts, bos_wanted

Request = tuple[Prompt, list[str]]

_BATCH = 8  # rows that transformers scores together
_ENOUGH = 9  # pairs


def check(
    name: str, settings: Reward, place: torch.device, load: Callable[[Reward], RewardFn], requests: Sequence[Request]
) -> Iterator[Check]:
    """Every check of a reward. Of a function it is whether it repeats itself."""
    is_model = isinstance(settings, ModelReward)
    pairs = [(Prompt(question, 0, question), list(answers)) for question, *answers in PAIRS]
    asked = [*requests, *pairs] if is_model else [*requests[:2]]
    try:
        score = load(settings)
    except Defect as error:
        yield Check(f"{name} self-test", "FAILED", str(error), "`aisp align` would refuse to run")
        score = load(settings.model_copy(update={"self_test": False}))
    try:
        scores = [score(*request) for request in asked]
        turn = -1 if is_model else 1  # after other requests, and turned round
        again = [score(prompt, responses[::turn])[::turn] for prompt, responses in asked[::turn]][::turn]
        singly = [score(prompt, [response]) for prompt, responses in asked * is_model for response in responses]
    except (RewardError, Unavailable) as error:
        yield Check(f"{name} scores", "FAILED", str(error), "Such prompts would become failed rows")
        return
    del score
    free()
    flat = [found for answer in scores for found in answer]
    if reasons := [found.reason for found in flat if found.reason]:
        figure = f"{len(reasons)} of {len(flat)} responses get none: {reasons[0]}"
        yield Check(f"{name} scores", "FAILED", figure, "Such candidates would be quarantined")
        return
    different = sum(a != b for a, b in zip(scores, again, strict=True))
    figure = f"{different} of {len(asked)} requests have other bits a second time" + " and in other order" * is_model
    advice = "The same run would not give the same rows" + " (of functions that is not promised)" * (not is_model)
    yield judge(f"{name} repetition", not different, figure, advice, "FAILED" if is_model else "note")
    if isinstance(settings, ModelReward):
        values = [found.value or 0.0 for found in flat]
        goods, bads = values[-2 * len(pairs) :: 2], values[1 - 2 * len(pairs) :: 2]
        better = sum(good > bad for good, bad in zip(goods, bads, strict=True))
        figure = f"{better} of {len(pairs)} plain questions: the good answer above the bad one"
        advice = "It may be trained for something else; look at what it prefers before it selects"
        yield judge(f"{name} pairs", better >= _ENOUGH, figure, advice, "note")
        texts = [(prompt, response) for prompt, responses in asked for response in responses]
        alone = [score.value or 0.0 for (score,) in singly]
        yield from against(name, settings, place, texts, {"whole requests": values, "single responses": alone})


def against(
    name: str,
    settings: ModelReward,
    place: torch.device,
    texts: Sequence[tuple[Prompt, str]],
    ours: Mapping[str, Sequence[float]],
) -> Iterator[Check]:
    """Holds our scores of texts against another copy of the model, run by transformers alone on one whole text without
    padding; and that against another way of its own, padded batches through eager attention."""
    where = checkpoints.locate(f"rewards.{name}.model", settings.model, "reward")
    source = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    tokenizer = model.template(AutoTokenizer.from_pretrained(where, **source), settings)
    heads = {"num_labels": 1, "key_mapping": model.HEADS}
    own = own_model(AutoModelForSequenceClassification, where, settings, place, **heads)
    chats = [model.chat(settings, prompt, response) for prompt, response in texts]
    whole = settings.self_test
    rows = [encode_chat(tokenizer, chat, {}, add_generation_prompt=False, fix="", whole=whole) for chat in chats]
    positions = getattr(own.config.get_text_config(), "max_position_embeddings", None)
    longest = min(settings.max_tokens, positions or settings.max_tokens)
    yield written(name, tokenizer, rows, longest)
    fit = [at for at, row in enumerate(rows) if len(row) <= longest]
    expected = [logit for at in fit for logit in forward(own, [rows[at]])]
    if own._can_set_attn_implementation():
        own.set_attn_implementation("eager")
    batches = (fit[i : i + _BATCH] for i in range(0, len(fit), _BATCH))
    padded = [logit for batch in batches for logit in forward(own, [rows[at] for at in batch])]
    spread = _distance(padded, expected)
    bound = allowed(spread, own.dtype, max(map(abs, expected), default=0.0))
    for what, values in ours.items():
        far = _distance([values[at] for at in fit], expected)
        figure = f"|dr| up to {far:.2g} in {len(fit)} texts, {bound:.2g} allowed, transformers' two ways {spread:.2g}"
        advice = "Scores depend on padding, on a prefix computed apart or on company, so they are wrong: report this"
        yield judge(f"{name} {what}", far <= bound, figure, advice)


def written(name: str, tokenizer: Any, rows: Sequence[list[int]], longest: int) -> Check:
    """What the model is given to read: BOS once if its tokenizer wants one, and what is cut."""
    cut, counts = sum(len(row) > longest for row in rows), bos_counts(tokenizer, rows)
    figure = f"{' or '.join(map(str, sorted(counts)))} BOS in front, up to {max(map(len, rows))} tokens, {longest} fit"
    figure += f", {cut} of {len(rows)} lose the left of their prompt" * bool(cut)
    figure += ", EOS is its padding too" * (tokenizer.pad_token_id in {tokenizer.eos_token_id} - {None})
    return judge(
        f"{name} input",
        counts <= bos_wanted(tokenizer),
        figure,
        "Its chat template must write BOS once: mend that file",
    )


@torch.inference_mode()
def forward(own: Any, rows: Sequence[list[int]]) -> list[float]:
    """Logits of rows padded to the longest with a token that none of them has, so that no padding is read as text."""
    used, width = {token for row in rows for token in row}, max(map(len, rows))
    pad = next((i for i in range(own.get_input_embeddings().num_embeddings) if i not in used), None)
    own.config.pad_token_id = own.config.get_text_config().pad_token_id = pad
    ids = [row + [pad or 0] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    ids_BT, mask_BT = (torch.tensor(x, device=own.device) for x in (ids, mask))
    logits: list[float] = own(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float().tolist()
    return logits


def _distance(values: Sequence[float], expected: Sequence[float]) -> float:
    return max((abs(a - b) for a, b in zip(values, expected, strict=True)), default=0.0)
