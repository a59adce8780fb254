"""The method's identities, run through the real loop on a toy world. Numbers: equations of arXiv 2510.26219."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from toy import PROMPT, World, covariance, white_noise

from aisp_dist import config
from aisp_dist.methods import aisp
from aisp_dist.methods.weights import importance_weights
from aisp_dist.records import Done, Failed

C = np.array([[0.3, -0.2], [0.1, 0.4], [-0.3, 0.2]])  # [T, D]
NOISES = ["independent", {"ar1": 0.7}, {"mixture": 0.5}, "shared"]


def run(method: dict, **changes) -> config.Run:
    return config.Run.model_validate(
        {
            "output": "unused",
            "generator": {"model": "toy"},
            "rewards": {"r": {"kind": "function", "function": "toy:r"}},
            "method": {"kind": "aisp", "num_samples": 64, "num_iterations": 4, "lambda": 0.5, **method},
            **changes,
        }
    )


def weights(rewards, penalties=None, lambda_=0.5):
    return importance_weights(rewards, penalties or [0.0] * len(rewards), lambda_)


def test_weights_sum_to_one_and_ignore_a_shift_and_a_common_scale():
    r = [1.0, -2.0, 0.5, 3.0]
    w = weights(r)
    assert sum(w) == pytest.approx(1)
    assert weights([x + 1e3 for x in r]) == pytest.approx(w, rel=1e-6)
    assert weights([x * 8 for x in r], lambda_=4.0) == w
    assert weights([x * 1e6 for x in r], lambda_=config.Ess(ess=0.5)) == pytest.approx(
        weights(r, lambda_=config.Ess(ess=0.5)), rel=1e-5
    )


def test_weights_are_equivariant_under_permutation():
    r, p = [1.0, -2.0, 0.5, 3.0], [0.1, 0.0, -0.2, 0.3]
    order = [2, 0, 3, 1]
    for lambda_ in (0.5, config.Ess(ess=0.4)):
        w = weights(r, p, lambda_)
        assert weights([r[i] for i in order], [p[i] for i in order], lambda_) == pytest.approx([w[i] for i in order])


def test_weights_are_softmax_of_reward_over_lambda_when_alpha_is_one():
    assert aisp.penalty(123.0, 456.0, alpha=1.0, sigma2=2.0) == 0
    w = weights([1.0, 2.0], lambda_=0.5)
    assert w[1] / w[0] == pytest.approx(math.exp(2), rel=1e-6)


def test_lambda_to_zero_is_one_hot_and_never_overflows():
    assert weights([1.0, 5.0, 4.9], lambda_=1e-300) == (0.0, 1.0, 0.0)
    assert weights([-1e300, 1e300], lambda_=1e-9) == (0.0, 1.0)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_ess_temperature_hits_its_target(fraction):
    rng = np.random.default_rng(0)
    r, p = list(rng.normal(size=40) * 100), list(rng.normal(size=40) * 0.01)
    w = weights(r, p, config.Ess(ess=fraction))
    assert 1 / sum(x * x for x in w) == pytest.approx(fraction * 40, rel=1e-3)


def test_ess_of_equal_rewards_is_n():
    assert weights([2.0] * 5, lambda_=config.Ess(ess=0.4)) == pytest.approx([0.2] * 5)


def test_missing_rewards_have_no_weight_and_none_at_all_keeps_u():
    w = weights([1.0, None, 1.0])
    assert w[1] == 0 and sum(w) == pytest.approx(1)
    assert weights([None, None]) == (0.0, 0.0)


def dense_log_weights(settings: config.Aisp, e, m, r, lengths):
    """(18) with u . v and the dense precision matrix of the steps that count, as algorithm prints it."""
    sampling, _ = settings.draws()
    steps = e.shape[1]
    out = []
    lower = np.linalg.cholesky(covariance(sampling, steps))
    u = lower @ m
    for i in range(len(e)):
        upto = steps if settings.after_eos == "full" else int(lengths[i])
        precision = np.linalg.inv(covariance(sampling, upto)) / settings.sigma2
        v = (u + lower @ e[i])[:upto]
        value = r[i] / settings.lambda_ - (1 - settings.alpha) * np.einsum("sd,st,td", u[:upto], precision, v)
        if settings.after_eos == "marginal":
            value += (1 - settings.alpha**2) / 2 * np.einsum("sd,st,td", u[:upto], precision, u[:upto])
        out.append(value)
    return np.array(out)


@pytest.mark.parametrize("after_eos", ["full", "marginal"])
@pytest.mark.parametrize("noise", NOISES[:3], ids=str)
def test_weights_of_a_later_round_equal_the_dense_formula(noise, after_eos):
    """Whitened coordinates and the matrix of the noise must give one and the same penalty, for every kind."""
    rng = np.random.default_rng(1)
    world = World(C, lengths=lambda e: 1 + rng.integers(0, 3, size=len(e)))
    settings = run({"noise": noise, "after_eos": after_eos, "alpha": 0.6, "num_iterations": 3})
    requests = []
    original = world.rollout

    async def recording(request):
        answer = await original(request)
        requests.append((request, answer))
        return answer

    world.rollout = recording
    done = world.align(settings)
    request, answer = requests[-1]
    assert request.iteration == 2
    e = white_noise(0, request.sampling, 2, range(64), *C.shape)
    lengths = [len(t.token_ids) for t in answer.trajectories]
    rewards = [float(t.text) for t in answer.trajectories]
    logs = dense_log_weights(settings.method, e, world.whitened_mean(request), rewards, lengths)
    expected = np.exp(logs - logs.max())
    np.testing.assert_allclose(done.trace[2].weights, expected / expected.sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("noise", NOISES, ids=str)
def test_linear_reward_reaches_the_closed_form_fixed_point(noise):
    """r = sum c . v has the fixed point u = Sigma c / (lambda (1 - alpha)), Sigma = sigma^2 times the covariance."""
    method = {"noise": noise, "alpha": 0.5, "lambda": 2.0, "sigma2": 0.8, "num_samples": 3000, "num_iterations": 24}
    world = World(C)
    settings = run(method)
    world.align(settings)
    sampling, _ = settings.method.draws()
    correlation = covariance(sampling, len(C))
    lower = np.linalg.cholesky(correlation + 1e-12 * np.eye(len(C)))
    u = lower @ np.mean(world.m_of[-16:], axis=0)
    np.testing.assert_allclose(u, 0.8 * correlation @ C / (2.0 * 0.5), atol=0.03)


def test_marginal_agrees_with_full_in_expectation():
    """Integrating out the noise after the end changes the variance of u, not its mean."""

    def lengths(e):  # the end depends on what was drawn before it
        return np.where(e[:, 0, 0] > 0, 1, 3)

    means = {}
    for after_eos in ("full", "marginal"):
        world = World(C, lengths, reward=lambda v, t: v[:, 0, 0] + np.where(t == 3, v[:, 2, 1], 0))
        method = {"alpha": 0.5, "lambda": 2.0, "after_eos": after_eos, "num_samples": 3000, "num_iterations": 24}
        world.align(run(method))
        means[after_eos] = np.mean(world.m_of[-16:], axis=0)
    np.testing.assert_allclose(means["marginal"], means["full"], atol=0.04)


def test_equal_rewards_move_u_by_the_plain_sample_mean():
    world = World(np.zeros((3, 400)))
    done = world.align(run({"num_samples": 16, "num_iterations": 2, "sigma2": 0.5}))
    assert done.trace[0].weights == pytest.approx([1 / 16] * 16)
    per_step = (world.m_of[1] ** 2).sum(-1)
    np.testing.assert_allclose(per_step, 0.5 * 400 / 16, rtol=0.25)


def test_kl_is_the_squared_control_over_twice_sigma2():
    world = World(C)
    done = world.align(run({"sigma2": 0.25}))
    assert done.trace[0].kl == 0
    for k in (1, 2, 3):
        assert done.trace[k].kl == pytest.approx((world.m_of[k] ** 2).sum() / 0.5)


def test_one_sample_gives_u_equal_v():
    world = World(C)
    world.align(run({"num_samples": 1, "num_iterations": 2, "lambda": 1.0}))
    e = white_noise(0, run({}).method.draws()[0], 0, range(1), *C.shape)
    np.testing.assert_allclose(world.m_of[1], e[0], rtol=1e-6)


def test_first_iteration_is_best_of_n_with_the_same_keys_whatever_lambda():
    drawn = {}
    for lambda_ in (0.01, 100.0):
        done = World(C).align(run({"num_samples": 32, "num_iterations": 2, "lambda": lambda_}))
        drawn[lambda_] = [c.reward for c in done.candidates[:32]]
    gaussian = {"kind": "best_of_n", "num_samples": 32, "num_iterations": 2, "sampling": {"gaussian": 0.5}}
    bon = World(C).align(run({}).model_copy(update={"method": config.BestOfN.model_validate(gaussian)}))
    assert drawn[0.01] == drawn[100.0] == [c.reward for c in bon.candidates[:32]]
    assert bon.best.reward == max(c.reward for c in bon.candidates)
    assert bon.samples_spent == 64 and bon.trace[1].kl == 0


def replayed(curve: list[float], spend: dict, num_iterations: int) -> int:
    """Iterations that the rule lets a prompt with these best rewards of each iteration spend, by its definition."""
    for k in range(1, len(curve) + 1):
        so_far = [max(curve[: j + 1]) for j in range(k)]
        if spend.get("target") is not None and so_far[-1] >= spend["target"]:
            return k
        p = spend.get("plateau")
        if p and k > p and so_far[-1 - p] == so_far[-1]:
            return k
        if k == (spend.get("max_iterations") or num_iterations):
            return k
    raise AssertionError("the curve is too short")


@pytest.mark.parametrize(
    "spend",
    [{"plateau": 1}, {"plateau": 2}, {"target": 1.0}, {"target": -99.0}, {"plateau": 2, "max_iterations": 9},
     {"plateau": 3, "target": 3.0, "max_iterations": 12}],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["aisp", "best_of_n"])
def test_a_prompt_spends_by_the_rule_and_its_candidates_are_those_of_the_whole_search(spend, kind):
    def method(num_iterations: int, **more: object) -> dict:
        own = {"lambda": 0.5} if kind == "aisp" else {"sampling": {"gaussian": 0.5}}
        return {"kind": kind, "num_samples": 8, "num_iterations": num_iterations, **own, **more}

    spent = set()
    for seed in range(6):
        base = run({}, seed=seed)
        make = config.Aisp if kind == "aisp" else config.BestOfN
        whole, early = (
            World(C).align(base.model_copy(update={"method": make.model_validate(m)}))
            for m in (method(12), method(4, spend=spend))
        )
        best = [it.best_reward for it in whole.trace]
        assert len(early.trace) == replayed(best, spend, 4)
        assert early.samples_spent == 8 * len(early.trace)
        assert early.candidates == whole.candidates[: early.samples_spent]
        spent.add(len(early.trace))
    assert len(spent) > 1 or spend == {"target": -99.0}, "the rule never told prompts apart"


def test_best_is_the_earliest_of_equals_and_the_curve_never_falls():
    done = World(C, reward=lambda v, t: np.round(v[:, 0, 0])).align(run({}))
    assert isinstance(done, Done)
    first = next(c for c in done.candidates if c.reward == done.best.reward)
    assert (first.iteration, first.sample) == (done.best.iteration, done.best.sample)
    assert list(done.curve) == sorted(done.curve) and done.curve[-1] == done.best.reward


def test_search_improves_on_its_first_round_and_the_shuffled_control_does_not_move_the_mean():
    method = {"num_samples": 256, "num_iterations": 12, "lambda": 0.3, "alpha": 0.9}
    true = World(C).align(run(method))
    shuffled = World(C).align(run(method | {"shuffle_rewards": True}))
    assert true.trace[-1].mean_reward - true.trace[0].mean_reward > 1
    assert abs(shuffled.trace[-1].mean_reward - shuffled.trace[0].mean_reward) < 0.5
    assert shuffled.best.reward == max(c.reward for c in shuffled.candidates), "true rewards select"


def test_one_bad_reward_is_quarantined_and_all_bad_fail_the_row():
    def one(v, t):
        r = v[:, 0, 0].copy()
        r[3:4] = np.nan  # the base answer is alone and has no fourth
        return r

    done = World(C, reward=one).align(run({}))
    assert done.quarantined == 4 and done.samples_spent == 256
    assert all(it.weights[3] == 0 for it in done.trace)
    failed = World(C, reward=lambda v, t: np.full(len(v), np.nan)).align(run({}))
    assert isinstance(failed, Failed) and failed.prompt is PROMPT and "not finite" in failed.reason


def test_a_prompt_does_not_depend_on_the_seed_of_another():
    a = World(C).align(run({}))
    assert a == World(C).align(run({}))
    assert a.best.text != World(C).align(run({}, seed=1)).best.text


def test_base_answer_never_wins():
    done = World(C, reward=lambda v, t: -np.abs(v).sum((1, 2))).align(run({}))
    assert done.base.reward == 0 > done.best.reward and done.best.iteration >= 0
    assert replace(done.base, iteration=0) != done.best
