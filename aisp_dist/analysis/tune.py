"""Which settings a tuning tries for a method, and which of them is best. Pure: it is told what the trials found and
says what to try next. Optuna searches between the points of a grid."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aisp_dist.config import ConfigError, Method, Tune

Point = dict[str, float]  # value by key of the method's section; a key inside a key is dotted
Spaces = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Trial:
    """One point on all tuning prompts: mean reward with interval, base-model NLL per token of the answers and of the
    base answers, samples drawn. seed: added to the run's."""

    point: Point
    seed: int
    reward: tuple[float, float, float]
    nll: float
    base_nll: float
    samples: int

    def objective(self, settings: Tune) -> float:
        """What is maximised: the reward, minus nll_weight for each nat above the base answers; far below every other
        trial beyond max_nll."""
        excess = self.nll - self.base_nll
        over = 0.0 if settings.max_nll is None else max(0.0, excess - settings.max_nll)
        return self.reward[0] - settings.nll_weight * max(0.0, excess) - (1e6 * (1 + over) if over else 0.0)


def spaces(arm: str, method: Method, settings: Tune) -> Spaces:
    """The values to try for an arm: those of tune.grids, else of the method's own grid."""
    return settings.grids.get(arm) or method.grid()


def placed(method: Method, point: Point) -> Method:
    """The method at a point. Raises ConfigError where the method cannot be there."""
    values = method.model_dump(by_alias=True)
    for key, value in point.items():
        *outer, last = key.split(".")
        place = values
        for part in outer:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[last] = value
    try:
        return type(method).model_validate(values)
    except ValueError as error:
        raise ConfigError(f"tune.grids: {method.name} cannot be at {point}: {' '.join(str(error).split())}") from None


def grid_points(spaces: Spaces, trials: int, seed: int) -> list[tuple[Point, int]]:
    """`trials` points with their seeds. A larger grid is sampled by `seed`; a smaller one is repeated with further
    seeds, so that every arm spends the same."""
    points = [dict(zip(spaces, values, strict=True)) for values in itertools.product(*spaces.values())]
    if len(points) > trials:
        return [(point, 0) for point in random.Random(f"{seed}/grid").sample(points, trials)]
    return [(points[k % len(points)], k // len(points)) for k in range(trials)]


class Search:
    """`for point, seed in search: ...; search.tell(trial)`. The same trials told in the same order give the same
    points, so an interrupted tuning is resumed by telling what its finished trials found."""

    def __init__(self, spaces: Spaces, settings: Tune, seed: int) -> None:
        self.settings, self.spaces = settings, spaces
        self.told: list[Trial] = []
        self._points = grid_points(spaces, settings.trials, seed) if settings.search == "grid" else None
        self._study: Any = None if self._points is not None else _study(seed)

    def __iter__(self) -> Iterator[tuple[Point, int]]:
        if self._points is not None:
            yield from self._points
            return
        for _ in range(self.settings.trials):
            self._asked = self._study.ask()
            yield {name: self._suggest(name, values) for name, values in self.spaces.items()}, 0

    def tell(self, trial: Trial) -> None:
        self.told.append(trial)
        if self._study is not None:
            self._study.tell(self._asked, trial.objective(self.settings))

    @property
    def best(self) -> Trial:
        """The first trial of the point that is best on average over its seeds; the earliest of equal points."""
        points: dict[tuple[tuple[str, float], ...], list[Trial]] = {}
        for trial in self.told:
            points.setdefault(tuple(trial.point.items()), []).append(trial)
        means = (math.fsum(t.objective(self.settings) for t in ts) / len(ts) for ts in points.values())
        return max(zip(points.values(), means, strict=True), key=lambda pair: pair[1])[0][0]

    def _suggest(self, name: str, values: Sequence[float]) -> float:
        """A value between the ends of the grid, on a logarithmic scale where the grid spans factors: of the value, or
        of its distance to 1, as alpha does."""
        low, high = min(values), max(values)
        if low == high:
            return low
        if low > 0 and high > 4 * low:
            return float(self._asked.suggest_float(name, low, high, log=True))
        if high < 1 and 1 - low > 4 * (1 - high):
            return 1 - float(self._asked.suggest_float(f"1 - {name}", 1 - high, 1 - low, log=True))
        return float(self._asked.suggest_float(name, low, high))


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("tune.search: tpe needs Optuna: pip install 'aisp-dist[tune]', or use search: grid") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
