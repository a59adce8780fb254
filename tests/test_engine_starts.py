"""Tokens that are given, likelihoods of answers, and the variance of a flip rate."""

from __future__ import annotations

import dataclasses

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import calibrate, model
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Round, Sampling, TopP

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
def test_what_continues_an_answer_as_it_was_drawn_is_that_answer(lm: model.LM, sampling: Sampling) -> None:
    """Noise and uniforms are keyed by step and sample, so a sample's own first tokens change nothing of it."""
    round = Round(5, "p", PROMPT, 1, 0, 6, sampling, slow_path.trace(1, 6, STEPS) if sampling.sigma2 else ())
    (free,) = engine(lm).run([round])
    assert len({len(t.token_ids) for t in free.trajectories}) > 1  # some end, some do not
    cuts = [(3 * i) % len(t.token_ids) for i, t in enumerate(free.trajectories)]
    starts = tuple(t.token_ids[:cut] for t, cut in zip(free.trajectories, cuts, strict=True))
    assert max(cuts) > 2
    assert engine(lm).run([dataclasses.replace(round, starts=starts)]) == [free]


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
def test_starts_that_cannot_be_are_refused(lm: model.LM, starts: tuple[tuple[int, ...], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine(lm).submit(Round(5, "p", PROMPT, 0, 0, 2, Sampling(0.4), starts=starts))


def test_the_variance_of_a_flip_rate_is_where_that_share_of_the_answer_changes(lm: model.LM) -> None:
    (base,) = engine(lm).run([Round(5, "p", PROMPT, -1, 0, 1, Sampling())])
    answer = base.trajectories[0].token_ids
    found = [calibrate.variance(lm, (1, 2), PROMPT, answer, rate) for rate in (0.05, 0.2, 0.6)]
    assert found == sorted(found) and found[0] < found[2]
    noisy = Sampling(found[1], decode=None)
    z_TD, _ = lm.dense((*PROMPT, *answer[:-1]))
    plain = lm.logits(z_TD[len(PROMPT) - 1 :]).argmax(-1)
    draws = torch.Generator().manual_seed(0)
    rates = {
        factor: [
            float(
                (
                    lm.logits(z + (factor * noisy.sigma2) ** 0.5 * torch.randn(z.shape, generator=draws)).argmax(-1)
                    != plain
                )
                .double()
                .mean()
            )
            for z in [z_TD[len(PROMPT) - 1 :]] * 400
        ]
        for factor in (0.5, 1.0, 2.0)
    }
    means = {factor: sum(values) / len(values) for factor, values in rates.items()}
    assert means[0.5] < 0.2 < means[2.0] and means[1.0] == pytest.approx(0.2, abs=0.06)


def test_a_flip_rate_has_no_unit(lm: model.LM) -> None:
    """Another scale of the output layer changes nothing; of the states, the variance by its square."""

    class Scaled:
        hidden_size, device = lm.hidden_size, lm.device

        def __init__(self, states: float, head: float) -> None:
            self.scale, self.head = states, head

        def dense(self, tokens):
            return lm.dense(tokens)[0] * self.scale, None

        def logits(self, z_ND):
            return lm.logits(z_ND / self.scale) * self.head

    asked = (3, 4), PROMPT, (11, 12, 13, 14), 0.2
    plain = calibrate.variance(lm, *asked)
    assert calibrate.variance(Scaled(1, 8), *asked) == plain
    assert calibrate.variance(Scaled(4, 1), *asked) == 16 * plain
