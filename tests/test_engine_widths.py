"""Fewer rows than slots are computed where that changes no bit."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch
from test_engine_schedule import STEPS, language_model, rounds
from torch import nn

from aisp_dist.engine import model, nucleus
from aisp_dist.engine.decode import Engine
from aisp_dist.engine.step import Batch
from aisp_dist.engine.widths import widths
from aisp_dist.records import Sampling, TopP

SLOTS = 128
WIDTHS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, SLOTS)


class Slipping(nn.Module):
    """A head whose logits depend on whether it is given 64 rows."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs_embeds, **more):
        out = self.head(inputs_embeds=inputs_embeds, **more)
        if len(inputs_embeds) < 64:
            out.logits = out.logits + 1e-3
        return out


@pytest.fixture
def computed(monkeypatch):
    """The rows that every step computes."""
    rows, first = [], Batch.first

    def watched(self, number):
        rows.append(number)
        return first(self, number)

    monkeypatch.setattr(Batch, "first", watched)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_the_bits_that_they_have_among_all_slots(dtype, computed):
    found = []
    for whole in (False, True):
        engine = Engine(language_model("qwen3", dtype), SLOTS, STEPS)
        assert engine.widths == WIDTHS
        if whole:
            engine.widths = (SLOTS,)
        computed.clear()
        found.append(engine.run(rounds()))
        assert (min(computed) < SLOTS) is not whole
    assert found[0] == found[1]


def test_a_step_computes_what_the_highest_taken_slot_needs(computed):
    engine = Engine(language_model("qwen3", torch.float32), SLOTS, STEPS)
    one, two = (dataclasses.replace(rounds()[0], prompt_id=name, stop=n) for name, n in (("p", 3), ("q", 40)))
    engine.run([one])
    assert set(computed) == {8}
    computed.clear()
    engine.run([two])
    assert computed[0] == 40 and set(computed) <= {8, 16, 24, 32, 40}


def test_sizes_that_give_other_bits_are_not_used():
    lm = language_model("qwen3", torch.float32)
    slipping = dataclasses.replace(lm, head=Slipping(lm.head))
    assert widths(lm, SLOTS) == WIDTHS
    assert widths(lm, 192) == (*WIDTHS, 144, 160, 176, 192)
    assert [widths(slipping, slots) for slots in (SLOTS, 96, 32)] == [WIDTHS[7:], WIDTHS[7:10], WIDTHS[:4]]


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"falcon", "bloom"}))
def test_every_family_can_be_tried(family):
    assert widths(model.adapt(tiny.causal(family), tiny.tokenizer()), 64)[-1] == 64


def test_only_rows_that_draw_are_drawn(monkeypatch):
    """Logits of an empty slot are all equal, which takes a draw the longest."""
    drawn, draw = [], nucleus.draw

    def watched(logits, *more):
        drawn.append(len(logits))
        return draw(logits, *more)

    monkeypatch.setattr(nucleus, "draw", watched)
    engine = Engine(language_model("qwen3", torch.float32), SLOTS, STEPS)
    some = dataclasses.replace(rounds()[0], sampling=Sampling(decode=TopP(0.9, 1.0)), stop=3)
    engine.run([some, dataclasses.replace(some, sampling=Sampling(), iteration=1)])
    assert max(drawn) == 3 and sum(drawn) <= 3 * STEPS
