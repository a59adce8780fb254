"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """A fault of the configuration or of what it names: one line with key, value, rule and fix; exit code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


def doc(text: str, default: Any = ..., **bounds: Any) -> Any:
    return Field(default=default, description=text, **bounds)
