"""Population and the limit, as laws of the draw and of the rows that come out."""

from __future__ import annotations

import json
from collections import Counter

import finished
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from aisp_dist import config
from aisp_dist.analysis import outputs
from aisp_dist.analysis.evaluate import evaluated
from aisp_dist.analysis.metrics import diversity
from aisp_dist.methods import population
from aisp_dist.methods.limit import within
from aisp_dist.output.filesystem import Place
from aisp_dist.output.verify import verify
from aisp_dist.philox import prompt_key
from aisp_dist.records import Rates, Sampling, TopP
from jobs import evaluate

KEY = prompt_key(0, "p")
DRAWN = {"top_p": 0.95, "temperature": 1.5}  # the tiny model is far from certain, and this farther
POPULATION = {"kind": "population", "num_samples": 6, "num_iterations": 4, "sampling": DRAWN}
NOISE = {"kind": "aisp", "num_samples": 6, "num_iterations": 4, "lambda": {"ess": 0.2}, "sigma2": {"flip_rate": 0.2}}


def parents(rewards, lengths=None, ess=2.0, iteration=1, samples=2000, key=KEY):
    lengths = [10] * len(rewards) if lengths is None else lengths
    return population.parents(ess, key, iteration, samples, rewards, lengths)


def test_answers_are_continued_as_often_as_their_weight_says():
    drawn = Counter(parent for parent, _ in parents([0.0, 1.0, 2.0, 3.0], ess=2.0))
    shares = [drawn[j] / 2000 for j in range(4)]
    assert shares == sorted(shares)
    assert 1 / sum(share**2 for share in shares) == pytest.approx(2.0, rel=0.01)
    assert max(Counter(parent for parent, _ in parents([5.0] * 8)).values()) == 250  # equal ones evenly: stratified


def test_a_cut_is_anywhere_before_the_last_token_and_evenly():
    cuts = Counter(cut for _, cut in parents([1.0], lengths=[5], ess=1.0))
    assert sorted(cuts) == [0, 1, 2, 3, 4] and min(cuts.values()) > 300


def test_what_may_not_be_continued_never_is_and_with_nothing_all_begin_anew():
    assert {parent for parent, _ in parents([None, 1.0, None, 0.9, 0.95, 0.97], ess=3.0)} == {1, 3, 4, 5}
    assert parents([None, None], samples=3) == ((-1, 0),) * 3


def test_draws_are_keyed_and_free_of_the_rewards_unit():
    rewards = [0.3, -1.0, 2.5, 0.0]
    assert parents(rewards) == parents([100 * r - 7 for r in rewards])
    assert parents(rewards) != parents(rewards, iteration=2) != parents(rewards, key=prompt_key(1, "p"))


def test_of_few_answers_no_more_than_half_are_continued():
    drawn = Counter(parent for parent, _ in parents([0.0, 1.0, 2.0, 3.0], ess=8.0))
    assert 1 / sum((n / 2000) ** 2 for n in drawn.values()) == pytest.approx(2.0, rel=0.01)
    assert {parent for parent, _ in parents([0.0, 9.0], ess=8.0)} == {1}


def test_a_limit_is_on_likelihood_beside_the_base_answer_and_on_repetition():
    near, varied = config.Limit(nll=0.3), config.Limit(diversity=0.9)
    assert within(None, "a a a a a", 99.0, 0.0)
    assert within(near, "a", 1.3, 1.0) and not within(near, "a", 1.31, 1.0)
    assert within(varied, "a b c d e", 9.0, 0.0) and not within(varied, "a a a a a", 0.0, 0.0)


@pytest.mark.parametrize("kind", ["aisp", "population", "best_of_n", "best_of_n gaussian"])
@pytest.mark.parametrize(
    ("limit", "asked"),
    [(None, False), ({"diversity": 0.9}, False), ({"nll": 0.3}, True), ({"nll": 0, "diversity": 1}, True)],
)
def test_likelihoods_are_asked_for_where_a_limit_is_on_them_alone(kind, limit, asked):
    kind, _, gaussian = kind.partition(" ")
    settings = {"kind": kind, "num_samples": 2, "num_iterations": 2, "limit": limit}
    settings |= {"lambda": 0.3} if kind == "aisp" else {}
    settings |= {"sampling": {"gaussian": 0.5}} if gaussian else {}
    sampling, _ = TypeAdapter(config.Method).validate_python(settings).draws()
    assert sampling.likelihood is asked


def test_a_configuration_says_what_is_drawn_and_what_is_found_for_each_prompt():
    found, given = config.Population(), config.Population(sampling={"top_p": 0.9, "temperature": 0.7})
    assert found.draws() == (Sampling(), Rates(drawing=0.28))
    assert given.draws() == (Sampling(decode=TopP(0.9, 0.7)), Rates())
    for method in (found, given):
        assert config.Population.model_validate(method.model_dump(by_alias=True)) == method


def test_fresh_starts_are_a_share_of_an_iteration_and_none_by_default():
    assert config.Population().fresh == 0 == population.fresh(0.0, 8, [1.0, 1.0])
    assert [population.fresh(share, 8, [0.0, 1.0]) for share in (0.01, 0.25, 0.5, 1.0)] == [1, 2, 4, 8]


def test_fresh_starts_by_ties_are_all_until_a_reward_differs_and_few_once_many_do():
    def ties(rewards, n=12):
        return population.fresh("ties", n, rewards)

    assert ties([]) == ties([None]) == ties([0.0] * 9) == ties([None, 1.0, 1.0]) == 12
    assert ties([0.0] * 9 + [1.0]) == ties([0.0, 1.0] * 8) == 6
    assert ties([0.0, 0.5, 1.0] * 6) == 4
    assert ties([0.0, 0.9, 1.0] * 4) == 6, "within half a deviation of the best is as good as the best"
    many = [j / 10 for j in range(100)]
    assert 1 <= ties(many) <= 2
    for rewards in ([0.0, 1.0, 0.3, 0.9, 0.31], many):
        assert ties(rewards) == ties([64 * r - 7 for r in rewards]) == ties(rewards[::-1])


@pytest.mark.parametrize(("share", "anew"), [(1.0, 6), (0.5, 3), ("ties", None)])
def test_what_begins_anew_is_drawn_as_best_of_n_draws_it(tmp_path, share, anew):
    project = finished.project(tmp_path / "p", 2)
    _, mixed = rows(finished.output(project, "mixed", POPULATION | {"fresh": share}))
    _, plain = rows(finished.output(project, "plain", POPULATION | {"kind": "best_of_n"}))
    counts = set()
    for mine, its in zip(mixed, plain, strict=True):
        for k, step in enumerate(mine["trace"][1:], 1):
            new = [i for i, parent in enumerate(step["parents"]) if parent < 0]
            counts.add(len(new))
            assert new == list(range(6 - len(new), 6))
            for i in new:
                assert mine["candidates"][6 * k + i]["token_ids"] == its["candidates"][6 * k + i]["token_ids"]
    assert counts == {anew} if anew else min(counts) >= 1 and max(counts) < 6


def rows(output):
    return (pq.read_table(output / table).to_pylist() for table in ("data", "candidates"))


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_sample_begins_as_its_parent_does_by_the_trace(tmp_path, shuffled):
    project = finished.project(tmp_path / "p", 4)
    output = finished.output(project, "out", POPULATION | {"shuffle_rewards": shuffled})
    data, kept = rows(output)
    assert not verify(Place.at(output)).violations
    given = 0
    for row, of in zip(data, kept, strict=True):
        answers = of["candidates"]
        assert len(answers) == row["samples_spent"] == 24
        for step, done in enumerate(of["trace"]):
            assert (done["weights"], done["sigma2"], done["kl"]) == ([], 0, 0)
            for i, (parent, length) in enumerate(zip(done["parents"], done["given"], strict=True)):
                assert 0 <= parent < 6 * step
                mine, its = (answers[j]["token_ids"] for j in (6 * step + i, parent))
                assert mine[:length] == its[:length] and length < len(its)
                given += length
        assert of["trace"][0]["parents"] == []
    assert given > 50


@pytest.mark.parametrize(
    ("method", "name"), [(NOISE, "sigma2"), (POPULATION | {"sampling": {"flip_rate": 0.95}}, "top_p")]
)
def test_a_flip_rate_is_one_value_for_each_prompt(tmp_path, method, name):
    _, kept = rows(finished.output(finished.project(tmp_path / "p", 4), "out", method))
    values = [{step[name] for step in of["trace"]} for of in kept]
    assert all(len(found) == 1 and 0 not in found for found in values)
    assert len(set(map(tuple, values))) > 1, "every prompt has the same value"


def test_population_finds_more_than_best_of_n_and_its_shuffled_control_does_not(tmp_path):
    project = finished.project(tmp_path / "p", 12)
    size = {"num_samples": 8, "num_iterations": 8}
    methods = {
        "population": POPULATION | size,
        "shuffled": POPULATION | size | {"shuffle_rewards": True},
        "best-of-n": {"kind": "best_of_n", "sampling": DRAWN} | size,
    }
    found = {}
    for name, method in methods.items():
        data, _ = rows(finished.output(project, name, method, seed=1))
        found[name] = sum(row["reward"] for row in data) / 12
    assert found["population"] > max(found["best-of-n"], found["shuffled"]) + 0.1


@pytest.mark.parametrize(
    ("method", "nll"),
    [
        (POPULATION, 1.95),
        (POPULATION | {"shuffle_rewards": True}, 1.95),
        (NOISE | {"sigma2": {"flip_rate": 0.5}}, 0.05),
        ({"kind": "best_of_n", "num_samples": 24, "num_iterations": 1, "sampling": DRAWN}, 1.95),
    ],
)
def test_the_limit_rules_selection_and_what_is_learnt(tmp_path, method, nll):
    project = finished.project(tmp_path / "p", 4)
    free = finished.output(project, "free", method)
    data, kept = rows(finished.output(project, "near", method | {"limit": {"nll": nll, "diversity": 0.5}}))
    better = 0
    for row, of in zip(data, kept, strict=True):
        bound = row["base_nll"] + nll
        assert row["nll"] <= bound + 1e-4 and row["curve"][-1] == row["reward"]
        for one in of["candidates"]:
            assert one["within"] == (one["nll"] <= bound and diversity(one["text"]) >= 0.5)
            better += one["reward"] > row["reward"]
            assert not (one["within"] and one["reward"] > row["reward"])
        for k, step in enumerate(of["trace"]):
            assert all(of["candidates"][parent]["within"] for parent in step["parents"] if parent >= 0)
            drawn = of["candidates"][6 * k : 6 * (k + 1)]
            if step["weights"]:
                assert all((w > 0) <= c["within"] for w, c in zip(step["weights"], drawn, strict=True))
    assert better, "the limit cost no reward"
    data, kept = rows(free)
    assert all(one["within"] and one["nll"] is None for of in kept for one in of["candidates"])


def test_a_prompt_without_an_answer_within_the_limit_fails_with_the_fix(tmp_path):
    project = finished.project(tmp_path / "p", 2)
    wild = {"limit": {"diversity": 1.0, "nll": 0.0}, "sampling": {"top_p": 1.0, "temperature": 9.0}}
    output = finished.output(project, "out", POPULATION | wild)
    (table,) = [pq.read_table(output / "failed").to_pylist()]
    assert [row["reason"] for row in table] == ["none of 24 candidates is within method.limit; widen it"] * 2


def test_an_output_with_flip_rates_is_evaluated_as_what_each_prompt_was(tmp_path):
    """The KL estimate draws with the prompt's own sigma2, which its trace has."""
    project = finished.project(tmp_path / "p", 3)
    noisy = finished.output(project, "noisy", NOISE, save={"candidates": "all"})
    found = {"sampling": {"flip_rate": 0.5}}
    still = finished.output(project, "still", POPULATION | found, save={"candidates": "all"})
    for output in (noisy, still):
        assert evaluate.main([str(output), "--sample", "3"]) == 0
    found, without = (json.loads((output / "evaluation.json").read_text()) for output in (noisy, still))
    assert found["kl"]["exact"][0] > 0 and 0 < found["flips"][0]["rate"][0] < 1
    assert without["kl"] is None and without["flips"] is None
    assert "undefined for population" in without["omitted"]["kl"] and "no noise" in without["omitted"]["flips"]
    for output, name in ((noisy, "sigma2"), (still, "top_p")):
        opened = outputs.open_output(Place.at(output))
        for of in list(rows(output))[1]:
            sampling = evaluated.last_round(opened, {"id": of["id"], "trace": of["trace"]}, (1, 2)).sampling
            drawn = {"sigma2": sampling.sigma2, "top_p": sampling.decode and sampling.decode.p}
            assert drawn[name] == of["trace"][0][name]
