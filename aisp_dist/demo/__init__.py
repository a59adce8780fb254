"""The embedded demo: three small trained models, and prompts that were held out from their training. They are loaded
like any other model; card.json says what they are.
"""

from pathlib import Path

_FILES = {"base": "base", "reward": "reward", "judge": "judge", "prompts": "prompts.jsonl"}


def path(name: str) -> Path:
    """The directory of a demo model in transformers format, or the file of the prompts (JSON lines).

    Raises ValueError for another name.
    """
    if name not in _FILES:
        raise ValueError(f"the demo has no {name!r}; choose one of {', '.join(_FILES)}")
    return Path(__file__).parent / _FILES[name]
