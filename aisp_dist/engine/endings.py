"""What ends a response: tokens of the checkpoint, of its chat template and of the configuration, and strings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from aisp_dist.config import Generator
from aisp_dist.data.chat import end_of_turn

_log = logging.getLogger("aisp")


def end_ids(config: Any, generation_config: Any, tokenizer: Any) -> tuple[frozenset[int], int | None]:
    """The tokens that end a response, and the one of them that only the chat template knows; None if the checkpoint
    declares all."""
    ends: set[int] = set()
    for value in (generation_config.eos_token_id, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        ends.update(() if value is None else [value] if isinstance(value, int) else value)
    turn_end = end_of_turn(tokenizer)
    if turn_end is None or turn_end in ends:
        return frozenset(ends), None
    return frozenset(ends | {turn_end}), turn_end


def stops(tokenizer: Any, ends: frozenset[int], stop: Sequence[str]) -> tuple[frozenset[int], tuple[str, ...]]:
    """The end tokens and the stop strings of a configuration: a string that is a special token acts as an end token."""
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return ends | {special[s] for s in stop if s in special}, tuple(s for s in stop if s not in special)


def warn_of_turn_end(settings: Generator, tokenizer: Any, turn_end: int | None) -> None:
    """Say in the log which end token only the chat template knows."""
    if turn_end is not None:
        _log.warning(
            "generator.model: the chat template ends an assistant's turn with %r, which %r does not declare as an end "
            "token; a response ends there too",
            tokenizer.convert_ids_to_tokens(turn_end),
            settings.model,
        )
