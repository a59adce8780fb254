"""What tuning tries and which point it takes, on objectives that are known."""

from __future__ import annotations

import pytest

from aisp_dist.analysis.tune import Search, Trial, grid_points, grids, placed
from aisp_dist.config import Aisp, Args, BatchedAisp, BestOfN, ConfigError, Gaussian, ReControl, Tune

METHODS = [Aisp(), BatchedAisp(), BestOfN(), BestOfN(sampling_=Gaussian(gaussian=1.0)), Args(), ReControl(value="v")]
METHODS += [Aisp.model_validate({"preset": "auto"})]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize("trials", [3, 16, 64])
def test_every_arm_gets_the_same_number_of_trials_in_its_grid(method, trials):
    settings = Tune(trials=trials)
    spaces = grids(method, settings)
    points = grid_points(spaces, trials, seed=0)
    assert len(points) == trials and points == grid_points(spaces, trials, seed=0)
    assert len({(tuple(p.items()), seed) for p, seed in points}) == trials, "no trial twice"
    for point, _ in points:
        assert all(value in spaces[name] for name, value in point.items())
        assert type(placed(method, point)) is type(method)


def test_a_point_is_in_the_method():
    at = placed(Aisp(num_samples=4), {"sigma2": 0.3, "ess": 0.2, "alpha": 0.99})
    assert (at.sigma2, at.lambda_.ess, at.alpha, at.num_samples) == (0.3, 0.2, 0.99, 4)
    by_unit = Tune(grids={"lambda": [60.0, 240.0]})
    assert grids(Aisp(), by_unit)["lambda"] == [60.0, 240.0] and "ess" not in grids(Aisp(), by_unit)
    auto = Aisp.model_validate({"preset": "auto"})
    found = placed(auto, {"flip_rate": 0.2, "branch": 4.0})
    assert (found.decode.flip_rate, found.branch.ess, found.sigma2) == (0.2, 4, 0)
    assert placed(BestOfN(), {"top_p": 0.7, "temperature": 0.4}).sampling_.top_p == 0.7
    with pytest.raises(ConfigError, match="tune.grids: aisp cannot be at"):
        placed(Aisp(), {"sigma2": 0.3, "lambda": -1.0, "alpha": 0.9})


def trial(point: dict, reward: float, nll: float = 1.0, seed: int = 0) -> Trial:
    return Trial(point, seed, (reward, reward, reward), nll, 1.0, 8)


@pytest.mark.parametrize("search", ["grid", "tpe"])
def test_a_search_told_the_same_asks_the_same_and_finds_the_top(search):
    settings = Tune(trials=40, search=search)

    def run() -> Search:
        made = Search(BestOfN(), settings, seed=1)
        for point, seed in made:
            made.tell(trial(point, -((point["temperature"] - 0.6) ** 2) - (point["top_p"] - 0.8) ** 2, seed=seed))
        return made

    first, second = run(), run()
    assert [t.point for t in first.told] == [t.point for t in second.told] and len(first.told) == 40
    assert abs(first.best.point["temperature"] - 0.6) < 0.1 and abs(first.best.point["top_p"] - 0.8) < 0.1


def test_fluency_may_cost_and_may_bar():
    fluent, bold = trial({"a": 1.0}, 1.0, nll=1.0), trial({"a": 2.0}, 2.0, nll=1.5)

    def best(**settings: float) -> float:
        made = Search(Args(), Tune(trials=2, **settings), seed=0)
        made.told = [fluent, bold]
        return made.best.point["a"]

    assert best() == 2.0 and best(nll_weight=1.0) == 2.0 and best(nll_weight=3.0) == 1.0 and best(max_nll=0.4) == 1.0


def test_seeds_of_a_point_count_together():
    made = Search(Args(), Tune(trials=4), seed=0)
    made.told = [trial({"a": 1.0}, 5.0), trial({"a": 1.0}, 0.0, seed=1), trial({"a": 2.0}, 3.0)]
    assert made.best.point == {"a": 2.0}
