"""ARGS-greedy: against its definition by brute force, and the reward model's cache that grows with the text."""

from __future__ import annotations

import codecs

import pytest
import tiny
import tiny_chat
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification
from transformers.convert_slow_tokenizer import bytes_to_unicode

from aisp_dist import rewards
from aisp_dist.config import Generator, ModelReward, Run
from aisp_dist.data.chat import encode_chat
from aisp_dist.engine import decode, guide, model
from aisp_dist.records import Prompt, Round, Sampling, TokenReward
from aisp_dist.rewards import stepwise
from aisp_dist.rewards.prefix import Chain, Classifier

PROMPT = Prompt("p", 0, (("user", "tell me"),))
TOKENS = (1, 120, 105, 110, 112)
STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base, reward = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("reward")
    tiny.save("llama", base)
    tiny_chat.classifier(reward, tiny_chat.tokenizer())
    return base, reward


@pytest.fixture(scope="module")
def lm(folders):
    return model.load(Generator(model=str(folders[0])))


@pytest.fixture(scope="module")
def by_reward(folders):
    settings = {"r": {"kind": "model", "model": str(folders[1]), "self_test": False}}
    return stepwise.load(run(settings), folders[1], torch.device("cpu"))


def run(settings: dict, **more: object) -> Run:
    whole = {"output": "o", "generator": {"model": "m"}, "rewards": settings, "method": {"kind": "args"}}
    return Run.model_validate(whole | more)


def asked(k: int, weight: float, sample: int = 0) -> Round:
    return Round(0, "p", TOKENS, 0, sample, sample + 1, Sampling(guide=TokenReward(k, weight)), (), PROMPT)


def decoded(lm, by_reward, *rounds: Round):
    return [r.trajectories[0].token_ids for r in decode.Engine(lm, 32, STEPS, guide=by_reward).run(rounds)]


def by_hand(lm, folder, k: int, weight: float) -> tuple[int, ...]:
    """The definition: whole texts through transformers' own forward, one at a time."""
    own = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    tok, tokens = tiny_chat.tokenizer(), []
    while len(tokens) < STEPS and (not tokens or tokens[-1] not in lm.eos_ids):
        z, _ = lm.dense((*TOKENS, *tokens))
        logits = lm.logits(z[-1:])[0]
        best = (float("-inf"), -1)
        for logit, token in zip(*(x.tolist() for x in logits.topk(k)), strict=True):
            text = said(lm, tokens if token in lm.eos_ids else [*tokens, token])
            messages = (*PROMPT.content, ("assistant", text))
            ids = torch.tensor([encode_chat(tok, messages, {}, add_generation_prompt=False, fix="")])
            with torch.no_grad():
                reward = own(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item()
            best = max(best, (logit + weight * reward, token), key=lambda pair: pair[0])
        tokens.append(best[1])
    return tuple(tokens)


def said(lm, tokens) -> str:
    """The text so far, in whole characters: a token of the tiny tokenizer is a byte, or special and no text."""
    spelled = lm.tokenizer.convert_ids_to_tokens([t for t in tokens if t not in lm.tokenizer.all_special_ids])
    letters = bytes_to_unicode()
    data = bytes(next(byte for byte, letter in letters.items() if letter == token) for token in spelled)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


def test_without_weight_and_with_one_candidate_it_is_greedy(lm, by_reward):
    greedy = decode.Engine(lm, 32, STEPS).run([Round(0, "p", TOKENS, 0, 0, 1, Sampling())])[0].trajectories[0].token_ids
    assert decoded(lm, by_reward, asked(8, 0.0)) == decoded(lm, by_reward, asked(1, 1e6)) == [greedy]


@pytest.mark.parametrize(("k", "weight"), [(4, 1.0), (16, 3.0), (260, 1e4)])
def test_every_token_is_the_definitions(lm, by_reward, folders, k, weight):
    assert decoded(lm, by_reward, asked(k, weight)) == [by_hand(lm, folders[1], k, weight)]


def test_company_changes_no_bit(lm, by_reward):
    plain = Round(0, "q", (1, 90), 0, 0, 3, Sampling(sigma2=1.0))
    (alone,) = decode.Engine(lm, 32, STEPS).run([plain])
    together = decode.Engine(lm, 32, STEPS, guide=by_reward).run([plain, asked(8, 2.0), asked(8, 2.0, sample=1)])
    assert together[0] == alone
    assert [r.trajectories[0].token_ids for r in together[1:]] == 2 * decoded(lm, by_reward, asked(8, 2.0))


def test_a_growing_text_passes_only_what_is_new(folders):
    own = AutoModelForSequenceClassification.from_pretrained(folders[1], num_labels=1, dtype=torch.float32).eval()
    whole, kept = Classifier(own), Chain()
    text = tuple(3 + (7 * i) % 200 for i in range(60))
    for end in (30, 31, 32, 40, 35, 36):  # forwards, and once back
        rows = sorted((*text[:end], 10 + c) for c in range(5))
        expected = whole.logits(rows, 32)
        before = whole.tokens
        found = whole.logits(rows, 32, kept)
        assert found == pytest.approx(expected, abs=1e-5)
        if end in (31, 32, 36):
            assert whole.tokens - before == 1 + 5 * 8, "one new token of the text, and the rows' own padded to 8"
    assert kept.tokens == text[:36]


def test_no_finite_reward_breaks_the_round_and_no_other(lm, by_reward):
    nothing = guide.Guide(reward=lambda name, prompt, texts: [None] * len(texts))
    engine = decode.Engine(lm, 32, STEPS, guide=nothing)
    plain = Round(0, "q", (1, 90), 0, 0, 1, Sampling())
    engine.submit(asked(4, 1.0))
    engine.submit(plain)
    answers, errors = {}, []
    while engine.busy:
        try:
            answers.update(engine.step())
        except decode.DecodeError as error:
            errors.append(str(error))
    assert list(answers) == [plain] and len(errors) == 1 and "no candidate of token 1 has a finite reward" in errors[0]


def test_several_rewards_are_summed_by_weight_and_a_missing_one_is_left_out(tmp_path):
    (tmp_path / "r.py").write_text(
        "def a(prompts, completions): return [float(len(c[-1]['content'])) for c in completions]\n"
        "def b(prompts, completions): return [None if len(c[-1]['content']) == 1 else 10.0 for c in completions]\n"
        "def c(prompts, completions): return [float('nan') if len(x[-1]['content']) > 2 else 0 for x in completions]\n"
    )
    settings = {n: {"kind": "function", "function": f"r.py:{n}", "weight": 2.0} for n in "abc"}
    scored = stepwise.load(run(settings), tmp_path, torch.device("cpu")).reward(("p", 0), PROMPT, ["x", "xx", "xxx"])
    assert scored == [2.0, 24.0, None]


def test_what_cannot_be_asked_at_every_token_is_refused():
    http = {"kind": "http", "url": "http://h/v1", "model": "m", "rubric": "{prompt} {response}"}
    with pytest.raises(ValidationError, match=r"rewards.r of kind http cannot serve"):
        run({"r": http})
    two = {"r": {"kind": "model", "model": "demo"}, "j": http | {"use": "report"}}
    run(two)
    with pytest.raises(ValidationError, match="combine: standardized cannot serve"):
        run(two, combine="standardized")


def test_a_model_reward_scores_a_growing_text_as_a_whole_one(folders):
    score = rewards.load("r", ModelReward(model=str(folders[1]), self_test=False))
    for texts in (["a", "b"], ["bc", "bd"], ["bcd", "bce"], ["x", "y"]):
        grown = score.growing("name", PROMPT, texts)
        assert [s.value for s in grown] == pytest.approx([s.value for s in score(PROMPT, texts)], abs=1e-5)
