"""The embedded demo: three small trained models and the prompts held out from their training. Owns where they lie;
recipe.py makes them, and nothing that loads them knows that they are special."""

from pathlib import Path

_FILES = {"base": "base", "reward": "reward", "judge": "judge", "prompts": "prompts.jsonl"}


def path(name: str) -> Path:
    """The directory of a demo model (transformers format) or the prompts' JSON lines; ValueError for other names."""
    if name not in _FILES:
        raise ValueError(f"the demo has no {name!r}; choose one of {', '.join(_FILES)}")
    return Path(__file__).parent / _FILES[name]
