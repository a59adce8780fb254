"""A reasoning model's answer without its thinking. Pure."""

from __future__ import annotations

from collections.abc import Sequence

UNFINISHED = "the response ends inside its thinking"  # how every message of Unfinished begins


class Unfinished(ValueError):
    """The response ends inside its thinking and so has no answer; the message is a candidate's reason."""


def answer(text: str, tags: Sequence[str], opened: bool = False) -> str:
    """What follows the block of thinking between the two tags, without white space before it; the text itself where it
    has no such block. opened: the prompt ends with the opening tag, as some templates leave it. Raises Unfinished."""
    opening, closing = tags
    before, closed, rest = text.partition(closing)
    if closed and (opened or opening in before or not before.strip()):
        return rest.lstrip()
    if not closed and (opened or text.lstrip().startswith(opening)):
        raise Unfinished(f"{UNFINISHED}: there is no {closing} in it; raise max_new_tokens")
    return text


def opens(prompt: str, tags: Sequence[str]) -> bool:
    """Whether a rendered prompt ends with the tag that opens a block of thinking."""
    return prompt.rstrip().endswith(tags[0])
