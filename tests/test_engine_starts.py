"""Given tokens, likelihoods of answers, and the meaning of a flip rate."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import model
from aisp_dist.engine import starts as starts_module
from aisp_dist.engine.calibrate import calibrate
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.lm import LM
from aisp_dist.records import Rates, Round, Sampling, TopP

STEPS, PROMPT = 74, (7, 8, 9)
DRAWN = Sampling(decode=TopP(0.9, 1.0), likelihood=True)
SAMPLINGS = [Sampling(likelihood=True), Sampling(decode=TopP(0.9, 0.7), likelihood=True)]
samplings = pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn"])


@pytest.fixture(scope="module")
def lm() -> model.LM:
    made = tiny.causal("llama")
    made.generation_config.eos_token_id = list(range(60, 64))
    return model.adapt(made, tiny.tokenizer())


def engine(lm: model.LM, **settings: Any) -> slow_path.Watched:
    return slow_path.Watched(lm, 32, STEPS, **settings)


def cuts(seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Starts from two answers that begin alike, cut inside, before and behind tiles of 32 tokens."""
    draw = torch.Generator().manual_seed(seed)
    one, rest = (torch.randint(100, 260, (70,), generator=draw).tolist() for _ in range(2))
    other = one[:40] + rest[:30]
    return tuple(tuple(one[:n]) for n in (70, 0, 33, 1, 32, 45)) + tuple(tuple(other[:n]) for n in (64, 50, 70))


@samplings
def test_continuing_an_answer_gives_that_answer(lm: model.LM, sampling: Sampling) -> None:
    """Uniforms are keyed by step and sample, so giving a sample its own first tokens changes nothing."""
    round = Round(5, "p", PROMPT, 1, 0, 6, sampling)
    (free,) = engine(lm).run([round])
    places = [(17 * i + 3) % len(t.token_ids) for i, t in enumerate(free.trajectories)]
    starts = tuple(t.token_ids[:place] for t, place in zip(free.trajectories, places, strict=True))
    assert max(places) > 33
    (again,) = engine(lm).run([dataclasses.replace(round, starts=starts)])
    for one, other in zip(free.trajectories, again.trajectories, strict=True):
        assert dataclasses.replace(one, nll=None) == dataclasses.replace(other, nll=None)
        assert one.nll == pytest.approx(other.nll, abs=1e-5)


@samplings
def test_given_tokens_come_first_and_others_follow(lm: model.LM, sampling: Sampling) -> None:
    starts = ((), (11, 12), (13,) * (STEPS - 1), (14,) * 32)
    (rollout,) = engine(lm).run([Round(5, "p", PROMPT, 0, 4, 8, sampling, starts=starts)])
    for trajectory, start in zip(rollout.trajectories, starts, strict=True):
        assert trajectory.token_ids[: len(start)] == start and len(trajectory.token_ids) > len(start)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_states_and_likelihoods_are_the_base_models(family: str) -> None:
    """Learned positions, windows that see less than a tile, sinks."""
    lm = model.adapt(tiny.causal(family), tiny.tokenizer())
    prompt, starts = tuple(range(100, 150)), cuts()
    one = engine(lm)
    (rollout,) = one.run([Round(5, "p", prompt, 0, 0, len(starts), DRAWN, starts=starts)])
    reference = tiny.causal(family)
    for trajectory, start in zip(rollout.trajectories, starts, strict=True):
        tokens = [*prompt, *trajectory.token_ids]
        z_TD = slow_path.states(reference, tokens)
        for step in range(len(start) + 1, len(trajectory.token_ids) + 1):
            z_D = one.seen["p", 0, trajectory.sample, step]
            assert float((z_D - z_TD[len(prompt) + step - 2]).abs().max()) < 2e-5
        with torch.no_grad():
            losses = -reference(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        nll = losses[range(len(prompt) - 1, len(tokens) - 1), tokens[len(prompt) :]].mean()
        assert trajectory.nll == pytest.approx(float(nll), abs=1e-5)
    (silent,) = one.run(
        [Round(5, "p", prompt, 0, 0, len(starts), dataclasses.replace(DRAWN, likelihood=False), starts=starts)]
    )
    assert [t.nll for t in silent.trajectories] == [None] * len(starts)
    assert [t.token_ids for t in silent.trajectories] == [t.token_ids for t in rollout.trajectories]


@pytest.mark.parametrize(("family", "dtype"), [("gemma3", torch.float32), ("qwen3", torch.bfloat16)])
def test_a_sample_has_the_same_bits_whatever_starts_are_served_with_it(family: str, dtype: torch.dtype) -> None:
    """Alone, in parts of its round, beside other prompts, after other rounds of its prompt, and where the store holds
    few tiles: tokens, states and likelihoods are equal bit for bit."""
    made = tiny.causal(family, **({"hidden_size": 96, "intermediate_size": 1376} if family == "qwen3" else {}))
    made.generation_config.eos_token_id = list(range(60, 64))
    lm = model.adapt(made.to(dtype), tiny.tokenizer())
    starts = cuts()
    round = Round(5, "p", tuple(range(100, 117)), 1, 0, len(starts), DRAWN, starts=starts)
    whole = engine(lm)
    (expected,) = whole.run([round])

    def parts(size: int) -> list[Round]:
        return [
            dataclasses.replace(round, start=at, stop=min(at + size, len(starts)), starts=starts[at : at + size])
            for at in range(0, len(starts), size)
        ]

    others = [
        Round(5, "q", PROMPT, 1, 0, 9, DRAWN, starts=cuts(1)),
        Round(5, "p", round.prompt_tokens, 2, 0, 25, Sampling(0.5)),
        Round(5, "p", round.prompt_tokens, 3, 0, 9, DRAWN, starts=cuts()[::-1]),
    ]
    shortest = engine(lm, kv_tokens=len(round.prompt_tokens) + 96 + 2 * 32 * 64)
    for one, asked in (
        (engine(lm), parts(1)),
        (engine(lm), [*others, round]),
        (engine(lm), [*parts(4), *others]),
        (shortest, parts(3)),
    ):
        answers = [answer for r, answer in zip(asked, one.run(asked), strict=True) if r not in others]
        assert sorted((t for r in answers for t in r.trajectories), key=lambda t: t.sample) == [*expected.trajectories]
        assert all(torch.equal(z, one.seen[key]) for key, z in whole.seen.items())
    for other in others:  # one after the other, so that the round finds tiles of earlier ones
        shortest.run([other])
    assert shortest.run([round]) == [expected]


def test_starts_that_begin_alike_pass_once(lm: model.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = []

    class Counted(starts_module.StartPass):
        def __init__(self, prefix, tiles):
            super().__init__(prefix, tiles)
            passed.append(tiles)

    monkeypatch.setattr(starts_module, "StartPass", Counted)
    one, begun = engine(lm), cuts()
    round = Round(5, "p", PROMPT, 1, 0, len(begun), DRAWN, starts=begun)
    one.run([round])
    assert sum(map(len, passed)) == 5 and len(passed) == 2  # [0, 32) of both; [32, 64) and [64, 70) of each
    (prompt,) = one.prompts.values()
    assert starts_module.held(prompt.tiles) == 5 * 32
    shorter = tuple(start[: len(start) // 2] for start in begun)
    one.run([dataclasses.replace(round, iteration=2, starts=shorter)])
    assert len(passed) == 2
    one.run([dataclasses.replace(round, iteration=3, starts=(begun[0], (*begun[0][:35], 5)), stop=2)])
    assert len(passed) == 3 and len(passed[2]) == 1  # which leaves the three tiles of the first, and this one
    assert one.kv.free == one.kv.capacity - len(PROMPT) - starts_module.held(prompt.tiles)
    assert starts_module.held(prompt.tiles) == 4 * 32


def test_every_pass_has_the_same_shape(lm: model.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no library has a reason to compute a tile in another way beside fewer others."""
    shapes, states = [], LM.states

    def watched(self: LM, attend: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if isinstance(attend, starts_module.StartPass):
            shapes.append((tuple(ids.shape), tuple(positions.shape)))
        return states(self, attend, ids, positions)

    monkeypatch.setattr(LM, "states", watched)
    for starts in (cuts(), cuts()[:1], ((11, 12),)):
        engine(lm).run([Round(5, "p", PROMPT, 1, 0, len(starts), DRAWN, starts=starts)])
    assert len(shapes) == 4 and set(shapes) == {((4, 32), (4, 32))}


@pytest.mark.parametrize(
    ("starts", "said"),
    [
        (((1,),), "1 starts for 2 samples"),
        (((1,) * STEPS, ()), "a start has 74 tokens"),
        (((1,), (61,)), "a start holds 61, an end token"),
        (((-1,), ()), "a start holds -1"),
    ],
)
def test_impossible_starts_are_refused(lm: model.LM, starts: tuple[tuple[int, ...], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        engine(lm).submit(Round(5, "p", PROMPT, 0, 0, 2, Sampling(), starts=starts))


def test_starts_that_do_not_fit_or_meet_noise_are_refused(lm: model.LM) -> None:
    round = Round(5, "p", PROMPT, 0, 0, 1, Sampling(), starts=((11,) * 33,))
    engine(lm, kv_tokens=67 + 32 * 64).submit(round)
    with pytest.raises(ValueError, match="a prompt of 3 tokens and an answer that begins with 33 need .* 2115"):
        engine(lm, kv_tokens=66 + 32 * 64).submit(round)
    with pytest.raises(ValueError, match="starts with noise of variance 0.4"):
        engine(lm).submit(dataclasses.replace(round, sampling=Sampling(0.4)))


def base_answer(lm: model.LM) -> tuple[int, ...]:
    (base,) = Engine(lm, 32, 10).run([Round(5, "p", PROMPT, -1, 0, 1, Sampling())])
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
