"""The shapes that a prompt comes in: each becomes the same messages, or a failed row that says why not."""

from __future__ import annotations

import json

import pytest

from aisp_dist.config import Prompts
from aisp_dist.data import messages
from aisp_dist.data.messages import Unusable

TURNS = (("system", "Be brief."), ("user", "Why rest?"), ("assistant", "To heal."), ("user", "How long?"))
SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


def chat(value):
    return messages.read(value, Prompts()).content


def openai(turns=TURNS):
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt():
    return [{"from": SHAREGPT[role], "value": text, "weight": None} for role, text in TURNS]


def in_parts():
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS]


SHAPES = {
    "messages": openai(),
    "sharegpt": sharegpt(),
    "parts": in_parts(),
    "json": json.dumps(openai()),
    "json of sharegpt": " " + json.dumps(sharegpt(), indent=2),
    "json of parts": json.dumps(in_parts()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_chat(shape):
    assert chat(SHAPES[shape]) == TURNS


def test_parts_of_text_are_joined_as_templates_write_them():
    parts = [
        {"type": "text", "text": "Read "},
        {"type": "text", "text": "this:\n"},
        {"type": "text", "text": "A text."},
    ]
    assert chat([{"role": "user", "content": parts}]) == (("user", "Read this:\nA text."),)


@pytest.mark.parametrize("text", ["[1, 2]", "[{]", '[{"a": 1}]', "[{'a': 1}]", "[]", "{}", '[{"role": "x"}]', "[ {"])
def test_other_text_in_brackets_is_the_users_text(text):
    assert chat(text) == (("user", text),)


@pytest.mark.parametrize("format", ["raw", "shp"])
def test_text_stays_text_where_no_chat_is_asked_for(format):
    text = json.dumps(openai())
    content = messages.read(text, Prompts(format=format)).content
    assert content == (text if format == "raw" else (("user", text),))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (str(openai()), "as Python prints it; write it as JSON"),
        (str(sharegpt()), "as Python prints it"),
        (json.dumps(openai())[:-9], "broken JSON"),
        (json.dumps([*openai(TURNS[1:]), {"role": "assistant", "tool_calls": [1]}]), "message 4 of 4 has tool_calls"),
        (json.dumps([{"role": "user"}, *openai()]), "message 1 of 5 has no text under 'content'"),
        (json.dumps([*openai(), 3]), "message 5 of 5 is of type int"),
        ([{"from": "observation", "value": "42"}], "from 'observation'"),
        ([{"from": "human", "value": 3}], "no text under 'role'"),
        ([{"role": "user", "content": []}], "no text under 'content'"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "of type 'image'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "of type 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}], "part 2 of"),
        (json.dumps(openai(TURNS[:3])), "the last turn is the assistant's .* set prompts.drop_last_answer: true"),
    ],
)
def test_what_a_model_would_not_be_shown_as_it_is_is_refused(value, words):
    with pytest.raises(Unusable, match=words):
        chat(value)


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "images", "image_url", "audio", "video"])
@pytest.mark.parametrize("turn", [0, 1])
def test_what_stands_beside_the_text_of_a_message_is_refused(key, turn):
    """It would not be shown to the model; empty, as exports of whole records have it, it is nothing."""
    value = openai(TURNS[1:])
    for nothing in (None, [], ""):
        value[turn][key] = nothing
        assert chat(value) == TURNS[1:]
    value[turn][key] = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    with pytest.raises(Unusable, match=f"message {turn + 1} of 3 has {key}"):
        chat(value)
    with pytest.raises(Unusable, match=f"message 1 of 1 has {key}"):
        chat([{"from": "human", "value": "Hi", key: ["x.png"]}])


# The answer that a dialogue ends with

ANSWERED = openai([*TURNS, ("assistant", " A week.\n")])
DROP = Prompts(drop_last_answer=True)


@pytest.mark.parametrize("role", ["assistant", "Assistant", "gpt", "bot", "model", "ai", "ChatGPT"])
def test_the_last_answer_is_dropped_and_kept(role):
    value = [*ANSWERED[:-1], ANSWERED[-1] | {"role": role}]
    assert messages.read(value, DROP) == (TURNS, " A week.\n")
    assert messages.read(json.dumps(value), DROP) == (TURNS, " A week.\n")
    with pytest.raises(Unusable, match=rf"is the assistant's \(role '{role}'\): set prompts.drop_last_answer: true"):
        chat(value)


def test_a_prompt_without_an_answer_has_none():
    assert messages.read(openai(), DROP) == (TURNS, None) and messages.read("Hi", DROP) == ((("user", "Hi"),), None)
    assert messages.read([*openai(), {"role": "assistant", "content": ""}], DROP) == (TURNS, "")


def test_sharegpt_and_a_system_message_of_the_run():
    value = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    settings = Prompts(drop_last_answer=True, system="S")
    assert messages.read(value, settings) == ((("system", "S"), ("user", "Hi")), "Hello.")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([*ANSWERED, ANSWERED[-1]], "the assistant's .* and so is the turn that prompts.drop_last_answer drops"),
        ([ANSWERED[-1]], "no messages before its answer"),
        ([ANSWERED[0], ANSWERED[-1]], "the last turn is the system's"),
        ([*openai(), ANSWERED[-1] | {"tool_calls": [1]}], "message 5 of 5 has tool_calls"),
    ],
)
def test_only_the_last_answer_is_dropped(value, words):
    with pytest.raises(Unusable, match=words):
        messages.read(value, DROP)


def test_the_last_answer_of_an_hh_dialogue():
    hh = DROP.model_copy(update={"format": "hh"})
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert messages.read(text, hh) == (turns, None) == messages.read(text + " d", Prompts(format="hh"))
    assert messages.read(text + " d\n e", hh) == (turns, "d\n e")
    assert messages.read(text + " d\n\nHuman: e", hh) == (turns, None), "it is not the end of the dialogue"


@pytest.mark.parametrize("format", ["raw", "shp"])
def test_other_formats_have_no_last_answer(format):
    with pytest.raises(ValueError, match="drop_last_answer: needs dialogues, format chat or hh"):
        Prompts(format=format, drop_last_answer=True)
