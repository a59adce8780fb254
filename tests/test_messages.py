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
    return messages.content(value, Prompts())


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


def test_parts_of_text_are_joined_by_lines():
    parts = [{"type": "text", "text": "Read this:"}, {"type": "text", "text": "A text."}]
    assert chat([{"role": "user", "content": parts}]) == (("user", "Read this:\nA text."),)


@pytest.mark.parametrize("text", ["[1, 2]", "[{]", '[{"a": 1}]', "[{'a': 1}]", "[]", "{}", '[{"role": "x"}]', "[ {"])
def test_other_text_in_brackets_is_the_users_text(text):
    assert chat(text) == (("user", text),)


@pytest.mark.parametrize("format", ["raw", "shp"])
def test_text_stays_text_where_no_chat_is_asked_for(format):
    text = json.dumps(openai())
    content = messages.content(text, Prompts(format=format))
    assert content == (text if format == "raw" else (("user", text),))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (str(openai()), "as Python prints it; write it as JSON"),
        (str(sharegpt()), "as Python prints it"),
        (json.dumps(openai())[:-9], "broken JSON"),
        ([{"from": "observation", "value": "42"}], "from 'observation'"),
        ([{"from": "human", "value": 3}], "no text under 'role'"),
        ([{"role": "user", "content": []}], "no text under 'content'"),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], "of type 'image'"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "of type 'text'"),
        ([{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]}], "part 1 of"),
        (json.dumps(openai(TURNS[:3])), "the last turn is the assistant's"),
    ],
)
def test_what_a_model_would_not_be_shown_as_it_is_is_refused(value, words):
    with pytest.raises(Unusable, match=words):
        chat(value)
