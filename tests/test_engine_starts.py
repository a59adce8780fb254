"""Given tokens, likelihoods of answers, and the meaning of a flip rate."""

from __future__ import annotations

import dataclasses

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import model
from aisp_dist.engine.calibrate import calibrate
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Rates, Round, Sampling, TopP

STEPS, PROMPT = 10, (7, 8, 9)
SAMPLINGS = [
    Sampling(2.0),
    Sampling(decode=TopP(0.9, 0.7)),
    Sampling(0.4, "shared", decode=TopP(0.9, 1.0)),
    Sampling(0.4, "mixture", 0.6, after_eos="marginal"),
]
samplings = pytest.mark.parametrize(
    "sampling", SAMPLINGS, ids=lambda s: f"{s.noise}, {'drawn' if s.decode else 'greedy'}"
)


@pytest.fixture(scope="module")
def lm() -> model.LM:
    made = tiny.causal("llama")
    made.generation_config.eos_token_id = list(range(60, 75))
    return model.adapt(made, tiny.tokenizer())


def engine(lm: model.LM) -> Engine:
    return Engine(lm, 32, STEPS)


@samplings
def test_continuing_an_answer_with_its_own_noise_gives_that_answer(lm: model.LM, sampling: Sampling) -> None:
    """Noise and uniforms are keyed by step and sample, so giving a sample its own first tokens changes nothing."""
    round = Round(5, "p", PROMPT, 1, 0, 6, sampling, slow_path.trace(1, 6, STEPS) if sampling.sigma2 else ())
    (free,) = engine(lm).run([round])
    assert len({len(t.token_ids) for t in free.trajectories}) > 1  # some end, some do not
    cuts = [(3 * i) % len(t.token_ids) for i, t in enumerate(free.trajectories)]
    starts = tuple(t.token_ids[:cut] for t, cut in zip(free.trajectories, cuts, strict=True))
    assert max(cuts) > 2
    (again,) = engine(lm).run([dataclasses.replace(round, starts=starts)])
    if sampling.noise == "independent":  # costs leave out noise that changed nothing (test_engine_control.py)
        blank = {"control_cost": 0.0, "control_sq": 0.0}
        again, free = (
            dataclasses.replace(r, trajectories=tuple(dataclasses.replace(t, **blank) for t in r.trajectories))
            for r in (again, free)
        )
    assert again == free


@samplings
def test_given_tokens_come_first_and_others_follow(lm: model.LM, sampling: Sampling) -> None:
    starts = ((), (11, 12), (13,) * (STEPS - 1), (14,))
    (rollout,) = engine(lm).run([Round(5, "p", PROMPT, 0, 4, 8, sampling, starts=starts)])
    for trajectory, start in zip(rollout.trajectories, starts, strict=True):
        assert trajectory.token_ids[: len(start)] == start and len(trajectory.token_ids) > len(start)


@samplings
def test_the_likelihood_is_the_base_models_whatever_drew_the_tokens(lm: model.LM, sampling: Sampling) -> None:
    sampling = dataclasses.replace(sampling, likelihood=True)
    one = engine(lm)
    starts = ((), (11, 12), (), (14,))
    (rollout,) = one.run([Round(5, "p", PROMPT, 0, 0, 4, sampling, starts=starts)])
    for trajectory in rollout.trajectories:
        assert trajectory.nll == pytest.approx(one.nll(PROMPT, trajectory.token_ids), abs=1e-5)
    (silent,) = one.run(
        [Round(5, "p", PROMPT, 0, 0, 4, dataclasses.replace(sampling, likelihood=False), starts=starts)]
    )
    assert [t.nll for t in silent.trajectories] == [None] * 4
    assert [t.token_ids for t in silent.trajectories] == [t.token_ids for t in rollout.trajectories]


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        (((1,),), "1 starts for 2 samples"),
        (((1,) * STEPS, ()), "a start has 10 tokens"),
        (((1,), (61,)), "a start holds 61, an end token"),
        (((-1,), ()), "a start holds -1"),
    ],
)
def test_impossible_starts_are_refused(lm: model.LM, starts: tuple[tuple[int, ...], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine(lm).submit(Round(5, "p", PROMPT, 0, 0, 2, Sampling(0.4), starts=starts))


def base_answer(lm: model.LM) -> tuple[int, ...]:
    (base,) = engine(lm).run([Round(5, "p", PROMPT, -1, 0, 1, Sampling())])
    return base.trajectories[0].token_ids


def found(lm: model.LM, answer: tuple[int, ...], **rates: float) -> Sampling:
    return calibrate(lm, Sampling(), Rates(**rates), (1, 2), PROMPT, answer)


def test_the_variance_of_a_flip_rate_is_where_that_share_of_the_answer_changes(lm: model.LM) -> None:
    answer = base_answer(lm)
    variances = [found(lm, answer, noise=rate).sigma2 for rate in (0.05, 0.2, 0.6)]
    assert variances == sorted(variances) and variances[0] < variances[2]
    z_TD, draws = lm.dense((*PROMPT, *answer[:-1]))[0][len(PROMPT) - 1 :], torch.Generator().manual_seed(0)

    def rate(sigma2: float) -> float:
        z_ND = z_TD.repeat(400, 1)
        moved = z_ND + sigma2**0.5 * torch.randn(z_ND.shape, generator=draws)
        return float((lm.logits(moved).argmax(-1) != lm.logits(z_ND).argmax(-1)).double().mean())

    assert rate(variances[1] / 2) < 0.2 < rate(variances[1] * 2)
    assert rate(variances[1]) == pytest.approx(0.2, abs=0.06)


def test_the_nucleus_of_a_flip_rate_is_where_draws_differ_that_often() -> None:
    """At every prefix of the base answer, the next token is drawn from its nucleus; that share of the draws differs."""
    made = tiny.causal("llama")
    with torch.no_grad():
        made.lm_head.weight *= 4  # a random model is otherwise far from certain of any token
    lm = model.adapt(made, tiny.tokenizer())
    answer, rate = base_answer(lm), 0.35
    p = found(lm, answer, drawing=rate).decode.p
    shares = []
    for at in range(len(answer)):
        round = Round(5, "p", (*PROMPT, *answer[:at]), 0, 0, 400, Sampling(decode=TopP(p, 1.0)))
        (rollout,) = Engine(lm, 32, 1).run([round])
        shares.append(sum(t.token_ids[0] != answer[at] for t in rollout.trajectories) / 400)
    assert sum(shares) / len(shares) == pytest.approx(rate, abs=0.04) and 0.5 < p < 0.95
    ps = [found(lm, answer, drawing=rate).decode.p for rate in (1e-6, rate, 0.9999)]
    assert ps == [0.5, p, 0.95]  # the least and the largest value, where the rate is out of reach


def test_a_flip_rate_has_no_unit(lm: model.LM) -> None:
    """Scaling the output layer changes nothing; scaling the states by s scales the variance by s^2."""

    class Scaled:
        hidden_size, device = lm.hidden_size, lm.device

        def __init__(self, states: float, head: float) -> None:
            self.scale, self.head = states, head

        def dense(self, tokens):
            return lm.dense(tokens)[0] * self.scale, None

        def logits(self, z_ND):
            return lm.logits(z_ND / self.scale) * self.head

    answer = (11, 12, 13, 14)
    plain = found(lm, answer, noise=0.2).sigma2
    assert found(Scaled(1, 8), answer, noise=0.2).sigma2 == plain
    assert found(Scaled(4, 1), answer, noise=0.2).sigma2 == pytest.approx(16 * plain, rel=1e-12)
