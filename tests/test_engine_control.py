"""The control and its costs in whitened coordinates against dense algebra with the covariance matrix over time.

Shapes: N samples, T steps, D hidden size.
"""

from __future__ import annotations

import dataclasses

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import control, model
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Round, Sampling, Weights

STEPS, SAMPLES, DIM, ALPHA = 10, 6, 32, 0.8
KINDS = [("independent", 0.0), ("ar1", 0.7), ("shared", 0.0), ("mixture", 0.6)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])


def request(kind: tuple[str, float], after_eos: str, iterations: int = 3) -> Round:
    sampling = Sampling(0.4, *kind, alpha=ALPHA, after_eos=after_eos)
    return Round(5, "p", (7, 8, 9), iterations, 0, SAMPLES, sampling, slow_path.trace(iterations, SAMPLES, STEPS))


@pytest.fixture(scope="module")
def lm() -> model.LM:
    made = tiny.causal("llama")
    made.generation_config.eos_token_id = list(range(60, 100))
    return model.adapt(made, tiny.tokenizer())


def whitened(round: Round) -> torch.Tensor:
    return control.rebuild(round, STEPS, DIM, torch.device("cpu")).m_TD.double()


def dense_marginal(round: Round) -> torch.Tensor:
    """u [T, D] where what follows a sample's end is its conditional mean under N(alpha u, Sigma) given the start."""
    sampling = round.sampling
    sigma, left = slow_path.covariance(sampling, STEPS), slow_path.factor(sampling, STEPS)
    u = torch.zeros(STEPS, DIM, dtype=torch.float64)
    for iteration, entry in enumerate(round.trace):
        following = torch.zeros_like(u)
        for sample, (weight, end) in enumerate(zip(entry.weights, entry.lengths, strict=True)):
            v = u + left @ slow_path.white(round, iteration, sample, STEPS, DIM)
            inverse = torch.linalg.pinv(sigma[:end, :end], hermitian=True)
            later = ALPHA * u[end:] + sigma[end:, :end] @ inverse @ (v[:end] - ALPHA * u[:end])
            following += weight * torch.cat([v[:end], later])
        u = following
    return u


@kinds
def test_the_full_update_is_the_weighted_mean_of_the_samples(kind: tuple[str, float]) -> None:
    round = request(kind, "full")
    u = slow_path.factor(round.sampling, STEPS) @ whitened(round)
    torch.testing.assert_close(u, slow_path.control(round, STEPS, DIM), rtol=0, atol=1e-5)


@kinds
def test_the_marginal_update_integrates_out_what_follows_the_end(kind: tuple[str, float]) -> None:
    round = request(kind, "marginal")
    u = slow_path.factor(round.sampling, STEPS) @ whitened(round)
    torch.testing.assert_close(u, dense_marginal(round), rtol=0, atol=1e-5)


@kinds
@pytest.mark.parametrize("after_eos", ["full", "marginal"])
def test_costs_are_those_of_the_precision_matrix(lm: model.LM, kind: tuple[str, float], after_eos: str) -> None:
    """control_cost = u' Sigma_T^-1 eps and control_sq = u' Sigma_T^-1 u over the steps that count."""
    round = request(kind, after_eos)
    left = slow_path.factor(round.sampling, STEPS)
    u = left @ whitened(round)
    rollout = Engine(lm, SAMPLES, STEPS).run([round])[0]
    lengths = [len(trajectory.token_ids) for trajectory in rollout.trajectories]
    assert min(lengths) < STEPS and len(set(lengths)) > 2
    for trajectory, length in zip(rollout.trajectories, lengths, strict=True):
        counted = STEPS if after_eos == "full" else length
        eps = left @ slow_path.white(round, round.iteration, trajectory.sample, STEPS, DIM)
        precision = torch.linalg.pinv(slow_path.covariance(round.sampling, counted), hermitian=True)
        cost, square = ((u[:counted] * (precision @ x[:counted])).sum() for x in (eps, u))
        assert trajectory.control_cost == pytest.approx(float(cost), rel=1e-4, abs=1e-4)
        assert trajectory.control_sq == pytest.approx(float(square), rel=1e-4)
    precision = torch.linalg.pinv(slow_path.covariance(round.sampling, STEPS), hermitian=True)
    assert rollout.u_sq == pytest.approx(float((u * (precision @ u)).sum()), rel=1e-4)


@pytest.mark.parametrize("after_eos", ["full", "marginal"])
def test_an_iteration_without_weights_leaves_the_control_as_it_was(after_eos: str) -> None:
    round = request(("ar1", 0.7), after_eos, 2)
    nothing = Weights((0.0,) * SAMPLES, (STEPS,) * SAMPLES)
    longer = dataclasses.replace(round, iteration=3, trace=(*round.trace, nothing))
    assert torch.equal(whitened(longer), whitened(round))


def test_one_sample_of_weight_one_is_the_control() -> None:
    """n = 1 gives u = v."""
    round = dataclasses.replace(request(("independent", 0.0), "full", 1), trace=(Weights((1.0,), (3,)),))
    torch.testing.assert_close(whitened(round), slow_path.white(round, 0, 0, STEPS, DIM), rtol=0, atol=1e-6)


def test_the_first_iteration_costs_nothing(lm: model.LM) -> None:
    rollout = Engine(lm, SAMPLES, STEPS).run([request(("ar1", 0.7), "full", 0)])[0]
    assert {(t.control_cost, t.control_sq) for t in rollout.trajectories} == {(0.0, 0.0)}
    assert rollout.u_sq == 0.0
