"""The prompt cell of a row as text or as chat messages, whatever shape it comes in: text, messages with role and
content, ShareGPT's from and value, JSON in a cell of text, HH-RLHF's dialogues. Knows no files, ids or tokens.

Messages are numbered from 1."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from aisp_dist.config import Prompts
from aisp_dist.records import Message

Content = str | tuple[Message, ...]

MARKER = re.compile(r"\n\n(Human|Assistant):")  # only with the empty line: a bare "Human:" occurs inside texts
ROLES = {"Human": "user", "Assistant": "assistant"}
_SHAREGPT = {"system": "system"}
_SHAREGPT |= dict.fromkeys(("human", "user"), "user")
_SHAREGPT |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant")
_LIST = re.compile(r"\s*\[\s*\{")
_QUOTED = re.compile(r"\s*\[\s*\{\s*(['\"])(role|content|from|value)\1\s*:")  # how a list of messages begins, as text
_KEYS = ({"role", "content"}, {"from", "value"})
# Roles that mean the assistant, in lower case, and keys of a message with what a model would have to be shown too.
_ASSISTANT = {"assistant", "gpt", "model", "bot", "ai", "chatgpt", "chatbot", "bing", "bard", "claude", "gemini"}
_UNSENT = ["tool_calls", "function_call", "images", "image", "image_url", "audio", "audios", "input_audio"]
_UNSENT += ["videos", "video", "files", "file"]


class Unusable(ValueError):
    """Why a line cannot become a prompt, and what could be read of it."""

    def __init__(self, reason: str, content: Content | None = None) -> None:
        super().__init__(reason)
        self.content = content


class Cell(NamedTuple):
    """A prompt, and the answer that `drop_last_answer` took from its end; None where there was none."""

    content: Content
    original: str | None = None


def read(value: Any, settings: Prompts) -> Cell:
    """The prompt in a cell, as `settings.format` reads it. Raises Unusable."""
    if isinstance(value, str):
        valid(value, "the prompt")
        if not value.strip():
            raise Unusable("the prompt is empty", value)
    match settings.format:
        case "chat":
            return _chat(value, settings)
        case _ if not isinstance(value, str):
            raise Unusable(f"the prompt is {_named(value)}; format {settings.format} takes text")
        case "shp":
            return Cell((("user", value),))
        case "hh":
            turns, answer = _dialogue(value)
            return Cell(turns, answer if settings.drop_last_answer else None)
    return Cell(value)


def valid(text: str, what: str) -> str:
    """The text. Raises Unusable where UTF-8 cannot write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise Unusable(
            f"{what} is not text: U+{code:04X} at character {error.start} is a broken byte or half a surrogate pair; "
            "save the file as UTF-8"
        ) from None
    return text


def _named(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _chat(value: Any, settings: Prompts) -> Cell:
    if isinstance(value, str):
        value = _unquoted(value)
    if isinstance(value, str):
        messages: tuple[Message, ...] = (("user", value),)
    elif isinstance(value, list):
        numbers = (f"message {number} of {len(value)}" for number in range(1, len(value) + 1))
        messages = tuple(_message(what, message) for what, message in zip(numbers, value, strict=True))
    else:
        raise Unusable(f"the prompt is {_named(value)}, neither text nor a list of messages")
    original: str | None = None
    if settings.drop_last_answer and messages and messages[-1][0].lower() in _ASSISTANT:
        *rest, (_, original) = messages
        messages = tuple(rest)
    if not messages:
        raise Unusable("the prompt has no messages" + " before its answer" * (original is not None))
    role, text = messages[-1]
    if role.lower() in _ASSISTANT:
        fix = "set prompts.drop_last_answer: true to answer anew and keep this answer as original_completion"
        if original is not None:
            fix = "and so is the turn that prompts.drop_last_answer drops"
        raise Unusable(f"the last turn is the assistant's (role {role!r}): {fix}", messages)
    if role in ("system", "developer"):
        raise Unusable(f"the last turn is the {role}'s; a prompt ends with a turn to answer", messages)
    if not text.strip():
        raise Unusable("the last turn is empty", messages)
    if settings.system is not None and "system" not in dict(messages):
        messages = (("system", settings.system), *messages)
    return Cell(messages, original)


def _unquoted(text: str) -> Any:
    """The messages where a text is their JSON, as a cell of CSV holds them; else the text. One whole message makes it
    such a list: then every other one has to be one too. Raises Unusable for what begins as such a list and is not JSON:
    cut off, or as Python prints it (pandas writes that into a CSV)."""
    if not _LIST.match(text):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if (quoted := _QUOTED.match(text)) is None:
            return text
        what = "as Python prints it" if quoted[1] == "'" else f"in broken JSON ({error})"
        raise Unusable(f"the prompt is a list of messages {what}; write it as JSON (json.dumps)", text) from None
    return found if any(isinstance(m, dict) and any(keys <= m.keys() for keys in _KEYS) for m in found) else text


def _message(what: str, message: Any) -> Message:
    """Role and text of a message. Other keys (timestamps, moderation, ...) are not part of what a model is asked; what
    it would have to see is refused."""
    if not isinstance(message, dict):
        raise Unusable(f"{what} is {_named(message)}, not an object with role and content")
    for key in _UNSENT:
        if message.get(key):
            raise Unusable(f"{what} has {key}, which this program does not show to a model; it reads role and text")
    if "role" not in message and isinstance(message.get("from"), str) and isinstance(message.get("value"), str):
        role = _SHAREGPT.get(message["from"])
        if role is None:
            raise Unusable(f"{what} is from {message['from']!r}; of ShareGPT's roles {', '.join(_SHAREGPT)} are read")
        return role, valid(message["value"], what)
    if isinstance(message.get("content"), list) and message["content"]:
        message = message | {"content": _joined(what, message["content"])}
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise Unusable(f"{what} has no text under {key!r}; its keys are {', '.join(map(repr, message))}")
    return valid(message["role"], what), valid(message["content"], what)


def _joined(what: str, parts: list[Any]) -> str:
    """The text of a message that comes in parts: one after the other, as chat templates write them. Raises Unusable for
    other parts than text: a model would not see them."""
    for number, part in enumerate(parts, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            about = f"of type {kind!r}" if isinstance(kind, str) else _named(part)
            raise Unusable(f"part {number} of the content of {what} is {about}; only parts of type 'text' are read")
    return "".join(part["text"] for part in parts)


def _dialogue(text: str) -> tuple[tuple[Message, ...], str | None]:
    """HH-RLHF: the turns before the last `\\n\\nAssistant:`, and the answer after it if it is the end of the text. The
    space after a marker is the marker's."""
    start, *rest = MARKER.split(text)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if start.strip():
        raise Unusable("the dialogue does not begin with a role marker, \\n\\nHuman: or \\n\\nAssistant:", text)
    answer = turns[-1][1].removeprefix(" ") if turns and turns[-1][0] == "Assistant" else ""
    while turns and turns.pop()[0] != "Assistant":
        pass
    if not turns:
        raise Unusable("the dialogue has no turn before a last \\n\\nAssistant:", text)
    bare = next((said for _, said in turns if not said.startswith(" ")), None)
    if bare is not None:
        raise Unusable(f"a role marker is not followed by a space but by {bare[:20]!r}", text)
    return tuple((ROLES[role], said[1:]) for role, said in turns), answer or None
