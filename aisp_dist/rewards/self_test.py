"""The self-test of a reward model when it is loaded, before any row: known defects that make scores wrong without a
sign. A defect stops the run; a preference for the worse answer of a plain question is a warning. `aisp doctor` runs the
self-test too."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

from aisp_dist.config import ConfigError
from aisp_dist.engine import attention
from aisp_dist.records import Message, Prompt, Score
from aisp_dist.rewards.prefix import Ids, Scores, alike

_log = logging.getLogger("aisp")
_FEW = 4  # pairs that the self-test scores
PAIRS = [  # question, better answer, worse answer
    ("How do I boil an egg?", "Put it into boiling water for eight minutes, then cool it.", "sdkfj wpeoi banana the"),
    ("What is the capital of France?", "The capital of France is Paris.", "No idea, find out yourself."),
    ("How can I sleep better?", "Go to bed at the same time and avoid coffee late.", "asdf asdf asdf asdf asdf"),
    ("Why is the sky blue?", "Air scatters blue light more than red light.", "Because because because because."),
    ("How do I learn to swim?", "Take lessons, and begin in shallow water.", "Just jump in."),
    ("What is 12 times 12?", "12 times 12 is 144.", "12 times 12 is a kind of fish."),
    ("How do I thank a teacher?", "Write a card that says what you learned.", "Teacher teacher thank 99 zzz of of"),
    ("What should I pack for a hike?", "Water, food, a map and a rain jacket.", "Stop asking, stupid."),
    ("How do plants grow?", "They make sugar from light, water and carbon dioxide.", "%%%% ???? ####"),
    ("How do I save money?", "Write down what you spend, and set a budget.", "Spend it all today."),
    ("Can you recommend a book?", "Yes: if you like adventure, try Treasure Island.", "no"),
    ("How do I remove a coffee stain?", "Blot it, then wash it with cold water and soap.", "I hate you."),
]


class Defect(ConfigError):
    """A defect that the self-test found."""


def examine(
    name: str,
    tokenizer: Any,
    encode: Callable[[Sequence[Message]], list[int]],
    tokens: Callable[[Prompt, str], Ids | Score],
    classifier: Scores,
    batch_rows: int,
    max_length: int,
    toy: bool = False,
) -> None:
    """Raises the first Defect found. toy: a model too small to tell plain answers apart, whose preferences are no news.
    encode: the tokens of a whole chat; tokens: those that the model is given of a
    prompt and a response, at most max_length."""

    def fail(finding: str) -> Defect:
        return Defect(
            f"rewards.{name}: its self-test found that {finding}; fix the model's files or chat_template "
            "(self_test: false runs it as it is)"
        )

    if finding := _cut(encode, tokens, max_length):
        raise fail(finding)
    found = [(tokens(Prompt("", 0, q), good), tokens(Prompt("", 0, q), bad)) for q, good, bad in PAIRS[:_FEW]]
    pairs = [(good, bad) for good, bad in found if isinstance(good, tuple) and isinstance(bad, tuple)]
    rows = sorted({row for pair in pairs for row in pair}, key=lambda row: (len(row), row))
    if not rows:
        return  # no text fits into max_tokens; responses that are too long are quarantined
    counts = bos_counts(tokenizer, rows)
    if not counts <= bos_wanted(tokenizer):
        raise fail(f"its texts begin with {' or '.join(map(str, sorted(counts)))} BOS tokens")
    together = classifier.logits(rows, batch_rows)
    if classifier.pad_token_id in {token for row in rows for token in row}:
        raise fail(f"its padding, token {classifier.pad_token_id}, is a token of the texts (EOS?)")
    alone = [classifier.logits([row], 1)[0] for row in rows]
    if not all(map(math.isfinite, together)):
        raise fail("plain texts score NaN or infinity")
    tolerance = attention.TOLERANCE.get(classifier.dtype, 0.0) * (1 + max(map(abs, alone)))
    if not (far := max(abs(a - b) for a, b in zip(together, alone, strict=True))) <= tolerance:
        raise fail(f"scores change by {far:.2g} with what is scored beside a text, or with its padding")
    logits = dict(zip(rows, together, strict=True))
    if wrong := sum(logits[good] <= logits[bad] for good, bad in pairs):
        level = logging.DEBUG if toy else logging.WARNING
        _log.log(level, "rewards.%s prefers the worse answer of %d of %d plain questions", name, wrong, len(pairs))


def bos_counts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> set[int]:
    """The numbers of BOS tokens with which the rows begin."""
    return {sum(1 for _ in takewhile(lambda token: token == tokenizer.bos_token_id, row)) for row in rows}


def bos_wanted(tokenizer: Any) -> set[int]:
    bos = tokenizer.bos_token_id
    return {1} if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else {0, 1}


def _cut(
    encode: Callable[[Sequence[Message]], list[int]], tokens: Callable[[Prompt, str], Ids | Score], max_length: int
) -> str | None:
    """The finding if cutting a prompt that is too long takes tokens from the response, None if all is well."""
    question, answer, other = " ".join(["why"] * max_length), PAIRS[0][1], "? " + PAIRS[1][1]
    whole, beside = (encode((("user", question), ("assistant", text))) for text in (answer, other))
    own = whole[alike(whole, beside) :]
    cut = tokens(Prompt("", 0, question), answer)
    if isinstance(cut, Score) or len(whole) <= max_length:
        return None
    if len(cut) > max_length:
        return f"{len(cut)} tokens are left of a long text, and {max_length} fit"
    return None if own and list(cut[-len(own) :]) == own else "cutting a long prompt cuts the response too"
