"""Reward models of other layouts, their templates, and the self-test: each planted defect is found."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_chat import TEMPLATE, classifier, tokenizer
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from aisp_dist import demo
from aisp_dist.config import ConfigError, ModelReward, Run
from aisp_dist.output import fingerprint
from aisp_dist.records import Prompt
from aisp_dist.rewards import load, model, self_test, templates
from aisp_dist.rewards.prefix import Classifier

RESPONSES = ["yes", "", "a longer one", "no"]
SIZES = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.5,
}  # fmt: skip
LAYOUTS = {
    "ultrarm": (LlamaConfig, LlamaModel, {"architectures": ["LlamaRewardModel"]}),
    "eurus": (
        MistralConfig,
        MistralModel,
        {"architectures": ["EurusRewardModel"], "auto_map": {"AutoModel": "modeling_eurus_rm.EurusRewardModel"}},
    ),
}


def checkpoint(folder, layout):
    """A body under `model.` and a regression_head, with a config.json as the published ones have it."""
    config_class, body_class, entries = LAYOUTS[layout]
    torch.manual_seed(0)
    config = config_class(**SIZES)
    body, head = body_class(config).eval(), torch.nn.Linear(32, 1, bias=False)
    folder.mkdir()
    weights = {f"model.{key}": value.contiguous() for key, value in body.state_dict().items()}
    save_file(weights | {"regression_head.weight": head.weight.data}, folder / "model.safetensors", {"format": "pt"})
    values = config.to_dict() | entries
    (folder / "config.json").write_text(json.dumps(values))
    if "auto_map" in entries:
        (folder / "modeling_eurus_rm.py").write_text("raise SystemExit('remote code was run')")
    tokenizer(None).save_pretrained(folder)
    return body, head


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_regression_head_scores_the_last_token(tmp_path, layout):
    body, head = checkpoint(tmp_path / "rm", layout)
    settings = ModelReward(model=str(tmp_path / "rm"), chat_template=layout)
    score = load("main", settings, device="cpu")
    want = []
    for response in RESPONSES:
        text = f"Human: Why?\nAssistant: {response}" if layout == "ultrarm" else f"[INST] Why? [\\INST] {response}"
        ids = tokenizer()(text)["input_ids"]
        assert ids[0] == 0 and ids.count(0) == 1
        with torch.inference_mode():
            want.append(head(body(torch.tensor([ids])).last_hidden_state[0, -1]).item())
    found = [s.value for s in score(Prompt("p", 0, "Why?"), RESPONSES)]
    assert found == pytest.approx(want, abs=1e-4) and max(want) - min(want) > 0.1


def test_turns_repeat_and_no_system_message_is_dropped_unasked(tmp_path):
    tok = tokenizer(None)
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    shown = {
        name: tok.apply_chat_template(chat, chat_template=text, tokenize=False)
        for name, text in templates.BUILT_IN.items()
    }
    assert shown == {
        "ultrarm": "Human: a\nAssistant: b\nHuman: c\nAssistant: d",
        "eurus": "[INST] a [\\INST] b [INST] c [\\INST] d",
    }
    checkpoint(tmp_path / "rm", "ultrarm")
    prompt = Prompt("p", 0, (("system", "S"), ("user", "Why?")))
    keep, drop = (
        load("main", ModelReward(model=str(tmp_path / "rm"), chat_template="ultrarm", system=system), device="cpu")
        for system in ("keep", "drop")
    )
    (refused,) = keep(prompt, ["x"])
    assert refused.value is None and "system: drop" in refused.reason
    assert drop(prompt, ["x"]) == keep(Prompt("q", 0, "Why?"), ["x"])


def test_a_missing_head_and_pickled_weights_are_refused(tmp_path):
    body, _ = checkpoint(tmp_path / "rm", "eurus")
    save_file({f"model.{k}": v for k, v in body.state_dict().items()}, tmp_path / "rm" / "model.safetensors")
    settings = ModelReward(model=str(tmp_path / "rm"), chat_template="eurus")
    with pytest.raises(ConfigError, match="lacks score.weight"):
        load("main", settings, device="cpu")
    (tmp_path / "rm" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "rm" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled .*convert it with save_pretrained"):
        load("main", settings, device="cpu")


def test_the_template_of_a_reward_is_in_the_fingerprint(tmp_path):
    def parts(template, text=None):
        if text:
            (tmp_path / "t.jinja").write_text(text)
        reward = {"kind": "model", "model": "demo", "chat_template": template}
        values = {"output": "x", "generator": {"model": "demo"}, "method": {"kind": "best_of_n"}}
        run = Run.model_validate(values | {"rewards": {"main": reward}})
        return fingerprint.fingerprint(fingerprint.components(run, fingerprint.locate(run, tmp_path), tmp_path))

    seen = {parts(None), parts("eurus"), parts("ultrarm"), parts("t.jinja", "a"), parts("t.jinja", "b")}
    assert len(seen) == 5 and parts("t.jinja", "a") in seen
    with pytest.raises(ConfigError, match="rewards.main.chat_template: no file"):
        parts("absent.jinja")


# The self-test.


def made(folder, tok=None, **more):
    classifier(folder, tok or tokenizer())
    return load("main", ModelReward(model=str(folder), **more), device="cpu")


PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def test_a_template_that_begins_texts_twice(tmp_path):
    tok = tokenizer(TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}" * 2))
    with pytest.raises(ConfigError, match="rewards.main: its self-test found that .* begin with 2 BOS"):
        made(tmp_path, tok)
    made(tmp_path, tok, self_test=False)


@pytest.mark.parametrize("self_test", [True, False])
@pytest.mark.parametrize(
    ("template", "number"),
    [
        (PLAIN.replace("m.content", "m.content if m.role == 'user' else ''"), 2),
        (PLAIN.replace("in messages", "in messages[-1:]"), 1),
    ],
)
def test_a_template_that_does_not_show_question_and_answer(tmp_path, template, number, self_test):
    with pytest.raises(ConfigError, match=f"rewards.main: .* does not show message {number} of 2 .*chat_template"):
        made(tmp_path, tokenizer(template), self_test=self_test)


def test_a_text_that_depends_on_its_company(tmp_path, monkeypatch):
    own = Classifier.logits
    monkeypatch.setattr(Classifier, "logits", lambda self, rows, n: [x + len(rows) for x in own(self, rows, n)])
    with pytest.raises(ConfigError, match="scores change by .* with what is scored beside a text"):
        made(tmp_path)


def test_padding_that_is_a_token_of_the_text(tmp_path, monkeypatch):
    def eos(self, rows):
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = 1
        return 1

    monkeypatch.setattr(Classifier, "_set_pad", eos)
    with pytest.raises(ConfigError, match="its padding, token 1, is a token of the texts"):
        made(tmp_path)


def test_a_cut_that_reaches_the_response(tmp_path, monkeypatch):
    made(tmp_path, max_tokens=50)  # has no room for the answer, and says so
    monkeypatch.setattr(model, "alike", lambda first, second: len(first))  # all of it is taken for the prompt's
    with pytest.raises(ConfigError, match="cutting a long prompt cuts the response too"):
        made(tmp_path, max_tokens=50)


def test_scores_that_are_no_numbers(tmp_path):
    broken = classifier(tmp_path, tokenizer())
    with torch.no_grad():
        broken.score.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        load("main", ModelReward(model=str(tmp_path)), device="cpu")


def test_a_wrong_preference_is_a_warning_but_not_of_the_demos_models(tmp_path, caplog, monkeypatch):
    elsewhere = tmp_path / "aisp_dist" / "demo" / "judge"  # the package as another process has it
    for copy in (tmp_path / "own", elsewhere):
        shutil.copytree(demo.path("judge"), copy)
    turned = [(q, bad, good) for q, good, bad in self_test.PAIRS]
    for name in (str(tmp_path / "own"), "demo-judge", str(demo.path("judge")), str(elsewhere)):
        caplog.clear()
        for pairs in (turned, self_test.PAIRS):
            monkeypatch.setattr(self_test, "PAIRS", pairs)
            with caplog.at_level(logging.WARNING, "aisp"):
                load("main", ModelReward(model=name), device="cpu")
        assert ("prefers the worse answer" in caplog.text) == name.endswith("own")
