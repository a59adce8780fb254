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
    has 4, `no, no no` has 1. Time for N words: N log(N)^2 at most.

    A stretch of period p is at least p long, so it holds a block of b words that starts at a multiple of b, for every
    b <= p / 2. For b = 1, 2, 4, ... those N / b blocks are compared with what stands p = 2b .. 4b - 1 words later, and
    where they agree the stretch is followed to both sides."""
    words = text.split()
    count, longest = len(words), 0
    names = _names(words)

    def agree(k: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether the 2**k words from i on are those from j on, j > i."""
        agreed: np.ndarray = (names[k][j] >= 0) & (names[k][i] == names[k][j])
        return agreed

    for k in range(len(names)):
        block = 1 << k
        starts = np.arange(0, count, block)
        # a period of p leaves at most N - p words, and only more than the longest so far matter
        periods = np.arange(2 * block if k else 1, min(4 * block, count // 2 + 1, count - longest))
        if not len(periods):
            break
        found = agree(k, starts[:, None], starts[:, None] + periods)
        found[1:] &= ~found[:-1]  # of blocks of one stretch the first is enough
        at, which = np.nonzero(found)
        first, last, period = starts[at], starts[at], periods[which]
        for step in reversed(range(len(names))):
            last = last + (agree(step, last, last + period) << step)
            before = np.maximum(first - (1 << step), 0)
            first = np.where((first >= 1 << step) & agree(step, before, before + period), before, first)
        stretch = last - first
        longest = max(longest, int(stretch[stretch >= period].max(initial=0)))
    return longest


def _names(words: Sequence[str]) -> list[np.ndarray]:
    """[k][i]: a number for the 2**k words from i on, equal for equal words; -1 where fewer are left. k ends where no
    words come twice; i ends at twice their number, so that what lies beyond the text can be asked for too."""
    ids: dict[str, int] = {}
    count = len(words)
    names = [np.full(2 * count + 1, -1)]
    names[0][:count] = [ids.setdefault(word, len(ids)) for word in words]
    size = 1
    while 2 * size <= count and names[-1].max() + 1 < count - size + 1:
        pairs = names[-1][: count - 2 * size + 1] * count + names[-1][size : count - size + 1]
        names.append(np.full(2 * count + 1, -1))
        names[-1][: len(pairs)] = np.unique(pairs, return_inverse=True)[1]
        size *= 2
    return names


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
