"""Rendering: the tokenizer's own template, one BOS, no date, and cuts that never touch what must stay."""

import gzip
import json
from datetime import datetime
from inspect import signature

import pytest
from tiny_chat import TEMPLATE, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aisp_dist import demo
from aisp_dist.config import ConfigError, Prompts
from aisp_dist.config.run import OF_TEMPLATES
from aisp_dist.data.prompts import read
from aisp_dist.data.render import Overlong, Unrenderable, render
from aisp_dist.records import Prompt

BOS, EOS = 0, 1
CHAT = (
    ("system", "S"),
    ("user", "one"),
    ("assistant", "two"),
    ("user", "three"),
    ("assistant", "four"),
    ("user", "five"),
)


def prompt(content):
    return Prompt("p", 0, content)


def text(ids, tok=None):
    return (tok or tokenizer()).decode(ids)


def rendered(content, tok=None, max_length=1000, **settings):
    tok = tok or tokenizer()
    return text(render(prompt(content), Prompts(**settings), tok, max_length), tok)


def test_it_is_transformers_own_rendering():
    tok = AutoTokenizer.from_pretrained(demo.path("base"))
    messages = [{"role": role, "content": content} for role, content in CHAT]
    want = tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(render(prompt(CHAT), Prompts(), tok, 1000)) == list(want)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("has_bos", [True, False])
def test_one_bos_where_the_tokenizer_wants_one(adds_bos, template, has_bos):
    tok = tokenizer(template, adds_bos=adds_bos, has_bos=has_bos)
    chat = render(prompt(CHAT), Prompts(), tok, 1000)
    assert chat.count(BOS) == (has_bos and (adds_bos or "bos_token" in template))
    raw = render(prompt("text"), Prompts(format="raw"), tok, 1000)
    assert raw.count(BOS) == (has_bos and adds_bos)
    planted = render(prompt("<s>text"), Prompts(format="raw"), tok, 1000)
    assert planted.count(BOS) == 1


def test_no_end_after_a_raw_text():
    tok = tokenizer(adds_eos=True)
    assert tok("text")["input_ids"][-1] == EOS
    assert rendered("text", tok, format="raw") == "<s>text"
    assert rendered("text</s>", tok, format="raw") == "<s>text</s>"


def test_formats():
    assert rendered((("user", "Hi"),)) == "<s>[user]Hi</s>[assistant]"
    assert rendered((("user", "A post."),), format="shp", begin="User:") == "<s>User:A post.\nAssistant:"
    dialogue = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert rendered(dialogue, format="hh", begin="User:") == "<s>\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant:"
    assert rendered((("user", "Hi"),), tokenizer(TEMPLATE + "{{ mood }}"), template_kwargs={"mood": "!"}).endswith("]!")


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_every_real_dialogue_is_rendered_back_exactly(real_data, column):
    source = real_data / "data" / "hh_harmless_test_1156.jsonl.gz"
    tok = tokenizer()
    settings = Prompts(source=str(source), column=column, format="hh", begin="Human:")
    with gzip.open(source, "rt", encoding="utf-8") as stream:
        for line, got in zip(stream, read(settings), strict=True):
            original = json.loads(line)[column]
            end = original.rindex("\n\nAssistant:") + len("\n\nAssistant:")
            want = tok(original[:end])["input_ids"]
            assert render(got, settings, tok, 100_000) == tuple(want)


def test_the_date_does_not_move(monkeypatch):
    import transformers.utils.chat_template_utils as utils

    template = (
        "   {% if strftime_now is defined %}{% macro day() %}{{ strftime_now('%d %B %Y') }}{% endmacro %}"
        "{{ day() }}|{{ strftime_now('%-m.%H:%M, %A') }}{% endif %}" + TEMPLATE
    )
    tok = tokenizer(template)
    moved = tok.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    seen = set()
    for year in (2025, 2031):

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, year=year):
                return cls(year, 1, 2)

        monkeypatch.setattr(utils, "datetime", Clock)
        seen.add(rendered((("user", "Hi"),), tok))
    (only,) = seen
    assert only == "<s>26 July 2024|7.00:00, Friday<s>[user]Hi</s>[assistant]"
    assert moved.split("<s>", 1)[1] == only.split("<s>", 2)[2]  # and nothing else of the template moved


def test_a_missing_template_is_a_fault_of_the_configuration():
    with pytest.raises(ConfigError, match=r"format: raw, or generator\.chat_template"):
        rendered(CHAT, tokenizer(None))
    with pytest.raises(ConfigError, match="is not valid Jinja"):
        rendered(CHAT, tokenizer("{% if %}"))


def test_template_kwargs_hold_variables_of_templates_only():
    taken = signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(taken) - set(OF_TEMPLATES) == {"self", "tools", "documents", "kwargs"}
    for name in OF_TEMPLATES:
        with pytest.raises(ValueError, match=f"{name} is set for every prompt"):
            Prompts(template_kwargs={name: None})


def test_a_template_that_refuses_is_a_reason():
    tok = tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(Unrenderable, match="roles must alternate"):
        rendered(CHAT, tok)


def test_text_that_is_none_is_a_reason():
    with pytest.raises(Unrenderable, match="refuses"):
        rendered("half \ud83d", format="raw")
    assert rendered("a\0b", format="raw") == "<s>a\0b"


# Too long


def test_the_limit_is_exact():
    size = len(render(prompt(CHAT), Prompts(), tokenizer(), 1000))
    for overlong in ("error", "left", "drop_turns"):
        assert len(render(prompt(CHAT), Prompts(overlong=overlong), tokenizer(), size)) == size
    more = f"the prompt has {size} tokens, more than the {size - 1} that fit"
    with pytest.raises(Overlong, match=f"^{more}; raise prompts.max_tokens or set prompts.overlong$"):
        render(prompt(CHAT), Prompts(max_tokens=size - 1), tokenizer(), size - 1)
    with pytest.raises(Overlong, match=f"^{more} into the model's context .*; lower generator.max_new_tokens or set"):
        render(prompt(CHAT), Prompts(), tokenizer(), size - 1)


@pytest.mark.parametrize("has_bos", [True, False])
def test_left_keeps_the_end_and_bos(has_bos):
    tok = tokenizer(TEMPLATE if has_bos else TEMPLATE.replace("{{ bos_token }}", ""), has_bos=has_bos)
    whole = render(prompt(CHAT), Prompts(), tok, 1000)
    for limit in range(2, len(whole)):
        cut = render(prompt(CHAT), Prompts(overlong="left"), tok, limit)
        head = 1 if has_bos else 0
        assert len(cut) == limit and cut[:head] == whole[:head] and cut[head:] == whole[len(whole) - limit + head :]


def test_dropping_turns_takes_the_oldest_whole_and_spares_the_rest():
    seen = []
    for limit in range(200, 0, -1):
        try:
            seen.append(rendered(CHAT, max_length=limit, overlong="drop_turns"))
        except Overlong as error:
            assert "without all turns that may be dropped" in str(error)
            break
    assert list(dict.fromkeys(seen)) == [
        "<s>[system]S</s>[user]one</s>[assistant]two</s>[user]three</s>[assistant]four</s>[user]five</s>[assistant]",
        "<s>[system]S</s>[user]three</s>[assistant]four</s>[user]five</s>[assistant]",
        "<s>[system]S</s>[user]five</s>[assistant]",
    ]
    assert limit == len("[system]S[user]five[assistant]") + 3 - 1
    hh = (("user", "a" * 50), ("assistant", "b"), ("user", "c"))
    assert rendered(hh, max_length=40, format="hh", overlong="drop_turns") == "<s>\n\nUser: c\n\nAssistant:"
    with pytest.raises(Overlong):
        rendered("a" * 50, max_length=40, format="raw", overlong="drop_turns")
