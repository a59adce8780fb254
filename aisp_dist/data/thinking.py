"""A reasoning model's response without its thinking. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class Unfinished(ValueError):
    """The response ends inside its thinking, so that it has no answer; a candidate's reason."""


def answer(text: str, tags: Sequence[str], opened: bool = False) -> str:
    """What follows the block between the two tags, white space before it aside; the text as it is where it has none.
    opened: the prompt ends with the opening tag, as some templates leave it. Raises Unfinished."""
    opening, closing = tags
    before, closed, rest = text.partition(closing)
    if closed and (opened or opening in before or not before.strip()):
        return rest.lstrip()
    if not closed and (opened or text.lstrip().startswith(opening)):
        raise Unfinished(f"the response ends inside its thinking: there is no {closing} in it; raise max_new_tokens")
    return text


def opens(prompt: str, tags: Sequence[str]) -> bool:
    """Whether a rendered prompt ends inside a block of thinking that it has opened."""
    return prompt.rstrip().endswith(tags[0])
