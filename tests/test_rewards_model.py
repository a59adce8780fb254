"""Model rewards: a score is a function of its text alone, whatever is scored beside it and however it is padded."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny_chat import TEMPLATE, classifier, tokenizer
from transformers import BertConfig, BertForSequenceClassification

from aisp_dist.config import ConfigError, ModelReward
from aisp_dist.records import Prompt, Score
from aisp_dist.rewards import load

BOS, EOS, PAD = 0, 1, 2
PROMPT = Prompt("p", 0, (("system", "S"), ("user", "Hi")))
RESPONSES = ["yes", "", "a much longer answer than the rest", "no", "yes", "maybe so"]


def settings(folder, **more):
    return ModelReward(kind="model", model=str(folder), **more)


def made(folder, tok=None, pad_token_id=None, **more):
    model = classifier(folder, tok or tokenizer(), pad_token_id=pad_token_id)
    return model, load("main", settings(folder, **more), device="cpu")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    return (*made(folder), folder)


def by_hand(model, prompt, response, cut=0):
    """The logit at the last token of the one sequence, by no code of ours; `cut` tokens lost after BOS."""
    content = (("user", prompt.content),) if isinstance(prompt.content, str) else prompt.content
    chat = [{"role": role, "content": text} for role, text in (*content, ("assistant", response))]
    ids = tokenizer().apply_chat_template(chat, return_dict=False)
    ids = ids[:1] + ids[1 + cut :]
    with torch.inference_mode():
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()


def values(scores):
    assert all(score.reason is None for score in scores)
    return [score.value for score in scores]


def test_scores_are_the_models_logits_at_the_last_token(loaded):
    model, score, _ = loaded
    want = [by_hand(model, PROMPT, response) for response in RESPONSES]
    assert values(score(PROMPT, RESPONSES)) == pytest.approx(want, abs=1e-5)
    assert max(want) - min(want) > 0.1 and max(map(abs, want)) > 1  # not through a sigmoid, and not all alike
    text = Prompt("p", 0, "Hi")
    assert values(score(text, ["yes"])) == pytest.approx([by_hand(model, text, "yes")], abs=1e-5)


def test_a_batch_of_one_scores_like_any_batch(loaded):
    _, score, folder = loaded
    want = values(score(PROMPT, RESPONSES))
    assert [values(score(PROMPT, [r]))[0] for r in RESPONSES] == pytest.approx(want, abs=1e-5)
    for batch_rows in (1, 2, 3):
        small = load("main", settings(folder, batch_rows=batch_rows), device="cpu")
        assert values(small(PROMPT, RESPONSES)) == pytest.approx(want, abs=1e-5)


def test_an_encoder_does_not_see_its_padding(tmp_path):
    torch.manual_seed(0)
    tok = tokenizer()
    config = BertConfig(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.5, num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    score = load("main", settings(tmp_path), device="cpu")
    alone = [values(score(PROMPT, [r]))[0] for r in RESPONSES]
    assert values(score(PROMPT, RESPONSES)) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_permuted_request_has_the_permuted_bits(loaded, dtype):
    _, _, folder = loaded
    score, fresh = (load("main", settings(folder, batch_rows=2, dtype=dtype), device="cpu") for _ in range(2))
    want = dict(zip(RESPONSES, score(PROMPT, RESPONSES), strict=True))
    for order in (RESPONSES[::-1], sorted(RESPONSES), [*RESPONSES, *RESPONSES]):
        assert score(PROMPT, order) == [want[r] for r in order]
    fresh(Prompt("q", 1, "Something else"), RESPONSES[:2])
    assert fresh(PROMPT, RESPONSES) == [want[r] for r in RESPONSES]


def test_equal_responses_are_scored_once_and_their_prompt_apart(loaded):
    score = load("main", settings(loaded[2]), device="cpu")
    seen = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(len(args[0])) if isinstance(module, torch.nn.Embedding) else None
    )
    score(PROMPT, ["a", "b", "a", "a"])
    hook.remove()
    assert seen == [1, 2]


@pytest.mark.parametrize("pad", [None, "<pad>", "</s>", "<s>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(tmp_path, pad, side):
    tok = tokenizer(pad=pad)
    tok.padding_side = side
    model, score = made(tmp_path, tok, pad_token_id=tok.pad_token_id)
    # every turn ends in EOS, which may not be taken for padding
    for prompt in (Prompt("p", 0, (("user", "see"), ("assistant", "what"), ("user", "here"))), PROMPT):
        want = [by_hand(model, prompt, response) for response in RESPONSES]
        assert values(score(prompt, RESPONSES)) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
def test_one_bos(tmp_path, template):
    model, score = made(tmp_path, tokenizer(template))
    assert values(score(PROMPT, ["yes"])) == pytest.approx([by_hand(model, PROMPT, "yes")], abs=1e-5)


def test_only_the_prompt_is_cut(loaded):
    model, _, folder = loaded
    prompt = Prompt("p", 0, (("user", "x" * 20 + "end"),))
    whole = len("[user][assistant]") + 3 + 23 + len("answer")
    own = 1 + len("[user]") + 23 + 1
    for max_tokens in (whole, whole - 1, whole - 7, whole - own + 1):
        score = load("main", settings(folder, max_tokens=max_tokens), device="cpu")
        want = by_hand(model, prompt, "answer", cut=whole - max_tokens)
        assert values(score(prompt, ["answer"])) == pytest.approx([want], abs=1e-5)
    none = load("main", settings(folder, max_tokens=whole - own), device="cpu")
    long, short = none(prompt, ["answer", "an"])
    assert long.value is None and "19 tokens, more than the 18" in long.reason
    assert short.value is not None


def test_rows_that_were_cut_differently_are_still_right(loaded):
    model, _, folder = loaded
    prompt = Prompt("p", 0, (("user", "all of this differs, once it is cut: " * 2),))
    score = load("main", settings(folder, max_tokens=60), device="cpu")
    cuts = [len("[user][assistant]") + 3 + len(prompt.content[0][1]) + len(r) - 60 for r in RESPONSES]
    want = [by_hand(model, prompt, r, cut) for r, cut in zip(RESPONSES, cuts, strict=True)]
    assert len(set(cuts)) > 3 and values(score(prompt, RESPONSES)) == pytest.approx(want, abs=1e-5)


def test_the_models_positions_bound_the_input(loaded):
    model, score, _ = loaded  # 128 positions, max_tokens 2048
    prompt = Prompt("p", 0, (("user", "x" * 200),))
    whole = len("[user][assistant]") + 3 + 200 + 2
    assert values(score(prompt, ["ok"])) == pytest.approx([by_hand(model, prompt, "ok", cut=whole - 128)], abs=1e-5)
    assert score(prompt, ["y" * 128])[0].value is None


def test_numbers_that_are_none_are_quarantined(tmp_path):
    model = classifier(tmp_path, tokenizer())
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer().convert_tokens_to_ids("!")] = math.nan
    model.save_pretrained(tmp_path)
    good, bad = load("main", settings(tmp_path), device="cpu")(PROMPT, ["fine", "broken!"])
    assert good.value is not None and bad == Score(None, "the reward is nan; give it dtype: float32")


def test_a_template_that_refuses_quarantines(tmp_path):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    _, score = made(tmp_path, tokenizer(template))
    (refused,) = score(PROMPT, ["yes"])
    assert refused.value is None and "no system" in refused.reason
    assert score(replace(PROMPT, content="Hi"), ["yes"])[0].value is not None


def test_a_message_that_the_template_does_not_show_quarantines(tmp_path):
    shows = "{% for m in messages if m.role != 'tool' %}"
    folder = tmp_path / "reward"
    _, score = made(folder, tokenizer(TEMPLATE.replace("{% for m in messages %}", shows)))
    prompt = replace(PROMPT, content=(*PROMPT.content, ("tool", "3 degrees")))
    (refused,) = score(prompt, ["yes"])
    assert refused.value is None and "does not show message 3 of 4 (role 'tool')" in refused.reason
    assert score(PROMPT, ["yes"])[0].value is not None
    assert load("main", settings(folder, self_test=False), device="cpu")(prompt, ["yes"]) == [refused]


def test_special_tokens_in_texts_are_text(loaded):
    model, score, _ = loaded
    tok = tokenizer()
    for content, response in (("see </s>[user]", "yes"), ("see", "yes</s>[user]no<s>")):
        prompt, ids = Prompt("p", 0, content), [BOS]
        for turn in (f"[user]{content}", f"[assistant]{response}"):
            ids += [*tok(turn, add_special_tokens=False, split_special_tokens=True)["input_ids"], EOS]
        with torch.inference_mode():
            want = model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert values(score(prompt, [response])) == pytest.approx([want], abs=1e-5)
        assert abs(by_hand(model, prompt, response) - want) > 1e-3


def test_half_precision_answers_in_full(tmp_path):
    classifier(tmp_path, tokenizer()).to(torch.bfloat16).save_pretrained(tmp_path)
    low = values(load("main", settings(tmp_path), device="cpu")(PROMPT, RESPONSES))
    full = values(load("main", settings(tmp_path, dtype="float32"), device="cpu")(PROMPT, RESPONSES))
    assert low == pytest.approx(full, abs=0.3) and low != full


def test_no_responses(loaded):
    assert loaded[1](PROMPT, []) == []


def test_what_is_no_reward_model_is_refused(tmp_path, loaded):
    model = loaded[0]
    classifier(tmp_path / "two", tokenizer(), labels=2)
    classifier(tmp_path / "dumb", tokenizer(None))
    model.model.save_pretrained(tmp_path / "headless")
    tokenizer().save_pretrained(tmp_path / "headless")
    cases = {
        "two": "exactly one",
        "dumb": "no chat template",
        "headless": "lacks score.weight",
        "absent": "is not a directory",
    }
    for name, words in cases.items():
        with pytest.raises(ConfigError) as error:
            load("main", settings(tmp_path / name), device="cpu")
        assert words in str(error.value), name
    torch.save(model.state_dict(), tmp_path / "dumb" / "pytorch_model.bin")
    (tmp_path / "dumb" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        load("main", settings(tmp_path / "dumb"), device="cpu")


@pytest.mark.parametrize("name", ["demo", "demo-judge"])
def test_the_demo_models_judge(name):
    score = load("main", ModelReward(kind="model", model=name), device="cpu")
    got = values(score(Prompt("p", 0, "What is rain?"), RESPONSES))
    assert all(a != b for a, b in pairwise(got[:4])) and got[0] == got[4]
