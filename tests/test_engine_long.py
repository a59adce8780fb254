"""Long answers: rows take room as they reach it, and those that find none begin anew with the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import slow_path
import tiny
import torch

from aisp_dist.engine import kv, model, starts
from aisp_dist.engine.decode import DecodeError, Engine
from aisp_dist.records import Rollout, Round, Sampling, TopP

STEPS = 140
ARENA = 32 * 32  # tokens of an arena with blocks of 32 steps


class Counted(slow_path.Watched):
    """Counts preemptions, and the most arenas at a time."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.preempted, self.most = 0, 0

    def _preempt(self, slot: int) -> None:
        super()._preempt(slot)
        self.preempted += 1

    def _decode(self) -> None:
        super()._decode()
        self.most = max(self.most, len(self.kv.arenas))
        blocks = sum(map(len, self.kv.tables))
        assert len(self.kv.arenas) == -(-blocks // 32) and self.kv.holes < 32
        for slot, table in enumerate(self.kv.tables):
            assert [arena.owners[index] for arena, index in table] == [(slot, at) for at in range(len(table))]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "_BLOCK", 32)


def rounds() -> list[Round]:
    """Rows of all lengths, under noise and drawn, some with a start, of three prompts; a second round of the first."""
    draw = torch.Generator().manual_seed(0)
    a, b, c = (tuple(torch.randint(70, 260, (n,), generator=draw).tolist()) for n in (20, 3, 40))
    begun = tuple(tuple(torch.randint(70, 260, (n,), generator=draw).tolist()) for n in (0, 40, 70, 5, 33, 64))
    return [
        Round(1, "a", a, 0, 0, 12, Sampling(0.5)),
        Round(1, "b", b, 1, 0, 6, Sampling(decode=TopP(0.95, 1.0), likelihood=True), starts=begun),
        Round(1, "c", c, 0, 0, 10, Sampling(0.5, "ar1", 0.7)),
        Round(1, "a", a, 1, 0, 12, Sampling(decode=TopP(0.9, 1.0))),
    ]


def language_model(family: str, ends: Sequence[int] = (60,), **overrides: Any) -> model.LM:
    made, tokenizer = tiny.causal(family, **overrides), tiny.tokenizer()
    made.generation_config.eos_token_id, made.config.eos_token_id = list(ends), None
    tokenizer.eos_token = None
    return model.adapt(made, tokenizer)


@pytest.mark.parametrize(("family", "sizes"), [("llama", (2, 1)), ("gemma3", (2,))])
def test_a_store_too_small_for_all_rows_gives_the_same_rows(family: str, sizes: tuple[int, ...]) -> None:
    lm = language_model(family)
    large = Counted(lm, 32, STEPS)
    expected: list[Rollout] = large.run(rounds())
    assert not large.preempted and large.most > 2
    preempted = 0
    for arenas in sizes:
        small = Counted(lm, 32, STEPS, kv_tokens=arenas * ARENA + 150)
        assert small.run(rounds()) == expected
        assert small.seen.keys() == large.seen.keys()
        assert all(torch.equal(z, large.seen[key]) for key, z in small.seen.items())
        assert small.most == arenas and small.preempted > preempted
        preempted = small.preempted


def test_rows_of_one_prompt_give_way_to_older_ones() -> None:
    """The youngest begin anew; the oldest row is never preempted, so that some row always comes nearer to its end."""
    lm = language_model("llama")
    expected = [Engine(lm, 32, STEPS).run([round])[0] for round in rounds()]
    small = Counted(lm, 32, STEPS, kv_tokens=ARENA + 150)
    order: list[tuple[int, int]] = []
    for round in rounds():
        small.submit(round)
    finished = {}
    while small.busy:
        before = [row for row in small.rows if row]
        finished.update(small.step())
        out = [row for row in before if row.reached and not row.tokens[len(row.start) :]]
        if before and out:
            assert min(before, key=lambda row: row.age) not in out
            order += [row.age for row in out]
    assert order and [finished[round] for round in rounds()] == expected
    held = [prompt for prompt in small.prompts.values() if prompt.prefix]
    assert small.kv.free == small.kv.capacity - sum(len(p.tokens) + starts.held(p.tiles) for p in held)


def test_a_row_without_room_even_alone_is_given_up_with_the_numbers() -> None:
    lm = language_model("llama", (), num_hidden_layers=1, max_position_embeddings=4096)
    one = Engine(lm, 32, 1100, kv_tokens=ARENA + 10)
    long = Round(1, "long", (7,) * 10, 0, 0, 2, Sampling(0.5))
    one.submit(long)
    said = "'long'.*sample 0 has 1025 tokens after a prompt of 10 .* 1034 tokens.* lower generator.max_new_tokens"
    with pytest.raises(DecodeError, match=said) as raised:
        while one.busy:
            one.step()
    assert raised.value.round == long and not one.busy and one.kv.free == ARENA
    short = dataclasses.replace(long, prompt_id="short", starts=((8,) * 1000,), stop=1, sampling=Sampling())
    with pytest.raises(ValueError, match="a prompt of 10 tokens and an answer that begins with 1000 .* room for 1034"):
        one.submit(short)


def test_four_thousand_tokens_are_those_of_one_dense_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from a model of one layer, over 64 blocks, with a stop string that never comes."""
    monkeypatch.setattr(kv, "_BLOCK", 64)
    settings = {"num_hidden_layers": 1, "max_position_embeddings": 8192}
    prompt = tuple(range(100, 117))
    one = Engine(language_model("llama", (), **settings), 1, 4096, stop=["never\x00there"])
    (rollout,) = one.run([Round(1, "p", prompt, 0, 0, 1, Sampling(decode=TopP(1.0, 1.0), likelihood=True))])
    (trajectory,) = rollout.trajectories
    assert len(trajectory.token_ids) == 4096 and trajectory.finish_reason == "length"
    tokens = torch.tensor([[*prompt, *trajectory.token_ids]])
    with torch.no_grad():
        losses = -tiny.causal("llama", **settings)(input_ids=tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert trajectory.nll == pytest.approx(float(losses.gather(1, tokens[0, len(prompt) :, None]).mean()), abs=1e-5)
