"""Input lines to Prompts with stable ids; lines that cannot be one become BadInput, in their place. Owns what a prompt
is and how it is named; knows no tokenizer (render.py) and no file format (sources.py)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import UUID

from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data.seen import Ids
from aisp_dist.data.sources import Broken, Line, Row, Source, open_source
from aisp_dist.records import BadInput, Input, Message, Prompt

Content = str | tuple[Message, ...]
Columns = tuple[tuple[str, Any], ...]


class Unusable(ValueError):
    """Why a line cannot become a prompt, and what could be read of it."""

    def __init__(self, reason: str, content: Content | None = None) -> None:
        super().__init__(reason)
        self.content = content


def read(settings: Prompts, source: Source | None = None) -> Iterator[Input]:
    """Every input line as exactly one Prompt or BadInput, in order; source_index counts them from 0. source: lines to
    read in place of those of `settings.source`.

    The order is the source's or, with shuffle_seed, a permutation of the whole source; `limit` comes last, so a larger
    one extends and changes no id. Ids are unique: a repeat gets `#2`, `#3`, ... A user's id that comes again with other
    content is a BadInput. Memory: about 25 bytes an input (seen.py), and what sources.open_source holds.
    Raises ConfigError (at once, or with the first row) where settings and source do not fit.
    """
    _check(settings)
    return _inputs(settings, source or open_source(settings))


def count(settings: Prompts) -> int:
    """How many inputs `read` yields, at the cost of the lines alone. Raises ConfigError as `read` does."""
    lines = open_source(settings.model_copy(update={"shuffle_seed": None})).lines
    return sum(1 for _ in _wanted(settings, lines))


def _wanted(settings: Prompts, lines: Iterator[Line]) -> Iterator[Line]:
    end = None if settings.limit is None else settings.skip + settings.limit
    return islice(lines, settings.skip, end)


def _check(settings: Prompts) -> None:
    if settings.format != "chat":
        for key in ("system", "template_kwargs"):
            if getattr(settings, key):
                raise ConfigError(f"prompts.{key} needs format: chat, not {settings.format}; remove it")
    taken = {"prompts", "completions"} & set(settings.keep)
    if taken or len(set(settings.keep)) < len(settings.keep):
        raise ConfigError(
            f"prompts.keep is {list(settings.keep)}: names must differ, and prompts and completions are arguments that "
            "every reward function has already; rename the column"
        )


def _inputs(settings: Prompts, source: Source) -> Iterator[Input]:
    ids = Ids()
    for ordinal, line in enumerate(_wanted(settings, source.lines)):
        where = f"{source.names[line.file]}:{line.number}"
        own = where
        columns: Columns = ()
        try:
            if isinstance(line.row, Broken):
                raise Unusable(line.row.reason)
            if settings.id_column is not None:
                own = _own_id(line.row, settings.id_column)
            columns = tuple((name, _column(line.row, name)) for name in settings.keep)
            content = _content(line.row, settings)
            digest = _hash(content, columns)
            if settings.id_column is None:
                own = digest
            elif (first := ids.conflict(own, digest)) is not None:
                raise Unusable(
                    f"the id {own!r} of {where} is that of source_index {first}, with other content: ids are unique",
                    content,
                )
        except Unusable as error:
            id = ids.claim(own, ordinal, "")
            digest = _hash(id, str(error), columns, line.row)
            yield BadInput(id, ordinal, str(error), error.content, columns, digest)
        else:
            id = ids.claim(own, ordinal, digest)
            yield Prompt(id, ordinal, content, columns, _hash(id, content, columns))


def _hash(*parts: Any) -> str:
    """128 bits of the parts' one JSON form, as hex. Surrogates are escaped, so that broken text has a hash too."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise Unusable(f"the line has no column {name!r}")
    return row[name]


def _own_id(row: Row, name: str) -> str:
    value = _field(row, name)
    if value is None or value == "" or isinstance(value, list | dict | bytes):
        raise Unusable(f"the id in column {name!r} is {value!r}; an id is a text or a number")
    return _valid(str(value), f"the id in column {name!r}")


def _column(row: Row, name: str) -> Any:
    """The value in JSON's types: records travel between processes and into reward functions."""
    try:
        text = json.dumps(_field(row, name), ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise Unusable(f"column {name!r} cannot be carried: {error}") from None
    return json.loads(_valid(text, f"column {name!r}"))


def _plain(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} values have no JSON form")


def _valid(text: str, what: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise Unusable(
            f"{what} is not text: U+{code:04X} at character {error.start} is a broken UTF-8 byte or half a pair"
        ) from None
    return text


def _content(row: Row, settings: Prompts) -> Content:
    value = _field(row, settings.column)
    if isinstance(value, str):
        _valid(value, "the prompt")
        if not value.strip():
            raise Unusable("the prompt is empty", value)
    match settings.format:
        case "chat":
            return _chat(value, settings.system)
        case _ if not isinstance(value, str):
            raise Unusable(f"the prompt is {_named(value)}; format {settings.format} takes text")
        case "shp":
            return (("user", value),)
        case "hh":
            return _dialogue(value)
    return value


def _named(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def _chat(value: Any, system: str | None) -> tuple[Message, ...]:
    if isinstance(value, str):
        messages: tuple[Message, ...] = (("user", value),)
    elif isinstance(value, list):
        messages = tuple(_message(i, message) for i, message in enumerate(value))
    else:
        raise Unusable(f"the prompt is {_named(value)}, neither text nor a list of messages")
    if not messages:
        raise Unusable("the prompt has no messages")
    role, text = messages[-1]
    if role in ("assistant", "system"):
        raise Unusable(f"the last turn is the {role}'s; a prompt ends with a turn to answer", messages)
    if not text.strip():
        raise Unusable("the last turn is empty", messages)
    if system is not None and "system" not in dict(messages):
        messages = (("system", system), *messages)
    return messages


def _message(index: int, message: Any) -> Message:
    """Only role and content: other keys (timestamps, moderation, ...) are not part of what a model is asked."""
    what = f"message {index}"
    if not isinstance(message, dict):
        raise Unusable(f"{what} is {_named(message)}, not an object with role and content")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise Unusable(f"{what} has no text under {key!r}; its keys are {', '.join(map(repr, message))}")
    if message.get("tool_calls"):
        raise Unusable(f"{what} calls tools, which role and content cannot carry")
    return _valid(message["role"], what), _valid(message["content"], what)


MARKER = re.compile(r"\n\n(Human|Assistant):")  # only with the empty line: a bare "Human:" occurs inside texts
ROLES = {"Human": "user", "Assistant": "assistant"}


def _dialogue(text: str) -> tuple[Message, ...]:
    """HH-RLHF: the turns before the last `\\n\\nAssistant:`. The space after a marker is the marker's."""
    start, *rest = MARKER.split(text)
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if start.strip():
        raise Unusable("the dialogue does not begin with a role marker, \\n\\nHuman: or \\n\\nAssistant:", text)
    while turns and turns.pop()[0] != "Assistant":
        pass
    if not turns:
        raise Unusable("the dialogue has no turn before a last \\n\\nAssistant:", text)
    bare = next((said for _, said in turns if not said.startswith(" ")), None)
    if bare is not None:
        raise Unusable(f"a role marker is not followed by a space but by {bare[:20]!r}", text)
    return tuple((ROLES[role], said[1:]) for role, said in turns)
