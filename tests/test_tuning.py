"""What tuning tries and which point it takes, on objectives that are known."""

from __future__ import annotations

import pytest

from aisp_dist.analysis.tune import Search, Trial, grid_points, placed, spaces
from aisp_dist.config import (
    Aisp,
    Args,
    BatchedAisp,
    BestOfN,
    ConfigError,
    Gaussian,
    Nucleus,
    Population,
    Qalign,
    ReControl,
    Tune,
)
from jobs.tune import _told

AISP = Aisp(num_samples=4, num_iterations=2, lambda_=0.3)
METHODS = [
    AISP,
    BatchedAisp(num_prompts=2, budget=8, lambda_=0.3),
    Population(),
    Population(sampling=Nucleus(top_p=0.9)),
    Qalign(),
    Qalign(beta=0.5, sampling={"flip_rate": 0.28}),
    BestOfN(),
    BestOfN(sampling=Gaussian(gaussian=1.0)),
    Args(),
    ReControl(value="v"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("trials", [3, 16, 64])
def test_every_arm_gets_the_same_number_of_trials_in_its_grid(method, trials):
    found = spaces(method.name, method, Tune(trials=trials))
    points = grid_points(found, trials, seed=0)
    assert len(points) == trials and points == grid_points(found, trials, seed=0)
    assert len({(tuple(p.items()), seed) for p, seed in points}) == trials, "no trial twice"
    for point, _ in points:
        assert all(value in found[name] for name, value in point.items())
        at = placed(method, point)
        assert type(at) is type(method) and values(at, point) == point
    assert len({placed(method, point) for point, _ in points}) == len({tuple(point.items()) for point, _ in points})


def values(method, point):
    """What a method says at the keys of a point."""

    def dig(at, key):
        for part in key.split("."):
            at = at[part]
        return at

    return {key: dig(method.model_dump(by_alias=True), key) for key in point}


def test_a_point_is_in_the_method_and_changes_nothing_else():
    at = placed(AISP, {"sigma2": 0.3, "lambda.ess": 0.2, "alpha": 0.99})
    assert at == Aisp(num_samples=4, num_iterations=2, lambda_={"ess": 0.2}, sigma2=0.3, alpha=0.99)
    assert placed(BestOfN(), {"sampling.top_p": 0.7}) == BestOfN(sampling=Nucleus(top_p=0.7))
    assert placed(Population(), {"ess": 4.0, "sampling.flip_rate": 0.2}) == Population(
        ess=4.0, sampling={"flip_rate": 0.2}
    )
    for point in ({"lambda": -1.0}, {"sampling.top_p": 0.9}, {"alpha": 1.5}):
        with pytest.raises(ConfigError, match="tune.grids: aisp cannot be at"):
            placed(AISP, point)


def test_a_grid_of_the_configuration_replaces_the_arms_own():
    mine = Tune(grids={"aisp": {"lambda": [60.0, 240.0]}})
    assert spaces("aisp", AISP, mine) == {"lambda": [60.0, 240.0]}
    assert spaces("another", AISP, mine) == AISP.grid()


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        ({"sigma2": [0.1, 0.3]}, "sigma2: name the arm first"),
        ({"aisp": {"sigma2": []}}, r"aisp: sigma2 is \[\]; give at least one value"),
        ({"aisp": {"sigma2": [0.1, 0.1]}}, "each once"),
    ],
)
def test_a_grid_that_cannot_be_searched_is_refused(grids, said):
    with pytest.raises(ValueError, match=said):
        Tune(grids=grids)


def trial(point: dict, reward: float, nll: float = 1.0, seed: int = 0) -> Trial:
    return Trial(point, seed, (reward, reward, reward), nll, 1.0, 8)


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_search_told_the_same_asks_the_same_and_finds_the_top(search):
    settings = Tune(trials=40, search=search)
    grid = BestOfN().grid()

    def run() -> Search:
        made = Search(grid, settings, seed=1)
        for point, seed in made:
            t, p = point["sampling.temperature"], point["sampling.top_p"]
            made.tell(trial(point, -((t - 0.6) ** 2) - (p - 0.8) ** 2, seed=seed))
        return made

    first, second = run(), run()
    assert [t.point for t in first.told] == [t.point for t in second.told] and len(first.told) == 40
    best = first.best.point
    assert abs(best["sampling.temperature"] - 0.6) < 0.1 and abs(best["sampling.top_p"] - 0.8) < 0.1


def test_tpe_stays_between_the_ends_of_a_grid_and_fills_a_range_by_its_scale():
    """alpha spans factors of its distance to 1, sigma2 of itself; step is linear."""
    grid = {"alpha": [0.99, 0.99999], "sigma2": [0.01, 1.0], "step": [1.0, 2.0]}
    made = Search(grid, Tune(trials=40, search="tpe"), seed=0)
    points = []
    for point, _ in made:
        points.append(point)
        made.tell(trial(point, 0.0))
    for name, (low, high) in grid.items():
        assert all(low <= p[name] <= high for p in points)
    above = {name: sum(p[name] > middle for p in points) for name, middle in {"alpha": 0.995, "sigma2": 0.5}.items()}
    assert above["alpha"] > 25 and above["sigma2"] < 15


def test_fluency_may_cost_and_may_bar():
    fluent, bold = trial({"a": 1.0}, 1.0, nll=1.0), trial({"a": 2.0}, 2.0, nll=1.5)

    def best(**settings: float) -> float:
        made = Search({"a": [1.0, 2.0]}, Tune(trials=2, **settings), seed=0)
        made.told = [fluent, bold]
        return made.best.point["a"]

    assert best() == 2.0 and best(nll_weight=1.0) == 2.0 and best(nll_weight=3.0) == 1.0 and best(max_nll=0.4) == 1.0


def test_what_is_printed_of_an_arm_is_in_columns_that_never_touch():
    settings = {"sampling.temperature": 0.7, "sampling.top_p": 0.95, "beta.sd": 0.5}
    told = _told("best-of-n top-p, rewards shuffled", trial(settings, 0.087))
    assert "rewards shuffled sampling.temperature 0.7, " in told and "beta.sd 0.5 reward" in told


def test_seeds_of_a_point_count_together():
    made = Search({"a": [1.0, 2.0]}, Tune(trials=4), seed=0)
    made.told = [trial({"a": 1.0}, 5.0), trial({"a": 1.0}, 0.0, seed=1), trial({"a": 2.0}, 3.0)]
    assert made.best.point == {"a": 2.0}
