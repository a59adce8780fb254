"""Measures of the demo models: rendering, greedy and sampled answers, rewards, and the figures of card.json. recipe.py
trains the models; tests/test_demo.py measures them again.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from random import Random
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tests.demo_recipe import domain
from tests.demo_recipe.domain import Pair, Question, Split, Voice

CLEAR = 3.0  # a difference in quality (of nine points) that makes one answer clearly better
GAPS = (1.0, 2.0, CLEAR, 4.0, math.inf)  # bounds of the differences in quality by which accuracy is reported


def render(tok: PreTrainedTokenizerFast, question: str, answer: str | None, system: str = "") -> list[int]:
    """Token ids of one exchange; without an answer, those before it."""
    head = [{"role": "system", "content": system}] if system else []
    tail = [] if answer is None else [{"role": "assistant", "content": answer}]
    messages = [*head, {"role": "user", "content": question}, *tail]
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    return list(tok.encode(text, add_special_tokens=False))


def pad(rows: list[list[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [rows, longest row]."""
    longest = max(map(len, rows))
    fillers = [[fill] * (longest - len(row)) for row in rows]
    ids = torch.tensor([f + row if left else row + f for row, f in zip(rows, fillers, strict=True)])
    marks = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f) for row, f in
             zip(rows, fillers, strict=True)]  # fmt: skip
    return ids, torch.tensor(marks)


def draw_question(rng: Random, *splits: Split, voice: Voice = "all") -> Question:
    return domain.question(rng, *rng.choice(domain.combinations(*splits)), voice)


def answer_loss(model: LlamaForCausalLM, rows: list[list[int]], starts: list[int], fill: int) -> Tensor:
    """Mean negative log-likelihood, in nats per token, of the tokens from each row's start on."""
    ids, mask = pad(rows, fill)
    answered = mask.bool() & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
    hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
    return F.cross_entropy(model.lm_head(hidden[answered[:, 1:]]), ids[:, 1:][answered[:, 1:]])


@torch.inference_mode()
def write(
    base: LlamaForCausalLM, tok: PreTrainedTokenizerFast, questions: list[str], temperature: float, limit: int = 80
) -> list[str]:
    """The base model's answers: greedy at temperature 0, otherwise sampled from torch's global generator."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    texts: list[str] = []
    for i in range(0, len(questions), 96):
        ids, mask = pad([render(tok, q, None) for q in questions[i : i + 96]], tok.pad_token_id, left=True)
        out = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, **sampling)
        texts += tok.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


@torch.inference_mode()
def score(
    model: LlamaForSequenceClassification, tok: PreTrainedTokenizerFast, texts: list[tuple[str, str]]
) -> list[float]:
    """Rewards of (question, answer) texts, in input order."""
    rows = [render(tok, question, answer) for question, answer in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = [0.0] * len(rows)
    for i in range(0, len(order), 128):
        ids, mask = pad([rows[j] for j in order[i : i + 128]], tok.pad_token_id)
        for j, value in zip(order[i : i + 128], model(input_ids=ids, attention_mask=mask).logits[:, 0], strict=True):
            found[j] = float(value)
    return found


def held_out_pairs(seed: int, count: int) -> list[Pair]:
    rng = Random(f"{seed}/held out")
    return [domain.pair(rng, draw_question(rng, "held_out")) for _ in range(count)]


def measure_reward(
    model: LlamaForSequenceClassification, tok: PreTrainedTokenizerFast, pairs: list[Pair], seed: int
) -> dict[str, Any]:
    """Accuracy on pairs with a clear gap in quality, on all pairs and by gap, and mean rewards of answers whose quality
    is known."""
    better = score(model, tok, [(p.question.text, p.better) for p in pairs])
    worse = score(model, tok, [(p.question.text, p.worse) for p in pairs])

    def accuracy(low: float, high: float) -> float | None:
        won = [b > w for p, b, w in zip(pairs, better, worse, strict=True) if low <= p.gap < high]
        return round(sum(won) / len(won), 4) if won else None

    means = {"better of a pair": mean(better), "worse of a pair": mean(worse)}
    means |= {name: mean(score(model, tok, texts)) for name, texts in probes(pairs[:200], seed).items()}
    return {
        "accuracy": accuracy(CLEAR, math.inf),
        "accuracy_of_all": accuracy(0, math.inf),
        "accuracy_by_gap": {f"{low:g} to {high:g}": accuracy(low, high) for low, high in pairwise(GAPS)},
        "pairs": len(pairs),
        "mean_reward": {name: round(value, 2) for name, value in means.items()},
    }


def probes(pairs: list[Pair], seed: int) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) texts of known quality: one of each kind per pair."""
    rng = Random(f"{seed}/probes")
    found: dict[str, list[tuple[str, str]]] = {}
    for p in pairs:
        complete, elsewhere = domain.complete(rng, p.question), draw_question(rng, "held_out")
        while elsewhere.topic == p.question.topic:
            elsewhere = draw_question(rng, "held_out")
        sentence = rng.choice(re.split(r"(?<=[.!?]) ", complete.text))
        answers = {
            "complete": complete.text,
            "gibberish": domain.gibberish(rng, rng.randint(10, 40)),
            "repeated": " ".join([sentence] * rng.randint(3, 5)),
            "off topic": domain.complete(rng, elsewhere).text,
            "empty": "",
        }
        for name, text in answers.items():
            found.setdefault(name, []).append((p.question.text, text))
    return found


@torch.inference_mode()
def perplexity(base: LlamaForCausalLM, tok: PreTrainedTokenizerFast, splits: tuple[Split, ...], seed: int) -> float:
    """Perplexity per token of answers (EOS included) to fresh questions of the splits."""
    rng = Random(f"{seed}/perplexity")
    total = tokens = 0.0
    for _ in range(4):
        asked = [draw_question(rng, *splits) for _ in range(64)]
        rows = [render(tok, q.text, domain.answer(rng, q).text) for q in asked]
        starts = [len(render(tok, q.text, None)) for q in asked]
        count = sum(map(len, rows)) - sum(starts)
        total += float(answer_loss(base, rows, starts, tok.pad_token_id)) * count
        tokens += count
    return round(math.exp(total / tokens), 3)
