"""Chat templates that a reward model is shown instead of its tokenizer's: built-in ones by name, others from a file."""

from __future__ import annotations

import functools
from pathlib import Path

from aisp_dist.config import ConfigError

_NO_SYSTEM = (
    "{%- if m.role == 'system' %}{{ raise_exception('this template has no place for a system message; set system: "
    "drop') }}{% endif %}"
)
BUILT_IN = {
    # As openbmb/UltraRM-13b was trained: Human: {q}\nAssistant: {a}
    "ultrarm": "{%- for m in messages %}" + _NO_SYSTEM + "{{ '' if loop.first else '\\n' }}"
    "{{ ('Assistant: ' if m.role == 'assistant' else 'Human: ') + m.content }}{% endfor %}",
    # As openbmb/Eurus-RM-7b was trained, the backslash included: [INST] {q} [\\INST] {a}
    "eurus": "{%- for m in messages %}" + _NO_SYSTEM + "{{ '' if loop.first else ' ' }}"
    "{{ m.content if m.role == 'assistant' else '[INST] ' + m.content + ' [\\\\INST]' }}{% endfor %}",
}


def locate(key: str, name: str | None, base_dir: Path) -> str | None:
    """A built-in name as it is, a file as its absolute path. Raises ConfigError for a file that is not there."""
    return name if name is None or name in BUILT_IN else file(key, name, base_dir)


def file(key: str, name: str, base_dir: Path) -> str:
    path = (base_dir / name).resolve()
    if not path.is_file():
        raise ConfigError(f"{key}: no file {str(path)!r}; the path is relative to the config file")
    try:
        fault = _fault(read(str(path)))
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {str(path)!r} is not UTF-8 text; save it as UTF-8") from None
    if fault:
        raise ConfigError(f"{key}: {str(path)!r} is not valid Jinja ({fault}); correct it")
    return str(path)


@functools.cache
def _fault(template: str) -> str | None:
    """What is wrong with a template as Jinja; None if nothing is. With the tags that transformers adds to Jinja's."""
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        """{% generation %} around an assistant's text, which transformers can find again."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).compile(template)
    except jinja2.TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return None


def read(name: str, base_dir: Path | None = None) -> str:
    return BUILT_IN.get(name) or ((base_dir or Path()) / name).read_text(encoding="utf-8-sig")
