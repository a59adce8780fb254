"""What compare says of finished tables: equal prompts, paired differences, honest losses."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aisp_dist.analysis import arms, compare
from aisp_dist.analysis.arms import AISP, GAUSSIAN, RANDOM, SHUFFLED, TOP_P
from aisp_dist.config import Aisp, BestOfN, ConfigError, Gaussian, Nucleus, Run
from aisp_dist.output.filesystem import Place


def write(folder, rewards: dict[str, float], base=0.0, judge=1.0):
    rows = [
        {
            "id": id, "prompt": [{"role": "user", "content": f"ask {id}"}], "reward": reward, "base_reward": base,
            "completion": [{"role": "assistant", "content": f"a b c d {id}"}], "base_completion": "e f g h",
            "rewards": [{"name": "judge", "value": judge * reward}], "base_rewards": [{"name": "judge", "value": None}],
            "nll": 1.0, "base_nll": 0.5, "samples_spent": 32, "num_tokens": 9, "base_num_tokens": 4,
        }
        for id, reward in rewards.items()
    ]  # fmt: skip
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "part-000000.parquet")
    return Place.at(folder)


def test_paired_differences_are_over_the_prompts_that_every_arm_finished(tmp_path):
    outputs = {
        TOP_P: [write(tmp_path / "p", {"x": 1.0, "y": 2.0, "z": 9.0})],
        GAUSSIAN: [write(tmp_path / "g", {"x": 0.0, "y": 0.0, "z": 0.0})],
        AISP: [write(tmp_path / "a", {"x": 3.0, "y": 1.5})],
        SHUFFLED: [write(tmp_path / "s", {"x": 1.0, "y": 1.0, "z": 1.0})],
    }
    found = compare.compare(outputs, ["judge"])
    arms = {arm.name: arm for arm in found.arms}
    assert found.left_out == 1 and all(arm.prompts == 2 for arm in found.arms)
    assert arms[TOP_P].reward.mean == 1.5 and arms[TOP_P].versus.mean == pytest.approx((2.0 - 0.5) / 2)
    assert arms[AISP].versus == (0, 0, 0) and arms["base"].reward.mean == 0
    assert arms[AISP].held_out["judge"].mean == 2.25 and "judge" not in arms["base"].held_out
    assert found.loss["prompt"] == "ask y" and found.loss["best_of_n_reward"] == 2.0
    text = compare.text(found)
    assert "where aisp loses most" in text and "over 2 prompts; 1 that failed in some arm are left out" in text


def test_a_rescored_arm_has_the_likelihoods_that_it_knows(tmp_path):
    def rescored(name, *unknown):
        place = write(tmp_path / name, {"x": 1.0, "y": 2.0})
        file = tmp_path / name / "data/part-000000.parquet"
        rows = pq.read_table(file).to_pylist()
        pq.write_table(pa.Table.from_pylist([r | {"nll": None if r["id"] in unknown else 2.0} for r in rows]), file)
        return [place]

    found = compare.compare({AISP: rescored("a"), TOP_P: rescored("p", "x"), "none": rescored("n", "x", "y")}, [])
    arms = {arm.name: arm for arm in found.arms}
    assert arms[TOP_P].nll == (2, 2, 2) and arms[TOP_P].nll_versus == (0, 0, 0)
    assert arms["none"].nll is arms["none"].nll_versus is None and arms["base"].nll_versus == (1.5, 1.5, 1.5)
    assert "nan" not in compare.text(found)


def test_seeds_are_averaged_before_prompts(tmp_path):
    def two(name, a, b):
        return [write(tmp_path / f"{name}0", {"x": a, "y": a}), write(tmp_path / f"{name}1", {"x": b, "y": b})]

    outputs = {
        TOP_P: two("p", 0.0, 2.0),
        GAUSSIAN: two("g", 1.0, 1.0),
        AISP: two("a", 2.0, 4.0),
        SHUFFLED: two("s", 0.0, 0.0),
    }
    arms = {arm.name: arm for arm in compare.compare(outputs, []).arms}
    assert arms[AISP].reward == (3, 3, 3) and arms[TOP_P].versus == (2, 2, 2)
    assert compare.compare(outputs, []).loss is None


def test_prompts_that_fail_everywhere_are_counted_and_more_rows_than_asked_are_not(tmp_path):
    def place(name, rewards):
        found = write(tmp_path / name, rewards)
        data = tmp_path / name / "data" / "part-000000.parquet"
        rows = pq.read_table(data).to_pylist()
        pq.write_table(pa.Table.from_pylist([r | {"source_index": i} for i, r in enumerate(rows)]), data)
        (tmp_path / name / "failed").mkdir()
        pq.write_table(
            pa.table({"id": ["bad"], "source_index": [1]}), tmp_path / name / "failed" / "part-000000.parquet"
        )
        return found

    outputs = {AISP: [place("a", {"x": 1.0, "y": 2.0, "z": 9.0})], TOP_P: [place("p", {"x": 0.0, "y": 0.0, "z": 0.0})]}
    found = compare.compare(outputs, [], limit=2)
    assert found.left_out == 1 and [arm.prompts for arm in found.arms] == [2, 2, 2]
    assert {arm.name: arm for arm in found.arms}[AISP].reward.mean == 1.5
    assert "over 2 prompts; 1 that failed in some arm are left out" in compare.text(found)


def test_a_base_answer_without_any_reward_ends_nothing(tmp_path):
    outputs = {
        AISP: [write(tmp_path / "a", {"x": 1.0}, base=None)],
        TOP_P: [write(tmp_path / "p", {"x": 2.0}, base=None)],
    }
    found = compare.compare(outputs, [])
    assert found.arms[0].reward is None and found.arms[0].won is None and found.arms[1].reward.mean in (1.0, 2.0)
    assert "base: over the 0 of them with a reward" in compare.text(found)


def run(method) -> Run:
    rewards = {"r": {"kind": "function", "function": "a.py:b"}}
    return Run.model_validate({"output": "o", "generator": {"model": "m"}, "rewards": rewards, "method": method})


@pytest.mark.parametrize(
    "method",
    [
        {"kind": "aisp", "num_samples": 4, "num_iterations": 3, "sigma2": 0.7},
        {"kind": "best_of_n", "num_samples": 4, "num_iterations": 3, "sampling": {"top_p": 0.8}},
        {"kind": "best_of_n", "num_samples": 4, "num_iterations": 3, "sampling": {"gaussian": 0.2}},
    ],
)
def test_all_arms_have_the_same_samples_and_keep_what_the_configuration_says(method):
    found = arms.arms(run(method))
    assert {(m.num_samples, m.num_iterations) for name, m in found.items() if name != RANDOM} == {(4, 3)}
    assert isinstance(found[AISP], Aisp) and not found[AISP].shuffle_rewards and found[SHUFFLED].shuffle_rewards
    assert isinstance(found[TOP_P], BestOfN) and isinstance(found[TOP_P].sampling_, Nucleus)
    assert isinstance(found[GAUSSIAN].sampling_, Gaussian)
    assert found[RANDOM] == found[TOP_P].model_copy(update={"num_samples": 1, "num_iterations": 1})
    assert run(method).method in found.values()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (
            {"base": {"kind": "best_of_n", "num_samples": 1, "num_iterations": 1}},
            "'base' is what the greedy answers are",
        ),
        (
            {"b": {"kind": "best_of_n", "num_samples": 4, "num_iterations": 3, "spend": {"plateau": 1}}},
            "`spend` differs",
        ),
    ],
)
def test_arms_that_would_mislead_are_refused(named, said):
    own = run({"kind": "aisp", "num_samples": 4, "num_iterations": 3})
    made = own.model_copy(
        update={
            "compare": own.compare.model_validate({"arms": {n: {"kind": "best_of_n", **m} for n, m in named.items()}})
        }
    )
    with pytest.raises(ConfigError, match=said):
        arms.arms(made)


def test_a_prompt_that_stopped_early_keeps_its_best_in_the_area(tmp_path):
    place = write(tmp_path / "a", {"x": 1.0})
    data = tmp_path / "a" / "data" / "part-000000.parquet"
    pq.write_table(pa.Table.from_pylist([r | {"curve": [0.0, 4.0]} for r in pq.read_table(data).to_pylist()]), data)
    method = Aisp(num_samples=2, num_iterations=4, spend={"plateau": 1})
    arm = compare.compare({AISP: [place]}, [], AISP, {AISP: method}).arms[1]
    assert arm.auc == pytest.approx((0 + 4 + 4 + 4) / 4)
