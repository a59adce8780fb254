"""Text of responses: prompt and response make the text that the model wrote, and a cut leaves whole characters."""

import random

import pytest
from chat_models import KINDS, TEXT, tokenizer

from aisp_dist.data.detokenize import stopped, text_after

TEXTS = [*TEXT, "the cat 🪐🫠🦩", "你好，世界🦄\n", "a\n\n  b", "naïve naïve"]


def decode(tok, ids):
    return tok.decode(ids, skip_special_tokens=True)


def ids_of(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [True, False])
def test_prompt_and_response_are_the_text_of_all_tokens(kind, bos):
    tok = tokenizer(kind)
    for text in TEXTS:
        ids = tok(text, add_special_tokens=bos)["input_ids"]
        for at in range(1 + bos, len(ids)):
            before = decode(tok, ids[:at])
            if not before.endswith("\ufffd"):  # a prompt ends with a whole character
                assert before + text_after(tok, ids[:at], ids[at:]) == decode(tok, ids), (text, at)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_last_tokens_of_a_prompt_are_decoded_again(kind, monkeypatch):
    tok = tokenizer(kind)
    ids = ids_of(tok, " ".join(TEXTS * 9))
    seen, own = [], type(tok).decode
    monkeypatch.setattr(type(tok), "decode", lambda self, ids, **how: (seen.append(len(ids)), own(self, ids, **how))[1])
    text_after(tok, ids[:-5], ids[-5:])
    assert max(seen) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_is_found_at_the_token_that_completes_it(kind):
    """Looking at the end of the text alone finds what looking at all of it finds: whole texts, random tokens, and stop
    strings of one byte and of several characters."""
    tok, draw = tokenizer(kind), random.Random(0)
    prompt = ids_of(tok, "the dog ran ")
    written = [ids_of(tok, " ".join(draw.sample(TEXTS * 3, 20))) for _ in range(6)]
    written += [draw.choices(range(len(tok) + 3), k=150) for _ in range(6)]
    written += [ids_of(tok, "".join(map(chr, range(0x1F300, 0x1F320))))] * 3  # where no token but bytes spells it
    found = 0
    for ids in written:
        whole = text_after(tok, prompt, ids)
        for _ in range(12 if whole else 0):
            at, size = draw.randrange(len(whole)), draw.choice([1, 2, 3, 9])
            stop = [whole[at : at + size], "never\x00there"]
            if "\ufffd" in stop[0]:
                continue
            for end in range(1, len(ids) + 1):
                text = text_after(tok, prompt, ids[:end])
                cut = text[: text.find(stop[0])] if stop[0] in text else None
                assert stopped(tok, prompt, ids[:end], stop) == cut, (stop, ids[:end])
                if cut is not None:
                    found += 1
                    break
    assert found > 60


@pytest.mark.parametrize("kind", KINDS)
def test_looking_for_a_stop_string_takes_no_longer_in_a_long_text(kind, monkeypatch):
    tok = tokenizer(kind)
    ids = ids_of(tok, " ".join(TEXTS * 40))
    assert len(ids) > 1000
    seen, own = [], type(tok).decode
    monkeypatch.setattr(type(tok), "decode", lambda self, ids, **how: (seen.append(len(ids)), own(self, ids, **how))[1])
    for end in range(1, len(ids) + 1):
        assert stopped(tok, ids[:5], ids[:end], ["###", "\n\nQ:"]) is None
    assert max(seen) < 30


def test_a_space_between_words_stays():
    tok = tokenizer("sentencepiece")
    prompt, answer = ids_of(tok, "the cat sat on"), ids_of(tok, "the mat")
    assert decode(tok, answer) == "the mat" and text_after(tok, prompt, answer) == " the mat"


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_a_special_token_is_decoded_by_itself(kind):
    tok = tokenizer(kind)
    ids = ids_of(tok, "the mat")
    header = tok.convert_tokens_to_ids(["<s>", "<|im_start|>"])
    assert text_after(tok, header, ids) == text_after(tok, [], ids) == decode(tok, ids)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_characters_of_bytes_at_the_end_of_a_prompt_do_no_harm(kind):
    tok = tokenizer(kind)
    for end in ("🪐" * 9, "你" * 9, "é" * 30):
        prompt = ids_of(tok, "the " + end)
        for answer in ("🫠 cat", "cat"):
            ids = ids_of(tok, "the " + end + answer)
            assert ids[: len(prompt)] == prompt and text_after(tok, prompt, ids[len(prompt) :]) == answer


# Cut inside a character


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_every_cut_leaves_whole_characters(kind):
    tok = tokenizer(kind)
    prompt = ids_of(tok, "the dog ran")
    halves = 0
    for text in TEXTS:
        ids = ids_of(tok, "the dog ran " + text)[len(prompt) :]
        for end in range(len(ids) + 1):
            size = sum(num_bytes(token, kind) for token in tok.convert_ids_to_tokens(ids[:end]))
            whole = (" " + text).encode()[:size].decode(errors="ignore")
            assert text_after(tok, prompt, ids[:end], cut=True) == whole
            halves += whole != text_after(tok, prompt, ids[:end])
    assert halves > 5


def num_bytes(token, kind):
    if kind == "byte-level":
        return len(token)
    return 1 if token.startswith("<0x") else len(token.replace("▁", " ").encode())


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_what_the_model_wrote_stays(kind):
    tok = tokenizer(kind)
    written = ids_of(tok, "cat \ufffd")
    assert text_after(tok, [], written, cut=True).endswith("cat \ufffd")
    byte = "Ł" if kind == "byte-level" else "<0x9F>"  # the byte 0x9F, which begins no character
    stray = [*ids_of(tok, "the cat"), tok.convert_tokens_to_ids(byte)]
    assert text_after(tok, [], stray, cut=True) == "the cat\ufffd"
    half = ids_of(tok, "cat 🪐")[:-1]
    assert text_after(tok, [], half, cut=True) == "cat " and "\ufffd" in text_after(tok, [], half)


def test_tokens_that_hold_the_end_of_one_character_and_the_start_of_another():
    """Random bytes, cut anywhere: the text is that of the bytes without those of an unfinished character."""
    tok, draw = tokenizer("byte-level"), random.Random(0)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    for _ in range(200):
        data = bytes(draw.choices([0x41, 0x9F, 0xC3, 0xE2, 0x82, 0xAC, 0xF0], k=9))
        ids = tok.convert_tokens_to_ids([letters[byte] for byte in data])
        kept = next(data[: len(data) - n] for n in (3, 2, 1, 0) if n == 0 or unfinished(data[len(data) - n :]))
        assert text_after(tok, [], ids, cut=True) == kept.decode("utf-8", "replace"), data


def unfinished(end):
    """Whether bytes are the start of a character and not all of it."""
    try:
        end.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start == 0
    return False
