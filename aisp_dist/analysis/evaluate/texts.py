"""Measures of an answer's text. Words are separated by white space, as in metrics.diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from aisp_dist import quiet
from aisp_dist.analysis.metrics import Interval
from aisp_dist.config import ConfigError

SIMCSE = "princeton-nlp/sup-simcse-bert-base-uncased"
_RESAMPLES = 500
Embed = Callable[[Sequence[str]], np.ndarray]  # N texts to [N, E] unit vectors


def immediate_repeat(text: str) -> int:
    """Length in words of the longest stretch that repeats the block before it, once or more often (ours): `a b a b a b`
    has 4, `no, no no` has 1."""
    _, words = np.unique(np.array(text.split(), dtype=str), return_inverse=True)
    longest = 0
    for period in range(1, len(words) // 2 + 1):
        same = np.concatenate([[False], words[period:] == words[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        stretch = int((edges[1::2] - edges[::2]).max(initial=0))
        longest = max(longest, stretch if stretch >= period else 0)
    return longest


def embedder(model: str) -> Embed:
    """A sentence-transformers model by directory or hub id. A checkpoint without pooling, such as SimCSE's, is averaged
    over its tokens; SimCSE's own package pools differently. Raises ConfigError where the model or
    sentence-transformers is missing."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(
            "--embeddings needs sentence-transformers, which is not installed; pip install 'aisp-dist[evaluate]'"
        ) from None
    fix = f"name a directory or a hub id that this machine can reach, such as {SIMCSE}"
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise ConfigError(f"--embeddings: {model!r} is not a directory; {fix}")
    try:
        with quiet.loading():
            loaded = SentenceTransformer(str(Path(model).expanduser()), model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--embeddings: {model!r} cannot be loaded; {fix} ({reason})") from None

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors: np.ndarray = loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return vectors

    return embed


def coherence(embed: Embed, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """[N] cosine of the sentence embeddings of a prompt and its answer (Su et al. 2022, arXiv 2202.06417; ARGS and
    RE-Control use it with SIMCSE)."""
    cosine: np.ndarray = (embed(prompts).astype(np.float64) * embed(answers)).sum(-1)
    return cosine


def correlations(*pairs: tuple[np.ndarray, np.ndarray], seed: int = 0) -> list[Interval | None]:
    """Pearson's r of each pair (x [P], y [P]), and of two pairs also the difference, first minus second, with 95 %
    percentile bootstrap intervals (500 resamples of prompts, the same for all). None where x or y does not vary."""
    values = np.array(pairs)
    values = values[:, :, np.isfinite(values).all(axis=(0, 1))]
    if values.shape[2] < 3:
        return [None] * (len(pairs) + (len(pairs) == 2))

    def r(sample: np.ndarray) -> list[float]:
        centred = sample - sample.mean(axis=2, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = (centred[:, 0] * centred[:, 1]).sum(-1) / np.sqrt((centred**2).sum(-1).prod(-1))
        return [*each, each[0] - each[1]] if len(each) == 2 else [*each]

    rng, count = np.random.default_rng(seed), values.shape[2]
    drawn = np.array([r(values[:, :, rng.integers(0, count, count)]) for _ in range(_RESAMPLES)])
    found: list[Interval | None] = []
    for mean, resampled in zip(r(values), drawn.T, strict=True):
        finite = resampled[np.isfinite(resampled)]  # few prompts resampled may not vary
        found.append(Interval(mean, *np.quantile(finite, [0.025, 0.975])) if np.isfinite(mean) else None)
    return found


def left_out(reasons: Sequence[str], count: int, what: str = "prompts") -> str:
    return f"{len(reasons)} of {count} {what} are left out; the first: {reasons[0]}"
