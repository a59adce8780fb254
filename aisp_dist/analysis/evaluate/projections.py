"""Pre-logits of one token on a few axes: how far they are from normal, before and after the search moved them. Ours,
after the histograms of Kanai et al. (arXiv 2510.26219). Pure; numpy only.

Shapes: M positions, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

LEAST = 8  # positions; fewer have no sixth component and no distribution
_BINS = 30
_COMPONENTS = (1, 3, 6)


def axes(z_MD: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Unit vectors [D]: one coordinate, the diagonal of two coordinates, a direction uniform on the sphere, and
    principal components of z."""
    rng, dim = np.random.default_rng(seed), z_MD.shape[1]
    first, second = np.eye(dim)[rng.choice(dim, 2, replace=False)]
    direction = rng.normal(size=dim)
    found = {
        "random axis": first,
        "mixed axis": (first + second) / math.sqrt(2),
        "random direction": direction / np.linalg.norm(direction),
    }
    components = np.linalg.svd(z_MD - z_MD.mean(0), full_matrices=False)[2]
    return found | {f"principal component {i}": components[i - 1] for i in _COMPONENTS if i <= len(components)}


def normality(x: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of values [M] from the normal of their own mean and deviation (Lilliefors' statistic,
    so its usual p-values do not hold); 0 for values that do not vary, a normal of no width."""
    if np.ptp(x) == 0:
        return 0.0
    x = np.sort((x - x.mean()) / x.std(ddof=1))
    below = np.array([math.erfc(-value / math.sqrt(2)) / 2 for value in x])
    ranks = np.arange(len(x) + 1) / len(x)
    return float(max((ranks[1:] - below).max(), (below - ranks[:-1]).max()))


def project(base_MD: np.ndarray, moved_MD: np.ndarray, token: str, seed: int) -> list[dict[str, Any]]:
    """For each axis (taken from `base`) the histograms of both on the same bins, the fitted normal and its distance."""
    base_MD, moved_MD = base_MD.astype(np.float64), moved_MD.astype(np.float64)

    def histogram(x: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
        counts = np.histogram(x, edges)[0].tolist()
        fit = {"mean": float(x.mean()), "std": float(x.std(ddof=1)), "ks": normality(x)}
        return {"edges": edges.tolist(), "counts": counts, **fit}

    found = []
    for name, axis in axes(base_MD, seed).items():
        base, moved = base_MD @ axis, moved_MD @ axis
        edges = np.histogram_bin_edges(np.concatenate([base, moved]), _BINS)
        sides = {"base": histogram(base, edges), "moved": histogram(moved, edges)}
        found.append({"name": name, "token": token, "positions": len(base), **sides})
    return found
