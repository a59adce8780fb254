"""`preset: auto`: branching and the limit, as laws of the draw and of the rows that come out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import finished
import pyarrow.parquet as pq
import pytest

from aisp_dist import config
from aisp_dist.analysis import outputs
from aisp_dist.analysis.evaluate import trials
from aisp_dist.analysis.metrics import diversity
from aisp_dist.config import load
from aisp_dist.methods import branch
from aisp_dist.methods.limit import within
from aisp_dist.output.filesystem import Place
from aisp_dist.output.manifest import read_run
from aisp_dist.output.verify import verify
from aisp_dist.philox import prompt_key
from aisp_dist.records import Rates
from jobs import evaluate

KEY = prompt_key(0, "p")
DRAWN = {"top_p": 0.95, "temperature": 1.5}  # the tiny model is far from certain, and this farther
NEAR = {"nll": 1.95, "diversity": 0.5}
AUTO = {
    "kind": "aisp",
    "preset": "auto",
    "sigma2": {"flip_rate": 0.2},
    "noise": "shared",
    "num_samples": 6,
    "num_iterations": 4,
    "decode": DRAWN,
}


def parents(rewards, lengths=None, ess=2.0, iteration=1, samples=2000, key=KEY):
    lengths = [10] * len(rewards) if lengths is None else lengths
    return branch.parents(config.Branch(ess=ess), key, iteration, samples, rewards, lengths)


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


def test_auto_fills_what_is_not_given_and_paper_what_the_paper_says():
    auto = config.Aisp.model_validate({"preset": "auto"})
    assert auto.branch and auto.sigma2 == 0 and config.Aisp().branch is None
    assert auto.rates() == Rates(drawing=config.AUTO["decode"]["flip_rate"])
    own = config.Aisp.model_validate({"preset": "auto", "lambda": 0.7, "branch": None, "sigma2": 0.1})
    assert (own.lambda_, own.branch, own.sigma2, own.decode) == (0.7, None, 0.1, auto.decode)
    assert config.Aisp.model_validate(own.model_dump(by_alias=True)) == own


def rows(output):
    return (pq.read_table(output / table).to_pylist() for table in ("data", "candidates"))


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_sample_begins_as_its_parent_does_by_the_trace(tmp_path, shuffled):
    project = finished.project(tmp_path / "p", 4)
    method = AUTO | {"shuffle_rewards": shuffled}
    output = finished.output(project, "out", method)
    data, kept = rows(output)
    assert not verify(Place.at(output)).violations
    given, variances = 0, set()
    for row, of in zip(data, kept, strict=True):
        answers = of["candidates"]
        assert len(answers) == row["samples_spent"] == 24
        (sigma2,) = {step["sigma2"] for step in of["trace"]}
        variances.add(sigma2)
        for step, done in enumerate(of["trace"]):
            assert sum(done["weights"]) == pytest.approx(1)
            for i, (parent, length) in enumerate(zip(done["parents"], done["given"], strict=True)):
                assert 0 <= parent < 6 * step
                mine, its = (answers[j]["token_ids"] for j in (6 * step + i, parent))
                assert mine[:length] == its[:length] and length < len(its)
                given += length
        assert of["trace"][0]["parents"] == []
    assert given > 50 and len(variances) > 1 and 0 not in variances  # each prompt has its own


def test_branching_finds_more_than_drawing_anew_and_the_shuffled_control_does_not(tmp_path):
    project = finished.project(tmp_path / "p", 12)
    size = {"num_samples": 8, "num_iterations": 8}
    branching = AUTO | size | {"sigma2": 0.0}
    anew = {"kind": "best_of_n", "sampling": DRAWN} | size
    methods = {"auto": branching, "shuffled": branching | {"shuffle_rewards": True}, "best of n": anew}
    found = {}
    for name, method in methods.items():
        data, _ = rows(finished.output(project, name.replace(" ", "-"), method, seed=1))
        found[name] = sum(row["reward"] for row in data) / 12
    assert found["auto"] > max(found["best of n"], found["shuffled"]) + 0.1


@pytest.mark.parametrize(
    "method",
    [
        AUTO | {"sigma2": 0.0},
        AUTO,
        AUTO | {"shuffle_rewards": True},
        {"kind": "best_of_n", "num_samples": 24, "num_iterations": 1, "sampling": DRAWN},
    ],
)
def test_the_limit_rules_selection_and_what_is_continued(tmp_path, method):
    project = finished.project(tmp_path / "p", 4)
    free = finished.output(project, "free", method)
    data, kept = rows(finished.output(project, "near", method | {"limit": NEAR}))
    better = 0
    for row, of in zip(data, kept, strict=True):
        bound = row["base_nll"] + NEAR["nll"]
        assert row["nll"] <= bound + 1e-4 and row["curve"][-1] == row["reward"]
        for one in of["candidates"]:
            assert one["within"] == (one["nll"] <= bound and diversity(one["text"]) >= NEAR["diversity"])
            better += one["reward"] > row["reward"]
            assert not (one["within"] and one["reward"] > row["reward"])
        for k, step in enumerate(of["trace"]):
            assert all(of["candidates"][parent]["within"] for parent in step["parents"] if parent >= 0)
            drawn = of["candidates"][6 * k : 6 * (k + 1)]
            if step["weights"] and not method.get("shuffle_rewards"):
                assert all((w > 0) <= c["within"] for w, c in zip(step["weights"], drawn, strict=True))
    assert better  # it has cost something
    data, kept = rows(free)
    assert all(one["within"] and one["nll"] is None for of in kept for one in of["candidates"])


def test_a_prompt_without_an_answer_within_the_limit_fails_with_the_fix(tmp_path):
    project = finished.project(tmp_path / "p", 2)
    output = finished.output(
        project, "out", AUTO | {"limit": {"diversity": 1.0, "nll": 0.0}, "decode": {"top_p": 1.0, "temperature": 9.0}}
    )
    (table,) = [pq.read_table(output / "failed").to_pylist()]
    assert [row["reason"] for row in table] == ["none of 24 candidates is within method.limit; widen it"] * 2


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"sigma2": 0}, "sigma2 is 0 without branch"),
        ({"branch": {}, "sigma2": 0}, "greedy decoding without noise would do as before"),
        ({"limit": {}}, "nothing is limited"),
        ({"preset": "best"}, "'best'"),
        ({"sigma2": {"flip_rate": 1.5}}, "flip_rate"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, said):
    values = {"output": "o", "generator": {"model": "demo"}, "rewards": {"r": {"kind": "model", "model": "demo"}}}
    with pytest.raises(config.ConfigError, match=said):
        load.check(values | {"method": {"kind": "aisp"} | method})


def test_the_resolved_configuration_says_what_auto_was(tmp_path):
    output = finished.output(finished.project(tmp_path / "p", 1), "out", AUTO)
    method = read_run(Place.at(output))["config"]["method"]
    assert method["preset"] == "auto" and method["branch"] == {"ess": config.AUTO["branch"]["ess"]}


def test_an_output_of_auto_is_evaluated_as_what_each_prompt_was(tmp_path):
    """The draws of the KL estimate are of the prompt's own top_p and sigma2, which its trace has."""
    project = finished.project(tmp_path / "p", 3)
    rates = {"decode": {"flip_rate": 0.5}, "sigma2": {"flip_rate": 0.2}}
    noisy = finished.output(project, "noisy", AUTO | rates, save={"candidates": "all"})
    still = finished.output(project, "still", AUTO | rates | {"sigma2": 0.0}, save={"candidates": "all"})
    for output in (noisy, still):
        assert evaluate.main([str(output), "--sample", "3"]) == 0
    found, without = (json.loads((output / "evaluation.json").read_text()) for output in (noisy, still))
    assert found["kl"]["exact"][0] > 0 and 0 < found["flips"][0]["rate"][0] < 1
    assert without["kl"] is None and "sigma2: 0" in without["omitted"]["kl"] and without["flips"] is None
    opened = outputs.open_output(Place.at(noisy))
    for row in opened_rows(opened):
        sampling = trials.last_round(opened, row, (1, 2)).sampling
        assert (sampling.sigma2, sampling.decode.p) == (row["trace"][0]["sigma2"], row["trace"][0]["top_p"])


def opened_rows(opened):
    _, kept = rows(Path(str(opened.place)))
    return [{"id": of["id"], "trace": of["trace"]} for of in kept]
