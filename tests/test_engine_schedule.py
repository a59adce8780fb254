"""The same bits whatever the schedule: a round's states, tokens and costs do not depend on what shares the batch.

`alone` is every round in an engine of its own, on one thread; every other schedule is held against it, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import kv, model
from aisp_dist.records import BASE_ITERATION, Rollout, Round, Sampling, TopP

STEPS = 8
FAMILIES = {
    "llama": {},
    "gemma3": {},
    "gemma2": {},
    # Large enough that two threads share every kernel, grouped heads that fill no tile evenly, odd sizes.
    "qwen3": {"hidden_size": 96, "intermediate_size": 1376, "num_attention_heads": 12, "num_key_value_heads": 4},
}
CASES = [(family, torch.float32) for family in FAMILIES] + [("qwen3", torch.bfloat16), ("gemma2", torch.bfloat16)]
cases = pytest.mark.parametrize(("family", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
STARTS = ((), (7, 8), (9,) * 7, (5,))
Bits = tuple[dict[Round, Rollout], dict[Any, torch.Tensor]]


def prompt(length: int) -> tuple[int, ...]:
    return tuple(int(x) for x in torch.randint(4, 260, (length,), generator=torch.Generator().manual_seed(length)))


def rounds() -> list[Round]:
    """Uneven lengths and groups, 47 trajectories for 32 rows, every noise kind, draws, given tokens, likelihoods and a
    base answer."""
    trace = functools.partial(slow_path.trace, samples=5, length=STEPS)
    ar1, mixed = (
        Sampling(0.5, "ar1", 0.7, likelihood=True),
        Sampling(0.5, "mixture", 0.8, alpha=0.9, after_eos="marginal"),
    )
    return [
        Round(3, "a", prompt(5), 0, 0, 7, Sampling(0.5)),
        Round(3, "b", prompt(40), 2, 0, 12, ar1, trace(2)),
        Round(3, "b", prompt(40), BASE_ITERATION, 0, 1, Sampling()),
        Round(3, "c", prompt(23), 3, 0, 3, mixed, trace(3)),
        Round(3, "d", prompt(1), 1, 0, 20, Sampling(0.5, "shared", decode=TopP(0.9, 1.0)), trace(1)),
        Round(3, "e", prompt(9), 1, 0, 4, Sampling(decode=TopP(0.9, 1.0), likelihood=True), starts=STARTS),
    ]


@functools.cache
def language_model(family: str, dtype: torch.dtype) -> model.LM:
    """Many end tokens, so that rows end at all kinds of steps."""
    made = tiny.causal(family, **FAMILIES[family])
    made.generation_config.eos_token_id = [tiny.EOS_ID, *range(60, 80)]
    return model.adapt(made.to(dtype), tiny.tokenizer())


def engine(family: str, dtype: torch.dtype, **settings: Any) -> slow_path.Watched:
    return slow_path.Watched(language_model(family, dtype), 27, STEPS, **settings)  # 32 slots


@functools.cache
def alone(family: str, dtype: torch.dtype) -> Bits:
    rollouts, states = {}, {}
    for round in rounds():
        one = engine(family, dtype)
        rollouts[round] = one.run([round])[0]
        states.update(one.seen)
    return rollouts, states


def together(one: slow_path.Watched, order: list[Round], every: int = 0) -> Bits:
    """Runs rounds in an order, the next one submitted `every` so many steps."""
    waiting, rollouts = list(order), {}
    while waiting or one.busy:
        for _ in range(1 if every else len(waiting)):
            if waiting:
                one.submit(waiting.pop(0))
        for _ in range(every or 1):
            rollouts.update(one.step())
    return rollouts, one.seen


def assert_same(left: Bits, right: Bits) -> None:
    assert left[0] == right[0]
    assert left[1].keys() == right[1].keys()
    different = [key for key in left[1] if not torch.equal(left[1][key], right[1][key])]
    assert not different, f"{len(different)} of {len(left[1])} states differ, first {different[:4]}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cases
def test_alone_or_in_any_company(family: str, dtype: torch.dtype) -> None:
    expected = alone(family, dtype)
    shuffled = [rounds()[i] for i in (4, 2, 0, 5, 3, 1)]
    assert_same(together(engine(family, dtype), shuffled), expected)
    assert_same(together(engine(family, dtype), shuffled[::-1], every=3), expected)  # late starters


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_over_several_blocks_of_a_suffix(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in differing blocks, and, with a window of 8, rows that see nothing of the blocks before theirs."""
    monkeypatch.setattr(kv, "_BLOCK", 32)
    lm = model.adapt(tiny.causal(family), tiny.tokenizer())
    steps, expected = 70, {}
    some = [dataclasses.replace(round, trace=(), iteration=0) for round in (rounds()[0], rounds()[3])]
    for round in some:
        one = slow_path.Watched(lm, 27, steps)
        expected.update(zip([round], one.run([round]), strict=True))
        assert one.steps > 64
    assert together(slow_path.Watched(lm, 27, steps), some, every=37)[0] == expected
    trajectory = expected[some[0]].trajectories[0]
    z_TD = slow_path.states(tiny.causal(family), [*some[0].prompt_tokens, *trajectory.token_ids])
    one = slow_path.Watched(lm, 27, steps)
    one.run(some)
    for step in range(1, len(trajectory.token_ids) + 1):
        z_D = one.seen[some[0].prompt_id, 0, 0, step]
        assert float((z_D - z_TD[len(some[0].prompt_tokens) + step - 2]).abs().max()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_like_one(dtype: torch.dtype) -> None:
    expected = alone("qwen3", dtype)
    torch.set_num_threads(2)
    assert_same(together(engine("qwen3", dtype), rounds()[::-1], every=2), expected)


@cases
def test_a_round_in_two_parts(family: str, dtype: torch.dtype) -> None:
    rollouts, states = alone(family, dtype)
    for round in rounds():
        if round.stop > 1:
            parts = [
                dataclasses.replace(round, start=start, stop=stop, starts=round.starts[start:stop])
                for start, stop in ((2, round.stop), (0, 2))
            ]
            one = engine(family, dtype)
            late, early = one.run(parts)
            assert early.trajectories + late.trajectories == rollouts[round].trajectories
            assert all(torch.equal(z, states[key]) for key, z in one.seen.items())


@pytest.mark.parametrize("idle_tokens", [0, 45, 1 << 14])
def test_evicted_prompts_come_back_the_same(idle_tokens: int) -> None:
    one = engine("gemma3", torch.float32, idle_tokens=idle_tokens)
    for _ in range(2):
        for round in rounds():
            one.run([round])
            assert sum(len(prompt.tokens) for prompt in one.prompts.values()) <= idle_tokens
    assert_same((alone("gemma3", torch.float32)[0], one.seen), alone("gemma3", torch.float32))


@cases
def test_what_others_left_in_a_slot_is_never_read(family: str, dtype: torch.dtype) -> None:
    one = engine(family, dtype)
    for round in rounds():
        one.submit(round)
    rollouts: dict[Round, Rollout] = {}
    while one.busy:
        rollouts.update(one.step())
        with torch.inference_mode():
            for arena in one.kv.arenas:
                for index, owner in enumerate(arena.owners):
                    for store in (x for kv in arena.kv for x in kv if owner is None):
                        store[index] = torch.nan
    assert_same((rollouts, one.seen), alone(family, dtype))


def test_the_control_is_the_same_incremental_or_rebuilt() -> None:
    """One prompt's iterations in order, backwards, and with another trace in between."""
    for after_eos in ("full", "marginal"):
        sampling = Sampling(0.5, "ar1", 0.7, alpha=0.9, after_eos=after_eos)
        trace, other = slow_path.trace(3, 5, STEPS), slow_path.trace(2, 5, STEPS, seed=9)
        steps = [Round(3, "a", prompt(5), k, 0, 3, sampling, trace[:k]) for k in range(4)]
        fresh = [engine("llama", torch.float32).run([round])[0] for round in steps]
        one = engine("llama", torch.float32)
        assert [one.run([round])[0] for round in steps] == fresh
        assert [one.run([round])[0] for round in reversed(steps)] == fresh[::-1]
        one.run([Round(3, "a", prompt(5), 2, 0, 3, sampling, other)])
        assert one.run(steps[2:]) == fresh[2:]
        assert len({rollout.u_sq for rollout in fresh}) == 4


def test_a_cancelled_round_leaves_the_others_alone() -> None:
    one = engine("llama", torch.float32)
    everything = rounds()
    for round in everything:
        one.submit(round)
    rollouts = dict(one.step())
    one.cancel(everything[1])
    while one.busy:
        rollouts.update(one.step())
    expected = alone("llama", torch.float32)[0]
    assert rollouts == {round: expected[round] for round in everything if round != everything[1]}
    assert one.run([everything[1]]) == [expected[everything[1]]]


def test_a_round_with_infinite_logits_is_given_up_and_the_others_go_on() -> None:
    from aisp_dist.engine.decode import DecodeError

    one = engine("llama", torch.float32)
    broken = Round(3, "z", prompt(9), 0, 0, 4, Sampling(float("inf")))
    for round in (rounds()[0], broken):
        one.submit(round)
    rollouts = {}
    with pytest.raises(DecodeError, match=r"'z'.*not finite") as raised:
        while one.busy:
            rollouts.update(one.step())
    assert raised.value.round == broken
    while one.busy:
        rollouts.update(one.step())
    assert rollouts == {rounds()[0]: alone("llama", torch.float32)[0][rounds()[0]]}
