"""What every section of the configuration is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """A fault of the configuration or of what it names: one line with key, value, rule and fix; exit code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def no_bool_for_a_number(cls, values: Any) -> Any:
        """Pydantic takes true for 1 and false for 0 where a number is wanted."""
        if not isinstance(values, Mapping):
            return values
        fields = {key: field for name, field in cls.model_fields.items() for key in (name, field.alias)}
        numbers = {key for key, field in fields.items() if _only_numbers(set(_types(field.annotation)))}
        return {key: _no_number(value) if key in numbers else value for key, value in values.items()}


def doc(text: str, default: Any = ..., **bounds: Any) -> Any:
    return Field(default=default, description=text, **bounds)


def _types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of, as int and str of `dict[str, int | None]`."""
    if parts := get_args(annotation):
        for part in parts:
            yield from _types(part)
    elif isinstance(annotation, type) or annotation is Any:
        yield annotation


def _only_numbers(types: set[Any]) -> bool:
    return bool({int, float} & types) and not {bool, Any} & types


def _no_number(value: Any) -> Any:
    """The value with an object that nothing takes in the place of each bool, so that the error is the field's own."""
    if isinstance(value, bool):
        return object()
    if isinstance(value, list | tuple):
        return [_no_number(item) for item in value]
    if isinstance(value, dict):
        return {key: _no_number(item) for key, item in value.items()}
    return value
