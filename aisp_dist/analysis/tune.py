"""Settings that a tuning tries for a method, and which of them is best. Pure: it is told what trials found and says
what to try next; the search between grid points is Optuna's."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aisp_dist.config import (
    Aisp,
    Args,
    BatchedAisp,
    BestOfN,
    Branch,
    ConfigError,
    Ess,
    FlipRate,
    Method,
    Nucleus,
    ReControl,
    Tune,
)

Point = dict[str, float]  # setting to value


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
        """What is to be large: reward, less nll_weight a nat above the base answers; far below all others beyond
        max_nll."""
        excess = self.nll - self.base_nll
        over = 0.0 if settings.max_nll is None else max(0.0, excess - settings.max_nll)
        return self.reward[0] - settings.nll_weight * max(0.0, excess) - (1e6 * (1 + over) if over else 0.0)


def grids(method: Method, settings: Tune) -> dict[str, list[float]]:
    """The settings of a method that are tuned, and their values. Empty for a method with none."""
    of = settings.grids
    match method:
        case Aisp(branch=Branch(), sigma2=0) | BatchedAisp(branch=Branch(), sigma2=0):
            rates = {"flip_rate": of.flip_rate} if isinstance(method.decode, FlipRate) else {}
            return {**rates, "branch": of.branch}
        case Aisp() | BatchedAisp():
            temperature = {"ess": of.ess} if of.lambda_ is None else {"lambda": of.lambda_}
            return {"sigma2": of.sigma2, **temperature, "alpha": of.alpha}
        case BestOfN(sampling_=Nucleus()):
            return {"temperature": of.temperature, "top_p": of.top_p}
        case BestOfN():
            return {"gaussian": of.sigma2}
        case Args():
            return {"weight": of.weight}
        case ReControl():
            return {"step_size": of.step_size}


def placed(method: Method, point: Point) -> Method:
    """The method at a point of its grids. Raises ConfigError where the method cannot be there."""
    match method:
        case Aisp(branch=Branch(), sigma2=0) | BatchedAisp(branch=Branch(), sigma2=0):
            update: dict[str, Any] = {"branch": Branch(ess=point["branch"])}
            if "flip_rate" in point:
                update["decode"] = FlipRate(flip_rate=point["flip_rate"])
        case Aisp() | BatchedAisp():
            temperature = Ess(ess=point["ess"]) if "ess" in point else point["lambda"]
            update = {"sigma2": point["sigma2"], "lambda_": temperature, "alpha": point["alpha"]}
        case BestOfN():
            update = {"sampling_": method.sampling_.model_copy(update=point)}
        case _:
            update = dict(point)
    try:
        return type(method).model_validate(method.model_copy(update=update).model_dump(by_alias=True))
    except ValueError as error:
        raise ConfigError(f"tune.grids: {method.kind} cannot be at {point}: {' '.join(str(error).split())}") from None


def grid_points(spaces: Mapping[str, Sequence[float]], trials: int, seed: int) -> list[tuple[Point, int]]:
    """`trials` points with their seeds. Of a larger grid a seeded choice; a smaller one comes again with further seeds,
    so that every arm spends the same."""
    points = [dict(zip(spaces, values, strict=True)) for values in itertools.product(*spaces.values())]
    if len(points) > trials:
        return [(point, 0) for point in random.Random(f"{seed}/grid").sample(points, trials)]
    return [(points[k % len(points)], k // len(points)) for k in range(trials)]


class Search:
    """`for point, seed in search: ...; search.tell(trial)`. The same trials told in the same order give the same
    points, so what is written of an interrupted tuning is told again and not run again."""

    def __init__(self, method: Method, settings: Tune, seed: int) -> None:
        self.settings, self.spaces = settings, grids(method, settings)
        self.told: list[Trial] = []
        self._points = grid_points(self.spaces, settings.trials, seed) if settings.search == "grid" else None
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
        """Of the point that is best on average over its seeds, the first trial; the earliest of equals."""
        points: dict[tuple[tuple[str, float], ...], list[Trial]] = {}
        for trial in self.told:
            points.setdefault(tuple(trial.point.items()), []).append(trial)
        means = (math.fsum(t.objective(self.settings) for t in ts) / len(ts) for ts in points.values())
        return max(zip(points.values(), means, strict=True), key=lambda pair: pair[1])[0][0]

    def _suggest(self, name: str, values: Sequence[float]) -> float:
        """A value between the ends of the grid: of 1 - alpha and of what spans factors by its logarithm."""
        low, high = min(values), max(values)
        if low == high:
            return low
        if name == "alpha":
            return 1 - float(self._asked.suggest_float("1 - alpha", 1 - high, 1 - low, log=high < 1))
        return float(self._asked.suggest_float(name, low, high, log=high > 4 * low))


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError("tune.search: tpe needs Optuna: pip install 'aisp-dist[tune]', or use search: grid") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
