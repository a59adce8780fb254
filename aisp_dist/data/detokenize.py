"""Token ids of a response to its text, as the text goes on after its prompt. Knows no model and no torch."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from aisp_dist.data.encode import Tokenizer, special_ids

_CONTEXT = 16  # tokens of the prompt that are decoded with a response; any that make a text would do
_MARGIN = 4  # tokens in front of a text's end, whose text may be another by itself: a character's bytes, a space
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece spells a byte of a character that it has no token for


def text_after(tokenizer: Tokenizer, prompt_tokens: Sequence[int], tokens: Sequence[int], *, cut: bool = False) -> str:
    """The text of a response without special tokens: what it adds to the text of its prompt. So the space before a
    first word stays where the prompt's text goes on, which decoders leave out at the beginning of a text. Special
    tokens divide texts: what follows one is decoded as it was encoded, by itself.

    cut: the response may end inside a character; the bytes of an unfinished one are left out. U+FFFD that the model has
    written, as a character or by bytes that are no character, stays.
    """
    tokens = list(tokens)
    unfinished = _unfinished(tokenizer, tokens) if cut else 0
    spelled = _bytes_are(tokenizer)
    if spelled == "tokens":
        tokens = tokens[: len(tokens) - unfinished]
    context = _context(tokenizer, prompt_tokens)
    before, whole = _decode(tokenizer, context), _decode(tokenizer, [*context, *tokens])
    text = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, tokens)
    return text.removesuffix("\ufffd") if unfinished and spelled == "characters" else text


def stopped(
    tokenizer: Tokenizer, prompt_tokens: Sequence[int], tokens: Sequence[int], stop: Sequence[str]
) -> str | None:
    """The text of a response before the first of these strings, None if it has none. Asked after every token, it
    decodes only the end of the text, until that has one of them."""
    end = _end(tokenizer, tokens, max(len(string.encode()) for string in stop))
    if end is not None and not any(string in end for string in stop):
        return None
    text = text_after(tokenizer, prompt_tokens, tokens)
    cuts = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(cuts)] if cuts else None


def _end(tokenizer: Tokenizer, tokens: Sequence[int], num_bytes: int) -> str | None:
    """A text that ends with at least the last `num_bytes` bytes of a response's text, whose first characters may be
    others; None for a short response."""
    special, size, runs = special_ids(tokenizer), _size(tokenizer), _bytes_are(tokenizer) == "tokens"
    window: list[int] = []  # from the last token back; each has a byte at least
    for token in reversed(tokens):
        if token < size and token not in special:
            window.append(token)
            spare = len(window) - num_bytes - _MARGIN
            # A run of byte tokens that begins inside a character has no text.
            if spare >= 0 and not (runs and spare < _MARGIN and _continues(tokenizer, token)):
                return _decode(tokenizer, window[::-1])
    return None


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _context(tokenizer: Tokenizer, prompt_tokens: Sequence[int]) -> list[int]:
    """The last tokens of a prompt, from its last special token on; not from the middle of a character's bytes."""
    special, start = special_ids(tokenizer), len(prompt_tokens)
    while start and ((before := prompt_tokens[start - 1]) not in special or before == tokenizer.unk_token_id):
        if len(prompt_tokens) - start >= _CONTEXT and not _is_byte(tokenizer, prompt_tokens[start]):
            break
        start -= 1
    return list(prompt_tokens[start:])


def _is_byte(tokenizer: Tokenizer, token: int) -> bool:
    return _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token) or "") is not None


def _continues(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a token is a byte of a character that is not its first."""
    match = _BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token) or "")
    return match is not None and 0x80 <= int(match[1], 16) < 0xC0


@lru_cache(maxsize=8)
def _size(tokenizer: Tokenizer) -> int:
    return len(tokenizer)


def _unfinished(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """How many bytes at the end begin a character and do not complete it."""
    spelled = _bytes_are(tokenizer)
    if spelled == "hidden":
        return 0
    alphabet, special = _alphabet(), special_ids(tokenizer)
    data = b""
    for token in tokenizer.convert_ids_to_tokens([token for token in tokens if token not in special][-8:]):
        if spelled == "characters" and token and set(token) <= alphabet.keys():
            data += bytes(alphabet[letter] for letter in token)
        elif spelled == "tokens" and (match := _BYTE.fullmatch(token or "")):
            data += bytes([int(match[1], 16)])
        else:
            data += (token or "").encode()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


@lru_cache(maxsize=8)
def _bytes_are(tokenizer: Tokenizer) -> Literal["characters", "tokens", "hidden"]:
    """How the tokenizer's vocabulary spells bytes: each as a character of its tokens (byte-level BPE), or as a token of
    its own."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    state: bytes = decoder.__getstate__() if decoder is not None else b""
    return "characters" if b'"ByteLevel"' in state else "tokens" if b'"ByteFallback"' in state else "hidden"


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """Bytes by the characters that byte-level BPE spells them with (GPT-2): themselves where those can be printed, the
    others from U+0100 on, in order."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    own = {letter: ord(letter) for letter in letters if ord(letter) < 256}
    rest = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip((letter for letter in letters if letter not in own), rest, strict=True))
