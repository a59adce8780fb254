"""QAlign's laws, by the real search on a language whose 31 answers can all be listed, and its rows."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from itertools import product

import finished
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import chi2

from aisp_dist import config
from aisp_dist.align import align
from aisp_dist.methods import qalign
from aisp_dist.methods.weights import deviation
from aisp_dist.output.filesystem import Place
from aisp_dist.output.verify import verify
from aisp_dist.philox import UNIFORM, philox4x32, prompt_key, sample_word
from aisp_dist.records import Prompt, Rollout, Score, Trajectory

A, B, END, LONGEST = 0, 1, 2, 4
NEXT = {None: (0.5, 0.3, 0.2), A: (0.2, 0.3, 0.5), B: (0.6, 0.3, 0.1)}  # probability of A, B, END after a token
ANSWERS = [(*w, END) for n in range(LONGEST) for w in product((A, B), repeat=n)] + [*product((A, B), repeat=LONGEST)]
PROMPT = Prompt("p", 0, "p")
BETA = 1.5  # at which ten moves reach the target


def likelihood(answer, after=0):
    """Of the tokens from `after` on, given those before."""
    steps = zip((None, *answer), answer, strict=False)
    return math.prod(NEXT[last][token] for last, token in list(steps)[after:])


def reward(answer):
    return 0.7 * answer.count(B) - 0.4 * (answer[0] == A) + 0.3 * (len(answer) == 3)


class Language:
    """An align.Backend: draws by the table, with the engine's keys. rewards: of a list of answers."""

    def __init__(self, of=reward):
        self.of = of

    async def rollout(self, round):
        key, drawn = prompt_key(round.seed, round.prompt_id), []
        for i in range(round.start, round.stop):
            answer = list(round.starts[i]) if round.starts else []
            while len(answer) < LONGEST and END not in answer:
                word = sample_word(max(round.iteration, 0), i)
                u = philox4x32((0, len(answer), word, UNIFORM), key)[0] / 2**32
                table = NEXT[answer[-1] if answer else None]
                answer.append(int(np.searchsorted(np.cumsum(table)[:2], u, side="right")))
            text = "".join(map(str, answer))
            drawn.append(Trajectory(i, tuple(answer), text, "stop" if END in answer else "length"))
        return Rollout(tuple(drawn))

    async def score(self, name, prompt, responses):
        values = [self.of(tuple(map(int, text))) for text in responses]
        return [Score(v, None if v is not None else "none") for v in values]

    async def nll(self, prompt_id, prompt_tokens, responses):
        return [0.0 for _ in responses]


def search(of=reward, seed=0, prompt=PROMPT, **method):
    run = config.Run.model_validate(
        {
            "output": "unused",
            "seed": seed,
            "generator": {"model": "toy"},
            "rewards": {"r": {"kind": "function", "function": "toy:r"}},
            "method": {"kind": "qalign", "beta": BETA, "sampling": {"top_p": 1.0}, **method},
        }
    )
    return asyncio.run(align(run, prompt, (1,), Language(of)))


def moves(done):
    """(answer, proposal, whether it was accepted) of every move whose decision the trace shows."""
    n = len(done.trace[0].lengths)
    for k in range(1, len(done.trace) - 1):
        for chain, (old, new) in enumerate(zip(done.trace[k].parents, done.trace[k + 1].parents, strict=True)):
            proposal = k * n + chain
            assert new in (old, proposal)
            yield done.candidates[old], done.candidates[proposal], new == proposal


def states(done):
    """Each chain's answer before the last move."""
    return [done.candidates[place].token_ids for place in done.trace[-1].parents]


def target(beta, of=reward):
    weights = [likelihood(y) * math.exp(of(y) / beta) if of(y) is not None else 0.0 for y in ANSWERS]
    return np.array(weights) / sum(weights)


def p_value(drawn, expected):
    """Of a chi-square test of answers against their probabilities; rare ones are one bin."""
    count = Counter(drawn)
    seen, mean = np.array([count[y] for y in ANSWERS]), expected * len(drawn)
    assert seen[mean == 0].sum() == 0
    usual = mean >= 8
    bins = [usual & (np.arange(len(mean)) == j) for j in np.flatnonzero(usual)] + [~usual]
    seen, mean = (np.array([x[b].sum() for b in bins if mean[b].sum()]) for x in (seen, mean))
    return chi2.sf(((seen - mean) ** 2 / mean).sum(), len(seen) - 1)


def proposed(y):
    """Probability of proposing each answer from y, from the definition: the cut is even over 0 .. |y| - 1."""
    found = np.zeros(len(ANSWERS))
    for i, other in product(range(len(y)), range(len(ANSWERS))):
        if ANSWERS[other][:i] == y[:i]:
            found[other] += likelihood(ANSWERS[other], after=i) / len(y)
    return found


def transitions(beta):
    """The chain's matrix, from the definition and the code's ratio."""
    ratio = [[qalign.log_ratio(reward(z) - reward(y), beta, len(y), len(z)) for z in ANSWERS] for y in ANSWERS]
    moved = np.array([proposed(y) for y in ANSWERS]) * np.minimum(1.0, np.exp(ratio))
    return moved + np.diag(1 - moved.sum(1))


def test_detailed_balance_holds_between_any_two_answers():
    for beta in (0.4, 1.5, math.inf):
        flow = target(beta)[:, None] * transitions(beta)
        np.testing.assert_allclose(flow, flow.T, rtol=1e-11)


def test_the_search_moves_as_that_matrix_does():
    done, base = search(chains=1500, num_iterations=4, beta=0.5), target(math.inf)
    assert p_value([c.token_ids for c in done.candidates[:1500]], base) > 1e-3
    reached = [base @ np.linalg.matrix_power(transitions(0.5), moves) for moves in (1, 2, 3)]
    assert p_value(states(done), reached[1]) > 1e-3 > max(p_value(states(done), reached[i]) for i in (0, 2))


def test_chains_end_as_samples_of_the_target():
    done = search(chains=1500, num_iterations=12)
    assert p_value(states(done), target(BETA)) > 1e-3 > p_value(states(done), target(0.75 * BETA))


def test_what_has_no_reward_is_never_a_chains_answer_and_the_rest_is_the_target():
    def of(answer):
        return None if answer[:2] == (A, B) else reward(answer)

    done = search(of, chains=1500, num_iterations=10)
    assert p_value(states(done), target(BETA, of)) > 1e-3
    first = done.trace[1]
    unstarted = [chain for chain, place in enumerate(first.parents) if place < 0]
    assert unstarted == [c.sample for c in done.candidates[:1500] if c.token_ids[:2] == (A, B)]
    assert {first.given[chain] for chain in unstarted} == {0}


def test_a_hot_chain_accepts_up_to_the_ratio_of_lengths_and_a_cold_one_what_is_better():
    of_length = {True: [], False: []}
    for old, new, accepted in moves(search(chains=500, num_iterations=12, beta=1e9)):
        longer = len(new.token_ids) > len(old.token_ids)
        if not longer:
            assert accepted
        of_length[longer].append(accepted - min(1.0, len(old.token_ids) / len(new.token_ids)))
    assert abs(np.mean(of_length[True])) < 4 * np.std(of_length[True]) / math.sqrt(len(of_length[True]))
    for old, new, accepted in moves(search(chains=200, num_iterations=12, beta=1e-300)):
        if new.reward != old.reward:
            assert accepted == (new.reward > old.reward)


def test_equal_rewards_leave_the_base_models_distribution():
    for beta in (BETA, {"sd": 0.25}):
        done = search(lambda y: 7.0, chains=1000, num_iterations=5, beta=beta)
        assert p_value(states(done), target(math.inf)) > 1e-3
        assert done.best == done.candidates[0], "the earliest of equals is selected"


def test_a_chain_with_its_own_beta_does_not_depend_on_the_others():
    few, many = search(chains=3, num_iterations=9), search(chains=40, num_iterations=9)
    for k in range(9):
        assert few.candidates[3 * k : 3 * k + 3] == many.candidates[40 * k : 40 * k + 3]
    path = np.array([[len(y) for y in states(search(chains=2, num_iterations=5, seed=s))] for s in range(400)])
    assert abs(np.corrcoef(path.T)[0, 1]) < 4 / math.sqrt(400)


def test_draws_are_keyed_by_seed_and_prompt():
    usual = search(chains=8, num_iterations=4)
    assert usual == search(chains=8, num_iterations=4)
    other, prompt = (
        search(chains=8, num_iterations=4, seed=1),
        search(chains=8, num_iterations=4, prompt=Prompt("q", 0, "q")),
    )
    assert len({one.candidates for one in (usual, other, prompt)}) == 3


def test_beta_in_deviations_is_free_of_the_rewards_unit_and_is_that_of_all_rewards_so_far():
    few = {"chains": 6, "num_iterations": 10}
    mine = search(beta={"sd": 0.5}, **few)
    scaled = search(lambda y: 64 * reward(y) - 3, beta={"sd": 0.5}, **few)
    assert [step.parents for step in mine.trace] == [step.parents for step in scaled.trace]
    assert deviation([1.0, None, 3.0]) == 1 and deviation([None, 2.0]) == 0 == deviation([])
    many = search(beta={"sd": 0.5}, chains=200, num_iterations=6)
    for k in range(1, 6):
        beta = 0.5 * float(np.std([c.reward for c in many.candidates[: 200 * k]]))
        number = config.Qalign(chains=200, beta=beta)
        seen, key = many.candidates[: 200 * k], prompt_key(0, "p")
        assert qalign.positions(number, many.trace[:k], key, seen) == many.trace[k].parents


def test_every_sample_is_spent_and_the_best_of_all_is_selected():
    done = search(chains=5, num_iterations=7)
    assert done.samples_spent == 35 == config.Qalign(chains=5, num_iterations=7).num_samples * 7
    assert done.best.reward == max(c.reward for c in done.candidates)


def test_the_shuffled_control_learns_nothing():
    true, shuffled = (search(chains=500, num_iterations=12, beta=0.3, shuffle_rewards=s) for s in (False, True))
    gain = {d: np.mean([reward(y) for y in states(d)]) for d in (true, shuffled)}
    base = float(np.dot(target(math.inf), [reward(y) for y in ANSWERS]))
    assert gain[true] > base + 1 and abs(gain[shuffled] - base) < 0.2
    one = config.Qalign(chains=1)
    assert one.shuffled(True) == one, "among the chains of an iteration there is nothing to permute"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0.0}, "beta is 0; it must be above 0 .*, or {sd: 0.25}"),
        ({"beta": {"sd": 0.0}}, "greater than 0"),
        ({"chains": 1, "shuffle_rewards": True}, "chains is 1 with shuffle_rewards"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        config.Qalign.model_validate(settings)


def test_rows_begin_as_their_chains_answer_does_by_the_trace(tmp_path):
    method = {"kind": "qalign", "chains": 5, "num_iterations": 5, "sampling": {"top_p": 0.95, "temperature": 1.5}}
    method |= {"beta": {"sd": 1.0}, "limit": {"nll": 1.95}}
    output = finished.output(finished.project(tmp_path / "p", 3), "out", method)
    assert not verify(Place.at(output)).violations
    data, kept = (pq.read_table(output / table).to_pylist() for table in ("data", "candidates"))
    given = beyond = 0
    for row, of in zip(data, kept, strict=True):
        answers = of["candidates"]
        assert row["samples_spent"] == len(answers) == 25
        assert row["reward"] == max(c["reward"] for c in answers if c["within"])
        beyond += sum(not c["within"] for c in answers)
        for k, step in enumerate(of["trace"][1:], 1):
            for chain, (parent, length) in enumerate(zip(step["parents"], step["given"], strict=True)):
                mine = answers[5 * k + chain]["token_ids"]
                if parent < 0:
                    assert length == 0 and not any(answers[5 * j + chain]["within"] for j in range(k))
                    continue
                its = answers[parent]["token_ids"]
                assert parent % 5 == chain and parent < 5 * k and answers[parent]["within"]
                assert mine[:length] == its[:length] and length < len(its)
                given += length
    assert given > 50 and beyond > 5
