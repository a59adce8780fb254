"""Prompts to token ids of the base model, and chats to token ids of any model. Pure given the tokenizer; knows no
files, no model and no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from aisp_dist.config import ConfigError, Prompts
from aisp_dist.records import Message, Prompt

Tokenizer = Any  # a transformers tokenizer

# What a chat template reads as today: the same config must give the same prompts tomorrow. The day is the one that
# Llama's templates fall back to.
TODAY = datetime(2024, 7, 26)
_DIRECTIVES = [f"%{d}" for d in "aAbBcdfHIjmMpSuUVwWxXyYzZG"] + [f"%-{d}" for d in "dmHIjMS"]


class Unrenderable(ValueError):
    """Why this prompt has no token ids; a failed row's reason."""


class Overlong(Unrenderable):
    pass


def render(prompt: Prompt, settings: Prompts, tokenizer: Tokenizer, max_length: int) -> tuple[int, ...]:
    """Token ids of the prompt, at most `max_length`, with the tokenizer's BOS exactly once where it wants one.

    chat: the tokenizer's template with a generation prompt. raw, shp, hh: the text, with the special tokens that the
    tokenizer puts before a text, never those after it. SHP is `{begin}{history}\\nAssistant:`; HH has `\\n\\n{begin}`
    and `\\n\\nAssistant:` before the turns, as Kanai et al. (arXiv 2510.26219) render both.
    A longer prompt is refused, or per `overlong` cut from the left or by its oldest turns (a user's message with what
    answers it; system messages and the last user turn stay).
    Raises Unrenderable (this prompt) or ConfigError (every prompt).
    """
    tokens = _encoder(settings, tokenizer)
    ids = tokens(prompt.content)
    if len(ids) <= max_length:
        return _nonempty(ids)
    size = f"{len(ids)} tokens, more than the {max_length} that fit"
    if settings.overlong == "left":
        head = ids[:1] if starts_with_bos(tokenizer, ids) else []
        if max_length > len(head):
            return tuple(head + ids[len(ids) - max_length + len(head) :])
    if settings.overlong == "drop_turns" and not isinstance(prompt.content, str):
        users = [i for i, (role, _) in enumerate(prompt.content) if role == "user"]
        for cut in users:
            ids = tokens(tuple(m for i, m in enumerate(prompt.content) if i >= cut or m[0] == "system"))
            if len(ids) <= max_length:
                return _nonempty(ids)
        size += f", and {len(ids)} without all turns that may be dropped"
    raise Overlong(f"the prompt has {size}; raise prompts.max_tokens or set prompts.overlong")


def _nonempty(ids: list[int]) -> tuple[int, ...]:
    if not ids:
        raise Unrenderable("the prompt has no tokens: the tokenizer knows none of its characters")
    return tuple(ids)


def _encoder(settings: Prompts, tokenizer: Tokenizer) -> Callable[[str | Sequence[Message]], list[int]]:
    def text_of(content: str | Sequence[Message]) -> str:
        if isinstance(content, str):
            return content
        if settings.format == "shp":
            return f"{settings.begin}{content[-1][1]}\nAssistant:"
        turns = (f"\n\n{settings.begin if role == 'user' else 'Assistant:'} {said}" for role, said in content)
        return "".join(turns) + "\n\nAssistant:"

    if settings.format != "chat":
        return lambda content: encode_text(tokenizer, text_of(content))
    fix = "set format: raw, or generator.chat_template to a file with one"
    return lambda content: encode_chat(
        tokenizer, as_chat(content), settings.template_kwargs, add_generation_prompt=True, fix=fix
    )


def as_chat(content: str | Sequence[Message]) -> Sequence[Message]:
    return (("user", content),) if isinstance(content, str) else content


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    bare = _ids(tokenizer, text, add_special_tokens=False)
    if starts_with_bos(tokenizer, bare):
        return bare
    full = _ids(tokenizer, text, add_special_tokens=True)
    before = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return full[:before] + bare


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    fix: str,
) -> list[int]:
    """Token ids of a chat under the tokenizer's template. The template decides every token but BOS, which is put before
    them if the tokenizer starts its texts so and the template did not. `fix`: what to do where there is no template."""
    ids = _ids(
        tokenizer, chat_text(tokenizer, messages, template_kwargs, add_generation_prompt, fix), add_special_tokens=False
    )
    wanted = _ids(tokenizer, "", add_special_tokens=True)[:1]
    if starts_with_bos(tokenizer, wanted) and not starts_with_bos(tokenizer, ids):
        return wanted + ids
    return ids


def starts_with_bos(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    return tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]


def _ids(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    try:
        # verbose would warn of texts over the tokenizer's own limit, which callers check
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except (TypeError, UnicodeError) as error:  # how tokenizers say that a str holds a lone surrogate
        raise Unrenderable(f"the tokenizer refuses the text: {error}") from None


def chat_text(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
    add_generation_prompt: bool,
    fix: str,
) -> str:
    import jinja2

    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(f"the tokenizer {tokenizer.name_or_path!r} has no chat template; {fix}") from None
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            chat_template=_undated(template),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template of {tokenizer.name_or_path!r} is no template ({error}); {fix}") from None
    except Exception as error:  # templates are programs: raise_exception, and whatever else they do
        raise Unrenderable(f"the chat template refuses the messages: {error}") from error
    return text


def _undated(template: str) -> str:
    """The template with its clock stopped: a macro of its own shadows the global strftime_now, and the newline after it
    is the one that transformers' trim_blocks takes away."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{d}', '{TODAY.strftime(d)}')" for d in _DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"
