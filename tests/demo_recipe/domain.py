"""The demo's text domain: questions about everyday topics, answers to them, and the quality of each answer.

The demo models are trained and measured on it. An answer is composed of parts (greeting, the fact the question asks
for, a supporting fact, an example, a wish), each with points, and may have a flaw (off topic, evasive, curt, rude,
repetitive, contradictory ...). Its quality is the sum of the points, so it is known by construction. All draws come
from the `random.Random` that is passed in. Nothing here knows a tokenizer, a model or a search method.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

Split = Literal["first", "second", "held_out"]
Voice = Literal["all", "early", "late"]  # which phrasings a speaker knows


@dataclass(frozen=True, slots=True)
class Question:
    topic: int  # row of topics.toml
    kind: str  # key of QUESTIONS
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    quality: float  # points: about 9 for a complete answer, below 0 for one that is wrong throughout


@dataclass(frozen=True, slots=True)
class Pair:
    question: Question
    better: str
    worse: str
    gap: float  # difference in quality, above 0


_PHRASES = tomllib.loads((Path(__file__).parent / "phrases.toml").read_text(encoding="utf-8"))
QUESTIONS: dict[str, list[str]] = _PHRASES["questions"]  # by kind of question
MOVES: dict[str, list[str]] = _PHRASES["moves"]  # the fact that is asked for, by kind of question
CURT: dict[str, str] = _PHRASES["curt"]
CONTRADICTIONS: dict[str, str] = _PHRASES["contradictions"]
EXAMPLES, OPENERS, CLOSERS, RUDE, EVASIVE = (
    _PHRASES[name] for name in ("examples", "openers", "closers", "rude", "evasive")
)
KINDS = tuple(QUESTIONS)
# The facts that support an answer of each kind. Every fact supports several kinds, so the fact that a held-out question
# asks for was seen with its topic elsewhere.
SUPPORTS = {
    "how": ("why", "mistake", "need"), "why": ("when", "time", "compare"), "need": ("how", "mistake", "compare"),
    "mistake": ("problem", "why", "compare"), "problem": ("mistake", "need", "when"),
    "time": ("when", "how", "problem"), "when": ("time", "need", "why"), "compare": ("time", "mistake", "why"),
    "start": ("mistake", "compare", "when"), "worth": ("need", "when", "problem"),
}  # fmt: skip
FLAWS = ("off_topic", "other_question", "stray_part", "evasive", "curt", "rude", "repeated", "contradiction", "partial")


@cache
def topics() -> tuple[dict[str, Any], ...]:
    """The facts of every topic in topics.toml, plus its steps as s1, s2, s3 and its problem in the first person."""
    table = tomllib.loads((Path(__file__).parent / "topics.toml").read_text(encoding="utf-8"))["topic"]
    for facts in table:
        facts["s1"], facts["s2"], facts["s3"] = facts["steps"]
        facts["my_problem"] = re.sub(r"\byour\b", "my", re.sub(r"\byou\b", "I", facts["problem"]))
    return tuple(table)


def split(topic: int, kind: str) -> Split:
    """The split of a combination of topic and kind. Of each topic two kinds are held out; each reward model is trained
    on four of the other eight, the base model on all eight."""
    slot = (KINDS.index(kind) + 3 * topic) % len(KINDS)
    return "held_out" if slot < 2 else "first" if slot < 6 else "second"


def combinations(*splits: Split) -> list[tuple[int, str]]:
    return [(topic, kind) for topic in range(len(topics())) for kind in KINDS if split(topic, kind) in splits]


def question(rng: Random, topic: int, kind: str, voice: Voice = "all") -> Question:
    return Question(topic, kind, _say(rng, QUESTIONS[kind], topic, voice))


def answer(rng: Random, q: Question, voice: Voice = "all", flawed: float = 0.36) -> Answer:
    """One answer to q. flawed: the probability of a flaw. Points: 4 for the fact that is asked for, 2 for a supporting
    fact, 1.5 for an example, 1 for a greeting, 0.5 for a wish; a wrong part has negative points or few."""
    flaw = rng.choice(FLAWS) if rng.random() < flawed else ""
    topic, kind, support = q.topic, q.kind, rng.choice(SUPPORTS[q.kind])
    if flaw == "off_topic":
        topic = _another(rng, q.topic)
    if flaw == "other_question":
        kind = rng.choice([k for k in KINDS if k not in (q.kind, support, "start", "worth")])
    core, points = _say(rng, MOVES[kind], topic, voice), 4.0
    if flaw == "evasive":
        core, points = _say(rng, EVASIVE, topic, voice), 0.5
    elif flaw == "curt":
        core, points = _say(rng, (CURT[kind],), topic, "all"), 2.0
    elif flaw == "off_topic":
        points = -1.0
    elif flaw == "other_question":
        points = 1.0
    elif flaw == "partial" and kind == "how":
        core, points = _say(rng, ("First, {s1}.", "Just {s1} and {s2}."), topic, "all"), 2.5
    elif flaw == "partial":
        core, points = " ".join(core.split()[: -rng.randint(2, 4)]) + ".", 2.0
    parts = [(core, points)]
    worth = -0.25 if flaw == "off_topic" else 1.0  # details about another topic make an answer worse
    brief, stray = flaw in ("evasive", "curt"), flaw == "stray_part"
    if rng.random() < 0.45 and not brief:
        where = _another(rng, topic) if stray else topic
        parts.append((_say(rng, MOVES[support], where, voice), -1.5 if stray else 2.0 * worth))
    if flaw == "contradiction":
        parts.append((_say(rng, (CONTRADICTIONS[kind],), topic, "all"), -3.0))
    if (rng.random() < 0.35 and not brief) or (stray and len(parts) == 1):
        where = _another(rng, topic) if stray else topic
        parts.append((_say(rng, EXAMPLES, where, voice), -1.5 if stray else 1.5 * worth))
    if flaw == "repeated":
        parts.insert(rng.randint(1, len(parts)), (parts[0][0], -3.0))
    if flaw == "rude":
        parts.insert(0, (_say(rng, RUDE, q.topic, voice), -3.0))
    elif rng.random() < 0.4 and flaw != "curt":
        parts.insert(0, (_say(rng, OPENERS, topic, voice), 1.0 * worth))
    if rng.random() < 0.25 and flaw != "rude":
        parts.append((_say(rng, CLOSERS, topic, voice), 0.5 * worth))
    return Answer(" ".join(text for text, _ in parts), sum(p for _, p in parts))


def complete(rng: Random, q: Question, voice: Voice = "all") -> Answer:
    """An answer with every part and no flaw: greeting, fact, supporting fact, example, wish."""
    moves = (OPENERS, MOVES[q.kind], MOVES[rng.choice(SUPPORTS[q.kind])], EXAMPLES, CLOSERS)
    return Answer(" ".join(_say(rng, options, q.topic, voice) for options in moves), 9.0)


def sentences(rng: Random, q: Question, voice: Voice = "all") -> list[Answer]:
    """Seven answers of one sentence each: the fact that is asked for, a supporting fact and an example; the same three
    about other topics; and a fact about the topic that is not asked for."""
    support = rng.choice(SUPPORTS[q.kind])
    aside = rng.choice([kind for kind in KINDS if kind not in (q.kind, *SUPPORTS[q.kind], "start", "worth")])
    kinds = ((MOVES[q.kind], 4.0, -1.0), (MOVES[support], 2.0, -1.5), (EXAMPLES, 1.5, -1.5))
    own = [Answer(_say(rng, options, q.topic, voice), points) for options, points, _ in kinds]
    strange = [Answer(_say(rng, options, _another(rng, q.topic), voice), points) for options, _, points in kinds]
    return [*own, *strange, Answer(_say(rng, MOVES[aside], q.topic, voice), 1.0)]


def gibberish(rng: Random, words: int) -> str:
    """Words of the domain in random order, and fragments of them, as a model writes that has collapsed."""
    known = " ".join(str(fact) for facts in rng.sample(topics(), 3) for fact in facts.values()).split()
    cut = [rng.choice(known) for _ in range(words)]
    return " ".join(w[: rng.randint(1, 4)] + rng.choice(known)[-3:] if rng.random() < 0.4 else w for w in cut)


def damage(rng: Random, text: str, quality: float, stray: str) -> Answer:
    """`text` with one defect of the kind that too much noise causes. stray: an answer to an unrelated question. The
    quality falls by 3 or 4 if about half of the text or more is intact, to -1 or less if the text becomes `stray`, and
    to -4 or less if nothing is intact."""
    words, sentences = text.split(), re.split(r"(?<=[.!?]) ", text)
    ruined = min(quality - 3.0, -4.0)
    half = len(words) // 2
    match rng.randrange(10):
        case 0:
            return Answer(" ".join(rng.sample(words, len(words))), ruined)
        case 1:
            return Answer(gibberish(rng, rng.randint(3, 50)), ruined)
        case 2:
            return Answer(" ".join([rng.choice(sentences)] * rng.randint(3, 6)), ruined)
        case 3:
            start = rng.randrange(max(1, len(words) - 3))
            loop = words[start : start + rng.randint(1, 4)] * rng.randint(5, 12)
            return Answer(" ".join(words[:start] + loop), ruined)
        case 4:
            return Answer("" if rng.random() < 0.3 else rng.choice((".", "...", "the", "Yes", "- - -")), ruined)
        case 5:
            return Answer(stray, min(quality - 3.0, -1.0))
        case 6:
            return Answer(" ".join(words[:half]) + " " + gibberish(rng, rng.randint(8, 30)), quality - 4.0)
        case 7:
            kept = rng.randint(half // 2, max(half // 2, len(words) - 3))
            return Answer(" ".join(words[:kept]).rstrip(".!"), quality - 3.0)
        case 8:
            return Answer(" ".join(w for w in words if rng.random() > 0.3), quality - 3.0)
        case _:
            broken = [gibberish(rng, 1) if rng.random() < 0.2 else w for w in words]
            return Answer(" ".join([*broken, gibberish(rng, 1)]), quality - 3.0)


def pair(rng: Random, q: Question, voice: Voice = "all", damaged: float = 0.35) -> Pair:
    """Two answers to q, the better first, whose quality differs by at least one point. With probability `damaged` one
    of them is a damaged text."""
    while True:
        left = answer(rng, q, voice, flawed=0.5)
        if rng.random() < damaged:
            elsewhere = question(rng, _another(rng, q.topic), rng.choice(KINDS), voice)
            right = damage(rng, left.text, left.quality, answer(rng, elsewhere, voice).text)
        else:
            right = complete(rng, q, voice) if rng.random() < 0.15 else answer(rng, q, voice, flawed=0.5)
        if abs(left.quality - right.quality) >= 1 and left.text != right.text:
            low, high = sorted((left, right), key=lambda a: a.quality)
            return Pair(q, high.text, low.text, high.quality - low.quality)


def held_out_prompts(rng: Random, phrasings: int = 4) -> list[Question]:
    """`phrasings` different questions for every held-out combination, shuffled."""
    found = []
    for topic, kind in combinations("held_out"):
        texts = rng.sample(QUESTIONS[kind], phrasings)
        found += [Question(topic, kind, _say(rng, (text,), topic, "all")) for text in texts]
    rng.shuffle(found)
    return found


def _another(rng: Random, topic: int) -> int:
    return (topic + rng.randrange(1, len(topics()))) % len(topics())


def _say(rng: Random, options: Sequence[str], topic: int, voice: Voice) -> str:
    spare = len(options) // 4  # early and late speakers each miss a quarter of the phrasings, at opposite ends
    known = {"all": options, "early": options[: len(options) - spare], "late": options[spare:]}[voice]
    text = rng.choice(known).format_map(topics()[topic])
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m[1] + m[2].upper(), text)
