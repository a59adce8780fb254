"""Input lines to Prompts with stable ids; lines that cannot be one become BadInput, in their place. Owns how a prompt
is named; knows no tokenizer (render.py), no file format (sources.py) and no shape of a prompt (messages.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from itertools import islice
from typing import Any
from uuid import UUID

from aisp_dist.config import ConfigError, Prompts
from aisp_dist.data import messages, sources
from aisp_dist.data.files import Broken, Row
from aisp_dist.data.messages import Unusable
from aisp_dist.data.seen import Ids
from aisp_dist.data.sources import Line, Source
from aisp_dist.records import BadInput, Input, Prompt

Columns = tuple[tuple[str, Any], ...]
_SAMPLE, _STREAMED = 20_000, 1000  # inputs that decide the types of kept columns; over a network fewer


def read(settings: Prompts, source: Source | None = None) -> Iterator[Input]:
    """Every input line as exactly one Prompt or BadInput, in order; source_index counts them from 0. A blank line of a
    text file is no input. source: lines to read in place of those of `settings.source`.

    The order is the source's or, with shuffle_seed, a permutation of the whole source; `limit` comes last, so a larger
    one extends and changes no id. Ids are unique: a repeat gets `#2`, `#3`, ... A user's id that comes again with other
    content is a BadInput. Memory: about 25 bytes an input (seen.py), and what sources.open_source holds.
    Raises ConfigError (at once, or with the first row) where settings and source do not fit.
    """
    return (line for _, line in located(settings, source))


def located(settings: Prompts, source: Source | None = None) -> Iterator[tuple[str, Input]]:
    """What `read` yields, each with the `file:line` where it stands."""
    _check(settings)
    return _inputs(settings, source or sources.open_source(settings))


def sample(settings: Prompts) -> Iterator[Input]:
    """The first inputs, by which the types of kept columns are decided: whatever `limit` is, since a larger one may
    extend a run. Raises ConfigError as `read` does."""
    lines = read(settings.model_copy(update={"limit": None}))
    return islice(lines, _STREAMED if settings.streaming else _SAMPLE)


def check(settings: Prompts) -> None:
    """Raise ConfigError where settings and source do not fit, having read the first row of every file."""
    _check(settings)
    sources.check(settings)


def whole(settings: Prompts) -> Prompts:
    """The section for all lines of its source, in their order."""
    return settings.model_copy(update={"skip": 0, "limit": None, "shuffle_seed": None})


def first_digest(inputs: Iterator[Input]) -> str:
    """The digest of a whole source's first input, or of none: what tells one source from another, while lines that are
    added leave it alone. Whether the lines of a part are those that it was computed from, its own digest says."""
    first = next(inputs, None)
    return _hash() if first is None else first.digest


def count(settings: Prompts) -> int:
    """How many inputs `read` yields, at the cost of the lines alone. Raises ConfigError as `read` does."""
    lines = sources.open_source(settings.model_copy(update={"shuffle_seed": None})).lines
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


def _inputs(settings: Prompts, source: Source) -> Iterator[tuple[str, Input]]:
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
            content, original = messages.read(_field(line.row, settings.column), settings)
            said = (content, columns) if original is None else (content, columns, original)
            digest = _hash(*said)
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
            yield where, BadInput(id, ordinal, str(error), error.content, columns, digest)
        else:
            id = ids.claim(own, ordinal, digest)
            yield where, Prompt(id, ordinal, content, columns, _hash(id, *said), original)


def _hash(*parts: Any) -> str:
    """128 bits of the parts' one JSON form, as hex. Surrogates are escaped, so that broken text has a hash too."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=_stable)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise Unusable(f"the line has no column {name!r}")
    return row[name]


def _own_id(row: Row, name: str) -> str:
    value = _field(row, name)
    if value is None or value == "" or isinstance(value, list | dict | bytes):
        raise Unusable(f"the id in column {name!r} is {value!r}; an id is a text or a number")
    return messages.valid(str(value), f"the id in column {name!r}")


def _column(row: Row, name: str) -> Any:
    """The value in JSON's types, since records travel between processes and into reward functions; as it is where it
    has no JSON form, and null where the row has no such column. A kept column never costs a prompt: what cannot be
    written as a row's value is the output's to say (schema.py)."""
    value = row.get(name)
    try:
        return json.loads(json.dumps(value, default=_plain))
    except (TypeError, ValueError, RecursionError):
        return value


def _plain(value: Any) -> str:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    raise TypeError(f"{type(value).__name__} values have no JSON form")


def _stable(value: Any) -> str:
    """What stands for a value in a hash: never an address in memory."""
    return value.hex() if isinstance(value, bytes) else type(value).__name__ if " at 0x" in str(value) else str(value)
