"""Chats to text and token ids by a tokenizer's chat template: what the template is given, and whether it shows all of
it. Knows no settings of a run, no model and no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from aisp_dist.config import ConfigError
from aisp_dist.data.encode import Literal, Tokenizer, Unrenderable, after_bos, encode_messages, one_of
from aisp_dist.records import Message

# What a chat template reads as today: the same configuration must give the same prompts tomorrow. The day is the one
# that Llama's templates fall back to.
TODAY = datetime(2024, 7, 26)
_DIRECTIVES = [f"%{d}" for d in "aAbBcdfHIjmMpSuUVwWxXyYzZG"] + [f"%-{d}" for d in "dmHIjMS"]
_ROLE = re.compile(r"[\w .-]+")
_SPELLED = re.compile(r"""(["'])type\1: *(["'])text\2""")
_INSTRUCTIONS = ("system", "developer")  # some templates move them: Mistral's show them in the last turn


def as_chat(content: str | Sequence[Message]) -> Sequence[Message]:
    return (("user", content),) if isinstance(content, str) else content


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    fix: str,
    special_tokens: bool = False,
) -> list[int]:
    """Token ids of a chat under the tokenizer's template. The template decides every token but BOS, which is put before
    them if the tokenizer begins its texts with it and the template did not.

    special_tokens: special tokens in the texts of messages are special tokens, not text. fix: what to do about a
    template that does not serve.
    Raises Unrenderable (this chat; also where the template does not show every message) or ConfigError (every chat: no
    template, or one that cannot be read).
    """

    def text_of(messages: Sequence[Message]) -> str:
        return chat_text(tokenizer, messages, template_kwargs, add_generation_prompt=add_generation_prompt, fix=fix)

    literal = None if special_tokens else _controls(tokenizer, _template(tokenizer, fix))
    return after_bos(tokenizer, encode_messages(tokenizer, messages, text_of, literal))


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    fix: str,
) -> str:
    """The text of a chat under the tokenizer's template, special tokens spelled out; arguments as in encode_chat."""
    template = _template(tokenizer, fix)
    roles = tuple(role for role, _ in messages)
    shown = _shown(
        tokenizer,
        template,
        roles,
        json.dumps(dict(template_kwargs), sort_keys=True, default=str),
        add_generation_prompt,
    )
    if shown.reason:
        raise Unrenderable(f"{shown.reason} {fix}")
    return _render(tokenizer, template, messages, shown.parts, template_kwargs, add_generation_prompt)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The added token with which the tokenizer's template closes an assistant's turn; None where it has no template or
    closes the turn with none."""
    names = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}
    try:
        template = _template(tokenizer, "")
        text = _render(tokenizer, template, (("user", _mark(0)), ("assistant", _mark(1))), frozenset(), {}, False)
    except (ConfigError, Unrenderable):
        return None
    match = one_of(names).search(text.partition(_mark(1))[2])
    return names[match[0]] if match else None


class _Shown(NamedTuple):
    """How a template shows chats of one shape. parts: the messages whose content it takes as a list of parts. reason:
    why it cannot show such a chat, to be followed by what to do."""

    parts: frozenset[int] = frozenset()
    reason: str | None = None


@lru_cache(maxsize=1024)
def _shown(
    tokenizer: Tokenizer, template: str, roles: tuple[str, ...], kwargs: str, add_generation_prompt: bool
) -> _Shown:
    """Renders a chat of these roles with a mark in the place of each text. Each mark must come back, in the order of
    the messages. What a template takes away from a text (white space around it, old thinking) leaves a mark whole. A
    list of parts that comes back as it is written in Python or JSON is no text."""

    def positions(parts: frozenset[int]) -> list[int]:
        chat = [(role, _mark(i)) for i, role in enumerate(roles)]
        text = _render(tokenizer, template, chat, parts, json.loads(kwargs), add_generation_prompt)
        spelled = parts and _SPELLED.search(text)
        return [-1 if spelled and i in parts else text.find(mark) for i, (_, mark) in enumerate(chat)]

    at = positions(frozenset())
    parts = frozenset(i for i, place in enumerate(at) if place < 0)
    if parts:
        at = positions(parts)
    for i, place in enumerate(at):
        if place < 0:
            return _Shown(parts, f"the chat template does not show {_named(i, roles)}; rename that role, or")
    turns = [i for i, role in enumerate(roles) if role not in _INSTRUCTIONS]
    for earlier, later in pairwise(turns):
        if at[later] < at[earlier]:
            return _Shown(parts, f"the chat template shows {_named(later, roles)} before {_named(earlier, roles)};")
    return _Shown(parts)


def _named(index: int, roles: Sequence[str]) -> str:
    return f"message {index + 1} of {len(roles)} (role {roles[index]!r})"


def _mark(index: int) -> str:
    """Long and of both cases, so that a template which cuts texts or changes their case does not give it back."""
    return f"xMessage{index:04}{'x' * 500}"


@lru_cache(maxsize=8)
def _controls(tokenizer: Tokenizer, template: str) -> Literal:
    """The tokens that may not come out of a message's text: the special ones, and other added tokens with which the
    template writes a user's turn, since those forge turns as well."""
    added = list(tokenizer.added_tokens_decoder.values())
    try:
        turn = _render(tokenizer, template, (("user", _mark(0)),), frozenset(), {}, False)
    except Unrenderable:
        turn = ""
    return Literal(
        tokenizer, (t.content for t in added if t.special or (t.content in turn and not t.content.isspace()))
    )


def _template(tokenizer: Tokenizer, fix: str) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; {fix}") from None
    return template


def _render(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    parts: frozenset[int],
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool,
) -> str:
    import jinja2

    for role, _ in messages:
        if not _ROLE.fullmatch(role):
            raise Unrenderable(f"the role {role!r} is no name: a role has letters, digits, spaces, '_', '-' and '.'")
    try:
        text: str = tokenizer.apply_chat_template(
            [
                {"role": role, "content": [{"type": "text", "text": content}] if i in parts else content}
                for i, (role, content) in enumerate(messages)
            ],
            chat_template=_undated(template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} is not valid Jinja ({error}); correct it"
        ) from None
    except Exception as error:  # templates are programs: raise_exception, and whatever else they do
        raise Unrenderable(f"the chat template refuses the messages: {error}") from error
    return text


def _undated(template: str) -> str:
    """The template with its clock stopped: a macro of its own shadows the global strftime_now, and the newline after it
    is the one that transformers' trim_blocks takes away."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{d}', '{TODAY.strftime(d)}')" for d in _DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
