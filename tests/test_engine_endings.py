"""How a trajectory ends, and how a token is chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chat_models
import pytest
import slow_path
import tiny
from tokenizers import AddedToken

from aisp_dist.config import Generator
from aisp_dist.engine import model
from aisp_dist.engine.decode import Engine
from aisp_dist.records import BASE_ITERATION, Round, Sampling, TopP, Trajectory

STEPS = 16
PROMPT = tuple(range(20, 32))
BASE = Round(0, "p", PROMPT, BASE_ITERATION, 0, 1, Sampling())


def engine(
    ends: Sequence[int] | int | None = None, steps: int = STEPS, stop: Sequence[str] = (), **overrides: Any
) -> Engine:
    made = tiny.causal("llama", **overrides)
    made.generation_config.eos_token_id = list(ends) if isinstance(ends, Sequence) else ends
    made.config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    if ends is None:
        tokenizer.eos_token = None
    return Engine(model.adapt(made, tokenizer), 4, steps, stop)


def greedy(**settings: Any) -> Trajectory:
    return engine(**settings).run([BASE])[0].trajectories[0]


@pytest.fixture(scope="module")
def endless() -> Trajectory:
    return greedy()


def test_length(endless: Trajectory) -> None:
    assert endless.finish_reason == "length" and len(endless.token_ids) == STEPS
    assert endless.text == tiny.tokenizer().decode(endless.token_ids, skip_special_tokens=True)


def test_an_end_token_at_the_first_step(endless: Trajectory) -> None:
    first = greedy(ends=endless.token_ids[0])
    assert (first.token_ids, first.text, first.finish_reason) == (endless.token_ids[:1], "", "stop")


def test_the_earliest_of_several_end_tokens(endless: Trajectory) -> None:
    ids = endless.token_ids
    at = next(i for i in range(3, STEPS) if ids[i] not in ids[:i])
    ended = greedy(ends=[ids[-1], ids[at]] if ids[-1] not in ids[:at] else [ids[at]])
    assert ended.token_ids == ids[: at + 1] and ended.finish_reason == "stop"
    assert ended.text == tiny.tokenizer().decode(ids[:at], skip_special_tokens=True)
    reference = tiny.causal("llama")
    assert slow_path.generate(reference, BASE, STEPS, eos_token_id=ids[at]) == [list(ended.token_ids)]


def test_an_end_token_as_the_last_step_is_a_stop(endless: Trajectory) -> None:
    ids = endless.token_ids
    at = next(i for i in range(3, STEPS) if ids[i] not in ids[:i])
    ended = greedy(ends=[ids[at]], steps=at + 1)
    assert ended.finish_reason == "stop" and ended.token_ids == ids[: at + 1]


def test_the_tokenizer_s_end_token_counts(endless: Trajectory) -> None:
    made = tiny.causal("llama")
    made.generation_config.eos_token_id = made.config.eos_token_id = None
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(endless.token_ids[0])
    assert len(Engine(model.adapt(made, tokenizer), 4, STEPS, ()).run([BASE])[0].trajectories[0].token_ids) == 1


def test_a_stop_string_over_two_tokens_is_cut(endless: Trajectory) -> None:
    text = endless.text
    at = next(i for i in range(2, len(text) - 1) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    ended = greedy(stop=[stop, "never\x00there"])
    assert ended.finish_reason == "stop" and ended.text == text[:at]
    assert ended.token_ids == endless.token_ids[: len(ended.token_ids)]
    decode = tiny.tokenizer().decode
    assert stop in decode(ended.token_ids) and stop not in decode(ended.token_ids[:-1])


def test_a_special_token_as_stop_string_ends_the_response() -> None:
    one = engine(ends=[], stop=[tiny.TURN, "x"])
    assert tiny.TURN_ID in one.end_ids and one.stop == ("x",)


def test_the_token_that_closes_a_turn_in_the_template_ends_a_response(
    endless: Trajectory, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The checkpoint declares other end tokens; the template closes turns with an added token that is not special."""
    made, tokenizer = tiny.causal("llama"), tiny.tokenizer()
    ids = endless.token_ids
    at = next(i for i in range(3, STEPS) if ids[i] not in ids[:i])
    closing = tokenizer.convert_ids_to_tokens(ids[at])
    tokenizer.add_tokens([AddedToken(closing, special=False)])
    turns = "{% for m in messages %}{{ m['role'] + m['content'] + '" + closing + "' }}{% endfor %}"
    for template, end in ((turns, ids[at]), (tiny.TEMPLATE, None), (None, None)):
        tokenizer.chat_template = template
        lm = model.adapt(tiny.causal("llama"), tokenizer)
        assert lm.turn_end == end and (ids[at] in lm.eos_ids) == (end is not None)
        one = Engine(lm, 4, STEPS, ()).run([BASE])[0].trajectories[0]
        assert (one.token_ids, one.finish_reason) == ((ids[: at + 1], "stop") if end else (ids, "length"))
    tokenizer.chat_template = turns
    made.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "aisp"):
        assert model.load(Generator(model=str(tmp_path)), "cpu").turn_end == ids[at]
    assert f"ends an assistant's turn with {closing!r}" in caplog.text and len(caplog.records) == 1
    made.generation_config.eos_token_id = [tiny.EOS_ID, ids[at]]
    made.save_pretrained(tmp_path)
    caplog.clear()
    assert model.load(Generator(model=str(tmp_path)), "cpu").turn_end is None and not caplog.records


def test_the_text_goes_on_where_the_prompt_ends() -> None:
    """Prompt and text together are the text of all tokens, in a tokenizer whose first words lose their space; and a cut
    leaves no half of a character."""
    tokenizer = chat_models.tokenizer("sentencepiece", None)
    made = tiny.causal("llama", vocab_size=len(tokenizer))
    made.generation_config.eos_token_id = made.config.eos_token_id = tokenizer.eos_token = None
    prompt = tuple(tokenizer("the cat sat on")["input_ids"])
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    round = dataclasses.replace(BASE, iteration=0, stop=32, prompt_tokens=prompt, sampling=Sampling(decode=TopP(1, 1)))
    words = halves = 0
    for one in Engine(model.adapt(made, tokenizer), 32, 3).run([round])[0].trajectories:
        whole = tokenizer.decode([*prompt, *one.token_ids], skip_special_tokens=True)
        if tokenizer.convert_ids_to_tokens(one.token_ids[-1]).startswith("<0x"):
            halves += not one.text.endswith("\ufffd") and whole.endswith("\ufffd")
        else:
            assert whole == before + one.text
            words += one.text.startswith(" ")
    assert words and halves


@pytest.mark.parametrize("noise", [("independent", 0.0), ("ar1", 0.7), ("mixture", 0.5), ("shared", 0.0)])
def test_later_noise_never_changes_earlier_tokens(noise: tuple[str, float]) -> None:
    sampling = Sampling(0.5, *noise)
    round = Round(0, "p", PROMPT, 2, 0, 5, sampling, slow_path.trace(2, 5, 6))
    short, long = (engine(steps=steps).run([round])[0].trajectories for steps in (6, STEPS))
    assert [t.token_ids for t in short] == [t.token_ids[:6] for t in long]


def test_drawn_tokens_differ_between_samples_and_repeat() -> None:
    round = Round(0, "p", PROMPT, 0, 0, 8, Sampling(decode=TopP(0.95, 1.0)))
    one = engine().run([round])[0]
    assert len({t.token_ids for t in one.trajectories}) == 8
    assert engine().run([round])[0] == one
    cold = dataclasses.replace(round, sampling=Sampling(decode=TopP(0.95, 1e-6)))
    assert {t.token_ids for t in engine().run([cold])[0].trajectories} == {greedy().token_ids}


def test_what_cannot_be_decoded_is_refused() -> None:
    one = engine(max_position_embeddings=40)
    one.submit(dataclasses.replace(BASE, prompt_tokens=(5,) * (40 - STEPS + 1)))  # the last token is never read
    for change, message in (
        ({"prompt_tokens": ()}, "no tokens"),
        (
            {"prompt_tokens": (5,) * (40 - STEPS + 2)},
            "26 prompt tokens . 16 new tokens exceed the model's 40 positions",
        ),
        ({"prompt_tokens": (260,)}, "260 to 260 exceed the model's vocabulary of 260"),
        ({"stop": 0}, "start must be below stop"),
        ({"sampling": Sampling(0.5)}, "iteration -1"),
    ):
        with pytest.raises(ValueError, match=message):
            one.submit(dataclasses.replace(BASE, **change))
    with pytest.raises(RuntimeError, match="busy"):
        one.run([BASE])
    with pytest.raises(ValueError, match="nll"):
        one.nll(PROMPT, ())
