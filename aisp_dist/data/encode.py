"""Text to token ids: where BOS goes, and which parts of a text may become special tokens. Knows no chat template, no
prompt, no model and no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any

from aisp_dist.records import Message

Tokenizer = Any  # a transformers tokenizer

_PRIVATE = 0x100000  # the first character of the last private-use plane, which has 65,534


class Unrenderable(ValueError):
    """A prompt that has no token ids; the message is the reason of its failed row."""


def token_ids(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    with _refusals():
        # verbose would warn of texts that are longer than the tokenizer's own limit, which callers check
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (TypeError, UnicodeError) as error:  # how tokenizers say that a str holds a lone surrogate
        raise Unrenderable(f"the tokenizer refuses the text: {error}") from None


def surplus(tokenizer: Tokenizer, rows: int) -> str | None:
    """What is wrong where a tokenizer has ids beyond the `rows` of a model's embedding, which fail only when a text
    uses one; None where it has not."""
    known = max(tokenizer.get_vocab().values(), default=-1) + 1
    if known <= rows:
        return None
    return (
        f"its tokenizer has {known} tokens and its embedding {rows} rows; give the tokenizer that the model was trained"
        " with, or save the model after resize_token_embeddings"
    )


def starts_with_bos(tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    return tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]


def after_prefix(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a text after the special tokens that the tokenizer puts before texts, unless the text brings BOS."""
    return ids if starts_with_bos(tokenizer, ids) else _prefix(tokenizer) + ids


def after_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids of a rendered chat, after BOS if the tokenizer begins its texts with it and the template did not."""
    bos = _prefix(tokenizer)[:1]
    return bos + ids if starts_with_bos(tokenizer, bos) and not starts_with_bos(tokenizer, ids) else ids


def _prefix(tokenizer: Tokenizer) -> list[int]:
    bare, full = (token_ids(tokenizer, "a", add_special_tokens=whole) for whole in (False, True))
    return full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)]


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    text_of: Callable[[Sequence[Message]], str],
    literal: Literal | None,
) -> list[int]:
    """Token ids of text_of(messages). The tokens of `literal` that stand in the text of a message are read as the
    characters that they are; None: special tokens in it are special tokens. Raises Unrenderable."""
    if literal is None:
        return token_ids(tokenizer, text_of(messages))
    hidden = [(role, literal.hide(text)) for role, text in messages]
    if hidden == list(messages):
        return token_ids(tokenizer, text_of(messages))
    literal.check(messages)
    return literal.encode(text_of(hidden))


class Literal:
    """Keeps the special tokens in the texts of messages apart from those that a template writes around them.

    `hide` puts a private character in the place of each token in a message. The tokens that a rendered chat has are
    then the template's. `encode` gives each token the other's spelling and encodes the text by a copy of the tokenizer
    in which the tokens are spelled by their private characters: it finds the template's tokens, with their own ids,
    and no others. Everything else is the tokenizer's own, so the ids are those that the tokenizer would give if the
    tokens in messages were no special ones.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
        self.own = tokenizer
        self.spelling = {token: chr(_PRIVATE + i) for i, token in enumerate(sorted(tokens))}
        self.tokens = one_of(self.spelling)

    def hide(self, text: str) -> str:
        return self.tokens.sub(lambda match: self.spelling[match[0]], text)

    def check(self, messages: Sequence[Message]) -> None:
        """Raises Unrenderable where the tokens in these messages cannot be hidden."""
        texts = [text for _, text in messages]
        found = next(match[0] for text in texts if (match := self.tokens.search(text)))
        fix = f"which is a special token ({found}); take it out of the text, or set prompts.special_tokens: true"
        if not hasattr(self.own, "backend_tokenizer"):
            raise Unrenderable(f"this tokenizer, written in Python, cannot read as plain text {found!r}, {fix}")
        if taken := set(self.spelling.values()) & set("".join(texts)):
            raise Unrenderable(f"the text has the private character U+{ord(min(taken)):X} beside {found!r}, {fix}")

    def encode(self, text: str) -> list[int]:
        other = self.spelling | {private: token for token, private in self.spelling.items()}
        respelled = one_of(other).sub(lambda match: other[match[0]], text)
        with _refusals():
            ids: list[int] = self._respelled.encode(respelled, add_special_tokens=False).ids
        return ids

    @cached_property
    def _respelled(self) -> Any:
        import tokenizers

        spec = json.loads(self.own.backend_tokenizer.to_str())
        spec["post_processor"] = None  # it names special tokens; `encode` adds none
        for token in spec["added_tokens"]:
            token["content"] = self.spelling.get(token["content"], token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.spelling.get(piece, piece): id for piece, id in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[self.spelling.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self.spelling.get(model["unk_token"], model["unk_token"])
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


def one_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, of those that begin alike the longest."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


@lru_cache(maxsize=8)
def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)


@lru_cache(maxsize=8)
def special(tokenizer: Tokenizer) -> Literal:
    """The tokenizer's special tokens."""
    return Literal(tokenizer, (token.content for token in tokenizer.added_tokens_decoder.values() if token.special))
