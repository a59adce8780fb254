"""Prompts to token ids of the base model: the formats, and what is cut from a prompt that is too long. Pure given the
tokenizer; knows no files, no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aisp_dist.config import Prompts
from aisp_dist.data import encode
from aisp_dist.data.chat import as_chat, encode_chat
from aisp_dist.data.encode import Tokenizer, Unrenderable
from aisp_dist.records import Message, Prompt

__all__ = ["Overlong", "Tokenizer", "Unrenderable", "render"]

_FIX = "set prompts.format: raw, or generator.chat_template to another template"


class Overlong(Unrenderable):
    """The prompt has more tokens than fit."""


def render(prompt: Prompt, settings: Prompts, tokenizer: Tokenizer, max_length: int) -> tuple[int, ...]:
    """Token ids of the prompt, at most `max_length`, with the tokenizer's BOS exactly once where it wants one.

    chat: the tokenizer's template with a generation prompt. raw, shp, hh: the text, after the special tokens that the
    tokenizer puts before texts. SHP is `{begin}{history}\\nAssistant:`; HH has `\\n\\n{begin}` and `\\n\\nAssistant:`
    before the turns, as Kanai et al. (arXiv 2510.26219) render both.
    Special tokens in a message's text are plain text unless `special_tokens` is set; a raw text may hold them, since it
    may be a chat that its author has rendered.
    A longer prompt is refused or, by `overlong`, loses tokens on its left or its oldest turns (a user's message with
    what follows it up to the next; system messages and the last user turn stay).
    Raises Unrenderable (this prompt) or ConfigError (every prompt).
    """
    tokens = _encoder(settings, tokenizer)
    ids = tokens(prompt.content)
    if len(ids) <= max_length:
        return _nonempty(ids)
    size = f"{len(ids)} tokens, more than the {max_length} that fit"
    if settings.overlong == "left":
        head = ids[:1] if encode.starts_with_bos(tokenizer, ids) else []
        if max_length > len(head):
            return tuple(head + ids[len(ids) - max_length + len(head) :])
    if settings.overlong == "drop_turns" and not isinstance(prompt.content, str):
        users = [i for i, (role, _) in enumerate(prompt.content) if role == "user"]
        for cut in users:
            ids = tokens(tuple(m for i, m in enumerate(prompt.content) if i >= cut or m[0] == "system"))
            if len(ids) <= max_length:
                return _nonempty(ids)
        size += f", and {len(ids)} without all turns that may be dropped"
    fix = "raise prompts.max_tokens"
    if max_length < settings.max_tokens:
        size += " into the model's context beside its answer"
        fix = "lower generator.max_new_tokens"
    raise Overlong(f"the prompt has {size}; {fix} or set prompts.overlong")


def _nonempty(ids: list[int]) -> tuple[int, ...]:
    if not ids:
        raise Unrenderable("the prompt has no tokens: the tokenizer knows none of its characters")
    return tuple(ids)


def _encoder(settings: Prompts, tokenizer: Tokenizer) -> Callable[[str | Sequence[Message]], list[int]]:
    def chat(content: str | Sequence[Message]) -> list[int]:
        return encode_chat(
            tokenizer,
            as_chat(content),
            settings.template_kwargs,
            add_generation_prompt=True,
            fix=_FIX,
            special_tokens=settings.special_tokens,
        )

    def text(content: str | Sequence[Message]) -> list[int]:
        if isinstance(content, str):
            ids = encode.token_ids(tokenizer, content)
        else:
            literal = None if settings.special_tokens else encode.special(tokenizer)
            ids = encode.encode_messages(tokenizer, content, text_of, literal)
        return encode.after_prefix(tokenizer, ids)

    def text_of(messages: Sequence[Message]) -> str:
        if settings.format == "shp":
            return f"{settings.begin}{messages[-1][1]}\nAssistant:"
        turns = (f"\n\n{settings.begin if role == 'user' else 'Assistant:'} {said}" for role, said in messages)
        return "".join(turns) + "\n\nAssistant:"

    return chat if settings.format == "chat" else text
