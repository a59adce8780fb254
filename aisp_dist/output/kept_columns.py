"""Columns that rows take over from their inputs (prompts.keep): the type of each, and a value as its column holds it.

A column's type is decided once, before the first row, from a sample of the inputs (`types`): bool, int64, float64
(integers among floats are floats) or string if all its values agree, else `json`: a string column that holds each value
as JSON text. A value that does not fit its column's type later is null there and stands as JSON text in the row's
`kept_as_json`; it never costs the prompt. JSON has no words for NaN and infinities: they fit float64 only, and stand in
`kept_as_json` as the texts "NaN", "Infinity" and "-Infinity". Function rewards see every value as it is in the input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from aisp_dist.config import ConfigError
from aisp_dist.records import Input

# Of a kept column; of MISFITS; of the original answers, which are no kept column (schema.ORIGINAL).
ColumnType = Literal["string", "int64", "float64", "bool", "json", "misfits", "original"]
MISFITS = "kept_as_json"  # list of name and JSON text: values that do not fit their columns


def types(names: Sequence[str], sample: Iterable[Input]) -> dict[str, ColumnType]:
    """Kept columns with their types. Nulls say nothing, and a column of nulls only is `json`.

    Raises ConfigError for a value that JSON has no words for (an image, say).
    """
    order: tuple[ColumnType, ...] = ("bool", "int64", "float64", "string", "json")
    fitting = dict.fromkeys(names, order)
    empty = set(names)
    for line in sample:
        for name, value in line.columns:
            if value is None:
                continue
            empty.discard(name)
            fitting[name] = tuple(type_ for type_ in fitting[name] if _suits(value, type_))
            if not fitting[name]:
                raise ConfigError(
                    f"prompts.keep: column {name!r} holds a {type(value).__name__}, which is neither text, a number, a "
                    "bool nor JSON; take it out of keep"
                )
    return {name: "json" if name in empty else fitting[name][0] for name in names}


def to_row(line: Input, columns: Mapping[str, ColumnType]) -> dict[str, Any]:
    """The kept columns of an input, null where a value does not fit, and those values as JSON text."""
    values = dict(line.columns)
    misfits = [name for name, value in values.items() if not _fits(value, columns[name])]
    row = {name: None if name in misfits else _cast(value, columns[name]) for name, value in values.items()}
    if MISFITS in columns:  # outputs of 0.1.0 have no such column
        row[MISFITS] = [{"name": name, "value": _text(values[name])} for name in misfits]
    return row


def of_row(row: Mapping[str, Any], columns: Mapping[str, ColumnType]) -> tuple[tuple[str, Any], ...]:
    """The kept columns of a row as its input had them: the inverse of `to_row`, except for NaN and infinities that are
    texts in `kept_as_json`."""
    misfits = {misfit["name"]: misfit["value"] for misfit in row.get(MISFITS) or ()}

    def value(name: str) -> Any:
        text = misfits.get(name) if row[name] is None else row[name] if columns[name] == "json" else None
        return row[name] if text is None else json.loads(text)

    return tuple((name, value(name)) for name, type_ in columns.items() if type_ not in ("misfits", "original"))


def _as_int(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise ValueError
    return value


def _as_float(value: Any) -> float:
    if type(value) is float or (type(value) is int and abs(value) <= 1 << 53):  # larger ones would be rounded
        return float(value)
    raise ValueError


def _as_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def _as_string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError
    value.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
    return value


def _as_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _text(value: Any) -> str | None:
    """`value` as JSON text, with "NaN", "Infinity" and "-Infinity" for numbers that JSON has no words for; None where
    it has no JSON form."""
    try:
        return _as_json(_spelled(value))
    except (ValueError, TypeError, RecursionError):
        return None


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    return [_spelled(item) for item in value] if isinstance(value, list | tuple) else value


_CAST: dict[ColumnType, Callable[[Any], Any]] = {
    "bool": _as_bool,
    "int64": _as_int,
    "float64": _as_float,
    "string": _as_string,
    "json": _as_json,
}


def _cast(value: Any, type_: ColumnType) -> Any:
    """`value` as the column holds it. Raises ValueError or TypeError where it does not fit."""
    return None if value is None else _CAST[type_](value)


def _suits(value: Any, type_: ColumnType) -> bool:
    """Whether a column with this value may have the type: `json` may, although a NaN is left to `kept_as_json`."""
    return _fits(value, type_) or (type_ == "json" and _text(value) is not None)


def _fits(value: Any, type_: ColumnType) -> bool:
    try:
        _cast(value, type_)
    except (ValueError, TypeError, RecursionError):
        return False
    return True
