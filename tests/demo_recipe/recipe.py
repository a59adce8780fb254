"""The recipe of the demo models: `python -m tests.demo_recipe.recipe --out DIR [--quick]` trains them again.

It trains the tokenizers, a causal language model on good and bad answers of the domain, and two Bradley-Terry reward
models on disjoint halves of its questions, and measures the figures of card.json on held-out questions. It knows no
search method: the models are trained once, on the quality that domain.py defines.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tests.demo_recipe import domain
from tests.demo_recipe.domain import Answer, Question, Split, Voice
from tests.demo_recipe.measure import (
    answer_loss,
    draw_question,
    held_out_pairs,
    measure_reward,
    pad,
    perplexity,
    render,
    write,
)

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>"]
# One header per message, EOS after each answer.
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The judge knows only questions and answers: it reads a system message as part of the question.
QUESTION_ANSWER = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '<|answer|>' + m['content'] | trim + eos_token }}"
    "{% else %}{{ '<|question|>' + m['content'] | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
)
Row = tuple[list[list[int]], list[float]]  # token ids of a question's exchanges, and the answers' grades
Written = tuple[list[tuple[Question, str]], list[tuple[Question, str]]]  # (question, answer): good ones, poor ones
SYSTEMS = ("You are a helpful assistant.", "Answer politely and give an example.", "You help people with daily life.")


@dataclass(frozen=True, slots=True)
class Shape:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True, slots=True)
class Training:
    steps: int
    batch: int  # answers; for a reward model, questions with all their answers
    lr: float


@dataclass(frozen=True, slots=True)
class Taste:
    """The source of a reward model's training data. doubt: annotators prefer the better of two answers with probability
    sigmoid(gap / doubt)."""

    split: Split
    voice: Voice
    doubt: float
    temperatures: tuple[float, ...]  # of the base model's answers in its data; the last two give poor answers


BASE_SHAPE = Shape(vocab=2048, hidden=160, layers=4, heads=4, kv_heads=2, mlp=448)
JUDGE_SHAPE = Shape(vocab=1536, hidden=128, layers=4, heads=4, kv_heads=4, mlp=352)
REWARD_TASTE = Taste("first", "early", 0.75, (0.7, 1.0, 1.4, 1.8))
JUDGE_TASTE = Taste("second", "late", 1.0, (0.8, 0.9, 1.3, 2.0))
PLANS = {
    "base": Training(600, 40, 3e-3),
    "reward_sentences": Training(600, 8, 1.5e-3),
    "reward": Training(450, 8, 1e-3),
    "reward_again": Training(500, 8, 1e-3),
    "judge_lm": Training(450, 32, 3e-3),
    "judge_sentences": Training(600, 8, 1.5e-3),
    "judge": Training(450, 8, 1e-3),
    "judge_again": Training(500, 8, 1e-3),
}


def make_tokenizer(texts: Iterator[str], vocab: int, roles: list[str], template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Encoding a plain text prepends BOS, as Llama's tokenizers do; the template writes BOS itself."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = [*SPECIAL, *(f"<|{role}|>" for role in roles)]
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bos = [("<|bos|>", bpe.token_to_id("<|bos|>"))]
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=bos
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>",
        extra_special_tokens=special[len(SPECIAL) :], model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tok.chat_template = template
    return tok


def config(shape: Shape, tok: PreTrainedTokenizerFast, **more: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tok), hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.mlp,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, **more,
    )  # fmt: skip


def in_length_order(draw: Callable[[], Row], rng: Random, batch: int) -> Iterator[list[Row]]:
    """Batches of draws of similar length, to save padding, in random order."""
    while True:
        pool = sorted((draw() for _ in range(16 * batch)), key=lambda row: max(map(len, row[0])))
        batches = [pool[i : i + batch] for i in range(0, len(pool), batch)]
        rng.shuffle(batches)
        yield from batches


def fit(model: torch.nn.Module, loss: Callable[[], Tensor], plan: Training, name: str) -> None:
    """Train with AdamW; the learning rate rises linearly for 5 % of the steps, then falls to 0 by a cosine."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    opt = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.95))
    warm = max(1, plan.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / plan.steps)))
    )
    model.train()
    mean, start = 0.0, time.perf_counter()
    for step in range(plan.steps):
        value = loss()
        opt.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        mean = value.item() if step == 0 else 0.97 * mean + 0.03 * value.item()
        if step % 50 == 0 or step == plan.steps - 1:
            print(f"{name} step {step}/{plan.steps} loss {mean:.3f} {time.perf_counter() - start:.0f} s", flush=True)
    # The files hold fp16, so the figures are measured with weights that were rounded to fp16.
    model.half().float().eval()


def train_lm(
    name: str, shape: Shape, tok: PreTrainedTokenizerFast, plan: Training, voice: Voice, seed: int
) -> LlamaForCausalLM:
    """Train a causal language model on good and bad answers to the questions that are not held out."""
    torch.manual_seed(seed)
    rng, fill = Random(f"{seed}/{name}"), tok.pad_token_id
    model = LlamaForCausalLM(config(shape, tok))

    def draw() -> Row:
        q = draw_question(rng, "first", "second", voice=voice)
        system = rng.choice(SYSTEMS) if rng.random() < 0.1 else ""
        text = domain.answer(rng, q, voice).text
        return [render(tok, q.text, text, system), render(tok, q.text, None, system)], []

    batches = in_length_order(draw, rng, plan.batch)

    def loss() -> Tensor:
        batch = [exchanges for exchanges, _ in next(batches)]
        return answer_loss(model, [full for full, _ in batch], [len(head) for _, head in batch], fill)

    fit(model, loss, plan, name)
    return model


def model_written(
    base: LlamaForCausalLM, tok: PreTrainedTokenizerFast, taste: Taste, count: int, limit: int, seed: int
) -> Written:
    """The base model's answers to questions of the taste's split: good ones (low temperature) and poor ones."""
    torch.manual_seed(seed)
    rng = Random(f"{seed}/written")
    sets: Written = ([], [])
    for i, temperature in enumerate(taste.temperatures):
        asked = [draw_question(rng, taste.split) for _ in range(count)]
        sets[i // 2].extend(zip(asked, write(base, tok, [q.text for q in asked], temperature, limit), strict=True))
    return sets


def draw_graded(rng: Random, taste: Taste, written: Written) -> tuple[Question, list[Answer]]:
    """A question and six graded answers: two of the domain; a third of the domain or one of the base model (grade 4.5
    if good, 0 if poor); damaged copies of two of these; and one that is off topic."""
    q, voice, share = draw_question(rng, taste.split, voice=taste.voice), taste.voice, rng.random()
    third = domain.answer(rng, q, voice, flawed=0.5)
    if share < 0.5:
        q, text = rng.choice(written[share < 0.2])
        third = Answer(text, 0.0 if share < 0.2 else 4.5)
    first = domain.complete(rng, q, voice) if rng.random() < 0.3 else domain.answer(rng, q, voice, flawed=0.5)
    second = domain.answer(rng, q, voice, flawed=0.5)
    topic = rng.choice([t for t, k in domain.combinations(taste.split) if k == q.kind and t != q.topic])
    stray = domain.answer(rng, domain.question(rng, topic, q.kind, voice), voice, flawed=0.0).text
    spoilt = [domain.damage(rng, a.text, a.quality, stray) for a in (rng.choice((first, second)), third)]
    return q, [first, second, third, *spoilt, Answer(stray, -1.5)]


def train_reward(
    name: str, shape: Shape, start: LlamaForCausalLM, tok: PreTrainedTokenizerFast, plans: dict[str, Training],
    taste: Taste, written: Written, seed: int,
) -> LlamaForSequenceClassification:  # fmt: skip
    """Train a Bradley-Terry model that starts from a language model's body, on all pairs of answers to a question: the
    cross-entropy of sigmoid(r_i - r_j) with the annotators' preference (Ouyang et al. 2022, eq. 1), plus a small
    penalty on the mean square of the rewards.

    Single sentences come first: they are cheap, and the model learns from them several times faster than from whole
    answers which facts belong to which topic. Whole answers follow in several stages, each with its own schedule."""
    torch.manual_seed(seed)
    fill = tok.pad_token_id
    model = LlamaForSequenceClassification(config(shape, tok, num_labels=1))
    model.model.load_state_dict(start.model.state_dict())

    def graded(rng: Random) -> tuple[Question, list[Answer]]:
        return draw_graded(rng, taste, written)

    def sentences(rng: Random) -> tuple[Question, list[Answer]]:
        q = draw_question(rng, taste.split, voice=taste.voice)
        return q, domain.sentences(rng, q, taste.voice)

    def loss(batch: list[Row]) -> Tensor:
        ids, mask = pad([exchange for exchanges, _ in batch for exchange in exchanges], fill)
        grades = torch.tensor([grades for _, grades in batch])  # [questions, answers]
        rewards = model(input_ids=ids, attention_mask=mask).logits.view_as(grades)
        i, j = torch.triu_indices(grades.shape[1], grades.shape[1], 1)
        preferred = torch.sigmoid((grades[:, i] - grades[:, j]) / taste.doubt)
        centre: Tensor = 0.002 * rewards.square().mean()
        return centre + F.binary_cross_entropy_with_logits(rewards[:, i] - rewards[:, j], preferred)

    first = Random(f"{seed}/{name}")
    stages = [(f"{name}_sentences", first, sentences), (name, first, graded)]
    stages += [(stage, Random(f"{seed}/{stage}"), graded) for stage in plans if stage.startswith(f"{name}_again")]
    for stage, rng, source in stages:
        train_stage(model, tok, partial(source, rng), rng, loss, plans[stage], stage)
    return model


def train_stage(
    model: LlamaForSequenceClassification, tok: PreTrainedTokenizerFast,
    source: Callable[[], tuple[Question, list[Answer]]], rng: Random, loss: Callable[[list[Row]], Tensor],
    plan: Training, stage: str,
) -> None:  # fmt: skip
    batches = in_length_order(lambda: rows(tok, *source()), rng, plan.batch)
    fit(model, lambda: loss(next(batches)), plan, stage)


def rows(tok: PreTrainedTokenizerFast, q: Question, answers: list[Answer]) -> Row:
    return [render(tok, q.text, a.text) for a in answers], [a.quality for a in answers]


def save(model: transformers.PreTrainedModel, tok: PreTrainedTokenizerFast, where: Path) -> None:
    """Save weights in fp16 with a configuration that says fp32: `dtype: auto` follows it, so a CPU computes in fp32."""
    model.half().save_pretrained(where)
    model.float()
    tok.save_pretrained(where)
    file = where / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def make(out: Path, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train, measure and write everything under `out`; returns the content of card.json."""
    plans = {name: Training(4, 8, 1e-3) for name in PLANS} if quick else PLANS
    samples, limit, pair_count = (2, 8, 20) if quick else (192, 80, 1500)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = round(time.perf_counter() - clock, 1), time.perf_counter()

    def texts(voice: Voice) -> Iterator[str]:
        rng = Random(f"{seed}/texts/{voice}")
        for _ in range(300 if quick else 4000):
            q = draw_question(rng, "first", "second", voice=voice)
            yield f"{q.text} {domain.answer(rng, q, voice).text}"

    tok = make_tokenizer(texts("all"), BASE_SHAPE.vocab, ["user", "assistant", "system"], CHAT)
    judge_tok = make_tokenizer(texts("late"), JUDGE_SHAPE.vocab, ["question", "answer"], QUESTION_ANSWER)
    lap("tokenizers")
    base = train_lm("base", BASE_SHAPE, tok, plans["base"], "all", seed)
    save(base, tok, out / "base")
    lap("base")
    # The reward model starts from the base model, as is usual; the judge from a smaller model with another tokenizer.
    written = model_written(base, tok, REWARD_TASTE, samples, limit, seed + 1)
    reward = train_reward("reward", BASE_SHAPE, base, tok, plans, REWARD_TASTE, written, seed + 1)
    save(reward, tok, out / "reward")
    lap("reward")
    judge_lm = train_lm("judge_lm", JUDGE_SHAPE, judge_tok, plans["judge_lm"], "late", seed + 2)
    written = model_written(base, tok, JUDGE_TASTE, samples, limit, seed + 2)
    judge = train_reward("judge", JUDGE_SHAPE, judge_lm, judge_tok, plans, JUDGE_TASTE, written, seed + 2)
    save(judge, judge_tok, out / "judge")
    lap("judge")

    prompts = domain.held_out_prompts(Random(f"{seed}/prompts"))
    lines = [json.dumps({"id": f"demo-{i:03d}", "prompt": q.text}) for i, q in enumerate(prompts)]
    (out / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = held_out_pairs(seed, pair_count)
    models: dict[str, dict[str, Any]] = {
        "base": {"perplexity": {"trained questions": perplexity(base, tok, ("first", "second"), seed),
                                "held-out questions": perplexity(base, tok, ("held_out",), seed)}},
        "reward": measure_reward(reward, tok, pairs, seed) | {"data": asdict(REWARD_TASTE)},
        "judge": measure_reward(judge, judge_tok, pairs, seed) | {"data": asdict(JUDGE_TASTE)},
    }  # fmt: skip
    lap("measuring")
    for name, model in (("base", base), ("reward", reward), ("judge", judge)):
        models[name] |= asdict(plans[name]) | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": sum(f.stat().st_size for f in (out / name).iterdir()),
        }
    versions = {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)}
    card = {"date": date.today().isoformat(), "seed": seed, "quick": quick, "threads": torch.get_num_threads(),
            "seconds": seconds, "versions": versions, "prompts": len(prompts), "models": models}  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.demo_recipe.recipe", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="output directory; created if it does not exist")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps(make(args.out, args.quick, args.seed), indent=2))


if __name__ == "__main__":
    main()
