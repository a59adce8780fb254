"""The table of methods: every section answers the protocol, names what ran, and refuses the spelling of 0.1.0."""

from __future__ import annotations

import itertools
import re
from typing import get_args

import pytest
import yaml

from aisp_dist import config, methods
from aisp_dist.analysis import tune
from aisp_dist.config import as_published, load, outdated, recorded
from aisp_dist.records import Sampling

SECTIONS = get_args(get_args(config.Method)[0])
SIZE = {"num_samples": 4, "num_iterations": 2}
GIVEN = {
    "aisp": SIZE | {"lambda": 0.3},
    "batched_aisp": {"num_prompts": 2, "budget": 8, "lambda": 0.3},
    "re_control": {"value": "value"},
}
KINDS = [section.model_fields["kind"].default for section in SECTIONS]
PUBLISHED = {"sigma2": 0.5, "lambda": 0.3, "alpha": 0.9999, "noise": "independent"}


def checked(method: dict):
    values = {"output": "o", "generator": {"model": "demo"}, "rewards": {"r": {"kind": "model", "model": "demo"}}}
    return load.check(values | {"method": method}).method


def made(kind: str, **more):
    return checked({"kind": kind} | GIVEN.get(kind, {}) | more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_is_all_that_a_search_asks_for(kind):
    """A first round comes out of every method, and its samples are all that the section promises."""
    method = made(kind)
    sampling, rates = method.draws()
    assert isinstance(sampling, Sampling) and (rates.noise, rates.drawing).count(None) >= 1
    proposal = methods.bind(method, sampling).propose((), (1, 2), [])
    assert proposal.iteration == 0 and proposal.num_samples == method.num_samples
    assert proposal.sampling == sampling and proposal.trace == proposal.starts == ()
    assert method.num_samples * method.num_iterations >= 1 and (method.prompts_together or 1) >= 1
    assert tune.grid_points(method.grid(), 1, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_is_what_it_says_again(kind):
    method = made(kind)
    assert type(method).model_validate(method.model_dump(mode="json", by_alias=True)) == method


def test_names_tell_methods_and_their_controls_apart():
    found = [made(kind) for kind in KINDS] + [made("best_of_n", sampling={"gaussian": 0.5})]
    shuffled = [one.shuffled(True) for one in found if one.shuffled(True).is_shuffled]
    assert {one.kind for one in shuffled} == {"aisp", "batched_aisp", "population", "qalign"}
    assert all(one.shuffled(False) in found for one in shuffled)
    names = [one.name for one in found + shuffled]
    assert len(set(names)) == len(names) and sum("rewards shuffled" in name for name in names) == len(shuffled)


@pytest.mark.parametrize("kind", ["aisp", "batched_aisp"])
@pytest.mark.parametrize("values", itertools.product((0.1, 0.7), (0.3, 480), (0.99, 0.99999)), ids=str)
def test_aisp_as_published_has_numbers_of_the_papers_grids(kind, values):
    sigma2, lambda_, alpha = values
    assert as_published(made(kind, **PUBLISHED | {"sigma2": sigma2, "lambda": lambda_, "alpha": alpha}))


@pytest.mark.parametrize(
    "other",
    [
        {"sigma2": 0.2},
        {"sigma2": {"flip_rate": 0.1}},
        {"lambda": 0.2},
        {"lambda": {"ess": 0.1}},
        {"alpha": 0.9},
        {"alpha": 1.0},
        {"noise": "shared"},
        {"noise": {"ar1": 0.0}},
        {"after_eos": "marginal"},
        {"limit": {"nll": 0.3}},
        {"spend": {"plateau": 2}},
        {"shuffle_rewards": True},
    ],
    ids=str,
)
def test_aisp_with_anything_else_is_not_as_published(other):
    assert as_published(made("aisp", **PUBLISHED)) and not as_published(made("aisp", **PUBLISHED | other))


def test_no_other_method_is_aisp_as_published():
    assert [kind for kind in KINDS if as_published(made(kind))] == ["aisp", "batched_aisp"]


@pytest.mark.parametrize("missing", ["lambda", "num_samples", "num_iterations"])
def test_what_aisp_needs_is_asked_for_with_the_papers_values_and_those_of_0_1_0(missing):
    given = {key: value for key, value in (SIZE | {"lambda": 0.3}).items() if key != missing}
    with pytest.raises(ValueError, match=f"{missing}: missing, and kind: aisp has no default") as refused:
        config.Aisp.model_validate(given)
    for part in ("0.3 with UltraRM or 240 with Eurus", "num_samples: 32, num_iterations: 32", "{ess: 0.1}", "16", "8"):
        assert part in str(refused.value)


# Sections of 0.1.0, and the section of this version that draws the same samples; None where there is none.
OLD = [
    (
        {"kind": "aisp", "preset": "auto", "num_samples": 16, "num_iterations": 32},
        {"kind": "population", "num_samples": 16, "num_iterations": 32, "ess": 8.0, "sampling": {"flip_rate": 0.28}},
    ),
    (
        {"kind": "aisp", "preset": "auto"},
        {"kind": "population", "num_samples": 16, "num_iterations": 8, "ess": 8.0, "sampling": {"flip_rate": 0.28}},
    ),
    (
        {"kind": "aisp", "preset": "auto", "branch": {"ess": 4}, "decode": {"top_p": 0.8}, "limit": {"nll": 0.3}},
        {"kind": "population", "num_samples": 16, "num_iterations": 8, "ess": 4, "sampling": {"top_p": 0.8},
         "limit": {"nll": 0.3}},
    ),
    (
        {"kind": "aisp", "branch": {}, "sigma2": 0, "decode": {"top_p": 0.9}, "shuffle_rewards": True},
        {"kind": "population", "num_samples": 16, "num_iterations": 8, "ess": 8.0, "sampling": {"top_p": 0.9},
         "shuffle_rewards": True},
    ),
    (
        {"kind": "batched_aisp", "preset": "auto", "num_prompts": 4, "budget": 32},
        {"kind": "population", "num_samples": 8, "num_iterations": 4, "ess": 8.0, "sampling": {"flip_rate": 0.28}},
    ),
    (
        {"kind": "aisp", "preset": "paper", "decode": "greedy", "branch": None, "sigma2": 0.3, "num_samples": 4},
        {"kind": "aisp", "num_samples": 4, "num_iterations": 8, "sigma2": 0.3, "lambda": {"ess": 0.1}},
    ),
    ({"kind": "aisp", "branch": {"ess": 2}}, None),
    ({"kind": "aisp", "decode": {"top_p": 0.9}}, None),
    ({"kind": "aisp", "preset": "auto", "sigma2": {"flip_rate": 0.1}, "noise": "shared"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("old", "same"), OLD, ids=str)
def test_a_section_of_0_1_0_is_refused_with_one_to_paste(old, same):
    with pytest.raises(config.ConfigError, match="not a key of kind: (batched_)?aisp") as refused:
        checked(old)
    offered = [yaml.safe_load(text) for text in re.findall(r"{kind: .*?}(?= for the|$)", str(refused.value))]
    assert outdated.translated(old) == same
    assert offered == [same] if same else [section["kind"] for section in offered] == ["aisp", "population"]
    for section in offered:
        assert section.keys() >= {"kind", "num_samples", "num_iterations"} and checked(section)


@pytest.mark.parametrize(("old", "same"), OLD, ids=str)
def test_a_recorded_configuration_is_read_in_this_versions_form(old, same):
    whole = {"seed": 3, "method": old, "compare": {"prompts": 1}, "tune": {"grids": {"branch": [4.0]}}}
    now = recorded(whole)
    assert now == {"seed": 3, "method": same or old} and recorded(now) == now


@pytest.mark.parametrize(
    "method",
    [None, "aisp", {"preset": "auto", "kind": "beam"}, {"branch": 3, "sigma2": 0, "decode": {}}],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_left_as_it_is(method):
    assert recorded({"method": method})["method"] == method


def test_a_record_is_read_without_what_had_no_effect():
    http = {"kind": "http", "url": "http://h:1", "model": "m", "protocol": "classify", "scale": [0.0, 1.0]}
    rewards = {
        "main": {"kind": "model", "model": "demo", "weight": 2.0},
        "held": {"kind": "function", "function": "a.py:f", "use": "report", "weight": 2.0},
        "far": http | {"max_tokens": 9, "weight": 0.5},
    }
    method = {"kind": "best_of_n", "spend": {"target": 1.0, "plateau": None, "min_gain": 0.5}}
    whole = {"output": "o", "generator": {"model": "demo"}, "rewards": rewards, "method": method}
    with pytest.raises(
        config.ConfigError, match="held: weight is 2, .*far: scale is .*min_gain is 0.5 without plateau"
    ):
        load.check(whole)
    run = load.check(recorded(whole))
    assert {name: reward.weight for name, reward in run.rewards.items()} == {"main": 2.0, "held": 1.0, "far": 0.5}
    assert run.method.spend == config.Spend(target=1.0)
