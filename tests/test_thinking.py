"""Responses of reasoning models: what is stripped, what is an answer, and what a whole search makes of it."""

from __future__ import annotations

import asyncio

import pytest

from aisp_dist.align import align
from aisp_dist.config import Run
from aisp_dist.data.thinking import Unfinished, answer, opens
from aisp_dist.records import Prompt, Rollout, Round, Score, Trajectory

TAGS = ("<think>", "</think>")


@pytest.mark.parametrize(
    ("text", "opened", "said"),
    [
        ("<think>let me see</think>\n\nFour.", False, "Four."),
        ("let me see</think>Four.", True, "Four."),
        ("<think></think>Four.", False, "Four."),
        ("Four.", False, "Four."),
        ("</think>Four.", False, "Four."),
        ("It ends with </think> they say.", False, "It ends with </think> they say."),
        ("<think>a</think>b </think>c", False, "b </think>c"),
        (" Four, with <think> in it.", False, " Four, with <think> in it."),
    ],
)
def test_what_is_left(text, opened, said):
    assert answer(text, TAGS, opened) == said


@pytest.mark.parametrize(("text", "opened"), [("<think>let me", False), ("  <think>", False), ("let me see", True)])
def test_no_end_of_thinking_is_no_answer(text, opened):
    with pytest.raises(Unfinished, match="there is no </think> in it; raise max_new_tokens"):
        answer(text, TAGS, opened)


def test_a_template_may_open_the_block():
    assert opens("<|user|>hi<|assistant|><think>\n", TAGS) and not opens("<think>a</think> <|assistant|>", TAGS)


TEXTS = [
    "<think>no end",
    "<think>short</think>ab",
    "<think>longer thoughts than that</think>abc",
    "<think></think>a",
]


def search(thinking: str, base: str = "<think>x</think>base"):
    seen = []
    rewards = {n: {"kind": "function", "function": "r.py:f", "use": u} for n, u in (("r", "select"), ("h", "report"))}
    run = Run.model_validate(
        {"output": "o", "generator": {"model": "m", "thinking": thinking}, "rewards": rewards,
         "method": {"kind": "best_of_n", "num_samples": 4, "num_iterations": 1}}
    )  # fmt: skip

    class Backend:
        async def rollout(self, round: Round) -> Rollout:
            texts = [base] if round.iteration < 0 else TEXTS
            return Rollout(tuple(Trajectory(i, (i, 7), text, "stop") for i, text in enumerate(texts)))

        async def score(self, name, prompt, responses):
            seen.extend(responses)
            return [Score(float(len(r))) for r in responses]

        async def nll(self, id, tokens, responses):
            return [1.0 for _ in responses]

    return asyncio.run(align(run, Prompt("p", 0, "q"), (1,), Backend())), seen


def test_rewards_and_rows_have_the_answer_alone_and_the_tokens_keep_all():
    done, seen = search("strip")
    assert done.best.text == "abc" and done.best.token_ids == (2, 7) and done.base.text == "base"
    assert not any("think" in text for text in seen)
    assert done.quarantined == 1 and "ends inside its thinking" in done.candidates[0].reason
    kept, seen = search("keep")
    assert kept.best.text == TEXTS[2] and kept.quarantined == 0


def test_a_base_answer_without_an_answer_has_no_reward():
    done, seen = search("strip", base="<think>still")
    assert done.base.reward is None and dict(done.base.rewards) == {"r": None, "h": None}
    assert dict(done.best.rewards) == {"r": 3.0, "h": 3.0} and "<think>still" not in seen
