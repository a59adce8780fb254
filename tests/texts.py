"""What README.md and docs/ generate: measured tables from tests/bench/figures.json, tables of keys from the
configuration's models. `python -m tests.texts` writes them between their marks:

    <!-- measured: mini -->  ...  <!-- end -->
    <!-- keys: Prompts -->   ...  <!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aisp_dist.config import Run
from tests.bench import figures

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TYPES = {"string": "text", "integer": "whole number", "number": "number", "null": "`null`", None: "any"}
BLOCK = re.compile(r"<!-- ((?:measured|keys): \w+) -->\n(.*?)<!-- end -->", re.DOTALL)


def blocks() -> dict[str, str]:
    """The text of every generated block, by its name."""
    return figures.blocks() | {f"keys: {section.__name__}": keys(section) for section in sections()}


def sections() -> list[type[BaseModel]]:
    """The sections of a configuration that have a table of their own. One that is a choice beside others, as
    {top_p: 0.9} is, stands in its key's line."""
    found: dict[type[BaseModel], None] = {Run: None}
    for section in (waiting := [Run]):
        for field in section.model_fields.values():
            for inner in _models(field.annotation):
                if inner not in found and _own_table(inner, field):
                    found[inner] = None
                    waiting.append(inner)
    return list(found)


def _own_table(section: type[BaseModel], field: FieldInfo) -> bool:
    beside = [a for a in _parts(field.annotation) if a not in (section, type(None))]
    return "kind" in section.model_fields or not beside or _is_mapping(field)


def _is_mapping(field: FieldInfo) -> bool:
    return getattr(field.annotation, "__origin__", None) is dict


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)


def _parts(annotation: Any) -> list[Any]:
    return list(getattr(annotation, "__args__", ())) or [annotation]


def keys(section: type[BaseModel]) -> str:
    """Key, values, default and meaning of every field."""
    schema = section.model_json_schema()
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        key = field.alias or name
        about = schema["properties"][key]
        cells = [f"`{key}`", _values(about, schema), _default(field), field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True, mode="json", exclude_defaults=True)
        return f"`{_yaml(value)}`" if value else "see its table"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """JSON in one line, which is YAML too, without its quotes around plain words."""
    return re.sub(r'"([\w.]+)"', r"\1", json.dumps(value, ensure_ascii=False))


def _values(about: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in about:
        about = schema["$defs"][about["$ref"].rpartition("/")[2]]
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{_yaml(value)}`" for value in about["enum"])
    for union in ("anyOf", "oneOf"):
        if union in about:
            return " or ".join(dict.fromkeys(_values(one, schema) for one in about[union]))
    kind = about.get("type")
    if kind == "object":
        if isinstance(inner := about.get("additionalProperties"), dict) and inner:
            return f"by name: {_values(inner, schema)}"
        if not (own := about.get("properties")):
            return "mapping"
        if "kind" in own:
            return f"`{{kind: {own['kind']['const']}, ...}}`"
        return "`{" + ", ".join(f"{name}: ..." for name in own) + "}`" if len(own) < 3 else "section"
    if kind == "array":
        return f"list of {_values(about['items'], schema)}" if "items" in about else "list"
    if kind == "boolean":
        return "`true`, `false`"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {about[bound]:g}" for bound, sign in bounds.items() if bound in about]
    return " ".join([TYPES[kind], ", ".join(limits)]).strip()


def write() -> None:
    found = blocks()
    for path in TEXTS:
        text = path.read_text()
        made = BLOCK.sub(lambda block: f"<!-- {block[1]} -->\n{found[block[1]]}\n<!-- end -->", text)
        if made != text:
            path.write_text(made)


if __name__ == "__main__":
    write()
